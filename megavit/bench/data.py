"""The input pipeline on generated photos, against stock webdataset and against decoding alone.

One process, one thread, CPU time.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import webdataset as wds
from PIL import Image

from megavit.bench.report import Row
from megavit.bench.rounds import ratio_to, rounds
from megavit.data.config import DataConfig
from megavit.data.fields import Labels, Picture
from megavit.data.loader import TrainLoader
from megavit.data.manifest import MANIFEST_SUFFIX, Manifest, open_shards, write_index
from megavit.data.reader import ShardReader

BATCH = 32
_SHARDS = 8
_PATTERN = "photo-{0000..0007}.tar"
_DECODE = "decode only (libjpeg-turbo)"
_STOCK = "stock webdataset"
_STOCK_READING = "reading, stock webdataset"


def measure(images: int, count: int) -> Iterator[Row]:
    """A row for each pipeline on `images` photos (a multiple of the batch, 32), from `count` rounds."""
    photos = [make_photo(number) for number in range(images)]
    with tempfile.TemporaryDirectory() as name:
        folder, manifest = Path(name), write_shards(Path(name), photos)
        ways = _pipelines(folder, manifest, photos) | _readers(folder, manifest)
        seconds = rounds(ways, count)
    for way, mine in seconds.items():
        row = {"pipeline": way, "images_per_s_per_core": images / statistics.median(mine)}
        if way.startswith("reading"):
            yield row | ratio_to(_STOCK_READING, seconds, way)
        else:
            of_decode = ratio_to(_DECODE, seconds, way)["ratio_median"]
            yield row | ratio_to(_STOCK, seconds, way) | {"ratio_to_decode_median": of_decode}


def make_photo(number: int) -> bytes:
    """A JPEG of about 400 x 500 pixels, quality 90, 4:2:0: pink noise, as photos are on average, and a
    sensor's noise."""
    rng = np.random.default_rng(number)
    height, width = int(rng.integers(360, 440)), int(rng.integers(450, 550))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
    pixels = np.fft.irfft2(noise / frequency**1.5, (height, width)).transpose(1, 2, 0)
    pixels = 128 + 45 * pixels / pixels.std() + rng.normal(0, 1, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, photos: list[bytes]) -> Manifest:
    per_shard = len(photos) // _SHARDS
    for start in range(0, len(photos), per_shard):
        path = folder / f"photo-{start // per_shard:04}.tar"
        with wds.TarWriter(str(path), encoder=False, mtime=0) as tar:
            for i in range(start, start + per_shard):
                tar.write({"__key__": f"{i:06}", "jpg": photos[i], "cls": str(i % 1000).encode()})
        write_index(path, f"{path}.idx")
    manifest_file = folder / f"photo{MANIFEST_SUFFIX}"
    open_shards(f"{folder}/photo-*.tar").save(manifest_file)
    return open_shards(str(manifest_file))


def _pipelines(folder: Path, manifest: Manifest, photos: list[bytes]) -> dict[str, Callable[[], None]]:
    """From shards on the disk to batches; and decoding alone."""
    from torchvision import transforms as t

    steps = [t.RandomResizedCrop(224, (0.05, 1.0)), t.RandomHorizontalFlip(), t.ToTensor()]
    transform = t.Compose([*steps, t.Normalize([0.5] * 3, [0.5] * 3)])

    def decode() -> None:
        for photo in photos:
            simplejpeg.decode_jpeg(photo)

    def stock() -> None:
        """The usual recipe: decode("pil"), RandomResizedCrop, flip, float, normalise, batched."""
        data: Any = wds.WebDataset(str(folder / _PATTERN), shardshuffle=False).shuffle(100).decode("pil")
        for _ in data.to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH):
            pass

    def ours(**options: Any) -> Callable[[], None]:
        config = DataConfig(workers=0, **options)
        picture = Picture(size=224, antialias=config.antialias, decoder=config.decoder)
        fields = [picture, Labels(num_classes=1000)]
        loader = TrainLoader(manifest, fields, config, seed=0, global_batch=BATCH, micro_batch=BATCH)

        def load() -> None:
            for _ in loader.batches(0, len(photos) // BATCH):
                pass

        return load

    ways = {_DECODE: decode, _STOCK: stock, "megavit": ours(), "megavit, no antialias": ours(antialias=False)}
    try:
        ways |= {
            "megavit, region": ours(decoder="region"),
            "megavit, region, no antialias": ours(decoder="region", antialias=False),
        }
    except ValueError as error:  # the decoder is not installed
        print(f"left out: {error}", file=sys.stderr)
    return ways


def _readers(folder: Path, manifest: Manifest) -> dict[str, Callable[[], None]]:
    """The bytes of all samples, without decoding."""
    reader = ShardReader(manifest)

    def stock() -> None:
        for _ in wds.WebDataset(str(folder / _PATTERN), shardshuffle=False):
            pass

    def ours() -> None:
        for shard, samples in enumerate(manifest.samples):
            for index in range(int(samples)):
                reader.read(shard, index, reader.members(shard, index).values())

    return {_STOCK_READING: stock, "reading, megavit (checksums verified)": ours}
