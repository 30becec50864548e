"""Mistakes in a DeepSpeed JSON, and the line that each one gets before anything heavy is imported."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megavit.train.ds_config import load_ds_config
from megavit.train.ds_rules import shown

GOOD: dict[str, Any] = {
    "train_batch_size": 64,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3},
}
PARAMS, ZERO = "optimizer.params.", "zero_optimization."
CPU, ON, OFF = {"device": "cpu"}, {"enabled": True}, {"enabled": False}
GONE = object()  # the key is taken out

# (dotted key, its value, words of the fix)
MISTAKES: list[tuple[str, Any, str]] = [
    # Batch.
    ("train_batch_size", GONE, "is missing; it must be a whole number of at least 1"),
    ("train_batch_size", 0, "a whole number of at least 1"),
    ("train_batch_size", "auto", "Hugging Face's Trainer only"),
    ("train_batch_size", 64.0, "a whole number"),
    ("train_batch_size", True, "a whole number"),
    ("train_batch_size", 10**400, "a whole number"),
    ("train_micro_batch_size_per_gpu", "auto", "or absent for a rank's whole share"),
    ("train_micro_batch_size_per_gpu", None, "a whole number of at least 1"),
    ("gradient_accumulation_steps", 4, "remove it: it is derived, train_batch_size / (micro-batch"),
    # Optimizer.
    ("optimizer", GONE, "is missing; it must be an object with type and params"),
    ("optimizer", None, "an object with type and params"),
    ("optimizer.type", GONE, 'is missing; it must be "AdamW" or "Adam"'),
    ("optimizer.type", "Lion", '"AdamW" or "Adam"'),
    ("optimizer.type", None, '"AdamW" or "Adam"'),
    ("optimizer.params", GONE, "is missing; it must be an object with lr"),
    ("optimizer.params", None, "an object with lr"),
    ("optimizer.legacy_fusion", True, "the trainer is not tested with it"),
    (PARAMS + "lr", GONE, "is missing; it must be a number above 0, the peak learning rate"),
    (PARAMS + "lr", True, "a number above 0"),
    (PARAMS + "lr", 0, "a number above 0"),
    (PARAMS + "lr", -1e-3, "a number above 0"),
    (PARAMS + "lr", math.inf, "a number above 0"),
    (PARAMS + "lr", math.nan, "a number above 0"),
    (PARAMS + "lr", 10**400, "a number above 0"),
    (PARAMS + "lr", "1e-3", "a number above 0"),
    (PARAMS + "lr", None, "a number above 0"),
    (PARAMS + "betas", 0.9, "a list of two numbers in [0, 1)"),
    (PARAMS + "betas", [0.9], "a list of two numbers"),
    (PARAMS + "betas", [0.9, 1.0], "a list of two numbers"),
    (PARAMS + "betas", [0.9, math.nan], "a list of two numbers"),
    (PARAMS + "betas", [0.9, [0.99]], "a list of two numbers"),
    (PARAMS + "eps", 0, "a number above 0"),
    (PARAMS + "eps", math.nan, "a number above 0"),
    (PARAMS + "weight_decay", -0.1, "a number of at least 0"),
    (PARAMS + "weight_decay", "0.1", "a number of at least 0"),
    (PARAMS + "weight_decay", math.inf, "a number of at least 0"),
    (PARAMS + "torch_adam", "true", "true or false"),
    (PARAMS + "fused", True, "add torch_adam: true, or remove fused"),
    (PARAMS + "adam_w_mode", False, "true or absent: weight decay is decoupled"),
    (PARAMS + "amsgrad", True, "AMSGrad has a third"),
    (PARAMS + "maximize", True, "the loss is minimised"),
    (PARAMS + "max_grad_norm", 1.0, "use gradient_clipping"),
    (PARAMS + "learning_rate", 1e-3, "an unknown key; remove it"),
    (PARAMS + "weight_decy", 0.1, "an unknown key; did you mean 'weight_decay'?"),
    ("scheduler", {"type": "WarmupLR"}, "the schedule is set with --schedule.name"),
    # Clipping and the reduction of gradients.
    ("gradient_clipping", math.nan, "a number of at least 0"),
    ("gradient_clipping", -1, "a number of at least 0"),
    ("gradient_clipping", False, "a number of at least 0"),
    ("gradient_cliping", 1.0, "an unknown key; did you mean 'gradient_clipping'?"),
    ("gradient_allreduce_op", "sum", '"mean" or absent: the engine divides by the global batch'),
    ("gradient_predivide_factor", 2.0, "1 or absent"),
    ("prescale_gradients", True, "false or absent"),
    ("managed_gradient_accumulation", False, "true or absent"),
    ("communication_data_type", "fp16", '"fp32" or "bf16"'),
    ("communication_data_type", "float32", '"fp32" or "bf16"'),
    # Precision.
    ("bf16", True, "an object with enabled"),
    ("bf16", {}, "bf16.enabled is missing; it must be true, false or"),
    ("bf16.enabled", "false", 'true, false or "auto"'),
    ("bf16.enabled", 1, 'true, false or "auto"'),
    ("bf16", ON | {"bf16_master_weights_and_grads": True}, "master weights are float32"),
    ("bfloat16", ON, "call it bf16"),
    ("fp16", ON, "it must be false: use bf16, which needs no loss scale"),
    ("fp16", {"loss_scale": 0}, "fp16.enabled is missing; it must be false"),
    ("amp", ON, "use bf16"),
    ("torch_autocast", ON, "it must be false: use bf16"),
    ("data_types.grad_accum_dtype", "fp16", '"fp32" or "bf16"'),
    ("data_types.grad_accum_dtype", "bf16", "with bf16 off"),
    ("data_types.grad_accum_dtyp", "fp32", "did you mean 'grad_accum_dtype'?"),
    ("data_types.keep_in_fp32_modules", ["norm"], "bf16.enabled decides the precision"),
    # ZeRO.
    ("zero_optimization", True, "it must be an object"),
    ("zero_optimisation", {}, "did you mean 'zero_optimization'?"),
    (ZERO + "stage", 4, "0, 1, 2 or 3"),
    (ZERO + "stage", True, "0, 1, 2 or 3"),
    (ZERO + "stage", "3", "0, 1, 2 or 3"),
    (ZERO + "overlap_comm", "true", "true or false"),
    (ZERO + "reduce_bucket_size", "auto", "a whole number of at least 1"),
    (ZERO + "reduce_bucket_size", 0, "a whole number of at least 1"),
    (ZERO + "reduce_bucket_size", 2.5, "a whole number of at least 1"),
    (ZERO + "allgather_bucket_size", 3, "an even whole number"),
    (ZERO + "stage3_prefetch_bucket_size", -1, "a whole number of at least 0"),
    (ZERO + "stage3_prefetch_buket_size", 0, "did you mean 'stage3_prefetch_bucket_size'?"),
    (ZERO + "compute_grad_norm", False, "updates are refused by the gradient's norm"),
    (ZERO + "round_robin_gradients", True, "it orders the weights otherwise than checkpoints read them"),
    (ZERO + "zero_hpz_partition_size", 8, "without regard to tensor parallelism"),
    (ZERO + "zero_quantized_gradients", True, "without regard to tensor parallelism"),
    (ZERO + "zero_quantized_weights", True, "the trainer is not tested with it"),
    (ZERO + "mics_shard_size", 8, "DeepSpeed 0.19 no longer has it"),
    (ZERO + "zenflow", {"topk_ratio": 0.1}, "it updates with gradients of earlier steps"),
    (ZERO + "cpu_offload", True, 'use offload_optimizer: {"device": "cpu"}'),
    (ZERO + "offload_optimizer", "cpu", "it must be an object"),
    (ZERO + "offload_optimizer", None, "it must be an object"),
    (ZERO + "offload_optimizer.device", "nvme", "checkpoints read what is in memory"),
    (ZERO + "offload_optimizer", CPU | {"ratio": 0.5}, "1 or absent: DeepSpeed would split the optimizer"),
    (ZERO + "offload_optimizer", CPU | {"pin_memroy": True}, "did you mean 'pin_memory'?"),
    (ZERO + "offload_param.device", "gpu", '"none" or "cpu"'),
    (ZERO + "offload_param", CPU | {"nvme_path": "/nvme"}, "it is for NVMe"),
    ("zero_optimization", {"stage": 2, "offload_param": CPU}, "with stage 2, which ignores it; use stage 3"),
    (
        "zero_optimization",
        {"offload_optimizer": CPU},
        "with stage 0, which ignores it; use stage 1",
    ),
    # Features of others.
    ("activation_checkpointing", {"partition_activations": True}, "use --recompute none|full|selective"),
    ("checkpoint", {"tag_validation": "Fail"}, "the trainer writes its own checkpoints"),
    ("compile", {"deepcompile": True}, "use --compile"),
    ("tensor_parallel", {"autotp_size": 2}, "use --tensor_parallel_size"),
    ("pipeline", {"stages": 2}, "pipeline parallelism is not supported"),
    ("elasticity", ON, "DeepSpeed 0.19 no longer has it"),
    ("sparse_gradients", True, "DeepSpeed 0.19 no longer has it"),
    ("data_efficiency", ON, "the trainer reads its own data"),
    ("hybrid_engine", ON, "it must be false"),
    ("wandb", ON, "TensorBoard files to the run folder, which wandb sync --sync-tensorboard uploads"),
    ("wandb", True, '"enabled": false'),
    ("wandb", {"enabled": "false"}, 'wandb.enabled is "false"; it must be false'),
    ("tensorboard", ON, "TensorBoard files to the run folder itself"),
    ("csv_monitor", ON, "log.jsonl"),
    ("comet", ON, "log.jsonl"),
    ("comms_logger", ON, "launch/plan.py predicts how long they take"),
    ("flops_profiler", ON, "the trainer logs its own MFU"),
    ("memory_breakdown", True, "false or absent"),
    ("wall_clock_breakdown", "false", "true or false"),
    ("steps_per_print", math.inf, "a whole number of at least 1"),
    ("speling", {}, "an unknown key; remove it"),
    ('a\n"key"', 1, "an unknown key; remove it"),
]


def changed(key: str, value: Any) -> dict[str, Any]:
    """GOOD with the value at a dotted key."""
    config = copy.deepcopy(GOOD)
    *path, last = key.split(".")
    block = config
    for name in path:
        block = block.setdefault(name, {})
    if value is GONE:
        del block[last]
    else:
        block[last] = value
    return config


def mistakes_of(tmp_path: Path, content: str | bytes) -> list[str]:
    """The lines that a file with this content is refused with."""
    path = tmp_path / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        load_ds_config(path)
    return str(error.value).splitlines()


@pytest.mark.parametrize(("key", "value", "fix"), MISTAKES, ids=[key for key, *_ in MISTAKES])
def test_a_mistake_is_one_line_with_file_key_value_and_fix(
    tmp_path: Path, key: str, value: Any, fix: str
) -> None:
    """Catches what DeepSpeed ignores, what trains something else than the file says, and tracebacks."""
    (line,) = mistakes_of(tmp_path, json.dumps(changed(key, value)))
    assert line.startswith(f"{tmp_path / 'ds.json'}: ") and fix in line, line
    if key.replace(".", "").isidentifier() and not isinstance(value, dict):
        assert value is GONE or f"{key} is {shown(value)}" in line, line
        assert f": {key} is " in line, line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{'a': 1}", "is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
        ('{"train_batch_size": 64,}', "is not valid JSON"),
        ("", "is not valid JSON: Expecting value: line 1 column 1"),
        ("[]", "must hold a JSON object, not []"),
        ("null", "must hold a JSON object, not null"),
        ('{"a": ' * 100_000, "is nested too deeply"),
        ('{"a": ' + "[" * 100_000, "is nested too deeply"),
        (f'{{"train_batch_size": {"9" * 5000}}}', "is not valid JSON: Exceeds the limit"),
        (b'{"train_batch_size": "\xff"}', "is not a text file: 'utf-8' codec can't decode byte 0xff"),
        (json.dumps(GOOD).encode("utf-16"), "save it as UTF-8"),
    ],
    ids=lambda value: None,
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: str | bytes, words: str) -> None:
    """Catches tracebacks of the JSON reader: JSONDecodeError, RecursionError, UnicodeDecodeError."""
    (line,) = mistakes_of(tmp_path, content)
    assert str(tmp_path / "ds.json") in line and words in line, line


def test_a_path_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """Catches a bare IsADirectoryError or OSError."""
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    for path, words in [
        (tmp_path / "missing.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (loop, "Too many levels of symbolic links"),
    ]:
        with pytest.raises(ValueError) as error:
            load_ds_config(path)
        assert str(error.value) == f"--deepspeed_config {path}: {words}"


def test_repeated_keys_are_named(tmp_path: Path) -> None:
    """Catches a key of which JSON's reader keeps the last value only, at any depth."""
    text = json.dumps(GOOD).replace('"lr": 0.001', '"lr": 0.001, "lr": 0.003')
    (line,) = mistakes_of(tmp_path, text)
    assert line.endswith('"lr" is given 2 times (0.001, 0.003); keep one')


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"stage": 0},
            "zero_optimization.stage 0, which is for float32; use stage 1, 2 or 3",
        ),
        ({"stage": 1}, "use stage 2, which needs less memory and sends no more"),
        ({"stage": 2, "reduce_scatter": True}, "use false, which sends the same bytes"),
    ],
)
def test_bf16_where_it_would_train_otherwise_is_refused(
    tmp_path: Path, block: dict[str, Any], words: str
) -> None:
    """Catches clipping by another norm, optimizer buffers that no checkpoint knows, and gradients that are
    divided in bfloat16."""
    config = GOOD | {"bf16": ON, "zero_optimization": block, "data_types": {"grad_accum_dtype": "fp32"}}
    (line,) = mistakes_of(tmp_path, json.dumps(config))
    assert words in line, line


HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_all_mistakes_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    """Catches a file that is refused one key a start: Hugging Face's has 13 that its Trainer fills in."""
    lines = mistakes_of(tmp_path, json.dumps(HUGGING_FACE))
    named = [line.removeprefix(f"{tmp_path / 'ds.json'}: ").split()[0] for line in lines]
    assert named == [
        "fp16.enabled",
        *(PARAMS + name for name in ("lr", "betas", "eps", "weight_decay")),
        "scheduler",
        ZERO + "reduce_bucket_size",
        ZERO + "stage3_prefetch_bucket_size",
        ZERO + "stage3_param_persistence_threshold",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ]
