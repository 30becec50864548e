"""Clips of real mp4 files: which frames they show, in which geometry, and what is wrong with broken ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megavit.data import geometry
from megavit.data.config import DataConfig
from megavit.data.fields import Labels, Picture
from megavit.data.images import DecodeError
from megavit.data.loader import EvalLoader, TrainLoader
from megavit.data.manifest import open_shards
from tests.data.dense_fixtures import encode_video
from tests.data.test_fields import write

pytest.importorskip("av", reason="videos need PyAV: pip install 'megavit[video]'")
from megavit.data.video import Video, check_video

CONFIG = DataConfig(workers=0, crop_area=(0.3, 1.0), lanes=1)
LEFT = (0, 24, 24, 48)  # the lower left, which has the frames' brightness
COLORS = list(range(20, 240, 5))  # 44 frames


def shown(
    data: bytes, video: Video, box: tuple[int, int, int, int] = LEFT, time: float | None = None, **more: bool
) -> np.ndarray:
    """A video's clips in a given geometry."""
    out = np.zeros(video.shape, np.uint8)
    video.decode_first(data, "mp4", lambda w, h: geometry.Geometry(w, h, box, time=time, **more), out)
    return out


def frames(clip: np.ndarray) -> list[int]:
    """Which frames of COLORS a clip [T, S, S, C] shows."""
    return [round((float(one.mean()) - 20) / 5) for one in clip]


@pytest.mark.parametrize("gop", [1, 6, 100])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_clip_shows_the_frames_that_were_chosen(gop: int, codec: str) -> None:
    """Catches frames counted from the key frame before the clip, in the order in which they are stored, or
    shifted by those that show later than they are stored."""
    data = encode_video(COLORS, gop=gop, codec=codec)
    assert check_video(data) == (64, 48, 44) == check_video(data, decode=True)
    video = Video(size=12, frames=4, stride=3)
    for time, first in ((0.0, 0), (0.31, 10), (0.999999, 34), (None, 17)):
        clip = shown(data, video, time=time)
        assert frames(clip) == [first, first + 3, first + 6, first + 9]
        assert np.array_equal(clip, shown(data, video, time=time))
    assert frames(shown(data, Video(size=8, frames=44), time=0.7)) == list(range(44))


def test_a_short_video_repeats_its_last_frame() -> None:
    """Catches a clip that ends in black, and a video of one frame that is refused."""
    data = encode_video(COLORS[:3])
    assert frames(shown(data, Video(size=8, frames=6), time=0.9)) == [0, 1, 2, 2, 2, 2]
    assert frames(shown(encode_video(COLORS[:1]), Video(size=8, frames=2, stride=4))) == [0, 0]


@pytest.mark.parametrize("time", [0.0, None, 0.8, 0.999])
def test_an_interval_in_seconds_does_not_depend_on_the_frame_rate(time: float | None) -> None:
    """Catches intervals in frames, and frames that rounding makes the ones before."""
    slow, fast = encode_video(COLORS[::2], rate=15), encode_video(COLORS[:-1], rate=30)
    video = Video(size=8, frames=4, interval_s=2 / 15)
    one, two = frames(shown(slow, video, time=time)), frames(shown(fast, video, time=time))
    assert np.ptp(np.diff(one)) == 0 and np.diff(one)[0] == 4 == np.diff(two)[0]
    assert 0 <= two[0] - one[0] <= 1
    assert frames(shown(fast, Video(size=8, frames=43, interval_s=1 / 30), time=time)) == list(range(43))
    assert frames(shown(slow, Video(size=8, frames=3, interval_s=10.0), time=time)) == [0, 42, 42]


def test_views_are_spread_over_the_video_and_its_longer_side() -> None:
    """Catches clips that crowd at one end, and crops that leave the frame or are in another order."""
    data = encode_video(COLORS)
    video = Video(size=24, frames=5, stride=2, clips=4, crops=3)
    box = (20, 24, 44, 48)
    views = shown(data, video, box).reshape(4, 3, 5, 24, 24, 3)
    for crop, at in enumerate(((0, 24, 24, 48), box, (40, 24, 64, 48))):
        one = shown(data, dataclasses.replace(video, clips=1, crops=1), at)
        assert np.array_equal(shown(data, dataclasses.replace(video, crops=1), at), views[:, crop])
        assert frames(one) == [18, 20, 22, 24, 26]
    assert [frames(clip)[0] for clip in views[:, 1]] == [4, 13, 22, 31]
    tall = shown(encode_video(COLORS, 48, 64), video, (0, 20, 24, 44)).reshape(4, 3, 5, 24, 24, 3)
    assert (tall[:, 0].mean() > 240) and frames(tall[0, 2]) == frames(views[0, 0])


