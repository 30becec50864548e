"""Say what photos show: `python launch/predict.py FOLDER photos/*.jpg` prints a line a photo, with the
likeliest classes and their probabilities.

    python launch/predict.py runs/digits photos/*.jpg --top 3
    python launch/predict.py runs/depth street.jpg --out depth.png

A model of depth or segmentation writes a map of the photo's size to --out: a PNG or npy file, or a folder of
one for each photo. Depth is a PNG of 16 bits whose "scale" (PNG text, and printed) makes metres of its
numbers, or npy in metres, float32. Classes are a palette PNG, or npy, of class numbers, whose names are
printed and in the PNG's text "classes".

FOLDER is an export (launch/export.py) or the folder of a run that has ended. Photos are JPEG, PNG, WebP, GIF
(the first frame), BMP or TIFF; of a folder all files in it and below that are called so. They are cropped and
resized as the validation images of the run were; maps are of the whole photo. What cannot be predicted is
named on stderr, and the rest goes on.

Exit status: 0 if all photos were predicted, 1 if some were not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavit.cli import Parser
from megavit.fields import fields_of
from megavit.tasks.config import DenseConfig, InferenceConfig

if TYPE_CHECKING:
    from megavit.predictor import Predictions, Predictor

_NAME_WIDTH = 24  # of a class; longer names push the rest of their line to the right


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    for name in ("top", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    try:
        predict = _job(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a photo is said in a line
        try:
            return predict()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # who reads the lines has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
            return 1


def _job(arguments: argparse.Namespace) -> Callable[[], int]:
    """What is to be done, with its model, whose result is the exit status. ValueError or OSError for a
    mistake, if there can be one, before the weights are read."""
    from megavit.predictor import load_classifier
    from megavit.tasks.exported import task_of_export

    task = task_of_export(arguments.folder)
    if isinstance(task, DenseConfig):
        from megavit.launch.predict_maps import maps_job

        return maps_job(task, arguments)
    if wrong := [name for name in ("out", "color", *inference_of(arguments)) if getattr(arguments, name)]:
        raise ValueError(
            f"--{wrong[0]} is for models of depth or segmentation, and {arguments.folder} is none"
        )
    model = load_classifier(arguments.folder, arguments.device, arguments.dtype, arguments.batch_size)
    return functools.partial(_predict, model, arguments)


def inference_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `InferenceConfig` that are given."""
    return {name: getattr(arguments, name) for name in fields_of(InferenceConfig) if name in arguments}


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
    parser.add_argument(
        "--out",
        type=Path,
        help="of depth or segmentation: file of the map, .png or .npy, or a folder of a PNG for each photo",
    )
    parser.add_argument(
        "--color", action="store_true", help="of depth: also a PNG in colours beside, NAME.color.png"
    )
    parser.add_fields(InferenceConfig)
    return parser


def _predict(predictor: Predictor, arguments: argparse.Namespace) -> int:
    """Print a line for each photo, a batch at a time; the exit status."""
    import torch
    from torch import Tensor

    misses = Misses()
    files = [path for path, _ in photos_of(arguments.photos, misses)]
    width = max((len(str(path)) for path in files), default=0)
    for start in range(0, len(files), predictor.batch_size):
        batch = files[start : start + predictor.batch_size]
        rows = predictor.prepare(batch)
        for path, row in zip(batch, rows, strict=True):
            if not isinstance(row, Tensor):
                misses.add(path, row)
        if good := [row for row in rows if isinstance(row, Tensor)]:
            usable = [path for path, row in zip(batch, rows, strict=True) if isinstance(row, Tensor)]
            predictions = predictor.predict(torch.stack(good))
            table = functools.partial(_table, width=width)
            for line in (_json if arguments.json else table)(usable, predictions, arguments.top):
                print_line(line)
    return 1 if misses.count else 0


class Misses:
    """Names on stderr what cannot be predicted, and counts it."""

    count = 0

    def add(self, path: Path, error: OSError | ValueError) -> None:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        self.count += 1
        print_line(f"{path}: {' '.join(reason.removeprefix(f'{path}: ').split())}", error=True)


def photos_of(named: Sequence[Path], misses: Misses) -> list[tuple[Path, Path]]:
    """The photos that are named, and those in folders that are, each with its path in its folder."""
    from megavit.data.photos import photos_in

    files: list[tuple[Path, Path]] = []
    for path in named:
        found = photos_in(path) if path.is_dir() else [path]
        if not found:
            misses.add(path, ValueError("this folder holds no photos"))
        files += [(photo, photo.relative_to(path) if path.is_dir() else Path(photo.name)) for photo in found]
    return files


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


def print_line(line: str, *, error: bool = False) -> None:
    """Names of files and classes may hold bytes that are no text here."""
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
