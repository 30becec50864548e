"""A plan in words, as JSON, as a plot, and as files to submit: DeepSpeed JSON, run YAML, batch script."""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megavit.model.config import model_preset
from megavit.scale.program import program
from megavit.scale.search import FRAGMENTATION, RUNTIME_GIB, Plan, reason
from megavit.scale.storage import checkpoint_cost
from megavit.tasks.config import ClassifyConfig
from megavit.train.config import LAUNCH_FIELDS, RunConfig, flat_config, plain_config

_GIB = 2**30
# The parts of a step, as people read them.
_PART_NAMES = {
    "matmuls": "matmuls",
    "attention": "attention",
    "elementwise": "norms, GELU and sums, bound by memory",
    "recomputation": "recomputation of activations",
    "waiting_for_launches": "waiting for kernels to be launched",
    "tensor_parallel": "TP all-reduces that compute does not hide",
    "sharding": "ZeRO communication that compute does not hide",
    "update": "the optimizer's update",
    "host_copies": "copies between GPU and host memory",
    "data": "waiting for decoded images",
}
_PLOT_GPUS = [8 * 2**n for n in range(10)]  # 8 to 4096


def table(plans: list[Plan], rows: int) -> str:
    """The best plans as a Markdown table, one a line, with the reason why each but the first loses."""
    lines = [
        "| ZeRO stage, TP size, recomputation, offload | micro-batch x accumulation steps | peak GiB per GPU "
        "| s per step | images/s | MFU | against the best |",
        "|---|---|---|---|---|---|---|",
    ]
    for plan in plans[:rows]:
        layout = plan.layout
        lines.append(
            f"| {plan.name} | {layout.micro_batch} x {layout.grad_accum} | {plan.needed_gib:.1f} "
            f"| {plan.step.total:.2f} | {_rate(plan)} | {_mfu(plan)} "
            f"| {reason(plan, plans[0])} |"
        )
    if len(plans) > rows:
        lines.append(f"\nThere are {len(plans) - rows} more; --rows {len(plans)} shows all.")
    return "\n".join(lines)


def trained(run: RunConfig) -> str:
    """How many of the parameters are trained, and what is frozen; empty if nothing is."""
    if not run.freeze:
        return ""
    tree = program(run.model, 1, run.freeze, run.task).tree
    mine, whole = tree.trained_part().numel(), tree.numel()
    return f"trains {mine:,} of {whole:,} parameters ({mine / whole:.2%}); frozen: {run.freeze}\n"


def details(plan: Plan, run: RunConfig) -> str:
    """Memory and time of one plan, item by item, and what the whole recipe costs."""
    memory, gpu = plan.memory, plan.cluster.gpu
    lines = [
        f"The best plan, {plan.name}, takes at most {plan.needed_gib:.1f} of a GPU's {gpu.memory_gib:g} GiB:",
        *_sizes("persistent, there during the whole run:", memory.persistent),
        *_sizes(f"transient, on top of it when a step needs most ({memory.peak_moment}):", memory.transient),
        f"  and {RUNTIME_GIB:g} GiB for CUDA, NCCL and cuBLAS, and {FRAGMENTATION - 1:.0%} for fragmentation",
    ]
    if memory.host:
        lines.append(f"It takes {plan.needed_host_gib:.0f} GiB of a node's host memory:")
        lines += _sizes("offloaded by each rank:", memory.host)
    lines.append(f"An optimizer step takes {plan.step.total:.3f} s:")
    for name, seconds in plan.step.parts().items():
        if seconds:
            share = seconds / plan.step.total
            lines.append(f"  {_PART_NAMES[name]:<46}{seconds:8.3f} s {share:7.1%}")
    cost = checkpoint_cost(run, plan.layout)
    bandwidth = plan.cluster.filesystem_gb_per_s
    whole = (
        f"{run.max_steps:,} steps of {plan.layout.global_batch:,} images: "
        f"{plan.days(run.max_steps):.1f} days, {plan.gpu_hours(run.max_steps):,.0f} GPU-hours"
        if run.max_steps
        else f"steps of {plan.layout.global_batch:,} images (days and GPU-hours need --max_steps, or "
        f"--epochs and --dataset_size, or a recipe)"
    )
    lines += [
        f"{whole}, {_rate(plan)} images/s" + ("" if plan.mfu is None else f", MFU {plan.mfu:.1%}"),
        f"a checkpoint: {cost.total_bytes / 1e9:.1f} GB in {cost.files} files of at most "
        f"{cost.most_bytes / 1e9:.2f} GB and a manifest of {cost.manifest_bytes / 1e6:.1f} MB; at "
        f"{bandwidth:g} GB/s {cost.save_s(bandwidth):.0f} s to save (in the background), "
        f"{cost.load_s(bandwidth):.0f} s to verify and load",
    ]
    return "\n".join(lines)


