"""What the loader decodes of a sample: declared fields, each a row of a tensor of the batch.

A field of your own is a frozen dataclass that inherits from `Field` and has a `decode`. It lives in a module
that worker processes can import by its name.

Letters: b micro-batch, p this rank's part of it, S side of a square field, C channels, M labels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from megavit.data.bad import BadSample
from megavit.data.decode import Decoder, resize_into
from megavit.data.exif import Box
from megavit.data.geometry import Geometry
from megavit.data.images import check_pixels
from megavit.data.index import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from megavit.data.json_data import kind_of, parse_json
from megavit.data.labels import pad_labels, parse_labels
from megavit.data.planes import PLANE_KINDS, check_values, known_pixels, read_plane

# Those that a TP group can gather.
_DTYPES = ("uint8", "int8", "int32", "int64", "float16", "float32", "float64", "bool")
_LARGEST = float(np.finfo(np.float32).max)


class Batch(NamedTuple):
    """A rank's part of a micro-batch, and what is to be done with the whole of it on the device.

    Slots beyond the batch (the parts of a TP group are of equal size) and bad ones have weight 0 and hold
    each field's `fill`.
    """

    fields: dict[str, Tensor]  # of each field, by name: [p, *shape]
    weights: Tensor  # float32 [p], 0 or 1
    flips: Tensor  # bool [b], see device.mirror
    blends: Tensor | None  # float32 [b, 6], see mixing.blends
    bad: list[BadSample]
    colors: Tensor | None = None  # float32 [b, 4], see color.color_changes
    numbers: Tensor | None = None  # int64 [b], in training: where each sample comes in the shards


@dataclass(frozen=True)
class Field(ABC):
    """One tensor of a sample.

    Args:
        name: what the batch calls it.
        extensions: members of the sample that may hold it; the first that is there is read. Several fields
            may read the same member.
        shape: of one sample's tensor.
        dtype: NumPy's name of its type.
        fill: what the slots of bad samples hold, and the empty ones that make the parts of a TP group equal.
    """

    # Whether it is a square of pixels, [S, S, ...], which the device mirrors with the picture.
    is_spatial: ClassVar[bool] = False
    # Whether it holds colours in 8 bits, [..., S, S, C], which colour jitter changes.
    is_color: ClassVar[bool] = False

    name: str
    extensions: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    fill: float = 0

    def __post_init__(self) -> None:
        if not self.extensions or isinstance(self.extensions, str):
            raise ValueError(f"field {self.name!r} needs a tuple of extensions, got {self.extensions!r}")
        if not all(side > 0 for side in self.shape):
            raise ValueError(f"field {self.name!r} has shape {list(self.shape)}; every side must be positive")
        if self.dtype not in _DTYPES:
            raise ValueError(f"field {self.name!r} has dtype {self.dtype!r}, not one of {', '.join(_DTYPES)}")
        if "float" not in self.dtype and not (
            math.isfinite(self.fill) and np.array(self.fill).astype(self.dtype) == self.fill
        ):
            raise ValueError(f"field {self.name!r} is filled with {self.fill}, which is no {self.dtype}")

    def empty(self, count: int) -> np.ndarray:
        """[count, *shape], filled."""
        shape = (count, *self.shape)
        # Memory from zeros is only taken when it is written to.
        return np.full(shape, self.fill, self.dtype) if self.fill else np.zeros(shape, self.dtype)

    @abstractmethod
    def decode(self, data: bytes, extension: str, geometry: Geometry, out: np.ndarray) -> None:
        """Write what the member `extension` with the bytes `data` says into `out` [*shape], which holds
        `fill`. ValueError, saying what is wrong, makes the sample a bad one."""


@dataclass(frozen=True)
class Picture(Field):
    """An image, uint8 [S, S, C], cropped, resized with antialias and moved. The first picture of a sample
    decides the geometry of all its fields.

    Args:
        size: S.
        channels: 1 (grey) or 3 (RGB); whatever the file has is converted.
        antialias, decoder, max_pixels: as in `DataConfig`.
    """

    is_spatial = True
    is_color = True

    name: str = "image"
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    shape: tuple[int, ...] = field(init=False)
    dtype: str = field(init=False, default="uint8")
    fill: float = field(init=False, default=0)
    _: KW_ONLY
    size: int
    channels: int = 3
    antialias: bool = True
    decoder: str = "full"
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (self.size, self.size, self.channels))
        super().__post_init__()
        _ = self._decoder  # its checks

    def decode(self, data: bytes, extension: str, geometry: Geometry, out: np.ndarray) -> None:
        self.decode_first(data, extension, partial(geometry.at, member=extension), out)

    def decode_first(
        self, data: bytes, extension: str, decide: Callable[[int, int], Geometry], out: np.ndarray
    ) -> Geometry:
        """Decode by the geometry that `decide(width, height)` gives for the picture's size, and return it."""
        geometry: Geometry | None = None

        def choose_box(width: int, height: int) -> Box:
            nonlocal geometry
            geometry = decide(width, height)
            return geometry.box

        def place() -> Box:
            assert geometry is not None
            return geometry.box_in(self.size)

        self._decoder.load(data, choose_box, out, place)
        assert geometry is not None
        geometry.move(out)
        return geometry

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.channels, self.size, self.antialias, self.decoder, self.max_pixels)


