"""The table of GPUs."""

from __future__ import annotations

import re

import pytest

from megavit.gpus import GPUS, gpu_named, peak_flops


def test_names_are_found_as_people_write_them() -> None:
    """Catches a card that is refused because of a blank, a hyphen or the maker's name."""
    for text, name in [
        ("4090", "rtx_4090"),
        ("RTX 4090", "rtx_4090"),
        ("NVIDIA GeForce RTX 5090", "rtx_5090"),
        ("3090", "rtx_3090"),
        ("RTX A6000", "a6000"),
        ("rtx-6000-ada", "rtx_6000_ada"),
        ("H100-SXM5", "h100"),
        ("H100 PCIe", "h100_pcie"),
        ("a100-80GB", "a100_80"),
        ("gb200", "gb200"),
        ("L40S", "l40s"),
        ("MI300X", "mi300x"),
    ]:
        assert gpu_named(text).name == name
    assert all(gpu_named(name) is gpu for name, gpu in GPUS.items())


def test_any_other_kind_is_described() -> None:
    """Catches numbers that land in the wrong place, and a link that cannot be given."""
    mine = gpu_named("mine:96:400:1800:64")
    assert (mine.name, mine.memory_gib, mine.tflops, mine.memory_gb_per_s, mine.link_gb_per_s) == (
        *("mine", 96, 400, 1800, 64),
    )
    assert gpu_named("x:0.5:.5:2.").link_gb_per_s == gpu_named("4090").link_gb_per_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100", "say a100_40 or a100_80"),
        ("A100-SXM", "say a100_40 or a100_80"),
        ("V100", "a V100 has no bfloat16"),
        ("h10", "did you mean 'h100'"),
        ("5080", "did you mean 'rtx_5090'"),
        ("zzz", "unknown GPU 'zzz'. Known: a100_40, "),
        ("x:1", "described as NAME:GiB:TFLOPs:GBps[:linkGBps]"),
        (":1:2:3", "described as NAME:GiB:TFLOPs:GBps[:linkGBps]"),
        ("x:1:2:3:4:5", "described as NAME:GiB:TFLOPs:GBps[:linkGBps]"),
        ("x:1:-2:3", "'-2' is no positive number"),
        ("x:0:2:3", "'0' is no positive number"),
        ("x:1:nan:3", "'nan' is no positive number"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    """Catches a card that is taken for another one, and a number that divides by zero later."""
    with pytest.raises(ValueError, match=re.escape(message)):
        gpu_named(text)


# Dense bf16 operations of one processor a cycle, with float32 accumulation, from the makers' white papers.
OPERATIONS = {
    **dict.fromkeys(["gb200", "b200"], 8192),
    **dict.fromkeys(["h200", "h100", "h100_nvl", "h100_pcie"], 4096),
    **dict.fromkeys(["a100_80", "a100_40", "mi300x"], 2048),
    **dict.fromkeys(["l40s", "l4", "rtx_6000_ada", "a6000"], 1024),
    **dict.fromkeys(["a10g", "rtx_5090", "rtx_4090", "rtx_3090"], 512),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rates_are_dense(name: str) -> None:
    """Catches a data sheet's rate with sparsity, or with float16 accumulation: twice as much, which no clock
    would give."""
    gpu = GPUS[name]
    clock_ghz = gpu.tflops * 1e3 / (gpu.processors * OPERATIONS[name])
    assert 1.35 < clock_ghz < 2.6
    assert OPERATIONS.keys() == GPUS.keys() - {"cpu", "h20"}  # an H20 is an H200 with its rate cut


def test_peak_of_a_device() -> None:
    """Catches the plain name matching a slower card's, and a part of a word matching at all."""
    for device, tflops in [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX A6000", 155),
        ("AMD Instinct MI300X", 1307),
    ]:
        assert peak_flops(device) == tflops * 1e12, device
    for device in (
        "Some card",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A10",
        "Tesla V100",
    ):
        assert peak_flops(device) is None, device
