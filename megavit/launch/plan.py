"""Plan a run before the nodes are rented: `python launch/plan.py --config launch/recipes/vit_22b_jft.yaml
--nodes 16 --gpus_per_node 8 --gpu h100` finds the best layout, predicts its memory and time, and writes the
files to submit; `--rehearse` runs one true rank of it here. See --help and megavit/scale/README.md.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavit.cli import PROJECT_ROOT, make_parser, parse
from megavit.fields import check_types
from megavit.gpus import GPUS, gpu_named
from megavit.scale.choices import Only, require_choice
from megavit.scale.cluster import Cluster
from megavit.scale.rates import rates_for
from megavit.train.config import with_max_steps
from megavit.train.ds_config import load_ds_config

if TYPE_CHECKING:
    from megavit.scale.search import Plan
    from megavit.train.config import RunConfig

_BASE = "ds_configs/zero3_vit22b.json"
_NEEDS = {
    "model.name": "what to plan for, e.g. vit_l16; or a recipe that names it, "
    "--config launch/recipes/vit_22b_jft.yaml"
}


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The cluster, and what to do with the plan.

    Args:
        nodes: number of nodes.
        gpus_per_node: GPUs of a node.
        gpu: kind of GPU, one of the list above; any other is described as NAME:GiB:TFLOPs:GBps[:linkGBps],
            which are its memory, its dense bf16 rate, its memory bandwidth, and its bandwidth to another GPU
            of the node (32, PCIe 4, if left out), e.g. mine:96:400:1800:64.
        global_batch: images of an optimizer step, over all GPUs; 0 takes the DeepSpeed JSON's.
        dataset_size: images of the training set; with --epochs it gives the number of steps, and with it
            days and GPU-hours.
        network_gb_per_s: network bandwidth of a node, in one direction, in GB/s (8 x 400 Gbit/s are 400).
        filesystem_gb_per_s: bandwidth of the shared file system, for all ranks together, in GB/s; it decides
            how long a checkpoint takes.
        host_gib: host memory of a node, in GiB; offloading may use 90% of it.
        cores_per_gpu: CPU cores that decode images for one GPU.
        rates: file of rates measured on such a GPU, as launch/bench.py gpu --stage rates writes; without it
            the file that comes with megavit for this kind of GPU, if there is one, else assumed rates.
        only: consider only these choices, e.g. tp=8,stage=3,recompute=selective,offload=none,micro_batch=8.
            stage is ZeRO's (2 or 3), recompute is none, selective or full, offload is none, optimizer (master
            weights and Adam's states wait in host memory) or params (the weights too); offload=true means
            optimizer, and false none.
        rows: lines of the table.
        out: folder for the files to submit.
        json: file for everything as JSON, in bytes and seconds (- prints only that).
        plot: PNG file with memory and step time on 8 to 4096 GPUs.
        rehearse: steps to take as one true rank of the best plan, on this machine; the other ranks do not
            exist, and their collectives move nothing. 3 reach the steady state.
        rehearse_gib: memory that the rehearsal may take, in GiB; it has fewer blocks if all do not fit.
        rehearse_micro_batch: images of a micro-step in the rehearsal; 0 takes 1 on a CPU, else the plan's.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    global_batch: int = 0
    dataset_size: int = 0
    network_gb_per_s: float = 400.0
    filesystem_gb_per_s: float = 50.0
    host_gib: float = 1024.0
    cores_per_gpu: int = 12
    rates: str = ""
    only: str = ""
    rows: int = 8
    out: str = ""
    json: str = ""
    plot: str = ""
    rehearse: int = 0
    rehearse_gib: float = 20.0
    rehearse_micro_batch: int = 0

    def __post_init__(self) -> None:
        check_types(self, "--")
        for name in ("global_batch", "dataset_size", "rows", "rehearse", "rehearse_micro_batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} cannot be negative, got {getattr(self, name)}")
        if self.rehearse_gib <= 0:
            raise ValueError(f"--rehearse_gib must be positive, got {self.rehearse_gib:g}")
        if self.out and Path(self.out).is_file():
            raise ValueError(f"--out {self.out} is a file; name a folder")
        for name in ("json", "plot"):
            if Path(getattr(self, name) or "-").is_dir():
                raise ValueError(f"--{name} {getattr(self, name)} is a folder; name a file")
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib: pip install 'megavit[plot]'")

    def cluster(self) -> Cluster:
        """ValueError for a kind of GPU that is not known, a size that is not positive, or a file of rates
        that is none."""
        gpu = gpu_named(self.gpu)
        return Cluster(
            gpu,
            self.nodes,
            self.gpus_per_node,
            self.network_gb_per_s,
            self.filesystem_gb_per_s,
            self.host_gib,
            self.cores_per_gpu,
            rates_for(gpu.name, self.rates),
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        "python launch/plan.py",
        "Search the best layout of a run on a cluster: ZeRO stage, tensor-parallel (TP) size, micro-batch, "
        "recomputation, offloading. The model, the recipe and the data are given as to launch/train.py; "
        f"optimizer, clipping and global batch come from --deepspeed_config ({_BASE}). Days and GPU-hours "
        "need the number of steps: a recipe, --max_steps, or --epochs with --dataset_size. What the printed "
        "words mean, and what the predictions rest on, is in megavit/scale/README.md. Kinds of GPU: "
        f"{', '.join(sorted(GPUS))}.",
        example="--config launch/recipes/vit_22b_jft.yaml --nodes 16 --gpus_per_node 8 --gpu h100",
        common=("config", "model.name", "nodes", "gpus_per_node", "gpu", "only", "out", "plot", "rehearse"),
        argv=argv,
    )
    parser.add_fields(PlanConfig)
    command = parse(parser, argv, needs=_NEEDS)
    for note in command.notes:
        print(note, file=sys.stderr)
    try:  # all that can be wrong, before torch is imported
        flags = PlanConfig(**command.more)
        cluster, only = flags.cluster(), Only.parse(flags.only)
        base = base_ds_config(command.deepspeed_config or PROJECT_ROOT / _BASE, command.ds_overrides)
        global_batch = flags.global_batch or base["train_batch_size"]
        require_choice(command.run.model, global_batch, cluster, only)
        run, size = command.run, flags.dataset_size
        if run.epochs and not size:
            raise ValueError(f"--epochs {run.epochs:g} needs --dataset_size, the images of the training set")
        if size and not run.epochs:
            raise ValueError(f"--dataset_size {size} needs --epochs, the passes over it")
        run = with_max_steps(run, size, global_batch)
        return plan(run, base, flags, cluster, only, global_batch)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def base_ds_config(path: str | Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed JSON that the plan starts from, with the values of --ds.KEY. ValueError if it is not for
    bfloat16."""
    base = load_ds_config(path, overrides)
    if base.get("bf16", {}).get("enabled") not in (True, "auto"):
        raise ValueError(f'{path}: plans are for bfloat16; set bf16.enabled to true or "auto"')
    return base


