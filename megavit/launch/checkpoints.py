"""Look at a run's checkpoints, offline: no GPU, ranks or DeepSpeed, one tensor at a time in memory.

python launch/checkpoints.py list RUN_DIR                    # what there is
python launch/checkpoints.py verify RUN_DIR                  # every byte; exit status 1 if any is damaged
python launch/checkpoints.py diff RUN_DIR                    # the newest two, tensor by tensor
python launch/checkpoints.py diff RUN_DIR OTHER_RUN_DIR      # the newest of each
python launch/checkpoints.py diff RUN_DIR --steps 1000 2000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megavit.cli import Parser

if TYPE_CHECKING:
    from megavit.train.checkpoint.checkpoint import Checkpoint


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    lister = commands.add_parser("list", help="step, time, size and layout of each checkpoint")
    verifier = commands.add_parser("verify", help="re-read every byte; exit status 1 if anything is damaged")
    verifier.add_argument("--step", type=int, help="only this checkpoint (all)")
    differ = commands.add_parser(
        "diff", help="how far two checkpoints are apart; exit status 1 if they differ"
    )
    for command, function in ((lister, list_), (verifier, verify), (differ, diff)):
        command.set_defaults(function=function)
        command.add_argument("run_dir", type=Path, help="run folder")
    differ.add_argument("other", type=Path, nargs="?", help="another run folder, for the newest of each")
    differ.add_argument("--steps", type=int, nargs=2, metavar=("A", "B"), help="the two steps to compare")
    return parser


def list_(arguments: argparse.Namespace) -> int:
    from megavit.train.checkpoint.checkpoint import Checkpoint
    from megavit.train.checkpoint.folder import checkpoints_of
    from megavit.train.checkpoint.manifest import CheckpointError

    folder = checkpoints_of(arguments.run_dir)
    paths = sorted(path for path in folder.glob("step_*") if path.is_dir())
    if not paths:
        raise ValueError(f"{folder} holds no checkpoints")
    latest, problem = _latest(arguments.run_dir)
    print(f"{'':2}{'checkpoint':<26}{'saved':<26}{'GiB':>9}  {'ranks':<16}{'optimizer':<12}")
    for path in paths:
        mark = "* " if path == latest else "  "
        try:
            found = Checkpoint.open(path)
        except CheckpointError as error:
            print(f"{mark}{path.name:<26}not usable: {error}")
            continue
        gib = sum(file.bytes for file in found.files) / 2**30
        ranks = f"dp {found.dp_size} x tp {found.tp_size}"
        kind = found.optimizer["type"]
        print(f"{mark}{path.name:<26}{found.saved_at:<26}{gib:>9.3f}  {ranks:<16}{kind:<12}")
    print(f"no new start is possible: {problem}" if problem else "* a new start goes on from here")
    return 1 if problem else 0


def verify(arguments: argparse.Namespace) -> int:
    from megavit.train.checkpoint.checkpoint import Checkpoint
    from megavit.train.checkpoint.folder import checkpoints_of, committed, open_step
    from megavit.train.checkpoint.manifest import CheckpointError
    from megavit.train.checkpoint.tensorfile import progress_bar

    run_dir = arguments.run_dir
    if arguments.step is not None:
        paths, problem = [open_step(run_dir, arguments.step).folder], ""
    else:
        paths = committed(checkpoints_of(run_dir))
        _, problem = _latest(run_dir)
    if not paths:
        raise ValueError(problem or f"{run_dir} holds no committed checkpoint")
    damaged = 0
    for path in paths:
        try:
            found = Checkpoint.open(path)
            size = sum(file.bytes for file in found.files)
            with progress_bar(size, path.name) as bar:
                problems = found.damage(found.files, bar.update)
        except CheckpointError as error:
            problems = [str(error)]
        print(f"{path.name}: {'; '.join(problems) or f'{len(found.files)} files, {size:,} bytes, all well'}")
        damaged += bool(problems)
    if problem:
        print(f"no new start is possible: {problem}")
    return 1 if damaged or problem else 0


def _latest(run_dir: Path) -> tuple[Path | None, str]:
    """The checkpoint that a new start goes on from, or why none can be told."""
    from megavit.train.checkpoint.folder import find_latest
    from megavit.train.checkpoint.manifest import CheckpointError

    try:
        return find_latest(run_dir), ""
    except CheckpointError as error:
        return None, str(error)


def diff(arguments: argparse.Namespace) -> int:
    import numpy as np

    one, two = _pair(arguments)
    print(f"{one.folder} against {two.folder}: largest difference (largest value)")
    if names := sorted(one.layouts.keys() ^ two.layouts.keys()):
        print(f"only in one of them: {', '.join(names)}")
    kinds = [kind for kind in one.kinds if kind in two.kinds]
    differ = bool(names)
    worst = dict.fromkeys(kinds, 0.0)
    for name in sorted(one.layouts.keys() & two.layouts.keys()):
        if one.layouts[name].shape != two.layouts[name].shape:
            print(f"{name}: shape {one.layouts[name].shape} against {two.layouts[name].shape}")
            differ = True
            continue
        cells = []
        for kind in kinds:
            left, right = one.tensor(kind, name), two.tensor(kind, name)
            gap, top = float(np.abs(left - right).max(initial=0.0)), float(np.abs(left).max(initial=0.0))
            worst[kind] = max(worst[kind], gap)
            cells.append(f"{kind} {gap:.3g} ({top:.3g})")
        steps = [checkpoint.optimizer["steps"].get(name) for checkpoint in (one, two)]
        cells += [f"updates {steps[0]} against {steps[1]}"] if steps[0] != steps[1] else []
        print(f"{name}: {', '.join(cells)}")
    print("all: " + ", ".join(f"{kind} {gap:.3g}" for kind, gap in worst.items()))
    return 1 if differ or any(worst.values()) else 0


def _pair(arguments: argparse.Namespace) -> tuple[Checkpoint, Checkpoint]:
    from megavit.train.checkpoint.folder import checkpoints_of, committed, open_step, step_of

    run_dir: Path = arguments.run_dir
    first, second = arguments.steps or (None, None)
    if arguments.other:
        return open_step(run_dir, first), open_step(arguments.other, second)
    if first is None:
        steps = [step_of(path) for path in committed(checkpoints_of(run_dir))]
        if len(steps) < 2:
            raise ValueError(
                f"{run_dir} holds {len(steps)} checkpoint(s); diff needs two, or another run folder"
            )
        first, second = steps[-2:]
    return open_step(run_dir, first), open_step(run_dir, second)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        return int(arguments.function(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