def _rate(plan: Plan) -> str:
    rate = plan.images_per_s
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _mfu(plan: Plan) -> str:
    return "" if plan.mfu is None else f"{plan.mfu:.1%}"


def _sizes(title: str, items: dict[str, int]) -> list[str]:
    return [f"  {title}", *(f"    {name:<44}{size / _GIB:8.2f} GiB" for name, size in items.items())]


def as_json(plans: list[Plan], run: RunConfig, advice: list[str]) -> dict[str, Any]:
    """All that the table says, and every plan's items, in bytes and seconds."""
    tree = program(run.model, 1, run.freeze, run.task).tree
    return {
        "model": asdict(run.model),
        "freeze": run.freeze,
        "parameters": {"all": tree.numel(), "trained": tree.trained_part().numel()},
        "cluster": asdict(plans[0].cluster),
        "advice": advice,
        "checkpoint": asdict(checkpoint_cost(run, plans[0].layout)),
        "plans": [_plan_as_json(plan, run, plans[0]) for plan in plans],
    }


def _plan_as_json(plan: Plan, run: RunConfig, best: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "fits": plan.fits,
        "reason": reason(plan, best),
        "recompute": plan.recompute,
        "layout": asdict(plan.layout),
        "zero": asdict(plan.zero),
        "memory_bytes": asdict(plan.memory),
        "peak_bytes": plan.memory.peak_bytes,
        "needed_gib": plan.needed_gib,
        "step_s": plan.step.parts() | {"total": plan.step.total},
        "images_per_s": plan.images_per_s,
        "mfu": plan.mfu,
        "days": plan.days(run.max_steps) if run.max_steps else None,
        "gpu_hours": plan.gpu_hours(run.max_steps) if run.max_steps else None,
    }


def planned_run(run: RunConfig, plan: Plan) -> dict[str, Any]:
    """The run configuration that the plan decides on, as `--config` reads it: what differs from the defaults
    and from the architecture's preset."""
    chosen = plain_config(run) | {"recompute": plan.recompute, "tensor_parallel_size": plan.layout.tp_size}
    usual = flat_config(plain_config(RunConfig(model=model_preset(run.model.name))))
    kept: dict[str, Any] = {"model": {"name": run.model.name}}
    for key, value in flat_config(chosen).items():
        decided = key in ("recompute", "tensor_parallel_size")
        own = key.startswith("task.") and run.task.name != ClassifyConfig.name
        if decided or own or (usual.get(key) != value and key not in LAUNCH_FIELDS):
            folder = kept
            *path, name = key.split(".")
            for part in path:
                folder = folder.setdefault(part, {})
            folder[name] = value
    return kept


