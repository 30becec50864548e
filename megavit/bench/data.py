"""The input pipeline on generated photos, against stock webdataset and against decoding alone.

One process, one thread, CPU time.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavit.bench.rounds import markdown_table, rounds, speed_ratio


def make_photos(count: int) -> list[bytes]:
    """JPEGs of about 400 x 500 pixels, quality 90, 4:2:0: pink noise, a gradient, shapes and sensor noise."""
    import numpy as np
    from PIL import Image, ImageDraw

    photos = []
    for i in range(count):
        rng = np.random.default_rng(i)
        height, width = int(rng.integers(360, 440)), int(rng.integers(450, 550))
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        frequency[0, 0] = 1
        noise = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
        layers = np.fft.irfft2(noise / frequency**1.5, (height, width))
        layers = 128 + 45 * layers / layers.std() + np.linspace(-30, 30, width)
        image = Image.fromarray(np.clip(layers.transpose(1, 2, 0), 0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, side = rng.integers(0, width), rng.integers(0, height), rng.integers(20, 120)
            draw.ellipse(
                (int(x), int(y), int(x + side), int(y + side)), tuple(rng.integers(0, 256, 3).tolist())
            )
        grain = np.asarray(image) + rng.normal(0, 1, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


def write_shards(folder: Path, photos: list[bytes], per_shard: int) -> None:
    import webdataset as wds

    from megavit.data.manifest import MANIFEST_SUFFIX, open_shards, write_index

    for start in range(0, len(photos), per_shard):
        path = folder / f"photo-{start // per_shard:04}.tar"
        with wds.TarWriter(str(path), encoder=False, mtime=0) as tar:
            for i in range(start, min(len(photos), start + per_shard)):
                tar.write({"__key__": f"{i:06}", "jpg": photos[i], "cls": str(i % 1000).encode()})
        write_index(path, f"{path}.idx")
    open_shards(f"{folder}/photo-*.tar").save(folder / f"photo{MANIFEST_SUFFIX}")


def stock(folder: Path, images: int) -> None:
    """The usual recipe: decode("pil"), RandomResizedCrop, flip, float, normalise, batched."""
    import webdataset as wds
    from torchvision import transforms as t

    steps = [t.RandomResizedCrop(224, (0.05, 1.0)), t.RandomHorizontalFlip(), t.ToTensor()]
    transform = t.Compose([*steps, t.Normalize([0.5] * 3, [0.5] * 3)])
    data: Any = wds.WebDataset(str(folder / "photo-{0000..0007}.tar"), shardshuffle=False)
    data = data.shuffle(100).decode("pil").to_tuple("jpg", "cls").map_tuple(transform, int).batched(32)
    seen = 0
    for batch, _ in data:
        seen += len(batch)
        if seen >= images:
            return


def data_ways(folder: Path, photos: list[bytes], images: int) -> dict[str, Callable[[], None]]:
    import simplejpeg
    import webdataset as wds

    from megavit.data.config import DataConfig
    from megavit.data.loader import TrainLoader
    from megavit.data.manifest import open_shards
    from megavit.data.reader import ShardReader
    from megavit.model.config import ModelConfig

    manifest = open_shards(str(folder / "photo.manifest.json"))
    model = ModelConfig(patch_size=16)

    def ours(**options: Any) -> Callable[[], None]:
        loader = TrainLoader(
            manifest, model, DataConfig(workers=0, **options), seed=0, global_batch=32, micro_batch=32
        )
        return lambda: [None for _ in loader.batches(0, images // 32)].clear()

    reader = ShardReader(manifest)

    def read() -> None:
        for number in range(images):
            shard, index = divmod(number, int(manifest.samples[0]))
            reader.read(shard, index, reader.members(shard, index).values())

    def read_stock() -> None:
        for number, _ in enumerate(
            wds.WebDataset(str(folder / "photo-{0000..0007}.tar"), shardshuffle=False)
        ):
            if number + 1 == images:
                return

    ways: dict[str, Callable[[], None]] = {
        "decode only (libjpeg-turbo)": lambda: [
            None for photo in photos[:images] if simplejpeg.decode_jpeg(photo) is None
        ].clear(),
        "stock webdataset": lambda: stock(folder, images),
        "megavit": ours(),
        "megavit, no antialias": ours(antialias=False),
    }
    try:
        ways |= {
            "megavit, region": ours(decoder="region"),
            "megavit, region, no antialias": ours(decoder="region", antialias=False),
        }
    except ValueError as error:
        print(f"left out: {error}")
    return ways | {"reading only, stock webdataset": read_stock, "reading only, megavit": read}


def measure(images: int, count: int, json_file: Path | None) -> None:
    """Print the table of all pipelines on `images` photos (a multiple of 32), from `count` rounds; also write
    it to `json_file`."""
    import torch

    torch.set_num_threads(1)
    photos = make_photos(images)
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), photos, -(-images // 8))
        seconds = rounds(data_ways(Path(name), photos, images), count)
    rows: list[dict[str, Any]] = []
    for way, mine in seconds.items():
        base = "reading only, stock webdataset" if way.startswith("reading") else "stock webdataset"
        rows.append(
            {
                "pipeline": way,
                "images_per_s_per_core": images / statistics.median(mine),
                "x_stock": speed_ratio(seconds[base], mine).median,
                "x_decode": speed_ratio(seconds["decode only (libjpeg-turbo)"], mine).median,
            }
        )
    size = sum(map(len, photos)) / len(photos) / 1000
    print(f"{images} JPEGs of {size:.0f} kB, {count} rounds, one thread, CPU time\n")
    cells = [
        [
            row["pipeline"],
            f"{row['images_per_s_per_core']:,.0f}",
            f"{row['x_stock']:.2f}",
            f"{row['x_decode']:.2f}",
        ]
        for row in rows
    ]
    print(markdown_table(["pipeline", "img/s per core", "x stock", "x decode only"], cells))
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")
