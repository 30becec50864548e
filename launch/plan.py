"""Plan a run before the nodes are rented: `python launch/plan.py --config launch/recipes/vit_22b_jft.yaml
--nodes 16 --gpus_per_node 8 --gpu h100` finds the best layout, predicts its memory and time, and writes the
files to submit; `--rehearse` runs one true rank of it here. See --help.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavit.cli import PROJECT_ROOT, make_parser, parse
from megavit.fields import check_types
from megavit.gpus import GPUS, gpu_named
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
        nodes: hosts.
        gpus_per_node: GPUs a host.
        gpu: their kind.
        global_batch: images a step; 0 takes the JSON's.
        network_gb_per_s: GB/s a node and direction.
        filesystem_gb_per_s: GB/s of all ranks together.
        host_gib: memory of a host, GiB.
        cores_per_gpu: CPU cores for one rank.
        only: consider nothing else, e.g. tp=8,stage=3,recompute=selective,offload=false,micro_batch=8.
        rows: lines of the table.
        out: folder for the files to submit.
        json: file for everything as JSON (- prints only that).
        plot: PNG of memory and step time on 8 to 4096 GPUs.
        rehearse: steps to take as one true rank of the best plan, here.
        rehearse_gib: memory that the rehearsal may take.
        rehearse_micro_batch: images a micro-step; 0 takes 1 on a CPU, else the planned ones.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    global_batch: int = 0
    network_gb_per_s: float = 400.0
    filesystem_gb_per_s: float = 50.0
    host_gib: float = 1024.0
    cores_per_gpu: int = 12
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
        for name in ("global_batch", "rows", "rehearse", "rehearse_micro_batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} cannot be negative, got {getattr(self, name)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        "python launch/plan.py",
        "Search the best layout of a run on a cluster. The model, the recipe and the data are given as to "
        f"launch/train.py; optimizer, clipping and global batch come from --deepspeed_config ({_BASE}). "
        "Days and GPU-hours need the number of steps: a recipe, or --max_steps. Kinds of GPU: "
        f"{', '.join(sorted(GPUS))}.",
    )
    parser.add_fields(PlanConfig)
    command = parse(parser, argv, needs=_NEEDS)
    for note in command.notes:
        print(note, file=sys.stderr)
    try:
        flags = PlanConfig(**command.more)
        base = base_ds_config(command.deepspeed_config or PROJECT_ROOT / _BASE)
        return plan(command.run, base, flags)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def base_ds_config(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed JSON that the plan starts from. ValueError if it is not for bfloat16."""
    base = load_ds_config(path)
    if base.get("bf16", {}).get("enabled") not in (True, "auto"):
        raise ValueError(f'{path}: plans are for bfloat16; set bf16.enabled to true or "auto"')
    return base


def plan(run: RunConfig, base: dict[str, Any], flags: PlanConfig) -> int:
    from megavit.scale import report
    from megavit.scale.roofline import Cluster
    from megavit.scale.search import Only, advice, scaling, search

    global_batch = flags.global_batch or base["train_batch_size"]
    cluster = Cluster(
        gpu_named(flags.gpu),
        flags.nodes,
        flags.gpus_per_node,
        flags.network_gb_per_s,
        flags.filesystem_gb_per_s,
        flags.host_gib,
        flags.cores_per_gpu,
    )
    only = Only.parse(flags.only)
    plans = search(run, global_batch, cluster, only)
    best = plans[0]
    hints = advice(run, global_batch, cluster, plans)
    facts = report.as_json(plans, run, hints)
    if flags.json == "-":
        print(json.dumps(facts, indent=2))
    elif flags.json:
        _parent_of(flags.json).write_text(json.dumps(facts, indent=2) + "\n")
    say = functools.partial(print, file=sys.stderr if flags.json == "-" else sys.stdout, flush=True)
    say(f"{run.model.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}\n")
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
        say(f"submit: sbatch {written[-1]} --data.shards ...{steps}")
    if flags.rehearse:
        say("\n" + rehearsal(run, base, best, flags))
    if not best.fits:
        print("error: nothing fits, see above; no files were written", file=sys.stderr)
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

    from megavit.scale.rehearse import compare, fitting_depth, rehearse
    from megavit.scale.report import planned_ds_config

    on_cpu = not torch.cuda.is_available()
    micro_batch = flags.rehearse_micro_batch or (1 if on_cpu else best.layout.micro_batch)
    layout = dataclasses.replace(best.layout, micro_batch=micro_batch, grad_accum=1)
    best = dataclasses.replace(best, layout=layout)
    depth = fitting_depth(best, flags.rehearse_gib, on_cpu=on_cpu)
    cut = dataclasses.replace(best, model=dataclasses.replace(run.model, depth=depth))
    run = dataclasses.replace(run, model=cut.model, recompute=best.recompute)
    ds_config = planned_ds_config(base, cut) | {"bf16": {"enabled": True}}  # on a CPU too
    measured = rehearse(run, ds_config, layout.tp_size, layout.dp_size, flags.rehearse)
    return compare(best, depth, measured, on_cpu=on_cpu)


if __name__ == "__main__":
    sys.exit(main())
