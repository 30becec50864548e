"""Measure, each against other ways of doing the same work, in alternating rounds of one process.

    python launch/bench.py data         the input pipeline, stock webdataset, bare decoding
    python launch/bench.py checkpoint   saving and restoring, torch's own ways
    python launch/bench.py model        a training step of MegaVit, other people's vision transformers
    python launch/bench.py trainer      the trainer's step at each ZeRO stage, the bare model's
    python launch/bench.py communication   ranks that talk, the same work with nobody to talk to
    python launch/bench.py gpu          blocks of ViT-22B's width on one GPU: batches, recompute, kernels

Ratios are taken within a round, in CPU time of one process and one thread (on a GPU, wall time), and their
medians printed: absolute rates on a shared machine mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavit.cli import Parser

SHAPES = ["384x6x6x8", "1024x2x16x8"]


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


def bench_model(arguments: argparse.Namespace) -> None:
    from megavit.bench.model import HOW, compare, plot, to_json, to_markdown
    from megavit.bench.peers import choose
    from megavit.bench.rounds import Report, require_matplotlib

    if arguments.plot:
        require_matplotlib()
    contestants, left_out = choose(arguments.models)
    report = Report(f"{_settings(arguments)}\n\n{HOW}", arguments.markdown, arguments.json)
    report.add(*left_out)
    tables = {}
    for shape in _shapes(arguments):
        tables[str(shape)] = rows = compare(shape, contestants, **_how(arguments), device=arguments.device)
        report.add(f"\n{shape}\n", to_markdown(rows), data={"shape": vars(shape), "rows": to_json(rows)})
    if arguments.plot:
        plot(tables, arguments.plot)


def bench_trainer(arguments: argparse.Namespace) -> None:
    from megavit.bench.rounds import Report
    from megavit.bench.trainer import compare, to_json, to_markdown

    report = Report(_settings(arguments), arguments.markdown, arguments.json)
    for shape in _shapes(arguments):
        results = compare(shape, arguments.stages, **_how(arguments))
        rows = to_json(results)
        report.add(f"\n{shape}\n", to_markdown(results), data={"shape": vars(shape), "rows": rows})


def bench_communication(arguments: argparse.Namespace) -> None:
    from megavit.bench.communication import HEADER, WAYS, measure, to_json, to_markdown
    from megavit.bench.rounds import Report

    if unknown := set(arguments.ways or ()) - WAYS.keys():
        raise ValueError(f"no way is called {min(unknown)!r}; known: {', '.join(WAYS)}")
    report = Report(f"{arguments.rounds} rounds of {arguments.steps} steps", None, arguments.json)
    for shape in _shapes(arguments):
        report.add(f"\n{shape} a rank\n", HEADER)
        for name in arguments.ways or WAYS:
            found = measure(shape, WAYS[name], arguments.rounds, arguments.steps)
            report.add(to_markdown(name, found), data={"shape": vars(shape)} | to_json(name, found))


def bench_gpu(arguments: argparse.Namespace) -> None:
    import torch

    from megavit.bench.gpu import Size, describe, measure, to_json, to_markdown
    from megavit.bench.kernels import plot, time_by_kind
    from megavit.bench.rounds import require_matplotlib

    if arguments.plot:
        require_matplotlib()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    size = Size(arguments.width, arguments.heads, arguments.tokens, arguments.blocks, arguments.dtype)
    for found in measure(
        size, arguments.batch, modes=arguments.modes, repeats=arguments.rounds, device=device
    ):
        text = f"{describe(found)}\n\n{to_markdown(found)}\n"
        print(to_markdown(found).splitlines()[-1], flush=True)
        if arguments.markdown:
            arguments.markdown.write_text(text)
        if arguments.json:
            arguments.json.write_text(json.dumps(to_json(found), indent=2) + "\n")
    print(f"\n{text}")
    if arguments.plot:
        times = time_by_kind(size, arguments.batch[0], device)
        plot(times, f"{found.device}, width {size.width}, batch {arguments.batch[0]}", arguments.plot)


def _shapes(arguments: argparse.Namespace) -> list[Any]:
    from megavit.bench.peers import Shape

    image = (arguments.image_size, arguments.patch_size, arguments.num_classes)
    return [Shape.parse(text, *image) for text in arguments.shape]


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    return {"count": arguments.rounds, "dtype": dtype, "compiled": arguments.compile}


def _settings(arguments: argparse.Namespace) -> str:
    import torch

    mode = "compiled blocks" if arguments.compile else "eager"
    return f"{arguments.dtype}, {mode}, {arguments.rounds} rounds, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Any, text: str, rounds: int) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        made.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
        made.add_argument("--json", type=Path, help="also write the results here")
        made.set_defaults(function=function)
        return made

    data = command("data", bench_data, "the input pipeline on JPEGs made for it", 6)
    data.add_argument("--images", type=int, default=256, help="a multiple of 32")
    saving = command("checkpoint", bench_checkpoint, "saving and restoring one rank's state", 3)
    saving.add_argument("--gib", type=float, default=1.0, help="weights and moments, in GiB")
    saving.add_argument("--folder", type=Path, help="where to write: measures its file system")
    model = command("model", bench_model, "a training step, against peers at the same shape", 9)
    _add_step_options(model)
    model.add_argument("--models", nargs="+", help="which of them (all)")
    model.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    model.add_argument("--plot", type=Path, help="a bar chart, PNG or SVG; needs megavit[plot]")
    trainer = command("trainer", bench_trainer, "the trainer's step, against the bare model's", 9)
    _add_step_options(trainer)
    trainer.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages")
    talk = command("communication", bench_communication, "what communication adds to a step", 5)
    talk.add_argument("--steps", type=int, default=2, help="optimizer steps a round")
    talk.add_argument("--ways", nargs="+", help="which layouts and settings (all)")
    _add_shape(talk, ["768x4x12x4"])
    gpu = command("gpu", bench_gpu, "blocks of ViT-22B's width on one GPU, under 10 minutes", 10)
    for name, default in {"blocks": 4, "width": 6144, "heads": 48, "tokens": 256}.items():
        gpu.add_argument(f"--{name}", type=int, default=default)
    gpu.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32], help="micro-batches")
    modes = ["eager", "compiled"]
    gpu.add_argument("--modes", nargs="+", default=modes, choices=modes)
    gpu.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    gpu.add_argument("--markdown", type=Path, help="also write the table here")
    gpu.add_argument("--plot", type=Path, help="a chart of the time by kind of kernel; needs megavit[plot]")
    return parser


def _add_shape(parser: argparse.ArgumentParser, default: list[str]) -> None:
    parser.add_argument(
        "--shape", nargs="+", default=default, help="width x depth x heads x batch of a rank, e.g. 384x6x6x8"
    )
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=14)
    parser.add_argument("--num_classes", type=int, default=1000)


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    _add_shape(parser, SHAPES)
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of all parameters"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter
    try:
        arguments.function(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
