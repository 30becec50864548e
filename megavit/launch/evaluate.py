"""Say how good a model is, with its weights frozen.

    python launch/evaluate.py runs/x --tasks linear,knn,fewshot --data data/digits
    python launch/evaluate.py exported --tasks imagenet,imagenet-c --data_root /data --out results
    python launch/evaluate.py runs/depth --tasks nyu,kitti --data_root /data
    deepspeed launch/evaluate.py runs/22b --tensor_parallel_size 8 --tasks ...
    python launch/evaluate.py ls --data_root /data
    python launch/evaluate.py table results/*.json --out tables

MODEL is an export, the folder of a run that has ended, or timm:NAME (timm:NAME@FILE with weights of a file).
`ls` lists every task, what it needs, and whether that is there. `table` makes one table of several results.
Results are written after every task; a command that was ended goes on where it was.

Exit status: 0 if every task has its numbers or lacks its data, 1 if a task failed, 2 for wrong arguments, 3
with --strict if data were missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megavit.cli import Parser, without_local_rank
from megavit.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from megavit.evaluate.tasks import Task
    from megavit.parallel.mesh import Mesh

_TIMEOUT_S = 24 * 3600.0  # ranks wait for the one that has the most to do
_COMMANDS = ("ls", "table")


def main(argv: Sequence[str] | None = None) -> int:
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _COMMANDS:
        return _side_command(words[0], words[1:])
    parser = make_parser()
    given = vars(parser.parse_args(words))
    name = given.pop("model")
    try:
        config = EvaluateConfig(**given)
    except ValueError as error:
        parser.error(str(error))
    import torch.distributed as dist

    from megavit.evaluate.tasks import parse_tasks
    from megavit.parallel.mesh import Mesh
    from megavit.parallel.rendezvous import wait_asleep

    try:
        tasks = parse_tasks(config)
    except ValueError as error:
        parser.error(str(error))
    wait_asleep()
    try:
        mesh = Mesh.from_environment(config.tensor_parallel_size, _TIMEOUT_S)
        code = _evaluate(name, config, tasks, mesh)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130
    dist.destroy_process_group()
    return code


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="export, run folder, or timm:NAME[@FILE]")
    parser.add_fields(EvaluateConfig)
    return parser


def _side_command(name: str, words: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if name == "ls":
        parser.add_argument("--data_root", type=Path, help="folder with the data sets as they are downloaded")
    else:
        parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="results.json files")
        parser.add_argument("--out", type=Path, help="folder for table.md, table.csv and the plots")
    given = parser.parse_args(words)
    try:
        if name == "ls":
            from megavit.evaluate.tasks import listing

            print("\n".join(listing(given.data_root)))
            code = 0
        else:
            from megavit.evaluate.table import table_command

            code = table_command(given.results, given.out)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads the lines (head, less) has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _evaluate(name: str, config: EvaluateConfig, tasks: Sequence[Task], mesh: Mesh) -> int:
    from megavit.evaluate.run import check_kind, open_model, out_folder, run_tasks
    from megavit.evaluate.session import Session
    from megavit.train.logging.monitor import say

    check_kind(name, tasks)
    model = open_model(name, mesh, config.dtype, config)
    session = Session(model, config, lambda text: say(mesh, text))
    return run_tasks(session, tasks, out_folder(name, config.out))


if __name__ == "__main__":
    sys.exit(main())
