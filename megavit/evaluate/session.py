"""An evaluation under way: the model, the settings, and the features of the data sets so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megavit.evaluate.cache import Pass, PassSettings, default_folder
from megavit.evaluate.config import EvaluateConfig
from megavit.evaluate.features import Features
from megavit.evaluate.images import Bad
from megavit.evaluate.model import POOLED, FrozenModel, chosen_layers
from megavit.evaluate.sets.image_set import ImageSet


class Session:
    """Gives tasks their features, so that each image goes through the model once, whatever asks for it.

    `layers` are those of the probes. `say` prints a line on the main rank.
    """

    def __init__(self, model: FrozenModel, config: EvaluateConfig, say: Callable[[str], None]):
        self.model, self.config, self.mesh, self.say = model, config, model.mesh, say
        self.layers = chosen_layers(config.layers, model.depth)
        folder = Path(config.cache_dir) if config.cache_dir else default_folder()
        self._settings = PassSettings(folder, config.cache_dtype, config.batch_size, config.workers)
        self._features: dict[tuple[str, object], dict[str, Features]] = {}
        self.transforms: dict[str, str] = {}  # of the sets that have been looked at, in words
        self.bad: dict[str, list[Bad]] = {}
        self.pass_s = 0.0  # seconds in feature passes

    def limited(self, images: ImageSet) -> ImageSet:
        """The set, or with --limit so many of its images."""
        return images.first(self.config.limit) if self.config.limit else images

    def features(self, images: ImageSet, layers: Sequence[str] = (POOLED,)) -> dict[str, Features]:
        """The features of a set, with the labels that `images` has. Those of `layers` and those of the probes
        are computed together. Collective."""
        images = self.limited(images)
        wanted = list(dict.fromkeys([*layers, *self.layers]))
        key = (images.digest, images.adjust)
        found = self._features.get(key, {})
        if missing := [layer for layer in wanted if layer not in found]:
            self._features[key] = found = found | self._compute(images, missing)
        return {layer: found[layer].labelled(images) for layer in wanted}

    def pooled(self, images: ImageSet) -> Features:
        """What the model's classifier reads. Collective."""
        return self.features(images)[POOLED]

    def _compute(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Features]:
        started = time.perf_counter()
        with self._bar(f"{images.name} {images.split}") as progress:
            one = Pass(self.model, images, self._settings, self._announce, progress)
            found = one.features(layers)
        self.pass_s += time.perf_counter() - started
        self.transforms[images.name] = one.transform.text
        self.bad[images.name] = one.bad
        return found

    def _announce(self, text: str) -> None:
        if not self.config.quiet:
            self.say(text)

    @contextmanager
    def _bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar on the main rank's terminal, or a line every so often where there is none."""
        hide = True if self.config.quiet or not self.mesh.is_main else None
        with tqdm(desc=title, unit=" images", leave=False, disable=hide) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total * self.mesh.dp_size
                bar.update((done * self.mesh.dp_size) - bar.n)

            yield show
