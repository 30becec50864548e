"""Published figures that the hour's are held against, with their sources.

MFU is model FLOPs, three forward passes whatever is recomputed, over the data sheet's dense bfloat16 rate
(fp8 runs too: their share of the fp8 rate is half of it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from megavit.bench.report import Row


class Measure(NamedTuple):
    """Which of a stage's rows are meant, and their column."""

    stage: str
    column: str
    counts: Callable[[Row], bool]


class Anchor(NamedTuple):
    """A published figure; `measure` is a key of `MEASURES`."""

    measure: str
    published: float
    what: str
    hardware: str
    source: str
    remark: str = ""


def _is_engine(row: Row) -> bool:
    return str(row["step"]).startswith("trainer")


_ALONE = "ours: one GPU, without communication"
_OTHER_MODEL = f"{_ALONE}, another model"
MEASURES = {
    "trainer MFU": Measure("trainer", "mfu", _is_engine),
    "trainer images/s": Measure("trainer", "images_per_s", _is_engine),
    "trainer against timm": Measure("trainer", "ratio", lambda row: _is_engine(row) and row["compiled"]),
    "ViT-22B MFU of the trunk": Measure("whole", "mfu_of_trunk", lambda row: True),
    "ViT-22B MFU": Measure("whole", "mfu", lambda row: True),
    "blocks in fp8, TFLOP/s": Measure(
        "fp8", "tflop_per_s", lambda row: row["work"] == "blocks" and row["dtype"] == "fp8"
    ),
    "matmul TFLOP/s": Measure("matmul", "tflop_per_s", lambda row: row["dtype"] == "bfloat16"),
    "fp8 matmul TFLOP/s": Measure("matmul", "tflop_per_s", lambda row: str(row["dtype"]).startswith("fp8")),
}
_NEMO = "docs.nvidia.com/nemo-framework, Vit/Perf.html: images/s; MFU by 1.60 TFLOP an image"
_FOUNDRY = "mosaicml/llm-foundry 8c8dd48, scripts/train/benchmarking/README.md"
_TITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md; TFLOP/s by 51.48 GFLOP a token"
_MAMF = "stas00/ml-engineering 744d01e, compute/accelerator/README.md (best of many shapes)"
ANCHORS = (
    Anchor("trainer MFU", 0.289, "NeMo ViT-g/14, bf16", "8 x H100", _NEMO, "ours: the same model on one GPU"),
    Anchor("trainer images/s", 1428 / 8, "NeMo ViT-g/14, bf16, a GPU", "8 x H100", _NEMO, "ours: as above"),
    Anchor("trainer MFU", 0.444, "NeMo ViT-g/14, bf16", "8 x A100", _NEMO, "ours: the same model on one GPU"),
    Anchor("trainer against timm", 1.0, "timm's parallel block, bare", "this GPU", "this run"),
    Anchor(
        "trainer MFU",
        0.229,
        "nvSubquadratic ViT-5-Small, compiled",
        "H100",
        "its repository",
        "a smaller model",
    ),
    Anchor(
        "ViT-22B MFU of the trunk",
        0.549,
        "ViT-22B",
        "1,024 x TPU v4",
        "arXiv 2302.05442, section 4: 1,150 tokens/s a core",
        f"{_ALONE}, gradient descent",
    ),
    Anchor(
        "ViT-22B MFU",
        0.567,
        "MaxText 22B (6144 x 48), full recompute",
        "64 x TPU v4",
        "AI-Hypercomputer/maxtext e591f30, src/maxtext/configs/tpu/v4/README.md",
        f"{_OTHER_MODEL}, gradient descent",
    ),
    Anchor(
        "ViT-22B MFU",
        0.415,
        "Megatron-LM GPT 22B",
        "8 x A100",
        "arXiv 2205.05198, table 5",
        f"{_OTHER_MODEL}, gradient descent",
    ),
    Anchor("ViT-22B MFU", 0.439, "LLM-foundry 30B, ZeRO-3 style, bf16", "32 x H100", _FOUNDRY, _OTHER_MODEL),
    Anchor("ViT-22B MFU", 0.443, "LLM-foundry 13B, ZeRO-3 style, bf16", "8 x H100", _FOUNDRY, _OTHER_MODEL),
    Anchor("ViT-22B MFU", 0.347, "torchtitan Llama 3.1 8B, bf16, compiled", "8 x H100", _TITAN, _OTHER_MODEL),
    Anchor(
        "ViT-22B MFU",
        0.48,
        "Megatron-LM GPT 462B, bf16",
        "thousands of H100",
        "NVIDIA/Megatron-LM, README.md",
        _OTHER_MODEL,
    ),
    Anchor("blocks in fp8, TFLOP/s", 439.0, "torchtitan Llama 3.1 8B, fp8", "8 x H100", _TITAN, _OTHER_MODEL),
    Anchor(
        "blocks in fp8, TFLOP/s",
        744.0,
        "Megatron-Bridge 25.11 Llama 3 8B, fp8",
        "8 x H100",
        "NVIDIA-NeMo/Megatron-Bridge 067f987, docs/performance-summary.md",
        f"{_OTHER_MODEL}, blocks only",
    ),
    Anchor("matmul TFLOP/s", 794.5, "largest matmul, bf16", "H100, H200", _MAMF, "ours: fewer shapes"),
    Anchor("fp8 matmul TFLOP/s", 1453.0, "largest matmul, fp8", "H200", _MAMF, "ours: fewer shapes"),
)


def best(folder: Path, measure: Measure) -> float | None:
    """The largest value of the stage's file in the folder; None where there is none."""
    file = folder / f"{measure.stage}.json"
    if not file.is_file():
        return None
    rows = [row for row in json.loads(file.read_text())["rows"] if not row["error"] and measure.counts(row)]
    return max((row[measure.column] for row in rows if row[measure.column] is not None), default=None)


def verdicts(folder: Path) -> Iterable[Row]:
    """A row for each anchor: what the stages' files in the folder hold beside it."""
    for anchor in ANCHORS:
        ours = best(folder, MEASURES[anchor.measure])
        yield {
            "measure": anchor.measure,
            "published": anchor.published,
            "of": anchor.what,
            "on": anchor.hardware,
            "ours": ours,
            "ours/published": None if ours is None else ours / anchor.published,
            "beaten": None if ours is None else ours > anchor.published,
            "remark": anchor.remark,
            "source": anchor.source,
        }
