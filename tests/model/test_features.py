"""The feature API under timm's names, and images of other sizes than the configured one."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from megavit import MegaVit
from megavit.model.embed import resize_position
from tests.model.test_vit import SMALL, export, small


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def timms(depth: int) -> Any:
    """timm's ViT of the same sizes, with a class token and one register."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=depth,
        num_heads=4,
        reg_tokens=1,
    )
    return model.eval()


@pytest.mark.parametrize("indices", [None, 1, 2, [0], [-1], [2, 0], (1, -1), [1, 1]])
@pytest.mark.parametrize("options", [{}, {"norm": True, "output_fmt": "NLC"}, {"return_prefix_tokens": True}])
def test_intermediates_have_the_form_of_timms(indices: Any, options: dict[str, Any]) -> None:
    """Catches another order, number or shape of the intermediates than the same call of timm gives."""
    ours, theirs = small(depth=3, pool="cls", num_registers=1).eval(), timms(3)
    for only in (False, True):
        options |= {"intermediates_only": only}
        found, expected = (
            m.forward_intermediates(images(16, 16), indices, **options) for m in (ours, theirs)
        )
        assert form(found) == form(expected)


def form(found: Any) -> Any:
    """Tensors' shapes in their lists and tuples."""
    return tuple(found.shape) if isinstance(found, Tensor) else [type(found), *map(form, found)]


def test_names_and_defaults_are_timms() -> None:
    """Catches code written for timm that stops here with a TypeError or gets another default."""
    theirs = timm.models.vision_transformer.VisionTransformer
    for name in ("forward_features", "forward_intermediates", "forward_head"):
        known = inspect.signature(getattr(theirs, name)).parameters
        for parameter in list(inspect.signature(getattr(MegaVit, name)).parameters.values())[2:]:
            assert parameter.default == known[parameter.name].default, (name, parameter)


def test_intermediates_are_the_states_of_the_blocks() -> None:
    """Catches a block counted from one, a norm that is wrong, and rows and columns exchanged."""
    model = small(depth=3, num_registers=2).eval()
    x = images(8, 24)
    states: list[Tensor] = []

    class Keeper:
        def tokens(self, layer: int, x: Tensor) -> None:
            states.append(x)

    with model.observe(Keeper()):
        features = model.forward_features(x)
    final, (first, last) = model.forward_intermediates(x, [0, 2])
    assert torch.equal(final, features) and torch.equal(features, model.norm(states[-1]))
    assert first.shape == last.shape == (2, 32, 2, 6)
    assert torch.equal(first[:, :, 1, 4], states[1][:, 2 + 1 * 6 + 4])
    (normed,) = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(normed, features[:, 2:])
    ((patches, prefix),) = model.forward_intermediates(
        x, [-3], output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    assert torch.equal(torch.cat([prefix, patches], 1), states[1])


def test_intermediates_run_no_block_in_vain() -> None:
    """Catches 47 blocks of ViT-22B that run for the first one's output."""
    model, ran = small(depth=3), []
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    model.forward_intermediates(images(16, 16), [0, 1], intermediates_only=True)
    assert ran == [0, 1]


@pytest.mark.parametrize("indices", [0, 4, -1, [3], [-4], []])
def test_blocks_that_are_not_there_are_named(indices: Any) -> None:
    """Catches silence about a block that does not exist."""
    with pytest.raises(ValueError, match="3") as error:
        small(depth=3).forward_intermediates(images(16, 16), indices)
    assert f"indices={indices}" in str(error.value)


def test_an_unknown_output_format_is_named() -> None:
    """Catches timm's NHWC, which would be taken for NLC."""
    with pytest.raises(ValueError, match="'NCHW' or 'NLC', got 'NHWC'"):
        small().forward_intermediates(images(16, 16), output_fmt="NHWC")  # type: ignore[arg-type]


def test_the_head_reads_what_features_give() -> None:
    """Catches a head that pools other tokens than the logits come from."""
    for pool in ("map", "mean", "cls"):
        model = small(pool=pool, num_registers=1).eval()
        tokens = model.forward_features(images(16, 16))
        assert torch.equal(model.forward_head(tokens), model(images(16, 16)))
        features = model.forward_head(tokens, pre_logits=True)
        assert features.shape == (2, 32)
        assert torch.equal(model.head(features), model(images(16, 16)))


@pytest.mark.parametrize("pool", ["map", "mean", "cls"])
def test_other_sizes_are_those_of_a_resized_model(tmp_path: Any, pool: str) -> None:
    """Catches a position embedding resized in another way at run time than by `from_pretrained`."""
    model = small(pool=pool, num_registers=1).eval()
    export(model, tmp_path / "m")
    resized = MegaVit.from_pretrained(tmp_path / "m", image_size=24)
    assert torch.equal(model(images(24, 24)), resized(images(24, 24)))
    assert not torch.equal(model(images(16, 24)), model(images(24, 16).transpose(2, 3)))
    assert model(images(4, 40)).shape == (2, 5)


def test_the_position_embedding_follows_the_weights() -> None:
    """Catches a resized copy that is kept after an optimizer's step, a load, or another move of the data."""
    model = small().eval()

    def is_fresh() -> bool:
        with torch.no_grad():
            found = model.embed(torch.zeros(1, 3, 24, 16)) - model.embed.bias
            return torch.allclose(found[0], resize_position(model.embed.position, (6, 4)), atol=1e-6)

    assert is_fresh()
    with torch.no_grad():
        model.embed.position.mul_(2)
    assert is_fresh()
    model.embed.position.data = model.embed.position.data * 2
    assert is_fresh()
    model.embed.position.data.mul_(2)  # moves no version counter
    assert is_fresh()


def test_other_sizes_train() -> None:
    """Catches a resized position embedding that is cut off from its parameter."""
    model = small()
    model(images(8, 20)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_sizes_of_a_meta_model() -> None:
    """Catches a size check that looks at values."""
    with torch.device("meta"):
        assert MegaVit(**SMALL)(torch.empty(3, 3, 8, 32)).shape == (3, 5)
