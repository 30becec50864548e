"""The parallel block against timm's ParallelScalingBlock, and against its own formula."""

from __future__ import annotations

import pytest
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from megavit.model.block import ParallelBlock, attend, make_block
from megavit.model.config import ModelConfig
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh

DIM, HEADS, MLP = 48, 4, 120
CONFIG = ModelConfig(image_size=8, patch_size=2, dim=DIM, depth=1, num_heads=HEADS, mlp_dim=MLP)


class TanhGelu(nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")


def timm_block() -> ParallelScalingBlock:
    torch.manual_seed(0)
    block = ParallelScalingBlock(
        DIM, HEADS, MLP / DIM, qkv_bias=False, qk_norm=True, norm_layer=RmsNorm, act_layer=TanhGelu
    )
    for parameter in block.parameters():  # nothing left at a neutral value
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return block


def pairs(ours: ParallelBlock, theirs: ParallelScalingBlock) -> list[tuple[Tensor, Tensor]]:
    """Our parameters beside the matching slices of timm's; timm's fused rows are [mlp, q, k, v]."""
    return [
        (ours.norm.weight, theirs.in_norm.weight),
        (ours.mlp.up.weight, theirs.in_proj.weight[:MLP]),
        (ours.attn.qkv.weight, theirs.in_proj.weight[MLP:]),
        (ours.mlp.up.bias, theirs.mlp_bias),
        (ours.attn.q_scale, theirs.q_norm.weight),
        (ours.attn.k_scale, theirs.k_norm.weight),
        (ours.attn.out.weight, theirs.attn_out_proj.weight),
        (ours.mlp.down.weight, theirs.mlp_out_proj.weight),
        (ours.mlp.down.bias, theirs.mlp_out_proj.bias),
    ]


def grad_pairs(ours: ParallelBlock, theirs: ParallelScalingBlock) -> list[tuple[Tensor, Tensor]]:
    fused = theirs.in_proj.weight.grad
    expected = [
        theirs.in_norm.weight.grad,
        fused[:MLP],
        fused[MLP:],
        theirs.mlp_bias.grad,
        theirs.q_norm.weight.grad,
    ]
    expected += [theirs.k_norm.weight.grad, theirs.attn_out_proj.weight.grad, theirs.mlp_out_proj.weight.grad]
    expected += [theirs.mlp_out_proj.bias.grad]
    return [(mine.grad, other) for (mine, _), other in zip(pairs(ours, theirs), expected, strict=True)]


@pytest.mark.parametrize("observed", [False, True])
def test_equals_timm_forward_and_all_gradients(observed: bool) -> None:
    """Catches any difference from the published block: norm, QK norm, scale, GELU form, biases, residual."""
    theirs = timm_block()
    with torch.no_grad():
        # timm adds two biases to the sum; ours is one. Give it all to the one we have.
        theirs.attn_out_proj.bias.zero_()
    ours = ParallelBlock(CONFIG, Initializer(0, Mesh.single()), "none")
    with torch.no_grad():
        for mine, other in pairs(ours, theirs):
            mine.copy_(other)
    x = torch.randn(3, 17, DIM, generator=torch.Generator().manual_seed(1))
    mine_x, other_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    seen: list[Tensor] = []
    y, expected = ours(mine_x, {"attention": seen.append} if observed else None), theirs(other_x)
    assert len(seen) == observed
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    (y * x).sum().backward()
    (expected * x).sum().backward()
    for mine, other in [(mine_x.grad, other_x.grad), *grad_pairs(ours, theirs)]:
        assert (mine - other).abs().max() < 1e-5 * other.abs().max()


def test_explicit_attention_equals_the_fused_kernel() -> None:
    """Catches attention maps that are not those the model used."""
    q, k, v = (torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    fused, none = attend(q, k, v, explicit=False)
    explicit, weights = attend(q, k, v, explicit=True)
    assert none is None
    assert (fused - explicit).abs().max() < 1e-5
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 9), atol=1e-6)


def test_norm_statistics_are_float32_in_bfloat16() -> None:
    """Catches squares summed in bfloat16, which loses small tokens beside large channels."""
    block = make_block(CONFIG, Initializer(0, Mesh.single()), "none")
    x = torch.randn(4, 16, DIM) * 100
    exact = block.norm(x.bfloat16().float())
    rounded = block.norm.bfloat16()(x.bfloat16()).float()
    assert (rounded - exact).abs().max() < 2**-7 * exact.abs().max()


def test_selective_recompute_is_for_parallel_blocks() -> None:
    """Catches the matmul-counting policy applied to a block with another order of matmuls."""
    import dataclasses

    with pytest.raises(ValueError, match="selective"):
        make_block(
            dataclasses.replace(CONFIG, block="sequential"), Initializer(0, Mesh.single()), "selective"
        )
