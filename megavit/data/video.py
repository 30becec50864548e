"""Videos of a sample: which frames make its clips, and decoding those alone, with PyAV.

A video's frames are known by the time stamps of its packets, which are listed without decoding. A clip is
then decoded from the last key frame before it; frames that are decoded on the way are not converted.

Letters: T frames of a clip, V views (clips times crops), S side, C channels, H and W the sides of a frame.
"""

from __future__ import annotations

import importlib.util
import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megavit.data.decode import resize_into
from megavit.data.exif import Box
from megavit.data.fields import Field, Picture
from megavit.data.geometry import Geometry
from megavit.data.images import DecodeError, check_pixels
from megavit.data.index import VIDEO_EXTENSIONS


class VideoSize(NamedTuple):
    """What a video is, upright."""

    width: int
    height: int
    frames: int


def require_pyav() -> None:
    """ValueError saying what to install, unless PyAV is there."""
    if importlib.util.find_spec("av") is None:
        raise ValueError("videos need PyAV, which is not installed: pip install 'megavit[video]'")


def check_video(data: bytes, *, decode: bool = False) -> VideoSize:
    """The size of a video, from its packets and its first frame. DecodeError if it is broken, as far as that
    shows; with `decode`, by decoding all of it."""
    with _opened(data) as (container, stream):
        times = _Times(container, stream)
        size = VideoSize(*_upright_size(_first_frame(container, stream, times)), len(times.frames))
        if decode:
            for _ in _decoded(container, stream, times, times.frames, channels=1):
                pass
        return size


@dataclass(frozen=True)
class Video(Picture):
    """Clips of a video, uint8 [T, S, S, C], all frames in one geometry; with several views [V, T, S, S, C].
    It decides the geometry of its sample as a picture does, and is mirrored here, not on the device.

    Clip i of n begins at the share (i + u) / n of the time that there is for its beginning: u is random in
    training, and 1/2 in evaluation, so that one clip is the middle of the video and several are spread
    evenly. A video that is shorter than a clip repeats its last frame.

    Args:
        size, channels, antialias, max_pixels: as for `Picture`.
        frames: T.
        stride: frames of the video between two of the clip, plus 1.
        interval_s: seconds between two frames of the clip, whatever the video's frame rate is, in place of
            `stride`; the frame that is shown at a time is taken.
        clips: of a video.
        crops: of a clip: 1, or 3, of which the first and last are moved to the ends of the longer side. Views
            are in the order of the clips, and for each clip of its crops.
    """

    is_spatial = False

    name: str = "video"
    extensions: tuple[str, ...] = VIDEO_EXTENSIONS
    decoder: str = field(init=False, default="full")
    _: KW_ONLY
    frames: int
    stride: int = 1
    interval_s: float | None = None
    clips: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"field {self.name!r} has {name} {getattr(self, name)}; it must be positive")
        if self.interval_s is not None and not 0 < self.interval_s < float("inf"):
            raise ValueError(f"field {self.name!r} has interval_s {self.interval_s}; it must be positive")
        if self.crops not in (1, 3):
            raise ValueError(f"field {self.name!r} has {self.crops} crops, not 1 or 3")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 (grey) or 3 (RGB)")
        views = self.clips * self.crops
        clip = (self.frames, self.size, self.size, self.channels)
        object.__setattr__(self, "shape", clip if views == 1 else (views, *clip))
        Field.__post_init__(self)
        require_pyav()

    def decode_first(
        self, data: bytes, extension: str, decide: Callable[[int, int], Geometry], out: np.ndarray
    ) -> Geometry:
        views = out.reshape(self.clips, self.crops, self.frames, self.size, self.size, self.channels)
        with _opened(data) as (container, stream):
            times = _Times(container, stream)
            check_pixels(stream.width, stream.height, self.max_pixels, data)
            width, height = _upright_size(_first_frame(container, stream, times))
            geometry = decide(width, height)
            boxes = _boxes(geometry, self.crops)
            for number, clip in enumerate(views):
                wanted = self._chosen(times, number, geometry.time)
                for time, pixels in _decoded(container, stream, times, wanted, self.channels):
                    if pixels.shape[:2] != (height, width):
                        raise DecodeError(
                            f"its frames change from {width}x{height} to "
                            f"{pixels.shape[1]}x{pixels.shape[0]} pixels"
                        )
                    places = [at for at, other in enumerate(wanted) if other == time]
                    for crop, (left, top, right, bottom) in zip(clip, boxes, strict=True):
                        self._place(pixels[top:bottom, left:right], geometry, crop[places[0]])
                        crop[places[1:]] = crop[places[0]]
        return geometry

    def _chosen(self, times: _Times, clip: int, time: float | None) -> list[int]:
        """When the frames [T] that make a clip are shown, in the stream's unit."""
        share = (clip + (0.5 if time is None else time)) / self.clips
        shown, steps = times.frames, np.arange(self.frames)
        if self.interval_s is None:
            room = max(0, len(shown) - ((self.frames - 1) * self.stride + 1))
            numbers = min(room, int((room + 1) * share)) + steps * self.stride
        else:
            interval = self.interval_s / times.unit_s
            start = max(0.0, shown[-1] - shown[0] - (self.frames - 1) * interval) * share
            # Rounded: a frame's own time, less what floating point loses, would be the frame before.
            moments = np.rint(shown[0] + start + steps * interval)
            numbers = np.searchsorted(shown, moments, side="right") - 1
        return [shown[number] for number in np.minimum(numbers, len(shown) - 1)]

    def _place(self, crop: np.ndarray, geometry: Geometry, out: np.ndarray) -> None:
        """Write a frame's crop [H, W, C] into `out` [S, S, C]."""
        resize_into(np.ascontiguousarray(crop), self.antialias, geometry.box_in(self.size), out)
        geometry.move(out)
        if geometry.mirror:
            out[:] = out[:, ::-1].copy()