def planned_ds_config(base: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The DeepSpeed JSON of the plan: optimizer, clipping and the like from `base`, batch and ZeRO from the
    plan."""
    config = copy.deepcopy(base)
    config["train_batch_size"] = plan.layout.global_batch
    config["train_micro_batch_size_per_gpu"] = plan.layout.micro_batch
    config["communication_data_type"] = "fp32" if plan.zero.reduces_in_fp32 else "bf16"
    if plan.zero.accumulates_in_fp32:
        config["data_types"] = config.get("data_types", {}) | {"grad_accum_dtype": "fp32"}
    zero = plan.zero
    section: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": zero.reduce_bucket,
    }
    if zero.stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": zero.gathers.prefetch,
            "stage3_param_persistence_threshold": zero.gathers.persistence,
            "stage3_max_live_parameters": zero.gathers.max_live,
            "stage3_max_reuse_distance": zero.gathers.max_reuse,
            "sub_group_size": zero.sub_group,
        }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        config["optimizer"]["params"].pop("torch_adam", None)
    if zero.offload_param:
        section["offload_param"] = {"device": "cpu", "pin_memory": True}
    config["zero_optimization"] = section
    return config


def write_files(folder: Path, run: RunConfig, base: dict[str, Any], plan: Plan, root: Path) -> list[Path]:
    """Write ds_config.json, run.yaml and train.sbatch, ready to submit from the checkout's root `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, yaml_path, script = (folder / name for name in ("ds_config.json", "run.yaml", "train.sbatch"))
    json_path.write_text(json.dumps(planned_ds_config(base, plan), indent=2) + "\n")
    yaml_path.write_text(yaml.safe_dump(planned_run(run, plan), sort_keys=False))
    script.write_text(_batch_script(folder, run, plan, root))
    script.chmod(0o755)
    return [json_path, yaml_path, script]


def _batch_script(folder: Path, run: RunConfig, plan: Plan, root: Path) -> str:
    cluster = plan.cluster
    inside = folder.resolve().is_relative_to(root)
    place = shlex.quote(str(folder.resolve().relative_to(root) if inside else folder.resolve()))
    run_dir = shlex.quote(run.run_dir or f"runs/{folder.name}")
    frozen = f"\n# Frozen: {run.freeze}." if run.freeze else ""
    gpus = "" if cluster.gpu.name == "cpu" else f"#SBATCH --gpus-per-node={cluster.gpus_per_node}\n"
    return f"""#!/bin/bash
# {run.model.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}: {plan.name}, micro-batch \
{plan.layout.micro_batch}, written by launch/plan.py.{frozen}
# From the checkout's root; flags given there come later and win:
#   sbatch {place}/train.sbatch --data.shards data/train.manifest.json
#SBATCH --job-name={run.model.name}
#SBATCH --nodes={cluster.nodes}
#SBATCH --ntasks-per-node={cluster.gpus_per_node}
{gpus}#SBATCH --cpus-per-task={cluster.cores_per_gpu}
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@900

# What runs is SLURM's copy of this file, so the other one is found from the checkout.
script=launch/slurm/train.sbatch
[ -e "$script" ] || cd "${{SLURM_SUBMIT_DIR:-.}}" || exit 2
[ -e "$script" ] || {{ echo "no $script in $PWD; submit from the checkout's root" >&2; exit 2; }}

set -- --deepspeed_config {place}/ds_config.json --config {place}/run.yaml --run_dir {run_dir} "$@"
# shellcheck source=launch/slurm/train.sbatch
. "$script"
"""


def plot_gpus(gpus_per_node: int) -> list[int]:
    """The numbers of GPUs that a plot shows: 8 to 4096, in whole nodes."""
    return [count for count in _PLOT_GPUS if count % gpus_per_node == 0 or count < gpus_per_node]


def plot(path: Path, gpus: list[int], plans: list[Plan | None], title: str) -> None:
    """PNG: memory by item, and time by part relative to ideal scaling, of the best plan at each number of
    GPUs. ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'megavit[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(count, plan) for count, plan in zip(gpus, plans, strict=True) if plan]
    if not shown:
        raise ValueError("nothing to plot: the job fits at no number of GPUs")
    labels = [f"{count}\ntp {plan.layout.tp_size}\nb {plan.layout.micro_batch}" for count, plan in shown]
    figure, axes = plt.subplots(1, 2, figsize=(14, 7))
    memory = [{**plan.memory.persistent, **plan.memory.transient} for _, plan in shown]
    _bars(axes[0], labels, [{k: v / _GIB for k, v in items.items()} for items in memory])
    axes[0].axhline(shown[0][1].cluster.gpu.memory_gib, color="black", linestyle="--")
    axes[0].set(
        title="memory at the peak of a step", ylabel="GiB per GPU", xlabel="GPUs, TP size, micro-batch"
    )
    seconds = [{k: v * count for k, v in plan.step.parts().items()} for count, plan in shown]
    _bars(axes[1], labels, seconds)
    axes[1].set(title="a step: equal bars would be ideal scaling", ylabel="GPU-seconds", xlabel="GPUs")
    for place, (_, plan) in enumerate(shown):
        if plan.mfu is not None:
            axes[1].annotate(
                f"{plan.mfu:.0%}", (place, sum(seconds[place].values())), ha="center", va="bottom", fontsize=8
            )
    figure.suptitle(title if shown[0][1].mfu is None else f"{title}; MFU above the bars")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, labels: list[str], columns: list[dict[str, float]]) -> None:
    from matplotlib import colormaps

    names = list(dict.fromkeys(name for column in columns for name in column))
    colors: Any = colormaps["tab20"]
    bottoms = [0.0] * len(columns)
    for number, name in enumerate(names):
        heights = [column.get(name, 0.0) for column in columns]
        if any(heights):
            axes.bar(labels, heights, bottom=bottoms, label=_PART_NAMES.get(name, name), color=colors(number))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=4)


def scaling_table(gpus: list[int], plans: list[Plan | None]) -> str:
    """Efficiency against the smallest number of GPUs that fits, and what the loss goes to."""
    lines = [
        "| GPUs | plan | s per step | MFU | efficiency of scaling | largest loss |",
        "|---|---|---|---|---|---|",
    ]
    first: tuple[int, Plan] | None = None
    for count, plan in zip(gpus, plans, strict=True):
        if plan is None:
            lines.append(f"| {count} | does not fit, or does not divide the batch | | | | |")
            continue
        first = first or (count, plan)
        ideal = first[1].step.total * first[0] / count
        before = {name: value * first[0] / count for name, value in first[1].step.parts().items()}
        parts = plan.step.parts()
        part = max(parts, key=lambda name: parts[name] - before[name])
        lost = f"{_PART_NAMES[part]} +{(parts[part] - before[part]) / plan.step.total:.1%}"
        lines.append(
            f"| {count} | {plan.name}, micro-batch {plan.layout.micro_batch} | {plan.step.total:.2f} "
            f"| {_mfu(plan)} | {ideal / plan.step.total:.1%} "
            f"| {lost if parts[part] > before[part] + 1e-9 else ''} |"
        )
    return "\n".join(lines)
