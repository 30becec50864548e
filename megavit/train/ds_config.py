"""The DeepSpeed JSON: read, checked early, and resolved for the ranks at hand. Imports neither torch nor
deepspeed.

It stays a plain DeepSpeed file. Three things are ours: an unknown key at the top level is an error (DeepSpeed
0.19 ignores it), `"bf16": {"enabled": "auto"}` follows the device, and accumulation is derived from the
global batch.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megavit.config import nearest

# Top-level keys that DeepSpeed 0.19.8 reads.
_KNOWN_KEYS = frozenset(
    """
    aio autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type compile csv_monitor comet
    data_efficiency data_types dataloader_drop_last disable_allgather disable_python_gc dump_state
    flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor keep_in_fp32_modules log_level memory_breakdown optimizer prescale_gradients
    scheduler steps_per_print tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu wall_clock_breakdown wandb zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization activation_checkpointing pipeline hybrid_engine
    expert_parallel sequence_parallel_size seq_parallel_communication_data_type sparse_gradients
    tensor_parallel weight_quantization use_data_before_expert_parallelism zenflow
    managed_gradient_accumulation
    """.split()
)

# Keys that another owner has; two owners of one number would drift apart silently.
_OWNED_ELSEWHERE = {
    "gradient_accumulation_steps": "it is derived: train_batch_size / (micro-batch x data-parallel ranks)",
    "scheduler": "the schedule is set with --schedule.name and --schedule.*_steps",
    "activation_checkpointing": "use --recompute none|full|selective",
    "tensor_parallel": "use --tensor_parallel_size",
    "sequence_parallel_size": "sequence parallelism is not supported",
    "pipeline": "pipeline parallelism is not supported",
    "bfloat16": "call it bf16",
    "fp16": "use bf16: ViT-22B trains in bfloat16, which needs no loss scale",
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON. Raises ValueError naming the file, the key and the fix."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--deepspeed_config {path}: no such file")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(raw).__name__}")
    for key in raw:
        if key not in _KNOWN_KEYS:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(key, _KNOWN_KEYS)}")
        if key in _OWNED_ELSEWHERE:
            raise ValueError(f"{path}: remove {key!r}: {_OWNED_ELSEWHERE[key]}")
    for block in ("bf16", "zero_optimization", "optimizer", "data_types"):
        if not isinstance(raw.get(block, {}), dict):
            raise ValueError(f"{path}: {block!r} must be a JSON object, got {json.dumps(raw[block])}")
    _require_count(path, raw, "train_batch_size", required=True)
    _require_count(path, raw, "train_micro_batch_size_per_gpu", required=False)
    parameters = raw.get("optimizer", {}).get("params", {})
    if not isinstance(parameters.get("lr"), int | float) or not parameters["lr"] > 0:
        raise ValueError(f'{path}: "optimizer": {{"params": {{"lr": ...}}}} must give the peak learning rate')
    optimizer = raw["optimizer"].get("type", "")
    if str(optimizer).lower() not in ("adam", "adamw"):
        raise ValueError(f"{path}: optimizer.type must be Adam or AdamW, got {optimizer!r}")
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    for part in ("offload_optimizer", "offload_param"):
        offload = raw.get("zero_optimization", {}).get(part) or {}
        if offload.get("device", "none") not in ("none", "cpu"):
            raise ValueError(
                f"{path}: zero_optimization.{part}.device must be none or cpu, got {offload['device']!r}: "
                f"checkpoints hold what is in memory"
            )
        if offload.get("ratio", 1) != 1:
            raise ValueError(
                f"{path}: zero_optimization.{part}.ratio must be 1: DeepSpeed splits the optimizer"
            )
    for feature in ("zero_hpz_partition_size", "zero_quantized_gradients"):
        if raw.get("zero_optimization", {}).get(feature, 1) not in (1, False):
            raise ValueError(
                f"{path}: zero_optimization.{feature} groups ranks without regard to tensor parallelism"
            )
    return raw


def _require_count(path: Path, raw: dict[str, Any], key: str, *, required: bool) -> None:
    if key not in raw and not required:
        return
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: {key} must be a whole number of at least 1, got {value!r}")


def split_batch(global_batch: int, dp_size: int, largest_micro_batch: int | None) -> tuple[int, int]:
    """(micro_batch, grad_accum) with micro_batch * grad_accum * dp_size == global_batch.

    The micro-batch is the largest divisor of a rank's share that is not above `largest_micro_batch`, so a run
    has the same global batch at any number of ranks. Raises ValueError when dp_size does not divide the
    global batch.
    """
    if global_batch % dp_size:
        lower = global_batch // dp_size * dp_size
        raise ValueError(
            f"train_batch_size {global_batch} is not a multiple of the {dp_size} data-parallel ranks; "
            f"use {lower or dp_size} or {lower + dp_size}, or another number of ranks"
        )
    share = global_batch // dp_size
    limit = min(share, largest_micro_batch or share)
    micro_batch = next(size for size in range(limit, 0, -1) if share % size == 0)
    return micro_batch, share // micro_batch


def resolve_ds_config(raw: dict[str, Any], dp_size: int, device_type: str) -> dict[str, Any]:
    """The dictionary handed to DeepSpeed: batch split, precision and Adam's implementation decided for this
    launch."""
    config = copy.deepcopy(raw)
    micro_batch, grad_accum = split_batch(
        raw["train_batch_size"], dp_size, raw.get("train_micro_batch_size_per_gpu")
    )
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = grad_accum
    bf16 = config.get("bf16", {})
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = device_type == "cuda"
    if bf16.get("enabled") and config.get("zero_optimization", {}).get("stage", 0) == 0:
        # DeepSpeed's wrapper for it refuses float32 accumulation, keeps no readable master weights and clips
        # by a norm that misses the other TP ranks.
        raise ValueError("bf16 needs zero_optimization.stage 1 or higher; stage 0 is for float32")
    accumulates_in_fp32 = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if bf16.get("enabled") and config["zero_optimization"]["stage"] == 1 and accumulates_in_fp32:
        # DeepSpeed takes another optimizer class for it, with buffers that zero_state does not know.
        raise ValueError(
            "bf16 with zero_optimization.stage 1 and data_types.grad_accum_dtype fp32 is not supported; use "
            "stage 2, which needs less memory and sends no more"
        )
    if not _offloads_optimizer(config) and (device_type == "cpu" or not _has_cuda_compiler()):
        # DeepSpeed's fused Adam would have to be compiled first: not worth it on a CPU, impossible without
        # nvcc.
        params = config["optimizer"].setdefault("params", {})
        params.setdefault("torch_adam", True)
        if device_type == "cpu" and params["torch_adam"]:
            params.setdefault("fused", True)  # torch's default there is ten passes over the weights
    config.setdefault("steps_per_print", 10**9)  # the trainer prints its own line
    return config


def _offloads_optimizer(config: dict[str, Any]) -> bool:
    return config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def uses_bf16(config: dict[str, Any]) -> bool:
    return bool(config.get("bf16", {}).get("enabled", False))


def _has_cuda_compiler() -> bool:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") is not None or (Path(home) / "bin" / "nvcc").is_file()
