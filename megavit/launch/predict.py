"""Say what photos show: `python launch/predict.py FOLDER photos/*.jpg` prints a line a photo, with the
likeliest classes and their probabilities.

FOLDER is an export (launch/export.py) or the folder of a run that has ended. Photos are JPEG, PNG, WebP, GIF
(the first frame), BMP or TIFF; of a folder all files in it and below that are called so. They are cropped and
resized as the validation images of the run were. What cannot be predicted is named on stderr, and the rest
goes on.

Exit status: 0 if all photos were predicted, 1 if some were not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megavit.cli import Parser

if TYPE_CHECKING:
    from megavit.predictor import Predictions, Predictor

_NAME_WIDTH = 24  # of a class; longer names push the rest of their line to the right


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    for name in ("top", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    from megavit import load

    try:
        predictor = load(arguments.folder, arguments.device, arguments.dtype, arguments.batch_size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a photo is said in a line
        try:
            return _predict(predictor, arguments)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # who reads the lines has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
            return 1


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="export, or run folder")
    parser.add_argument("photos", metavar="PHOTO", nargs="+", type=Path, help="photos, or folders of photos")
    parser.add_argument("--top", type=int, default=5, help="classes to show of each photo (5)")
    parser.add_argument(
        "--json",
        action="store_true",
        help='print a JSON object a line: {"file": ..., "top": [{"class": ID, "name": ..., "probability": '
        "...}, ...]}",
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="photos that go through the model together (32)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--dtype", help="float32 or bfloat16 (float32)")
    return parser


def _predict(predictor: Predictor, arguments: argparse.Namespace) -> int:
    """Print a line for each photo, a batch at a time; the exit status."""
    import torch
    from torch import Tensor

    from megavit.data.photos import photos_in

    missed = 0

    def miss(path: Path, reason: str) -> None:
        nonlocal missed
        missed += 1
        _print(f"{path}: {' '.join(reason.split())}", error=True)

    files: list[Path] = []
    for path in arguments.photos:
        found = photos_in(path) if path.is_dir() else [path]
        if not found:
            miss(path, "this folder holds no photos")
        files += found
    width = max((len(str(path)) for path in files), default=0)
    for start in range(0, len(files), predictor.batch_size):
        batch = files[start : start + predictor.batch_size]
        rows = predictor.prepare(batch)
        for path, row in zip(batch, rows, strict=True):
            if isinstance(row, OSError):
                miss(path, row.strerror or str(row))
            elif isinstance(row, ValueError):
                miss(path, str(row).removeprefix(f"{path}: "))
        if good := [row for row in rows if isinstance(row, Tensor)]:
            usable = [path for path, row in zip(batch, rows, strict=True) if isinstance(row, Tensor)]
            predictions = predictor.predict(torch.stack(good))
            table = functools.partial(_table, width=width)
            for line in (_json if arguments.json else table)(usable, predictions, arguments.top):
                _print(line)
    return 1 if missed else 0


def _table(paths: Sequence[Path], predictions: Predictions, top: int, width: int) -> Iterator[str]:
    """A line of text for each photo, its file padded to `width`."""
    name_width = min(_NAME_WIDTH, max(map(len, predictions.names)))
    for path, best in zip(paths, predictions.top(top), strict=True):
        cells = "  ".join(f"{probability:.4f} {name:<{name_width}}" for name, probability in best)
        yield f"{path!s:<{width}}  {cells}".rstrip()


def _json(paths: Sequence[Path], predictions: Predictions, top: int) -> Iterator[str]:
    """A line of JSON for each photo."""
    ids = predictions.ranked(top).tolist()
    for path, classes, best in zip(paths, ids, predictions.top(top), strict=True):
        rows = [
            {"class": number, "name": name, "probability": probability}
            for number, (name, probability) in zip(classes, best, strict=True)
        ]
        yield json.dumps({"file": str(path), "top": rows})


def _print(line: str, *, error: bool = False) -> None:
    """Names of files and classes may hold bytes that are no text here."""
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
