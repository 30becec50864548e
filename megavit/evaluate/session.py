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
from megavit.evaluate.sets.catalogue import CATALOGUE, Split
from megavit.evaluate.sets.image_set import Adjust, ImageSet, MissingData
from megavit.evaluate.sets.photo_patches import PHOTO_PATCHES, photo_patches
from megavit.evaluate.sets.shards import OWN_LAYOUT, own_data


class Session:
    """Gives tasks their features, so that each image goes through the model once, whatever asks for it.

    `layers` are those of the probes. `say` prints a line on the main rank.
    """

    def __init__(self, model: FrozenModel, config: EvaluateConfig, say: Callable[[str], None]):
        self.model, self.config, self.mesh, self.say = model, config, model.mesh, say
        self.layers = chosen_layers(config.layers, model.depth)
        folder = Path(config.cache_dir) if config.cache_dir else default_folder()
        self._settings = PassSettings(folder, config.cache_dtype, config.batch_size, config.workers)
        self._sets: dict[tuple[str, str], ImageSet] = {}
        self._features: dict[tuple[str, object], dict[str, Features]] = {}
        self._transforms: dict[tuple[str, Adjust], str] = {}
        self.bad: dict[str, list[Bad]] = {}
        self.pass_s = 0.0  # seconds in feature passes

    def open(self, data: str, split: Split) -> ImageSet:
        """A split of a set: of --data if `data` is empty, else of one below --data_root, by its name. Read by
        the main rank, for all. MissingData if it is not there. Collective."""
        key = (data, split)
        if key not in self._sets:
            self._sets[key] = self.mesh.on_main(lambda: self._read(data, split))
        return self.limited(self._sets[key])

    def _read(self, data: str, split: Split) -> ImageSet:
        if data:
            return CATALOGUE[data].open(self.config.data_root, split)
        found = own_data(self.config.data)
        if split not in found:
            raise MissingData(
                f"{self.config.data} has no {split} images; it has {' and '.join(found)}: {OWN_LAYOUT}"
            )
        return found[split]

    def outside(self) -> ImageSet:
        """The data of --ood, which the model should not know. Collective."""
        return self.limited(self.mesh.on_main(lambda: _outside(self.config)))

    def limited(self, images: ImageSet) -> ImageSet:
        """The set, or with --limit so many of its images."""
        return images.first(self.config.limit) if self.config.limit else images

    def features(self, images: ImageSet, layers: Sequence[str] = (POOLED,)) -> dict[str, Features]:
        """The features of a set, with the labels that `images` has. Those of `layers` and those of the probes
        are computed together. Collective."""
        wanted = list(dict.fromkeys([*layers, *self.layers]))
        key = (images.digest, images.adjust)
        found = self._features.get(key, {})
        if missing := [layer for layer in wanted if layer not in found]:
            self._features[key] = found = found | self._compute(images, missing)
        return {layer: found[layer].labelled(images) for layer in wanted}

    def probe_features(self, images: ImageSet) -> dict[str, Features]:
        """Of the layers of --layers. Collective."""
        found = self.features(images)
        return {layer: found[layer] for layer in self.layers}

    def pooled(self, images: ImageSet) -> Features:
        """What the model's classifier reads. Collective."""
        return self.features(images)[POOLED]

    def _compute(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Features]:
        started = time.perf_counter()
        with self._bar(f"{images.name} {images.split}") as progress:
            one = Pass(self.model, images, self._settings, self.tell, progress)
            found = one.features(layers)
        self.pass_s += time.perf_counter() - started
        self._transforms[images.digest, images.adjust] = one.transform.text
        self.bad[images.name] = one.bad
        return found

    def transform(self, images: ImageSet) -> str:
        """What was done to the images of a set that has been looked at, in words."""
        return self._transforms[images.digest, images.adjust]

    def tell(self, text: str) -> None:
        """Say something that --quiet leaves out."""
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


def _outside(config: EvaluateConfig) -> ImageSet:
    named = config.ood
    if not named:
        raise MissingData(
            f"the task ood needs --ood: a folder of images or shards, a set below --data_root "
            f"({', '.join(name for name in CATALOGUE if '/' not in name)}), or {PHOTO_PATCHES}"
        )
    if named == PHOTO_PATCHES:
        return photo_patches()
    if named in CATALOGUE:
        return CATALOGUE[named].open(config.data_root, "test")
    found = own_data(named)
    return found.get("test") or found["train"]
