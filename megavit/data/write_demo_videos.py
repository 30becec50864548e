"""Small videos out of an installed package: handwritten digits (scikit-learn's) that move left, right, up or
down, and jump from side to side on their way. Nothing is downloaded.

The middle frame, and a frame that is drawn at random, show a digit in the same places whatever the direction
is, so one frame says nothing: a quarter is right by chance. Frames without their order can tell the axis, but
not the direction: a half.

Letters: n videos, T frames of a video.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavit.data.video import require_pyav
from megavit.data.write import DataSet, Split, digest, digits_arrays

SIDE, LENGTH, SPEED = 16, 7, 2  # pixels, frames, pixels a frame
DIRECTIONS = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}
_FRAMES_PER_S, _BITS_PER_S = 10, 2_000_000


@dataclass(frozen=True)
class Videos:
    """Grey videos uint8 [n, T, SIDE, SIDE] and the numbers of their directions, stored as mp4 (MPEG-4)."""

    frames: np.ndarray
    labels: np.ndarray

    def __call__(self, i: int) -> dict[str, bytes]:
        return {"mp4": encode_mp4(self.frames[i]), "cls": str(self.labels[i]).encode()}

    def split(self, name: str) -> Split:
        return Split(name, len(self.frames), self, digest(self.frames.tobytes(), self.labels.tobytes()))


def moving_digits_set() -> DataSet:
    """The digits of the demo's splits train and test, each in a direction. ValueError without PyAV."""
    require_pyav()
    random = np.random.default_rng(0)
    splits = [
        _moved(found.images, random).split(name)
        for name, found in zip(("train", "test"), digits_arrays(), strict=True)
    ]
    return DataSet(splits, list(DIRECTIONS), baselines=_baselines)


def _moved(digits: np.ndarray, random: np.random.Generator) -> Videos:
    labels = np.arange(len(digits)) % len(DIRECTIONS)
    frames = []
    for ink, label in zip(digits, labels, strict=True):
        row, column = random.integers(2, 7, 2).tolist()
        side = int(random.choice((-1, 1)))
        frames.append(moving(ink, places(list(DIRECTIONS)[label], (row, column), side)))
    return Videos(np.stack(frames), labels)


def places(direction: str, middle: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """Row and column of a digit in each frame. It is in the `middle` when half of the time has passed; across
    its way it is on the `side` 1 or -1 in even frames and on the other in odd ones, as far from the middle as
    it is along it."""
    down, right = DIRECTIONS[direction]
    found = []
    for number in range(LENGTH):
        along = SPEED * (number - LENGTH // 2)
        across = side * (-1) ** number * abs(along)
        row, column = (down * along, across) if down else (across, right * along)
        found.append((middle[0] + row, middle[1] + column))
    return found


def moving(ink: np.ndarray, where: Sequence[tuple[int, int]]) -> np.ndarray:
    """Frames uint8 [T, SIDE, SIDE] of a digit `ink`, uint8 [8, 8], in several places, partly outside
    perhaps."""
    border = len(ink)
    frames = np.zeros((len(where), SIDE + 2 * border, SIDE + 2 * border), np.uint8)
    for frame, (row, column) in zip(frames, where, strict=True):
        frame[border + row :, border + column :][: len(ink), : len(ink)] = ink
    return frames[:, border:-border, border:-border]


def encode_mp4(frames: np.ndarray) -> bytes:
    """Grey frames uint8 [T, H, W] as an mp4 file of 10 frames a second."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=_FRAMES_PER_S)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt, stream.bit_rate = "yuv420p", _BITS_PER_S
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _baselines() -> dict[str, Any]:
    chance = 1 / len(DIRECTIONS)
    return {"split": "test", "metric": "top1", "results": {"any direction": chance}}