def test_all_frames_are_cropped_moved_and_mirrored_alike() -> None:
    """Catches a geometry that is decided a frame, a mirror left to the device, which would turn the clip
    upside down, and grey taken from one colour."""
    data = encode_video(COLORS)
    video = Video(size=48, frames=6)
    plain, mirrored = shown(data, video, (0, 0, 48, 48)), shown(data, video, (0, 0, 48, 48), mirror=True)
    assert np.array_equal(mirrored, plain[:, :, ::-1]) and not video.is_spatial
    assert (plain[:, 2:20, 2:28] > 230).all() and (plain[:, 28:, 30:] < 150).all()
    config = dataclasses.replace(CONFIG, rotate_degrees=40.0, zoom=0.3, flip=False)
    moved = geometry.decide(64, 48, config, np.array([0.9, 0.5, 0.5, 0.5, 0.9, 0.5, 0.5, 0.5, 0.9, 0.4]))
    assert moved.affine
    out, alone = np.zeros(video.shape, np.uint8), np.zeros((48, 48, 3), np.uint8)
    video.decode_first(data, "mp4", lambda w, h: moved, out)
    still = dataclasses.replace(moved, affine=None)
    video.decode_first(data, "mp4", lambda w, h: still, plain)
    for one, moved_one in zip(plain, out, strict=True):
        alone[:] = one
        moved.move(alone)
        assert np.array_equal(alone, moved_one)
    grey = shown(data, Video(size=48, frames=6, channels=1), (0, 0, 48, 48))
    whole = shown(data, video, (0, 0, 48, 48))
    assert grey.shape == (6, 48, 48, 1) and np.abs(grey - whole.mean(-1, keepdims=True)).max() < 20


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_a_phones_video_is_shown_upright(turn: int) -> None:
    """Catches videos on their side: the container says how to turn them."""
    data = encode_video(COLORS, turn=turn)
    width, height, _ = check_video(data)
    assert (width, height) == ((48, 64) if turn % 180 else (64, 48))
    clip = shown(data, Video(size=24, frames=2), (0, 0, 24, 24))
    bright = {90: (height - 24, 0), 180: (height - 24, width - 24), -90: (0, width - 24)}[turn]
    corner = (bright[1], bright[0], bright[1] + 24, bright[0] + 24)
    assert clip.mean() < 200 < shown(data, Video(size=24, frames=2), corner).mean()


def test_a_broken_video_is_a_bad_sample_with_a_reason(tmp_path: Path) -> None:
    """Catches damage that decoders paper over, one that ends the run, and a bad sample that trains."""
    whole = encode_video(COLORS, codec="libx264")
    damaged = bytearray(whole)
    at = whole.index(b"mdat") + len(whole) // 4
    damaged[at : at + 60] = bytes(60)
    no_video = whole.replace(b"vide", b"soun").replace(b"avc1", b"mp4a")
    broken = {
        "cut": (whole[:-400], r"video: |cut off"),
        "damaged": (bytes(damaged), "video: |cannot be decoded"),
        "page": (b"<html>not here</html>", "video: "),
        "empty": (b"", "video: "),
        "sound": (no_video, "video|codec"),
    }
    samples = [{"mp4": data, "cls": b"1"} for data, _ in broken.values()]
    shards = write(tmp_path, [*samples, {"mp4": whole, "cls": b"2"}])
    fields = [Labels(num_classes=5), Video(size=16, frames=44)]
    (batch,) = list(EvalLoader(open_shards(shards), fields, CONFIG, batch=6))
    assert batch.weights.tolist() == [0, 0, 0, 0, 0, 1]
    assert not batch.fields["video"][:5].any() and (batch.fields["label"][:5] == -1).all()
    for bad, (_, words) in zip(batch.bad, broken.values(), strict=True):
        assert "it cannot be decoded: " in bad.reason
        with pytest.raises(ValueError, match=words):
            raise ValueError(bad.reason)
    large = dataclasses.replace(fields[1], max_pixels=1000)
    with pytest.raises(DecodeError, match="64x48 pixels are more than"):
        shown(whole, large)


def test_damage_that_decoders_paper_over_is_found() -> None:
    """Catches frames of which FFmpeg shows what was there before, without an error."""
    whole = encode_video(COLORS)
    start, end = whole.index(b"mdat") + 100, whole.rindex(b"moov") - 200
    for place in range(start, end, (end - start) // 12):
        damaged = bytearray(whole)
        damaged[place : place + 40] = bytes(40)
        with pytest.raises(DecodeError):
            check_video(bytes(damaged), decode=True)


@pytest.mark.dist
def test_a_clip_depends_on_seed_epoch_and_position_alone(tmp_path: Path) -> None:
    """Catches clips that begin at the same place in every epoch, or elsewhere in another process."""
    data = encode_video(COLORS)
    shards = write(tmp_path, [{"mp4": data, "cls": b"1"} for _ in range(4)])
    fields = [Video(size=16, frames=3, stride=2), Labels(num_classes=5)]

    def clips(workers: int) -> list[torch.Tensor]:
        config = dataclasses.replace(CONFIG, workers=workers)
        loader = TrainLoader(open_shards(shards), fields, config, seed=1, global_batch=4, micro_batch=4)
        return [batch.fields["video"] for batch in loader.batches(0, 3)]

    first = clips(0)
    assert len({clip.numpy().tobytes() for batch in first for clip in batch}) == 12
    assert all(torch.equal(one, other) for one, other in zip(first, clips(1), strict=True))


def test_videos_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a declaration that fails in a worker only, and a missing package that is not named."""
    for arguments, words in (
        ({"frames": 0}, "frames 0"),
        ({"frames": 2, "crops": 2}, "2 crops, not 1 or 3"),
        ({"frames": 2, "interval_s": 0.0}, "interval_s 0.0"),
        ({"frames": 2, "channels": 4}, "channels is 4"),
        ({"frames": 2, "size": 0}, "every side"),
    ):
        with pytest.raises(ValueError, match=words):
            Video(**{"size": 8, **arguments})
    assert Video(size=8, frames=2, clips=4, crops=3).shape == (12, 2, 8, 8, 3)
    assert isinstance(Video(size=8, frames=2), Picture)
    monkeypatch.setattr("megavit.data.video.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'megavit\[video\]'"):
        Video(size=8, frames=2)