def plan(
    run: RunConfig,
    base: dict[str, Any],
    flags: PlanConfig,
    cluster: Cluster,
    only: Only,
    global_batch: int,
) -> int:
    from megavit.scale import report
    from megavit.scale.search import advice, scaling, search

    plans = search(run, global_batch, cluster, only)
    best = plans[0]
    hints = advice(run, global_batch, cluster, plans)
    facts = report.as_json(plans, run, hints)
    if flags.json == "-":
        print(json.dumps(facts, indent=2))
    elif flags.json:
        _parent_of(flags.json).write_text(json.dumps(facts, indent=2) + "\n")
    say = functools.partial(print, file=sys.stderr if flags.json == "-" else sys.stdout, flush=True)
    say(f"{run.model.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}")
    say(cluster.rates.describe())
    say(report.trained(run))
    say(report.table(plans, flags.rows))
    say("\n" + report.details(best, run))
    for line in hints:
        say(f"note: {line}")
    if flags.plot:
        gpus = report.plot_gpus(cluster.gpus_per_node)
        found = scaling(run, global_batch, cluster, gpus, only)
        report.plot(_parent_of(flags.plot), gpus, found, f"{run.model.name} on {cluster.gpu.name}")
        say("\n" + report.scaling_table(gpus, found))
    if flags.out and best.fits:
        written = report.write_files(Path(flags.out), run, base, best, PROJECT_ROOT)
        say(f"\nwrote {', '.join(str(path) for path in written)}")
        steps = "" if run.max_steps else " --max_steps ..."
        start = f" --init_from {run.init_from or '...'}" if run.freeze else ""
        say(f"submit: sbatch {written[-1]} --data.shards ...{steps}{start}")
    if flags.rehearse:
        say("\n" + rehearsal(run, base, best, flags))
    if not best.fits:
        written_not = ", and no files were written" if flags.out else ""
        print(f"error: no plan fits, see the notes above{written_not}", file=sys.stderr)
        return 1
    return 0


def _parent_of(name: str) -> Path:
    """The path, whose folder exists from now on."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def rehearsal(run: RunConfig, base: dict[str, Any], best: Plan, flags: PlanConfig) -> str:
    """One true rank of the plan beside its prediction, as text; fewer blocks if memory asks for it."""
    import torch

    from megavit.scale.rehearse import compare, fitting_depth, rehearse, with_depth
    from megavit.scale.report import planned_ds_config

    on_cpu = not torch.cuda.is_available()
    micro_batch = flags.rehearse_micro_batch or (1 if on_cpu else best.layout.micro_batch)
    layout = dataclasses.replace(best.layout, micro_batch=micro_batch, grad_accum=1)
    best = dataclasses.replace(best, layout=layout)
    depth = fitting_depth(best, flags.rehearse_gib, on_cpu=on_cpu)
    cut = with_depth(best, depth)
    run = dataclasses.replace(run, model=cut.model, freeze=cut.freeze, recompute=best.recompute)
    ds_config = planned_ds_config(base, cut) | {"bf16": {"enabled": True}}  # on a CPU too
    measured = rehearse(run, ds_config, layout.tp_size, layout.dp_size, flags.rehearse)
    return compare(best, depth, measured, on_cpu=on_cpu)
