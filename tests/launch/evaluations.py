"""`launch/evaluate.py` in this process, and what it is run on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megavit.data.write import ArrayImages, write_splits
from megavit.evaluate.results_file import Recorded, read_results
from megavit.evaluate.sets.imagenet_classes import class_of_wnid
from tests.exports import write_export

THREE = ("zero", "one", "two")
# What the classifier of `imagenet_export` says of whatever it sees, best first; the last two are what is left
# for the sets that have few of the classes.
LIKED = (278, 1, 6, 0, 999, 212, 671)


@dataclass
class Evaluation:
    code: int
    output: str
    errors: str
    recorded: Recorded

    def value(self, task: str, data: str, metric: str, **settings: Any) -> float:
        """Of the one result that is called so."""
        found = [
            result.value
            for result in self.recorded.results
            if (result.task, result.data, result.metric) == (task, data, metric)
            and all(result.settings.get(name) == value for name, value in settings.items())
        ]
        assert len(found) == 1, (task, data, metric, found, self.output)
        return found[0]

    def values(self) -> dict[tuple[str, ...], float]:
        """Of all results, by what names them."""
        names = ("layer", "k", "shots")
        return {
            (one.task, one.data, one.metric, *(f"{n} {one.settings.get(n)}" for n in names)): one.value
            for one in self.recorded.results
        }


def evaluate(model: Path, out: Path, *words: object) -> Evaluation:
    """`launch/evaluate.py MODEL WORDS`, with the results and the cache below `out`."""
    argv = [str(model), "--out", str(out), "--cache_dir", str(out.parent / "cache"), *map(str, words)]
    code, output, errors = run_main(argv)
    return Evaluation(code, output, errors, read_recorded(out))


def read_recorded(out: Path) -> Recorded:
    """The results that there are; none if the file cannot be read."""
    try:
        return read_results(out)
    except (ValueError, OSError):
        return Recorded()


def run_main(argv: Sequence[str]) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of the command."""
    from megavit.launch.evaluate import main

    output, errors, environment = StringIO(), StringIO(), dict(os.environ)
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            code = main(argv)
        except SystemExit as end:  # wrong flags
            code = int(end.code or 0)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.environ.clear()
            os.environ.update(environment)
    return code, output.getvalue(), errors.getvalue()


def imagenet_export(folder: Path, names: Sequence[str] | None = None) -> Path:
    """A model of ImageNet's classes, by their ids or other `names`, that says LIKED of every image."""
    known = tuple(class_of_wnid())
    write_export(folder, names or known, num_classes=1000)
    weights = load_file(folder / "model.safetensors")
    weights["head.weight"].zero_()
    weights["head.bias"].zero_()
    for place, number in enumerate(LIKED):
        weights["head.bias"][number] = 20.0 * (len(LIKED) - place)
    save_file(weights, folder / "model.safetensors")
    return folder


def coloured(count: int, seed: int, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a tinge of the class: uint8 [count, side, side, 3], and three class ids, int64 [count]."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    images = random.integers(0, 200, (count, side, side, 3))
    images[np.arange(count), :, :, labels] += 12
    return images.astype(np.uint8), labels


def three_colours(folder: Path, train: int = 203, test: int = 97, side: int = 16) -> Path:
    """Shards of three classes, which features can tell apart now and then."""
    splits = [
        ArrayImages(*coloured(count, seed, side)).split(name)
        for seed, (name, count) in enumerate((("train", train), ("test", test)))
    ]
    write_splits(splits, folder, 100, 1)
    (folder / "classes.txt").write_text("\n".join([*THREE, ""]))
    return folder
