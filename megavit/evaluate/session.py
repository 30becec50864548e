"""An evaluation under way: the model, the settings, and the features of the data sets so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megavit.data.loader import Share
from megavit.evaluate.cache import Pass, PassSettings, default_folder
from megavit.evaluate.config import EvaluateConfig
from megavit.evaluate.dense import DensePass
from megavit.evaluate.features import Features
from megavit.evaluate.images import Augment, Transform, load_batches
from megavit.evaluate.model import POOLED, ExportedModel, FrozenModel, chosen_layers
from megavit.evaluate.sets.catalogue import CATALOGUE, DENSE_SETS, Split
from megavit.evaluate.sets.celeba import celeba
from megavit.evaluate.sets.dense import DenseSet, Plane, kitti, own_dense
from megavit.evaluate.sets.image_set import Adjust, ImageSet, MissingData
from megavit.evaluate.sets.photo_patches import PHOTO_PATCHES, photo_patches
from megavit.evaluate.sets.shards import OWN_LAYOUT, own_data
from megavit.parallel.collectives import gather_from_tp

_SAY_S = 60.0  # between two lines about progress where there is no terminal


class Session:
    """Gives tasks their features, so that each image goes through the model once, whatever asks for it.

    `layers` are those of the probes. `say` prints a line on the main rank.
    """

    def __init__(self, model: FrozenModel, config: EvaluateConfig, say: Callable[[str], None]):
        self.model, self.config, self.mesh, self.say = model, config, model.mesh, say
        self.dense = model.dense if isinstance(model, ExportedModel) else None
        self.layers = chosen_layers(config.layers, model.depth)
        folder = Path(config.cache_dir) if config.cache_dir else default_folder()
        self._settings = PassSettings(folder, config.cache_dtype, config.batch_size, config.workers)
        self._sets: dict[tuple[str, str], ImageSet] = {}
        self._features: dict[tuple[str, object], dict[str, Features]] = {}
        self._transforms: dict[tuple[str, Adjust | None], str] = {}
        self._bad: dict[tuple[str, str, str], dict[int, str]] = {}

    def open(self, data: str, split: Split) -> ImageSet:
        """A split of a set: of --data if `data` is empty, else of one below --data_root, by its name. Read by
        the main rank, for all. MissingData if it is not there. Collective."""
        key = (data, split)
        if key not in self._sets:
            self._sets[key] = self.mesh.on_main(lambda: self._read(data, split))
        return self.limited(self._sets[key])

    def _read(self, data: str, split: Split) -> ImageSet:
        if data == "celeba":
            return celeba(self.config.data_root, split, target=self.config.attribute)
        if data:
            return CATALOGUE[data].open(self.config.data_root, split)
        found = own_data(self.config.data)
        if split not in found:
            raise MissingData(
                f"{self.config.data} has no {split} images; it has {' and '.join(found)}: {OWN_LAYOUT}"
            )
        return found[split]

    def open_dense(self, data: str, plane: Plane) -> DenseSet:
        """The test pictures of a set with planes, named as for `open`. Collective."""

        def read() -> DenseSet:
            if data == "kitti":
                return kitti(self.config.data_root, self.config.kitti_list)
            if data:
                return DENSE_SETS[data].open(self.config.data_root)
            return own_dense(self.config.data, plane)

        images = self.mesh.on_main(read)
        for note in images.notes:
            self.tell(note)
        return images.first(self.config.limit) if self.config.limit else images

    @contextmanager
    def maps(self, images: DenseSet) -> Iterator[DensePass]:
        """What gives the maps of a set's pictures, while a protocol looks at them."""
        assert self.dense, self.model.name  # which `check_kind` saw to
        with self._bar(images.name) as progress:
            found = DensePass(self.dense, images, self.config.workers, progress)
            yield found
        self._transforms[images.digest, None] = self.dense.as_text()
        self._bad[images.name, "test", images.digest] = dict(found.bad)

    def outside(self) -> ImageSet:
        """The data of --ood, which the model should not know. Collective."""
        return self.limited(self.mesh.on_main(lambda: _outside(self.config)))

    def limited(self, images: ImageSet) -> ImageSet:
        """The set, or with --limit so many of its images."""
        return images.first(self.config.limit) if self.config.limit else images

    def features(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Features]:
        """The features of a set, with the labels that `images` has. Collective."""
        wanted = list(dict.fromkeys(layers))
        key = (images.digest, images.adjust)
        found = self._features.get(key, {})
        if missing := [layer for layer in wanted if layer not in found]:
            self._features[key] = found = found | self._compute(images, missing)
        return {layer: found[layer].labelled(images) for layer in wanted}

    def probe_features(self, images: ImageSet) -> dict[str, Features]:
        """Of the layers of --layers; what the classifier reads is computed with them. Collective."""
        found = self.features(images, [POOLED, *self.layers])
        return {layer: found[layer] for layer in self.layers}

    def pooled(self, images: ImageSet, *, probed: bool = True) -> Features:
        """What the model's classifier reads. The layers of --layers are computed with it, unless no probe
        will ask for this set (not `probed`). Collective."""
        return self.features(images, [POOLED, *(self.layers if probed else ())])[POOLED]

    def augmented(
        self, images: ImageSet, epochs: Sequence[Sequence[np.ndarray]]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """This rank's share of each global batch of each epoch, randomly cropped: the features of the probes'
        layers, float32 [b, D], and the class ids, int64 [b]; b may be 0. Nothing is kept. Collective."""
        mesh, config = self.mesh, self.config
        transform = Transform(self.model.preprocessing, images.adjust)
        share = Share(tp_rank=mesh.tp_rank, tp_size=mesh.tp_size, local_size=mesh.local_size)
        for epoch, batches in enumerate(epochs):
            augment = Augment(config.crop_area, config.flip, config.seed, epoch)
            mine = [batch[mesh.dp_rank :: mesh.dp_size] for batch in batches]
            loaded = load_batches(images, transform, mine, share, config.workers, augment)
            done, total = 0, sum(map(len, mine))
            with self._bar(f"{images.name}, epoch {epoch + 1} of {len(epochs)}") as progress:
                for batch in loaded:
                    pixels = gather_from_tp(mesh, batch.pixels.to(mesh.device), 0)[: len(batch.rows)]
                    parts = [
                        self.model.features(some, self.layers) for some in pixels.split(config.batch_size)
                    ]
                    labels = torch.from_numpy(images.labels[batch.rows.numpy(), 0])
                    yield {layer: torch.cat([part[layer] for part in parts]) for layer in self.layers}, labels
                    done += len(batch.rows)
                    progress(done, total)

    def _compute(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Features]:
        with self._bar(f"{images.name} {images.split}") as progress:
            one = Pass(self.model, images, self._settings, self.tell, progress)
            found = one.features(layers)
        self._transforms[images.digest, images.adjust] = one.transform.text
        bad = self._bad.setdefault((images.name, images.split, images.digest), {})
        bad.update(one.bad)
        return found

    def bad(self) -> Iterator[tuple[str, list[str]]]:
        """Each set that has images which could not be used, and the reasons, one an image."""
        for (name, split, _), reasons in self._bad.items():
            if reasons:
                yield f"{name} {split}", [reasons[row] for row in sorted(reasons)]

    def transform(self, images: ImageSet | DenseSet) -> str:
        """What was done to the images of a set that has been looked at, in words."""
        return self._transforms[images.digest, images.adjust if isinstance(images, ImageSet) else None]

    def tell(self, text: str) -> None:
        """Say something that --quiet leaves out."""
        if not self.config.quiet:
            self.say(text)

    @contextmanager
    def _bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Tells the main rank's terminal how far this is; a log file once a minute."""
        hide = self.config.quiet or not self.mesh.is_main
        on_terminal, started, said = sys.stderr.isatty(), time.monotonic(), time.monotonic()
        with tqdm(desc=title, unit=" images", leave=False, disable=hide or not on_terminal) as bar:

            def show(done: int, total: int) -> None:
                nonlocal said
                # The other ranks are taken to be as far as this one.
                bar.total = total * self.mesh.dp_size
                bar.update(done * self.mesh.dp_size - bar.n)
                now = time.monotonic()
                if not on_terminal and now - said > _SAY_S and done:
                    said, left_s = now, (now - started) / done * (total - done)
                    self.tell(f"{title}: {done:,} of {total:,} images a rank, {left_s / 60:.0f} min left")

            yield show


def _outside(config: EvaluateConfig) -> ImageSet:
    named = config.ood
    if named == PHOTO_PATCHES:
        return photo_patches()
    if named in CATALOGUE:
        return CATALOGUE[named].open(config.data_root, "test")
    found = own_data(named)
    return found.get("test") or found["train"]
