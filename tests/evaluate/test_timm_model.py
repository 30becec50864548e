"""A model of timm as an evaluated one, against timm's own calls on the same weights."""

from __future__ import annotations

import dataclasses
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from megavit.data.photos import PhotoReader
from megavit.evaluate.timm_model import TimmModel
from megavit.parallel.mesh import Mesh

VIT, CNN, STAGES = "test_vit", "resnet10t", "test_convnext"


@cache
def opened(name: str) -> TimmModel:
    return TimmModel.open(f"timm:{name}@none", Mesh.single())


@cache
def plain(name: str) -> torch.nn.Module:
    """The same model, from timm alone, with the weights of `opened`."""
    model = timm.create_model(name)
    model.load_state_dict(opened(name)._model.state_dict())
    return model.eval()


def pixels(name: str, count: int = 3) -> torch.Tensor:
    side = opened(name).preprocessing.image_size
    return torch.randint(
        0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def normalised(name: str, rows: torch.Tensor) -> torch.Tensor:
    cfg = timm.data.resolve_model_data_config(plain(name))
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    return (rows.permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.mark.parametrize("name", [VIT, CNN, STAGES, "test_vit2", "mixer_s32_224"])
@torch.no_grad()
def test_features_and_logits_are_timms(name: str) -> None:
    """Catches a class token in the mean of the patches, a missing norm, another normalisation, and a
    classifier on the wrong features."""
    model, other, rows = opened(name), plain(name), pixels(name)
    images = normalised(name, rows)
    last, prefix = other.forward_features(images), getattr(other, "num_prefix_tokens", 0)
    pooled = other.forward_head(last, pre_logits=True)
    patches = last.mean((2, 3)) if last.ndim == 4 else last[:, prefix:].mean(1)
    every = [f"block.{k}" for k in range(model.depth)]
    found = model.features(rows, ["patches", *every, "pooled"])
    assert list(found) == ["patches", *every, "pooled"]
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["patches"], patches, rtol=1e-4, atol=1e-5)
    maps = other.forward_intermediates(images, norm=True, intermediates_only=True)
    assert len(maps) == model.depth > 0
    for layer, each in zip(every, maps, strict=True):
        torch.testing.assert_close(found[layer], each.mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.logits(found["pooled"]), other(images), rtol=1e-4, atol=1e-4)
    alone = model.features(rows[:1], ["pooled"])["pooled"]
    torch.testing.assert_close(alone, pooled[:1], rtol=1e-4, atol=1e-5)
    assert all(each.dtype == torch.float32 for each in found.values())


@torch.no_grad()
def test_the_last_block_of_a_vit_is_its_patches() -> None:
    """Catches blocks that are counted from 1, or without the final norm."""
    found = opened(VIT).features(pixels(VIT), ["patches", "block.5", "block.4"])
    torch.testing.assert_close(found["block.5"], found["patches"])
    assert not torch.allclose(found["block.4"], found["patches"], atol=1e-3)


@pytest.mark.parametrize("name", [VIT, CNN, "test_vit2"])
def test_photos_are_prepared_as_timm_does(name: str) -> None:
    """Catches bilinear for bicubic, another crop, and pixels that are shifted by a part of one: on photos
    that lie, stand and are smaller than the model's input, in grey levels."""
    cfg = timm.data.resolve_model_data_config(plain(name))
    assert cfg["interpolation"] == "bicubic"
    transform = timm.data.create_transform(**cfg, is_training=False)
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    for photo in load_sample_images().images:
        for size in ((640, 427), (333, 501), (427, 640), (101, 97), (1000, 180)):
            image = Image.fromarray(photo).resize(size)
            expected = (transform(image) * std + mean).permute(1, 2, 0) * 255
            found = PhotoReader(opened(name).preprocessing).load(image)
            assert (found - expected).abs().mean() < 0.3, size


def test_grey_photos_and_files_are_resized_bicubic_too(tmp_path: Path) -> None:
    """Catches a way into the reader that does not look at the interpolation, and an image that is not turned
    upright before it is cut."""
    used = dataclasses.replace(opened(VIT).preprocessing, channels=1, mean=(0.5,), std=(0.5,))
    photo = Image.fromarray(load_sample_images().images[1])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = tmp_path / "turned.png"
    photo.save(path, exif=exif)
    expected = PhotoReader(used).load(photo.transpose(Image.Transpose.ROTATE_270))
    assert expected.shape == (160, 160, 1)
    for given in (path, path.read_bytes(), Image.open(path)):
        assert torch.equal(PhotoReader(used).load(given), expected)
    bilinear = PhotoReader(dataclasses.replace(used, interpolation="bilinear")).load(path)
    assert (bilinear.float() - expected).abs().mean() > 1


def test_bilinear_models_keep_the_trainers_own_crop() -> None:
    """Catches a change of what runs see in evaluation: within a pixel of timm's crop, not equal to it."""
    used = opened("test_resnet").preprocessing
    assert used.interpolation == "bilinear"
    photo = Image.fromarray(load_sample_images().images[0])
    side = round(427 * used.crop)
    left, top = (640 - side) // 2, (427 - side) // 2
    expected = photo.crop((left, top, left + side, top + side)).resize((160, 160), Image.Resampling.BILINEAR)
    assert np.abs(PhotoReader(used).load(photo).numpy() - np.asarray(expected).astype(int)).mean() < 0.5


def test_what_a_model_says_of_itself() -> None:
    """Catches random weights that pass for trained ones, and numbers in the place of ImageNet's classes."""
    model = opened(VIT)
    assert model.name == "timm:test_vit (random weights)"
    assert (model.num_classes, len(set(model.class_names)), model.depth) == (1000, 1000, 6)
    assert len(model.class_names) == 1000 and model.class_names[1].startswith("goldfish")
    assert model.preprocessing.link == "softmax"


def test_the_digest_is_of_weights_and_transform(tmp_path: Path) -> None:
    """Catches a cache of one model's features that is taken for another's, and random weights that differ
    from one process to the next."""
    model = opened(VIT)
    torch.manual_seed(5)
    assert TimmModel.open(f"timm:{VIT}@none", Mesh.single()).digest == model.digest
    state = plain(VIT).state_dict()
    same, other = tmp_path / "same.safetensors", tmp_path / "other.pth"
    save_file(state, same)
    torch.save(state | {"norm.bias": state["norm.bias"] + 1e-6}, other)
    assert TimmModel.open(f"timm:{VIT}@{same}", Mesh.single()).digest == model.digest
    assert TimmModel.open(f"timm:{VIT}@{other}", Mesh.single()).digest != model.digest
    assert TimmModel.open("timm:test_vit2@none", Mesh.single()).digest != model.digest
    assert TimmModel.open(f"timm:{VIT}@none", Mesh.single(), dtype=torch.bfloat16).digest != model.digest


@torch.no_grad()
def test_weights_of_a_file(tmp_path: Path) -> None:
    """Catches a fine-tuned classifier that is dropped because it has not 1000 classes."""
    torch.manual_seed(0)
    tuned = timm.create_model(CNN, num_classes=7).eval()
    path = tmp_path / "tuned.pth"
    torch.save({"state_dict": tuned.state_dict()}, path)
    model = TimmModel.open(f"timm:{CNN}@{path}", Mesh.single())
    assert (model.num_classes, model.class_names) == (7, tuple("0123456"))
    assert model.name == f"timm:{CNN}@{path}"
    rows = pixels(CNN)
    found = model.logits(model.features(rows, ["pooled"])["pooled"])
    torch.testing.assert_close(found, tuned(normalised(CNN, rows)), rtol=1e-4, atol=1e-5)
    bare = {name: value for name, value in tuned.state_dict().items() if not name.startswith("fc.")}
    torch.save(bare, path)
    model = TimmModel.open(f"timm:{CNN}@{path}", Mesh.single())
    assert (model.num_classes, model.class_names) == (0, ())
    with pytest.raises(ValueError, match="no classifier"):
        model.logits(model.features(rows, ["pooled"])["pooled"])


def test_bfloat16_gives_float32_near_the_exact_one() -> None:
    """Catches features that leave in the model's type."""
    exact, fast = opened(VIT), TimmModel.open(f"timm:{VIT}@none", Mesh.single(), dtype=torch.bfloat16)
    layers = ["pooled", "patches", "block.0"]
    found, expected = (model.features(pixels(VIT), layers) for model in (fast, exact))
    for layer in layers:
        assert found[layer].dtype == torch.float32
        assert (found[layer] - expected[layer]).norm() < 0.05 * expected[layer].norm()
    assert fast.logits(found["pooled"]).dtype == torch.float32


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of timm, torch or the hub in the place of what to do."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no weights")
    wrong = tmp_path / "wrong.safetensors"
    save_file(plain(CNN).state_dict(), wrong)
    for spec, said in (
        (
            "timm:vit_tinny_patch16_224@none",
            "no model 'vit_tinny_patch16_224'; the nearest are vit_tiny_patch16_224",
        ),
        ("timm:test_vit.r160_in1kk", "the nearest are test_vit"),
        ("timm:test_vit.r160_in1k", "not in the cache and could not be downloaded"),
        ("timm:test_vit@nowhere.pth", "there is no such file"),
        (f"timm:test_vit@{junk}", "junk.safetensors does not hold the weights of timm:test_vit"),
        (f"timm:test_vit@{wrong}", "wrong.safetensors does not hold the weights of timm:test_vit"),
        ("timm:deit_tiny_distilled_patch16_224@none", "not one classifier on its pooled features"),
        ("timm:dla46_c@none", "not one classifier on its pooled features"),
    ):
        with pytest.raises(ValueError) as caught:
            TimmModel.open(spec, Mesh.single())
        assert said in str(caught.value), spec
    for layer in ("block.6", "block.-1", "last"):
        with pytest.raises(ValueError, match="has no layer .*; it has pooled, patches, block.0 to block.5"):
            opened(VIT).features(pixels(VIT), [layer])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install megavit\[timm\]"):
        TimmModel.open("timm:test_vit@none", Mesh.single())
