"""Dense heads against independent implementations, on grids and patch sizes of all kinds."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megavit.model.config import ModelConfig
from megavit.model.dense import DenseHead, DptDecoder, DptHead, LinearHead, MaskTransformer, PyramidHead
from megavit.model.dense_layers import BatchNorm, Convolution, Rescale
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from tests.ranks import run_ranks

DIM = 12


def initializer(seed: int = 0) -> Initializer:
    return Initializer(seed, Mesh.single(), "decoder")


def heads(patch_size: int, outputs: int = 5) -> list[DenseHead]:
    block = ModelConfig(block="sequential", dim=16, depth=2, num_heads=2, mlp_dim=32)
    return [
        LinearHead(DIM, outputs, patch_size, initializer()),
        DptHead(DIM, outputs, patch_size, 8, initializer()),
        PyramidHead(DIM, outputs, patch_size, 8, initializer()),
        MaskTransformer(DIM, outputs, patch_size, block, initializer()),
    ]


@pytest.mark.parametrize(("patch_size", "grid"), [(14, (16, 16)), (16, (14, 14)), (14, (5, 7)), (4, (1, 2))])
def test_maps_have_the_images_resolution(patch_size: int, grid: tuple[int, int]) -> None:
    """Catches heads that know one patch size only, and odd grids, whose halves do not double back."""
    for head in heads(patch_size):
        taps = [torch.randn(2, DIM, *grid) for _ in range(head.num_taps)]
        found = head(taps, torch.ones(2))
        assert found.shape == (2, 5, grid[0] * patch_size, grid[1] * patch_size)
        assert found.dtype == torch.float32
        found.square().mean().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_an_image_of_weight_0_does_not_change_the_others() -> None:
    """Catches unusable images in the statistics of a norm."""
    for head in heads(4):
        taps = [torch.randn(3, DIM, 4, 4) for _ in range(head.num_taps)]
        weights = torch.tensor([1.0, 0.0, 1.0])
        with torch.no_grad():
            one = head(taps, weights)
            other = head([torch.cat([t[:1], 100 * t[1:2], t[2:]]) for t in taps], weights)
        assert torch.equal(one[[0, 2]], other[[0, 2]]), type(head).__name__


@pytest.mark.parametrize("ratio", ["x4", "x2"])
def test_rescaling_up_is_torchs_transposed_convolution(ratio: Any) -> None:
    """Catches sub-pixels in another order, which weights of other projects would come out scrambled by."""
    layer = Rescale(6, ratio, initializer())
    factor = int(ratio[1])
    torchs = nn.ConvTranspose2d(6, 6, factor, stride=factor)
    with torch.no_grad():
        torchs.weight.normal_()
        copy_transposed(layer, torchs)
        x = torch.randn(2, 6, 3, 5)
        torch.testing.assert_close(layer(x), torchs(x))


def copy(ours: Convolution, theirs: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> None:
    """Weights of a torch convolution, folded with the norm after it in evaluation."""
    weight = theirs.weight.flatten(1)
    bias = torch.zeros(len(weight)) if theirs.bias is None else theirs.bias
    if norm is not None:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        weight, bias = weight * scale[:, None], (bias - norm.running_mean) * scale + norm.bias
    ours.weight.copy_(weight)
    if ours.bias is not None:
        ours.bias.copy_(bias)


def copy_transposed(ours: Rescale, theirs: nn.ConvTranspose2d) -> None:
    assert ours.convolution is not None and ours.bias is not None
    ours.convolution.weight.copy_(theirs.weight.permute(1, 2, 3, 0).flatten(0, 2))
    ours.bias.copy_(theirs.bias)


@pytest.mark.skipif(
    importlib.util.find_spec("segmentation_models_pytorch") is None,
    reason="segmentation_models_pytorch 0.6 (pip install --no-deps), the reference, is not installed",
)
def test_the_dpt_decoder_is_that_of_segmentation_models_pytorch() -> None:
    """Catches a decoder that is only like DPT: another order of fusion, of corners, or of residuals."""
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder

    torch.manual_seed(0)
    widths = (8, 16, 32, 32)
    theirs = DPTDecoder(
        encoder_out_channels=(DIM,) * 4,
        encoder_output_strides=(16,) * 4,
        encoder_has_prefix_tokens=False,
        readout="ignore",
        intermediate_channels=widths,
        fusion_channels=8,
    ).eval()
    ours = DptDecoder(DIM, 8, widths, initializer())
    with torch.no_grad():
        for norm in theirs.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 1.5)
        for level, (mine, part) in enumerate(zip(ours.reassemble, theirs.reassemble_blocks, strict=True)):
            copy(mine.project, part.project_to_out_channel)
            copy(mine.out, part.project_to_feature_dim)
            if level < 2:
                copy_transposed(mine.rescale, part.upsample)
            elif level == 3:
                copy(mine.rescale.convolution, part.upsample)
        for mine, part in zip(ours.fuse, reversed(theirs.fusion_blocks), strict=True):
            copy(mine.out, part.project)
            for residual, other in (
                (mine.own, part.residual_conv_block1),
                (mine.both, part.residual_conv_block2),
            ):
                copy(residual.first, other.conv_1, other.batch_norm_1)
                copy(residual.second, other.conv_2, other.batch_norm_2)
        taps = [torch.randn(2, DIM, 14, 10) for _ in range(4)]
        expected = theirs(taps, [None] * 4)
        found = ours(taps)
    assert expected.shape == found.shape == (2, 8, 112, 80)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def batch_norm_steps(x: Tensor, grad: Tensor, weights: Tensor, mesh: Mesh) -> list[Tensor]:
    """Three steps on this rank's part of a batch: the output, gradients (summed over ranks), statistics."""
    from megavit.parallel.collectives import sum_over_dp

    norm = BatchNorm(x.shape[1], Initializer(0, mesh))
    share = slice(mesh.dp_rank * len(x) // mesh.dp_size, (mesh.dp_rank + 1) * len(x) // mesh.dp_size)
    part = x[share].clone().requires_grad_()
    for _ in range(3):
        norm.zero_grad()
        part.grad = None
        out = norm(part, weights[share])
        (out * grad[share]).sum().backward()
    assert part.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    sums = [sum_over_dp(mesh, gradient) for gradient in (norm.weight.grad, norm.bias.grad)]
    evaluated = norm.eval()(part, weights[share])
    return [t.detach() for t in (out, part.grad, evaluated, *sums, norm.running_mean, norm.running_var)]


def batch_norm_of_rank(x: Tensor, grad: Tensor, weights: Tensor) -> list[Tensor]:
    return batch_norm_steps(x, grad, weights, Mesh.from_environment())


@pytest.mark.dist
def test_batch_norm_over_ranks_is_torchs_over_the_whole_batch() -> None:
    """Catches statistics of a rank's own images, gradients that stop at the ranks' border, running variances
    without Bessel's correction, and unusable images that are counted."""
    torch.manual_seed(0)
    x, grad = 3 * torch.randn(6, 5, 4, 3) + 40, torch.randn(6, 5, 4, 3)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    usable = weights > 0
    grad[~usable] = 0
    torchs = nn.BatchNorm2d(5)
    kept = x[usable].clone().requires_grad_()
    for _ in range(3):
        torchs.zero_grad()
        kept.grad = None
        out = torchs(kept)
        (out * grad[usable]).sum().backward()
    assert kept.grad is not None
    expected = [out, kept.grad, torchs.eval()(kept)]
    expected += [torchs.weight.grad, torchs.bias.grad, torchs.running_mean, torchs.running_var]
    single = batch_norm_steps(x, grad, weights, Mesh.single())
    ranks = run_ranks(2, batch_norm_of_rank, x, grad, weights)
    joined = [torch.cat(parts) for parts in list(zip(*ranks, strict=True))[:3]] + ranks[0][3:]
    for found in (single, joined):
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            ours = ours[usable] if number < 3 else ours
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-4, msg=str(number))


def test_running_statistics_stay_float32() -> None:
    """Catches statistics that a model in bfloat16 rounds, whose averages then stand still."""
    norm = BatchNorm(3, initializer())
    before = norm.running_mean
    norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean is before and before.dtype == torch.float32
