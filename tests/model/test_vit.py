"""The model as a user meets it: constructors, shapes, errors, loading, recomputation."""

from __future__ import annotations

import dataclasses
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from megavit import MegaVit
from megavit.model.count import repeated_flops
from megavit.model.embed import resize_position

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 5,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 64,
}


def small(**fields: Any) -> MegaVit:
    model = MegaVit(**(SMALL | fields))
    if model.head is not None:
        torch.nn.init.normal_(model.head.weight)  # the zero head would hide what comes before it
    return model


def images(count: int, side: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("pool", ["map", "mean", "cls"])
@pytest.mark.parametrize("registers", [0, 3])
def test_logits_have_the_promised_shape(pool: str, registers: int) -> None:
    """Catches prefix tokens lost or pooled by mistake."""
    model = small(pool=pool, num_registers=registers)
    assert model(images(3)).shape == (3, 5)
    tokens = model.forward_features(images(3))
    assert tokens.shape == (3, 16 + registers + (pool == "cls"), 32)
    assert small(pool=pool, num_classes=0)(images(3)).shape == (3, 32)


def test_mean_pool_leaves_registers_out() -> None:
    """Catches registers averaged into the feature."""
    model = small(pool="mean", num_registers=2)
    tokens = model.forward_features(images(2))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 2:].mean(1))


def test_patch_embedding_is_the_convolution() -> None:
    """Catches a patch flattened in another order than a convolution's weight."""
    model = small()
    weight = model.embed.weight.view(32, 3, 4, 4)
    expected = (
        torch.nn.functional.conv2d(images(2), weight, model.embed.bias, stride=4).flatten(2).transpose(1, 2)
    )
    assert torch.allclose(model.embed(images(2)) - model.embed.position, expected, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    """Catches dropout rates that are not passed on, or left on in evaluation."""
    model = small(dropout=0.5, emb_dropout=0.5)
    assert not torch.equal(model(images(2)), model(images(2)))
    model.eval()
    assert torch.equal(model(images(2)), model(images(2)))


def test_head_bias() -> None:
    """Catches a sigmoid head that starts far from the classes' prior."""
    assert MegaVit(**SMALL).head.bias[0].item() == pytest.approx(-1.6094379)  # -log 5
    assert MegaVit(**SMALL, head_bias=-10.0).head.bias[0].item() == -10.0
    assert torch.equal(MegaVit(**SMALL)(images(1)), torch.full((1, 5), -1.609437912434)), (
        "the head starts at zero"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 18}, ["18", "4", "16 or 20"]),
        ({"heads": 5}, ["32", "5"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"pool": "max"}, ["map, mean, cls", "max"]),
        ({"num_registres": 1}, ["num_registres", "num_registers"]),
        ({"depth": 0}, ["depth", "0"]),
    ],
)
def test_bad_sizes_name_both_numbers(fields: dict[str, Any], words: list[str]) -> None:
    """Catches errors that leave the user guessing."""
    with pytest.raises(ValueError) as error:
        MegaVit(**(SMALL | fields))
    assert all(word in str(error.value) for word in words), error.value


def test_unknown_preset_names_the_nearest() -> None:
    """Catches a KeyError where the name of the right preset is due."""
    with pytest.raises(ValueError, match="vit_22b"):
        MegaVit.from_preset("vit-22b")


def test_wrong_image_names_both_shapes() -> None:
    """Catches pixels that are left out of the patches, and a fix that does not fit either."""
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 22\).* from 16 x 22 to 16 x 24") as error:
        small()(torch.zeros(2, 3, 16, 22))
    assert "4 x 4 pixels" in str(error.value)
    for shape in ((2, 3, 0, 16), (2, 3, 1, 16)):
        with pytest.raises(ValueError, match="to 4 x 16"):
            small()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\)"):
        small()(images(2, channels=1))


def export(model: MegaVit, folder: Path) -> None:
    folder.mkdir()
    save_file(
        {name: p.detach().clone() for name, p in model.named_parameters()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))


def test_from_pretrained_gives_the_same_logits(tmp_path: Path) -> None:
    """Catches a field or tensor that the export does not carry."""
    model = small(pool="cls", num_registers=2, layer_scale=0.5, qkv_bias=True, dropout=0.3)
    export(model, tmp_path / "m")
    assert torch.equal(MegaVit.from_pretrained(tmp_path / "m")(images(2)), model.eval()(images(2)))
    with pytest.raises(ValueError, match="'imagesize'.*'image_size'"):
        MegaVit.from_pretrained(tmp_path / "m", imagesize=16)


