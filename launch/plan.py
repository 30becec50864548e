"""Plan a run before the nodes are rented: `python launch/plan.py --model.name vit_22b --nodes 16
--gpus_per_node 8 --gpu h100` finds the best layout, predicts its memory and time, and writes the files to
submit; `--rehearse` runs one true rank of it here. See --help.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

from megavit.cli import PROJECT_ROOT, parse_flags
from megavit.scale.gpus import GPUS, gpu_named
from megavit.train.ds_config import load_ds_config

_BASE = "ds_configs/zero3_vit22b.json"


def add_flags(parser: Any) -> None:
    parser.description = (
        "Search the best layout of a run on a cluster. The model, the recipe and the data are given as to "
        "launch/train.py; optimizer, clipping and global batch come from --deepspeed_config."
    )
    parser.prog = "python launch/plan.py"
    parser.add_argument("--nodes", type=int, default=1, help="hosts")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs a host")
    parser.add_argument("--gpu", type=str, default="h100", help=f"one of {', '.join(sorted(GPUS))}")
    parser.add_argument("--global_batch", type=int, default=0, help="images a step (0: the JSON's)")
    parser.add_argument("--network_gb_per_s", type=float, default=400.0, help="GB/s a node and direction")
    parser.add_argument("--filesystem_gb_per_s", type=float, default=50.0, help="GB/s of all ranks together")
    parser.add_argument("--host_gib", type=float, default=1024.0, help="memory of a host, GiB")
    parser.add_argument("--cores_per_gpu", type=int, default=12, help="CPU cores for one rank")
    parser.add_argument(
        "--only",
        type=str,
        default="",
        help="consider nothing else, e.g. tp=8,stage=3,recompute=selective,offload=false,micro_batch=8",
    )
    parser.add_argument("--rows", type=int, default=8, help="lines of the table")
    parser.add_argument("--out", type=str, default="", help="folder for the files to submit")
    parser.add_argument(
        "--json", type=str, default="", help="file for everything as JSON (- prints only that)"
    )
    parser.add_argument("--plot", type=str, default="", help="PNG of memory and step time on 8 to 4096 GPUs")
    parser.add_argument(
        "--rehearse", type=int, default=0, help="steps to take as one true rank of the best plan, here"
    )
    parser.add_argument("--rehearse_gib", type=float, default=20.0, help="memory that the rehearsal may take")
    parser.add_argument(
        "--rehearse_micro_batch",
        type=int,
        default=0,
        help="images a micro-step (0: 1 on a CPU, else planned)",
    )


def main() -> int:
    run, flags, _ = parse_flags(add_flags=add_flags)
    try:
        return plan(run, flags)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(run: Any, flags: Any) -> int:
    from megavit.scale import report
    from megavit.scale.roofline import Cluster
    from megavit.scale.search import Only, advice, scaling, search

    base_path = flags.deepspeed_config or _BASE
    base = load_ds_config(base_path if Path(base_path).exists() else PROJECT_ROOT / base_path)
    if base.get("bf16", {}).get("enabled") not in (True, "auto"):
        raise ValueError(f'{base_path}: plans are for bfloat16; set bf16.enabled to true or "auto"')
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
        say(f"submit: sbatch {written[-1]} --data.shards ...")
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


def rehearsal(run: Any, base: dict[str, Any], best: Any, flags: Any) -> str:
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
