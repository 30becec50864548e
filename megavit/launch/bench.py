"""Measure, each against other ways of doing the same work, side by side in one process.

    python launch/bench.py model        a training step of MegaViT, other people's vision transformers
    python launch/bench.py trainer      the trainer's step at each ZeRO stage, the bare model's
    python launch/bench.py data         the input pipeline, stock webdataset, bare decoding
    python launch/bench.py features     the feature pass of an evaluation, a bare loop of decode and forward
    python launch/bench.py dense        a step of a dense head on a trained trunk, a frozen one, a cached one
    python launch/bench.py checkpoint   saving and restoring, torch's own ways
    python launch/bench.py gpu          the first hour on one GPU: stages, each a file in the folder --out

Every result is a row: Markdown on the terminal, and in --out FILE.json and --markdown FILE after every row.
megavit/bench/README.md explains the columns and holds figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megavit.cli import Parser

SHAPES = ["384x6x6x8", "1024x2x16x8"]

# Each of these functions checks its flags and returns the rows, which are measured when they are asked for.


def bench_data(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megavit.bench.data import BATCH, measure

    if arguments.images < BATCH or arguments.images % BATCH:
        raise ValueError(f"--images {arguments.images}: give a multiple of {BATCH}")
    return measure(arguments.images, arguments.rounds)


def bench_features(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megavit.bench.features import measure

    if arguments.images < 1:
        raise ValueError(f"--images {arguments.images}: give at least 1")
    return measure(arguments.images, arguments.rounds, arguments.preset)


def bench_dense(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megavit.bench.dense import measure

    if arguments.batch < 1:
        raise ValueError(f"--batch {arguments.batch}: give at least 1")
    return measure(arguments.preset, arguments.batch, arguments.rounds, arguments.device)


def bench_checkpoint(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megavit.bench.checkpoint import measure

    def rows() -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            yield from measure(Path(name), arguments.gib, arguments.rounds)

    return rows()


def bench_model(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megavit.bench.model import compare
    from megavit.bench.peers import choose

    contestants, left_out = choose(arguments.models)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    options = {**_step_options(arguments), "device": arguments.device}
    shapes = _shapes(arguments)
    return (row for config, batch in shapes for row in compare(config, batch, contestants, **options))


def bench_trainer(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megavit.bench.trainer import compare

    shapes, options = _shapes(arguments), _step_options(arguments)
    return (row for config, batch in shapes for row in compare(config, batch, arguments.stages, **options))


def run_gpu(arguments: argparse.Namespace) -> None:
    from megavit.bench.gpu import hour

    names = arguments.stage or [*hour.STAGES, hour.ANCHORS]
    hour.run(names, arguments.out, arguments.minutes, dry=arguments.dry)


def _shapes(arguments: argparse.Namespace) -> list[tuple[Any, int]]:
    from megavit.bench.peers import parse_shape

    image = (arguments.image_size, arguments.patch_size, arguments.num_classes)
    return [parse_shape(text, *image) for text in arguments.shape]


def _step_options(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    dtype = getattr(torch, arguments.dtype)
    return {"count": arguments.rounds, "dtype": dtype, "compiled": arguments.compile}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Callable[..., Any], text: str, rounds: int) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        made.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
        made.add_argument("--out", "--json", type=Path, help="also write the rows here, as JSON")
        made.add_argument("--markdown", type=Path, help="also write the tables here")
        made.set_defaults(function=function)
        return made

    model = command("model", bench_model, "a training step, against peers at the same shape", 9)
    _add_step_options(model)
    model.add_argument("--models", nargs="+", help="which of them (all)")
    model.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    trainer = command("trainer", bench_trainer, "the trainer's step, against the bare model's", 9)
    _add_step_options(trainer)
    trainer.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages")
    data = command("data", bench_data, "the input pipeline on JPEGs made for it", 6)
    data.add_argument("--images", type=int, default=256, help="a multiple of 32")
    features = command("features", bench_features, "an evaluation's feature pass, a second protocol", 5)
    features.add_argument("--images", type=int, default=256, help="JPEGs, made for it")
    features.add_argument("--preset", default="vit_s16", help="the model")
    dense = command("dense", bench_dense, "dense heads on a trained, frozen and cached trunk", 5)
    dense.add_argument("--preset", default="vit_s16", help="the trunk")
    dense.add_argument("--batch", type=int, default=4, help="pictures a step")
    dense.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    saving = command("checkpoint", bench_checkpoint, "saving and restoring one rank's state", 3)
    saving.add_argument("--gib", type=float, default=1.0, help="weights and moments, in GiB")
    saving.add_argument("--folder", type=Path, help="where to write: measures its file system")
    gpu = commands.add_parser(
        "gpu",
        help="the first hour on one GPU, in stages",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    gpu.add_argument("--out", type=Path, default=Path("gpu_hour"), help="folder: a JSON and a table a stage")
    gpu.add_argument("--stage", nargs="+", help="which of them, in this order (all)")
    gpu.add_argument("--minutes", type=float, default=45.0, help="begin no further case after so long")
    gpu.add_argument("--dry", action="store_true", help="tiny sizes, on any machine: no figures")
    return parser


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", nargs="+", default=SHAPES, help="width x depth x heads x batch, e.g. 384x6x6x8"
    )
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=14)
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of all parameters"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter
    import torch

    from megavit.bench.report import Report

    torch.set_num_threads(1)
    if arguments.command == "trainer":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if arguments.command == "gpu":  # its results are several files
            run_gpu(arguments)
            return 0
        if arguments.rounds < 1:
            raise ValueError(f"--rounds {arguments.rounds}: give at least 1")
        rows = arguments.function(arguments)
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
            if name not in ("command", "function", "out", "markdown")
        }
        device = getattr(arguments, "device", "cpu")
        report = Report(arguments.command, settings, device, arguments.out, arguments.markdown)
        for row in rows:
            report.add(row)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
