"""What TensorBoard shows of a run's samples: pictures as the model sees them, with what it says of them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megavit.parallel.mesh import Mesh
from megavit.tasks.config import ClassifyConfig
from megavit.tasks.task import DeviceBatch, make_task
from megavit.train.logging.pictures import draw_pictures
from tests.ranks import run_ranks
from tests.train.runs import DEMO, ds_config, small_run, train_here


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pictures_stand_above_their_captions(channels: int) -> None:
    """Catches pictures that are blurred, mixed up, or painted over by a caption, and captions beside their
    picture."""
    images = torch.rand(6, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = ["cat", "", "two\nlines", "w" * 200, "\udcff \u4e2d", "dog"]
    sheet = draw_pictures(images, captions)
    side, gap = 128, 6
    height = (len(sheet) - gap) // 2
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * height + gap, 4 * (side + gap) + gap, 3)
    shown = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    for number, picture in enumerate(shown):
        top, left = number // 4 * height + gap, number % 4 * (side + gap) + gap
        found = sheet[top : top + side, left : left + side][::16, ::16].transpose(2, 0, 1)
        assert np.abs(found / 255 - picture.numpy()).max() <= 0.51 / 255
        under = sheet[top + side : top + height - gap, left : left + side]
        assert (under.min() < 128) == bool(captions[number])
        assert (sheet[top : top + height - gap, left + side : left + side + gap] == 255).all()
    again = draw_pictures(images, ["cow", *captions[1:]])
    assert (again != sheet).any() and (again[:, side + 2 * gap :] == sheet[:, side + 2 * gap :]).all()


def test_large_pictures_keep_their_size_and_values_their_range() -> None:
    """Catches a picture that wraps around where it is a little above one, and one that is made smaller."""
    sheet = draw_pictures(torch.full((1, 3, 150, 150), 1.2), ["x"])
    assert sheet[6:156, 6:156].min() == 255 and sheet.shape[1] == 162


def samples(**changes: Any) -> DeviceBatch:
    labels = torch.tensor([[2, -1], [0, 1], [-1, -1], [1, -1]], dtype=torch.int32)
    fields = {"image": torch.zeros(4, 8, 8, 1, dtype=torch.uint8), "label": labels}
    return DeviceBatch(fields, torch.tensor([1.0, 1, 1, 0]))._replace(**changes)


def captions_of(of: DeviceBatch, module: Any = None, names: Any = (), **config: Any) -> list[str]:
    model = dataclasses.replace(DEMO.model, num_classes=3)
    task = make_task(ClassifyConfig(**config), model, DEMO.data)
    task._names = names  # type: ignore[attr-defined]
    found = task.pictures(of, task.inputs(of, Mesh.single(), training=True), 8, module)
    assert found and found.images.shape == (4, 1, 8, 8) and not found.images.any()
    return found.captions


def test_captions_name_labels_and_predictions() -> None:
    """Catches a caption of another image, a name of another class, and a share that is not the label's."""
    names = ["ant", "bee", "cow"]
    assert captions_of(samples()) == ["label: 2", "label: 0, 1", "no label", "not usable"]
    assert captions_of(samples(), names=names)[:2] == ["label: cow", "label: ant, bee"]
    blends = torch.tensor([[0.7, 0.7, 0, 0, 0, 0]] * 4)
    mixed = captions_of(samples(blends=blends), names=names)
    assert mixed == ["70% cow\n30% ant, bee", "70% ant, bee\n30% cow", "no label", "not usable"]

    class Module:
        class trunk:
            dtype = torch.float32

            def __new__(cls, images: torch.Tensor) -> Any:
                return torch.tensor([[0.0, 0.0, 2.0], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])

    found = captions_of(samples(), Module, names, loss="sigmoid")
    assert found[:3] == ["cow 88%\nlabel: cow", "ant 95%\nlabel: ant, bee", "bee 73%\nno label"]
    assert captions_of(samples(), Module, names, loss="softmax")[0] == "cow 79%\nlabel: cow"


def is_coloured(image: Any) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")).astype(int)
    return bool((pixels.max(2) - pixels.min(2)).max() > 50)


def test_maps_while_training_need_classes_and_validation_images(tmp_path: Path) -> None:
    """Catches a run that ends in its first evaluation."""
    with pytest.raises(ValueError, match="it needs the task classify and --data.val_shards"):
        dataclasses.replace(DEMO, explain_every=5, data=dataclasses.replace(DEMO.data, val_shards=""))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_a_run_shows_its_samples_and_predictions(digits: Path, tmp_path: Path, tp: int) -> None:
    """Catches predictions that only some ranks take part in, pictures of one evaluation only, and files of
    another set or step than their names say."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {
        "eval_every": 2,
        "explain_every": 4,
        "max_steps": 6,
        "data__val_shards": f"{digits}/test-*.tar",
    }
    run = small_run(digits, tmp_path, tensor_parallel_size=tp, **changes)
    assert run_ranks(2, train_here, run, ds_config(3, micro_batch=48 // (2 // tp))) == [""] * 2
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [image.step for image in board.Images("pictures/train")] == [0]
    evaluations = board.Images("pictures/val")
    assert [image.step for image in evaluations] == [2, 4, 6]
    maps = board.Images("pictures/val/located")
    assert [image.step for image in maps] == [4, 6]
    pictures = {image.encoded_image_string for image in [*evaluations, *maps]}
    assert len(pictures) == 5 and evaluations[0].width == maps[0].width == 4 * 134 + 6
    files = {"step_00000000_train.png", *(f"step_{step:08}_val.png" for step in (2, 4, 6))}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == files | {
        f"step_{step:08}_val_located.png" for step in (4, 6)
    }
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "pictures" / "step_00000004_val.png")),
        np.asarray(Image.open(io.BytesIO(evaluations[1].encoded_image_string))),
    )
    # Grey pictures; the maps have colour.
    assert [is_coloured(image) for image in (evaluations[-1], maps[-1])] == [False, True]