@dataclass(frozen=True)
class FloatPicture(Picture):
    """A picture of any number of channels whose values are not 8 bits of colour: float32 [S, S, C], `scale *
    stored + offset`, interpolated as a picture, channel by channel.

    Args:
        scale, offset: they should bring the values to about [-1, 1], as the model takes them.
        fill: what a bad slot holds, and the border that an affine map leaves.
    """

    is_color = False

    extensions: tuple[str, ...] = ("npy", "png")
    dtype: str = field(init=False, default="float32")
    fill: float = 0.0
    _: KW_ONLY
    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (self.size, self.size, self.channels))
        Field.__post_init__(self)
        _check_kinds(self)

    def decode_first(
        self, data: bytes, extension: str, decide: Callable[[int, int], Geometry], out: np.ndarray
    ) -> Geometry:
        geometry: Geometry | None = None

        def check_size(width: int, height: int) -> None:
            nonlocal geometry
            check_pixels(width, height, self.max_pixels, data)
            geometry = decide(width, height)

        values = read_plane(data, _kind(extension), check_size)
        assert geometry is not None
        _check_channels(values, self.channels, extension)
        left, top, right, bottom = geometry.box
        crop = values[top:bottom, left:right] * np.float32(self.scale) + np.float32(self.offset)
        if not np.isfinite(crop).all():
            raise ValueError(f"its {extension} has values that are not finite")
        pixels = np.ascontiguousarray(crop, np.float32)
        resize_into(pixels, self.antialias, geometry.box_in(self.size), out)
        geometry.move(out, self.fill)
        return geometry


@dataclass(frozen=True)
class Plane(Field):
    """A value a pixel, such as a mask or depth: [S, S], or [S, S, C] with several channels. Every value is
    `scale` times a stored one, that of the nearest pixel; none is interpolated.

    The file must have the size of the sample's picture, and is stored upright. What an affine map brings in
    from outside is `fill`.

    Args:
        size: S.
        channels: C, as many as the file has.
        invalid: the stored number that means that nothing is known of a pixel, which becomes `fill`; so does
            what is not finite.
        scale: the unit in which the file counts; KITTI's depth in 1/256 m is `dtype="float32", invalid=0,
            scale=1 / 256`.
        classes: of a mask: a file with a stored number outside of 0 to classes - 1, which is not `invalid`,
            is bad.
        allow_empty: whether a file may know nothing of any pixel.
        negative: whether negative numbers mean something; if not, nothing is known where they are.
        png_bits: the fewest bits a channel that a PNG may have; one with 8 has too few for depth.
    """

    is_spatial = True

    name: str
    extensions: tuple[str, ...]
    shape: tuple[int, ...] = field(init=False)
    dtype: str = field(default="float32", kw_only=True)
    fill: float = field(default=0, kw_only=True)
    size: int
    channels: int = 1
    _: KW_ONLY
    invalid: float | None = None
    scale: float = 1.0
    classes: int | None = None
    allow_empty: bool = True
    negative: bool = True
    png_bits: int = 1

    def __post_init__(self) -> None:
        channels = () if self.channels == 1 else (self.channels,)
        object.__setattr__(self, "shape", (self.size, self.size, *channels))
        super().__post_init__()
        _check_kinds(self)

    def decode(self, data: bytes, extension: str, geometry: Geometry, out: np.ndarray) -> None:
        stored = read_plane(data, _kind(extension), partial(geometry.at, member=extension))
        _check_channels(stored, self.channels, extension)
        if _kind(extension) == "png" and 8 * stored.itemsize < self.png_bits:
            bits = 8 * stored.itemsize
            raise ValueError(f"its {extension} has {bits} bits a channel, not {self.png_bits}")
        if not self.negative and (stored < 0).any():
            stored = np.where(stored < 0, np.nan, stored)
        check_values(stored, self.invalid, self.classes, self.allow_empty, extension)
        values, outside = geometry.nearest(stored, self.size)
        unknown = ~known_pixels(values, self.invalid)
        if outside is not None:
            unknown |= outside[:, :, None]
        values = np.where(unknown, 0, values)
        if self.scale != 1:
            values = values * self.scale
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            found = values.astype(self.dtype)
        wrong = ~np.isfinite(found) if found.dtype.kind == "f" else found != values
        if wrong.any():
            raise ValueError(f"its {extension} holds {values[wrong][0]}, which is no {self.dtype}")
        out[...] = np.where(unknown, np.array(self.fill, self.dtype), found).reshape(self.shape)


