"""Decoding samples to see whether training could, whatever they hold. Imports torch, for seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import numpy as np
import torch

from megavit.data.audit_planes import PlaneCounts, name_of_plane, plane_members
from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.fields import Field, Labels, Picture
from megavit.data.geometry import Geometry
from megavit.data.index import LABEL_EXTENSIONS, VIDEO_EXTENSIONS
from megavit.data.manifest import Manifest
from megavit.data.plane_facts import PlaneFacts
from megavit.data.planes import PLANE_KINDS, check_values, read_plane
from megavit.data.samples import Samples
from megavit.data.video import Video, check_video


class Trial:
    """Decodes samples as training does, with any class number and without augmentation, and counts in
    `counts`, by the extension of their members, what their planes hold, which are what `planes` says."""

    def __init__(self, manifest: Manifest, cache: ShardCache, planes: Mapping[str, PlaneFacts]):
        torch.set_num_threads(1)  # there is a process for each core
        self._manifest, self._cache, self._planes = manifest, cache, planes
        self._of_members: dict[tuple[str, ...], tuple[Samples, list[np.ndarray]]] = {}
        self.counts: defaultdict[str, PlaneCounts] = defaultdict(PlaneCounts)

    def decode(self, shard: int, index: int, members: Iterable[str]) -> None:
        """SampleError if training could not use the sample, which has these members."""
        names = tuple(members)
        if names not in self._of_members:
            samples = Samples(self._manifest, self._fields(names), DataConfig(), self._cache)
            self._of_members[names] = samples, [column[0, ...] for column in samples.empty(1)]
        samples, row = self._of_members[names]
        samples.load(shard, index, row, None)

    def _fields(self, members: Iterable[str]) -> list[Field]:
        found = plane_members(members)
        is_video = any(name in VIDEO_EXTENSIONS for name in members)
        fields: list[Field] = [_WholeVideo(size=1, frames=1) if is_video else Picture(size=224)]
        if not (found or self._planes) or any(name in LABEL_EXTENSIONS for name in members):
            fields.append(Labels(num_classes=2**31 - 1))  # labels are int32
        # If it is not known what there is: an npy may be anything, such as a feature.
        guessed = {name_of_plane(name): PlaneFacts() for name in found if name.endswith(".png")}
        for name, facts in (self._planes or guessed).items():
            extensions = tuple(f"{name}.{kind}" for kind in PLANE_KINDS)
            fields.append(_WholePlane(f"plane {name}", extensions, facts=facts, counts=self.counts))
        return fields


@dataclass(frozen=True)
class _WholeVideo(Video):
    """Decodes every frame, and keeps none."""

    def decode_first(
        self, data: bytes, extension: str, decide: Callable[[int, int], Geometry], out: np.ndarray
    ) -> Geometry:
        width, height, _ = check_video(data, decode=True)
        return decide(width, height)


@dataclass(frozen=True)
class _WholePlane(Field):
    """Reads a whole plane as training would, of any number of channels, and counts what it holds."""

    shape: tuple[int, ...] = field(init=False, default=())
    dtype: str = field(init=False, default="uint8")
    _: KW_ONLY
    facts: PlaneFacts
    counts: defaultdict[str, PlaneCounts]

    def decode(self, data: bytes, extension: str, geometry: Geometry, out: np.ndarray) -> None:
        kind = extension.rpartition(".")[2]
        values = read_plane(data, kind, partial(geometry.at, member=extension))
        check_values(values, self.facts.invalid, self.facts.classes, False, extension)
        self.counts[extension].look(values, self.facts)
