"""The sizes at which the stages measure: those of a GPU with 80 GB or more, and tiny ones for a rehearsal of
the whole hour on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megavit.model.config import ModelConfig, model_preset
from megavit.train.logging.meters import nominal_peak


@dataclass(frozen=True)
class Setting:
    """A machine and the sizes for it.

    Args:
        device: "cuda" or "cpu".
        dry: tiny sizes: what comes out are the same files with the same columns, and no figures.
        out: the folder of the results.
        block: a few blocks of ViT-22B's width, for speeds by kernel and by block.
        micro_batches: for them; at the first one everything is measured, the others are a sweep.
        trained: the architecture that the whole trainer trains, at `trained_batch` images a step.
        learner: the architecture that learns in bfloat16 and in fp8, at `learner_batch` images a step.
        learner_steps: its steps.
        whole: ViT-22B, at `whole_batches` images a step.
        steps: of each case that are timed; one more comes first.
        kernel_s: how long a single kernel is repeated for one of five timings.
        sustained_s: how long matmuls run until clocks are those of a long run.
        stream: elements of the tensor that is copied and updated for the rates of memory.
        compiler: the backend of `torch.compile`.
    """

    device: str
    dry: bool
    out: Path
    block: ModelConfig
    micro_batches: tuple[int, ...]
    trained: ModelConfig
    trained_batch: int
    learner: ModelConfig
    learner_batch: int
    learner_steps: int
    whole: ModelConfig
    whole_batches: tuple[int, ...]
    steps: int
    kernel_s: float
    sustained_s: float
    stream: int
    compiler: str
    dtype: torch.dtype = torch.bfloat16

    @property
    def peak(self) -> float | None:
        """Dense bfloat16 FLOP/s of the data sheet; fp8 has twice as many. None for a CPU."""
        return nominal_peak(torch.device(self.device), self.dtype)

    def of_peak(self, flops_per_s: float, *, fp8: bool = False) -> float | None:
        return flops_per_s / (self.peak * (2 if fp8 else 1)) if self.peak else None


def blocks_of(dim: int, depth: int, num_heads: int, side: int) -> ModelConfig:
    """An architecture of which only the blocks are used, on side x side tokens."""
    return ModelConfig(
        name=f"{dim}x{depth}x{num_heads}",
        image_size=side,
        patch_size=1,
        num_classes=0,
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=4 * dim,
    )


def hour_setting(out: Path) -> Setting:
    """For one GPU."""
    return Setting(
        device="cuda",
        dry=False,
        out=out,
        block=blocks_of(6144, 4, 48, 16),
        micro_batches=(16, 8, 32, 64),
        trained=model_preset("vit_g14"),
        trained_batch=64,
        learner=model_preset("vit_l16", num_classes=100),
        learner_batch=64,
        learner_steps=200,
        whole=model_preset("vit_22b"),
        whole_batches=(16, 8, 32, 64),
        steps=10,
        kernel_s=0.1,
        sustained_s=8.0,
        stream=2**29,
        compiler="inductor",
    )


def dry_setting(out: Path) -> Setting:
    """For the CPU, or a GPU if there is one."""
    on_gpu = torch.cuda.is_available()
    tiny = model_preset("vit_tiny", channels=3)
    return Setting(
        device="cuda" if on_gpu else "cpu",
        dry=True,
        out=out,
        block=blocks_of(32, 3, 2, 4),
        micro_batches=(2,),
        trained=tiny,
        trained_batch=2,
        learner=tiny,
        learner_batch=8,
        learner_steps=8,
        whole=tiny,
        whole_batches=(2,),
        steps=1,
        kernel_s=0.0,
        sustained_s=0.01,
        stream=2**12,
        compiler="inductor" if on_gpu else "eager",
    )