def _boxes(geometry: Geometry, crops: int) -> list[Box]:
    """The crops of a frame: the geometry's box, for 3 between two that lie at the ends of the longer side."""
    left, top, right, bottom = box = geometry.box
    if crops == 1:
        return [box]
    if geometry.width >= geometry.height:
        rest = geometry.width - right
        return [(0, top, right - left, bottom), box, (left + rest, top, right + rest, bottom)]
    rest = geometry.height - bottom
    return [(left, 0, right, bottom - top), box, (left, top + rest, right, bottom + rest)]


class _Times:
    """When the frames of a stream are shown, and where decoding may begin, in the stream's own unit."""

    def __init__(self, container: Any, stream: Any):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if any(packet.is_corrupt for packet in packets) or len(packets) < stream.frames:
            raise DecodeError(f"it is cut off: {len(packets)} of {stream.frames} frames are there")
        if not packets:
            raise DecodeError("it has no frames")
        if any(packet.pts is None for packet in packets):
            raise DecodeError("its frames have no time stamps")
        self.frames: list[int] = sorted({packet.pts for packet in packets})
        self.unit_s = float(stream.time_base)
        keys = sorted((packet.pts, packet.dts) for packet in packets if packet.is_keyframe)
        self._keys = [pts for pts, _ in keys]
        self._seeks = [pts if dts is None else dts for pts, dts in keys]

    def seek(self, time: int) -> int:
        """Where to seek so that the frame shown at `time` can be decoded."""
        number = bisect_right(self._keys, time) - 1
        return self._seeks[number] if number >= 0 else self.frames[0]


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and video stream in `data`. Whatever FFmpeg says of either becomes a DecodeError."""
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise DecodeError("it has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise DecodeError("its codec is unknown")
            stream.codec_context.thread_count = 1  # the loader's parallelism is its processes
            yield container, stream
    except av.FFmpegError as error:
        raise DecodeError(f"video: {error.strerror or error}") from error


def _first_frame(container: Any, stream: Any, times: _Times) -> Any:
    container.seek(times.seek(times.frames[0]), stream=stream)
    frame = next(container.decode(stream), None)
    if frame is None:
        raise DecodeError("its first frame cannot be decoded")
    return frame


def _upright_size(frame: Any) -> tuple[int, int]:
    return (frame.height, frame.width) if _quarters(frame) % 2 else (frame.width, frame.height)


def _quarters(frame: Any) -> int:
    """Quarter turns, counterclockwise, by which a frame is turned to be shown."""
    return round(frame.rotation / 90) % 4


def _decoded(
    container: Any, stream: Any, times: _Times, wanted: Sequence[int], channels: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The time and the pixels, uint8 [H, W, C], upright, of each frame shown at one of the times `wanted`,
    ascending. DecodeError if one cannot be decoded."""
    for place in dict.fromkeys((times.seek(wanted[0]), times.frames[0])):
        container.seek(place, stream=stream)
        frames = container.decode(stream)
        frame = next(frames, None)
        # Containers differ in what they seek by; the beginning is always right.
        if frame is not None and frame.pts is not None and frame.pts <= wanted[0]:
            break
    left = set(wanted)
    while frame is not None and left:
        if frame.pts in left:
            if frame.is_corrupt:  # what could be made of a damaged one, often what was there before
                break
            left.remove(frame.pts)
            pixels = frame.to_ndarray(format="rgb24" if channels == 3 else "gray")
            yield frame.pts, np.rot90(pixels.reshape(*pixels.shape[:2], channels), _quarters(frame))
        frame = next(frames, None) if left else None
    if left:
        number = times.frames.index(min(left))
        raise DecodeError(f"its frame {number} of {len(times.frames)} cannot be decoded")