@dataclass(frozen=True)
class Labels(Field):
    """Class numbers, int32 [M], filled up with -1, of a `cls` member (a number) or a `json` one (a list, or
    {"labels": [...]}).

    Args:
        num_classes: every number must be below it.
        max_labels: M; a sample with more is bad.
        allow_none: whether a sample may have an empty list.
    """

    name: str = "label"
    extensions: tuple[str, ...] = LABEL_EXTENSIONS
    shape: tuple[int, ...] = field(init=False)
    dtype: str = field(init=False, default="int32")
    fill: float = field(init=False, default=-1)
    _: KW_ONLY
    num_classes: int
    max_labels: int = 32
    allow_none: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (self.max_labels,))
        super().__post_init__()

    def decode(self, data: bytes, extension: str, geometry: Geometry, out: np.ndarray) -> None:
        labels = parse_labels(_kind(extension), data, self.num_classes, allow_none=self.allow_none)
        out[:] = pad_labels(labels, self.max_labels)


@dataclass(frozen=True)
class Number(Field):
    """A number of a JSON object, by its key: float32, a scalar."""

    name: str
    extensions: tuple[str, ...] = field(default=("json",), kw_only=True)
    shape: tuple[int, ...] = field(init=False, default=())
    dtype: str = field(init=False, default="float32")
    fill: float = field(default=0.0, kw_only=True)
    key: str

    def decode(self, data: bytes, extension: str, geometry: Geometry, out: np.ndarray) -> None:
        try:
            value = parse_json(data)
        except ValueError as error:
            raise ValueError(f"its {extension} cannot be parsed: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"its {extension} holds {kind_of(value)}, not an object with {self.key!r}")
        if self.key not in value:
            raise ValueError(f"its {extension} has no {self.key!r}")
        number = value[self.key]
        if type(number) not in (int, float):  # not isinstance: true is an int to Python
            raise ValueError(f"its {extension} has {kind_of(number)} as {self.key!r}, not a number")
        if not abs(number) <= _LARGEST:
            raise ValueError(f"its {extension} has {str(number)[:40]} as {self.key!r}, no finite float32")
        out[...] = number


def _kind(extension: str) -> str:
    """The last part of an extension, which says what a member is: `png` of `depth.png`."""
    return extension.rpartition(".")[2]


def _check_kinds(plane: Field) -> None:
    if wrong := [name for name in plane.extensions if _kind(name) not in PLANE_KINDS]:
        raise ValueError(
            f"field {plane.name!r} reads {' and '.join(PLANE_KINDS)}, such as 'depth.png', not {wrong[0]!r}"
        )


def _check_channels(values: np.ndarray, channels: int, extension: str) -> None:
    if values.shape[2] != channels:
        raise ValueError(f"its {extension} has {values.shape[2]} channels, not {channels}")
