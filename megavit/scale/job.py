"""The numbers of a job that its cost depends on, beside the model: how ranks share the work, and what the
DeepSpeed JSON says of ZeRO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from megavit.scale.gathers import GatherLimits
from megavit.train.ds_config import uses_bf16

# What waits in host memory: nothing, Adam's states and master weights, or the weights too. DeepSpeed offloads
# weights without the optimizer in no mode that it describes.
Offload = Literal["none", "optimizer", "params"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)


@dataclass(frozen=True)
class Layout:
    """How a global batch is shared: micro_batch x grad_accum x dp_size images a step, over dp_size x tp_size
    ranks."""

    tp_size: int
    dp_size: int
    micro_batch: int
    grad_accum: int = 1

    @property
    def ranks(self) -> int:
        return self.tp_size * self.dp_size

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.grad_accum * self.dp_size


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed JSON decides memory and traffic. Buckets in elements."""

    stage: int
    bf16: bool
    gathers: GatherLimits = GatherLimits()
    reduce_bucket: int = 500_000_000
    sub_group: int = 1_000_000_000
    accumulates_in_fp32: bool = True
    reduces_in_fp32: bool = True
    offload_optimizer: bool = False
    offload_param: bool = False

    @property
    def offload(self) -> Offload:
        if self.offload_param:
            return "params"
        return "optimizer" if self.offload_optimizer else "none"

    @property
    def element_bytes(self) -> int:
        """Of a weight in compute, an activation, and a fresh gradient."""
        return 2 if self.bf16 else 4

    @property
    def accumulated_bytes(self) -> int:
        """Of a gradient that accumulates over the micro-steps, at stages 2 and 3."""
        return 4 if self.accumulates_in_fp32 else 2

    @property
    def reduced_bytes(self) -> int:
        """Of a gradient on its way between the data-parallel ranks."""
        return 4 if self.reduces_in_fp32 else 2

    @staticmethod
    def from_ds_config(config: dict[str, Any]) -> ZeroSettings:
        """From a resolved or plain DeepSpeed JSON, with DeepSpeed 0.19's defaults."""
        zero = config.get("zero_optimization", {})
        defaults = GatherLimits()
        return ZeroSettings(
            stage=zero.get("stage", 0),
            bf16=uses_bf16(config),
            gathers=GatherLimits(
                persistence=int(zero.get("stage3_param_persistence_threshold", defaults.persistence)),
                prefetch=int(zero.get("stage3_prefetch_bucket_size", defaults.prefetch)),
                max_live=int(zero.get("stage3_max_live_parameters", defaults.max_live)),
                max_reuse=int(zero.get("stage3_max_reuse_distance", defaults.max_reuse)),
            ),
            reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            sub_group=int(zero.get("sub_group_size", 1_000_000_000)),
            accumulates_in_fp32=config.get("data_types", {}).get("grad_accum_dtype") != "bf16",
            reduces_in_fp32=config.get("communication_data_type") != "bf16",
            offload_optimizer=_offloads(zero, "offload_optimizer"),
            offload_param=_offloads(zero, "offload_param"),
        )


def _offloads(zero: dict[str, Any], part: str) -> bool:
    return (zero.get(part) or {}).get("device", "none") != "none"
