"""The rows of each benchmark, at tiny sizes, and the models that take part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megavit.bench import checkpoint, data, dense
from megavit.bench.kernels import kind_of
from megavit.bench.peers import CONTESTANTS, choose, parse_shape


def test_wrong_names_and_shapes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a misspelt model that is left out silently, and a missing package that ends the comparison."""
    with pytest.raises(ValueError, match=r"--models timm-paralel: .*known: megavit, .*timm-parallel"):
        choose(["timm-paralel"])
    for text in ("384x6x6", "384x6x6xb", "384x6x0x8", "65x2x2x2"):
        with pytest.raises(ValueError, match="384x6x6x8|multiple of model.num_heads"):
            parse_shape(text, 224, 14, 1000)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else name)
    chosen, left_out = choose(["hf-vit", "megavit"])
    assert list(chosen) == ["megavit"]
    assert left_out == ["hf-vit needs transformers: pip install 'megavit[peers]'"]
    with pytest.raises(ValueError, match="none can be built; hf-vit needs"):
        choose(["hf-vit"])


@pytest.mark.parametrize("name", choose(None)[0])
def test_every_model_has_the_shape_and_its_blocks(name: str) -> None:
    """Catches a peer's release with other names, where `--compile` would compile nothing, and a peer that is
    not built at the shape."""
    config, _ = parse_shape("64x2x2x1", image_size=56, patch_size=14, num_classes=10)
    model = CONTESTANTS[name].build(config)
    assert len(CONTESTANTS[name].blocks(model)) in (2, 4)  # whole blocks, or their two branches
    assert model(torch.rand(1, 3, 56, 56)).shape == (1, 10)


def test_frozen_trunks_keep_less_and_cached_ones_are_read() -> None:
    """Catches a frozen trunk that keeps activations for backward, and a cache whose rows the step does not
    take."""
    rows = [row for row in dense.measure("vit_tiny", 1, 1, "cpu") if row["head"] == "segmentation, linear"]
    kept = {row["trunk"]: row["kept_mib_per_image"] for row in rows}
    assert kept["frozen"] < 0.5 * kept["trained"] and kept["frozen, cached"] < 0.5 * kept["trained"]
    assert all(row["ratio_to"] == "trained" for row in rows)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN", "matmul"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(...)>", "gelu"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<...>", "norm"),
        ("void at::native::elementwise_kernel<128, 4, at::native::add>", "other"),
        ("aten::addmm", "matmul"),
        ("_RmsNormBackward", "norm"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "norm"),
        ("triton_poi_fused_gelu_gelu_backward_5", "gelu"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm>>", "matmul"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    """Catches CUDA kernels, whose names have capitals, that all count as others."""
    assert kind_of(kernel) == kind


def test_pipelines_and_their_bases() -> None:
    """Catches a loader or reader whose interface has moved on, and ratios to another pipeline than said."""
    rows = {row["pipeline"]: row for row in data.measure(data.BATCH, 1)}
    assert rows.keys() >= {
        "stock webdataset",
        "megavit",
        "megavit, no antialias",
        "reading, stock webdataset",
    }
    assert all(row["images_per_s_per_core"] > 0 for row in rows.values())
    assert rows["stock webdataset"]["ratio_median"] == 1
    assert rows["decode only (libjpeg-turbo)"]["ratio_to_decode_median"] == 1
    assert rows["reading, megavit (checksums verified)"]["ratio_to"] == "reading, stock webdataset"


def test_checkpoints_are_written_and_read(tmp_path: Path) -> None:
    """Catches a saver whose interface has moved on, and a save that fails and counts as a fast one."""
    rows = list(checkpoint.measure(tmp_path, 0.002, 1))
    assert len(rows) == 8 and all(row["gib_per_s"] > 0 for row in rows)
    assert [row["ratio_to"][:4] for row in rows[:6]] == ["save"] * 3 + ["rest"] * 3
    (tmp_path / "checkpoints").rename(tmp_path / "before")
    (tmp_path / "checkpoints").touch()  # a file where the folder should be
    with pytest.raises(ValueError, match=f"--folder {tmp_path.parent}: a checkpoint cannot be saved"):
        list(checkpoint.measure(tmp_path, 0.002, 1))