def test_from_pretrained_takes_a_run_folder(tmp_path: Path) -> None:
    """Catches a run that has ended and whose folder is refused, and one that has not, without the way out."""
    model, run = small(), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"its run has not ended; python launch/export.py \S*run OUT"):
        MegaVit.from_pretrained(run)
    export(model, run / "export")
    assert torch.equal(MegaVit.from_pretrained(run)(images(2)), model.eval()(images(2)))


def test_images_are_square() -> None:
    """Catches timm's (height, width), which fails deep inside or builds another model."""
    for sides in ((16, 16), [16, 32]):
        with pytest.raises(ValueError, match=r"model.image_size must be a whole number, got .16, "):
            small(image_size=sides)


def test_from_pretrained_resizes_the_position_embedding(tmp_path: Path) -> None:
    """Catches a resized model whose other weights changed, or that cannot run."""
    model = small()
    export(model, tmp_path / "m")
    larger = MegaVit.from_pretrained(tmp_path / "m", image_size=32)
    assert larger(images(1, side=32)).shape == (1, 5)
    assert torch.equal(larger.blocks[1].mlp.up.weight, model.blocks[1].mlp.up.weight)


@pytest.mark.filterwarnings("error")
def test_from_pretrained_without_a_classifier(tmp_path: Path) -> None:
    """Catches features that are not those of the classifier, and an export without one that is refused."""
    model = small().eval()
    export(model, tmp_path / "m")
    features = MegaVit.from_pretrained(tmp_path / "m", num_classes=0)
    assert features.head is None
    expected = model.forward_head(model.forward_features(images(2)), pre_logits=True)
    assert torch.equal(features(images(2)), expected)
    export(features, tmp_path / "headless")
    assert torch.equal(MegaVit.from_pretrained(tmp_path / "headless")(images(2)), expected)


