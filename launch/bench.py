"""Measure, each against other ways of doing the same work, in alternating rounds of one process.

`python launch/bench.py data` compares the input pipeline with stock webdataset and with bare decoding,
`checkpoint` saving and restoring with torch's own ways.

Ratios are taken within a round, in CPU time of one process and one thread, and their medians printed:
absolute rates on a shared machine mean little.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def bench_data(arguments: argparse.Namespace) -> None:
    from megavit.bench.data import measure

    measure(arguments.images, arguments.rounds, arguments.json)


def bench_checkpoint(arguments: argparse.Namespace) -> None:
    from megavit.bench.checkpoint import measure

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        speeds = measure(Path(name), arguments.gib, arguments.rounds)
    print(f"{arguments.gib:g} GiB of weights and moments, one rank, median of {arguments.rounds} rounds\n")
    print("| | GiB/s |\n|---|---|")
    for way, speed in speeds.items():
        print(f"| {way} | {speed:.2f} |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Any, text: str, rounds: int) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        made.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
        made.set_defaults(function=function)
        return made

    data = command("data", bench_data, "the input pipeline on JPEGs made for it", 6)
    data.add_argument("--images", type=int, default=256, help="a multiple of 32")
    data.add_argument("--json", type=Path, help="also write the table here")
    saving = command("checkpoint", bench_checkpoint, "saving and restoring one rank's state", 3)
    saving.add_argument("--gib", type=float, default=1.0, help="weights and moments, in GiB")
    saving.add_argument("--folder", type=Path, help="where to write: measures its file system")
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments.function(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