def test_from_pretrained_says_that_a_classifier_is_new(tmp_path: Path) -> None:
    """Catches a classifier that holds uninitialised memory, or of which nobody hears; and one that is thrown
    away though it fits."""
    model = small()
    export(model, tmp_path / "m")
    with pytest.warns(UserWarning, match=r"head.weight and head.bias are newly .* 7 classes.*\(5, 32\)"):
        other = MegaVit.from_pretrained(tmp_path / "m", num_classes=7)
    fresh = MegaVit(**(SMALL | {"num_classes": 7}))
    assert torch.equal(other.head.weight, fresh.head.weight) and torch.equal(other.head.bias, fresh.head.bias)
    assert torch.equal(other.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    export(small(num_classes=0), tmp_path / "headless")
    with pytest.warns(UserWarning, match="head.weight is missing"):
        MegaVit.from_pretrained(tmp_path / "headless", num_classes=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = MegaVit.from_pretrained(tmp_path / "m", num_classes=5)
    assert torch.equal(same.head.weight, model.head.weight)


def test_from_pretrained_in_another_type_and_on_another_device(tmp_path: Path) -> None:
    """Catches a copy in float32 of every weight, and a default of torch's that stays changed."""
    model = small()
    export(model, tmp_path / "m")
    loaded = MegaVit.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(
        torch.equal(mine, p.bfloat16())
        for mine, p in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert torch.get_default_dtype() == torch.float32 and torch.empty(0).device.type == "cpu"
    on_meta = MegaVit.from_pretrained(tmp_path / "m", device="meta")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    assert MegaVit.from_pretrained(tmp_path / "m", recompute="full").blocks[0].recompute == "full"


def test_resize_position_keeps_a_linear_ramp_monotonic_and_the_identity_exact() -> None:
    """Catches rows and columns exchanged in the grid."""
    ramp = torch.arange(4.0).repeat_interleave(4)[:, None]  # value = row
    assert torch.equal(resize_position(ramp, (4, 4)), ramp)
    large = resize_position(ramp, (8, 8)).view(8, 8)
    assert torch.allclose(large, large[:, :1].expand(8, 8))
    assert (large[1:, 0] >= large[:-1, 0]).all() and large[7, 0] > large[0, 0]


def test_from_pretrained_refuses_what_does_not_fit(tmp_path: Path) -> None:
    """Catches silently ignored or missing tensors."""
    with pytest.raises(ValueError, match="config.json is missing"):
        MegaVit.from_pretrained(tmp_path)
    export(small(), tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["extra"] = weights.pop("norm.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['norm.weight'\], unknown \['extra'\]"):
        MegaVit.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"missing \['norm.weight'\]"):
        MegaVit.from_pretrained(tmp_path / "m", num_classes=7)
    export(small(), tmp_path / "other")
    with pytest.raises(ValueError, match=r"mlp.up.weight has shape \(64, 32\), the model needs \(96, 32\)"):
        MegaVit.from_pretrained(tmp_path / "other", mlp_dim=96)


RECOMPUTED = [
    ("full", {"block": "sequential"}),
    ("full", {}),
    ("selective", {}),
    ("selective", {"layer_scale": 0.5}),
]


@pytest.mark.parametrize(("policy", "fields"), RECOMPUTED)
def test_recompute_changes_nothing(policy: str, fields: dict[str, Any]) -> None:
    """Catches a recomputed activation that differs from the kept one, dropout masks included."""
    fields = fields | {"dropout": 0.2, "num_registers": 1, "depth": 3}
    results = []
    for model in (small(**fields), small(**fields, recompute=policy)):
        torch.nn.init.ones_(model.head.weight)
        torch.manual_seed(1)
        loss = model(images(3)).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_every_policy_compiles_to_one_graph(policy: str) -> None:
    """Catches a block that torch.compile gives up on, silently, and runs eagerly."""
    model = small(recompute=policy)
    torch.compiler.reset()
    forward = torch.compile(model.blocks[0].forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 32, requires_grad=True)
    grads = [torch.autograd.grad(way(x).square().sum(), x)[0] for way in (forward, model.blocks[0])]
    torch.testing.assert_close(*grads)


def flops_of_step(policy: str, **fields: Any) -> int:
    model = small(recompute=policy, depth=4, **fields)
    with FlopCounterMode(display=False) as counter:
        model(images(4)).sum().backward()
    return int(counter.get_total_flops())


def test_selective_recompute_repeats_no_matmul() -> None:
    """Catches a policy that keeps the wrong matmul."""
    assert flops_of_step("selective") == flops_of_step("none")


@pytest.mark.parametrize("fields", [{}, {"block": "sequential"}, {"layer_scale": 0.5}])
def test_full_recompute_repeats_what_backward_reads(fields: dict[str, Any]) -> None:
    """Catches a projection computed again for nothing, and a count that the planner could not rely on."""
    full, plain = (flops_of_step(policy, **fields) for policy in ("full", "none"))
    assert full - plain == 4 * repeated_flops(small(depth=4, **fields).config)


def test_selective_recompute_keeps_eight_d_beside_the_block_input() -> None:
    """Catches activations kept beyond q, k, v, the MLP's hidden layer and the attention output."""
    kept = {}
    for depth in (2, 6):
        model = small(depth=depth, recompute="selective")
        before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
        loss = model(images(4)).sum()
        new = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in before]
        floats = [x for x in new if x.is_floating_point()]  # not the saved state of the random generator
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 4 for x in floats}
        kept[depth] = sum(storages.values())
        loss.backward()
    per_block = (kept[6] - kept[2]) / 4 / (4 * 16 * 32)
    # q k v 3 D, attention output D, F = 2 D here: 6 D; the block's input D; H (= D / 8) for the log-sum-exp.
    assert 7 <= per_block <= 7.2


def held_elements(model: MegaVit, batch: int) -> float:
    """Elements kept for backward by one forward pass, each storage counted once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(images(batch)).sum()
    return sum(held.values())


def test_full_recompute_keeps_one_tensor_a_block() -> None:
    """Catches a policy that is not applied: full must hold D per token and block, none about 16 D."""
    tokens, dim, batch = 16, 32, 4
    per_block = {}
    for policy in ("none", "full"):
        deep, shallow = (held_elements(small(depth=d, recompute=policy), batch) for d in (6, 2))
        per_block[policy] = (deep - shallow) / 4 / (batch * tokens * dim)
    assert per_block["full"] == pytest.approx(1.0, abs=0.1)
    assert per_block["none"] > 12


@pytest.mark.parametrize("pool", ["map", "mean", "cls"])
def test_features_and_logits_are_float32_in_bfloat16_models(pool: str) -> None:
    """Catches logits, of which the largest is the answer, that are rounded to eight bits."""
    model = MegaVit(**SMALL, pool=pool).to(torch.bfloat16)
    with torch.no_grad():
        model.head.weight.normal_()
    tokens = model.forward_features(images(2).to(torch.bfloat16))
    features = model.forward_head(tokens, pre_logits=True)
    logits = model(images(2).to(torch.bfloat16))
    assert features.dtype == logits.dtype == torch.float32
    expected = features @ model.head.weight.float().t() + model.head.bias.float()
    assert torch.equal(logits, expected) or (logits - expected).abs().max() < 1e-5
    assert not torch.equal(logits, logits.to(torch.bfloat16).float())
    logits.sum().backward()
    assert model.head.weight.grad.dtype == torch.bfloat16
