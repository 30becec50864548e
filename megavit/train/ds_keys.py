"""The keys of a DeepSpeed JSON that the trainer accepts, with the values that each may have, and the reason
why the others that people write are refused. Imports neither torch nor deepspeed.

DeepSpeed 0.19.8 reads more keys than these and ignores what it does not know. An accepted key is one that a
test trains the engine with, comparing losses and weights (`tests/train/test_ds_config.py`); a key is added
here together with a case there.
"""

from __future__ import annotations

from megavit.train.ds_rules import (
    FLAG,
    Block,
    SwitchedOff,
    Value,
    count,
    elements,
    is_number,
    number,
    one_of,
    only,
)

_BLOCKS_ARE_LEAVES = "remove it: the engine has each block's weights gathered at once"
_OWN_CHECKPOINTS = "remove it: the trainer writes its own checkpoints (--checkpoint.*)"
_NVME = "remove it: it is for NVMe; weights and optimizer stay in memory, where checkpoints read them"
_REMOVED = "remove it: DeepSpeed 0.19 no longer has it"
_UNTESTED = "remove it: the trainer is not tested with it"
_RANKS_ARE_MIXED = "it groups ranks without regard to tensor parallelism"
_EACH_RANKS_MEAN = "the engine divides by the global batch itself and counts on DeepSpeed's plain mean"
_BF16_DECIDES = "remove it: bf16.enabled decides the precision of the weights"

_OPTIMIZER = Block(
    {
        "type": Value(
            lambda value: isinstance(value, str) and value.lower() in ("adam", "adamw"),
            '"AdamW" or "Adam", which DeepSpeed takes for AdamW: checkpoints hold Adam\'s two moments',
        ),
        "params": Block(
            {
                "lr": number("a number above 0, the peak learning rate", lambda value: value > 0),
                "betas": Value(
                    lambda value: (
                        isinstance(value, list)
                        and len(value) == 2
                        and all(is_number(beta) and 0 <= beta < 1 for beta in value)
                    ),
                    "a list of two numbers in [0, 1)",
                ),
                "eps": number("a number above 0", lambda value: value > 0),
                "weight_decay": number("a number of at least 0", lambda value: value >= 0),
                "torch_adam": FLAG,
                "fused": FLAG,
                "adam_w_mode": only(True, "weight decay is decoupled, as AdamW has it"),
            },
            {
                "amsgrad": "remove it: checkpoints hold Adam's two moments, AMSGrad has a third",
                "bias_correction": "remove it: Adam's bias is always corrected",
                "foreach": "remove it: torch chooses; fused with torch_adam is faster",
                "fp32_optimizer_states": "remove it: moments are always float32",
                "max_grad_norm": "remove it: use gradient_clipping",
                "maximize": "remove it: the loss is minimised",
            },
            ("lr",),
        ),
    },
    {"legacy_fusion": _UNTESTED},
    ("type", "params"),
)

_OFFLOAD_REFUSED = dict.fromkeys(("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"), _NVME)
_DEVICE = one_of("none", "cpu", because=": checkpoints read what is in memory")

_ZERO = Block(
    {
        "stage": Value(lambda value: type(value) is int and 0 <= value <= 3, "0, 1, 2 or 3"),
        "overlap_comm": FLAG,
        "contiguous_gradients": FLAG,
        "reduce_scatter": FLAG,
        "reduce_bucket_size": elements(1),
        "allgather_bucket_size": elements(2, step=2),
        "sub_group_size": elements(1),
        "stage3_prefetch_bucket_size": elements(0),
        "stage3_param_persistence_threshold": elements(0),
        "stage3_model_persistence_threshold": elements(0),
        "stage3_max_live_parameters": elements(0),
        "stage3_max_reuse_distance": elements(0),
        "stage3_gather_16bit_weights_on_model_save": FLAG,
        "ignore_unused_parameters": FLAG,
        "memory_efficient_linear": FLAG,
        "offload_optimizer": Block(
            {
                "device": _DEVICE,
                "pin_memory": FLAG,
                "ratio": only(1, "DeepSpeed would split the optimizer, and checkpoints hold one"),
                "fast_init": only(False, "it is for NVMe"),
                "pipeline_read": only(False, "it is for NVMe"),
                "pipeline_write": only(False, "it is for NVMe"),
                "super_offload": only(False, "it takes another optimizer, which checkpoints do not know"),
            },
            _OFFLOAD_REFUSED | {"cpuadam_cores_perc": _UNTESTED},
        ),
        "offload_param": Block({"device": _DEVICE, "pin_memory": FLAG}, _OFFLOAD_REFUSED),
        "allgather_partitions": only(True, "DeepSpeed 0.19 has no other way"),
        "compute_grad_norm": only(True, "updates are refused by the gradient's norm (--guard.*)"),
        "elastic_checkpoint": only(False, "the trainer writes its own checkpoints"),
        "round_robin_gradients": only(False, "it orders the weights otherwise than checkpoints read them"),
        "use_multi_rank_bucket_allreduce": only(True, "the trainer is not tested without it"),
        "zero_hpz_partition_size": only(1, _RANKS_ARE_MIXED),
        "zero_quantized_gradients": only(False, _RANKS_ARE_MIXED),
        "zero_quantized_nontrainable_weights": only(False, "the trainer is not tested with it"),
        "zero_quantized_weights": only(False, "the trainer is not tested with it"),
    },
    {
        "cpu_offload": 'use offload_optimizer: {"device": "cpu"}',
        "cpu_offload_param": 'use offload_param: {"device": "cpu"}',
        "cpu_offload_use_pin_memory": "use pin_memory in offload_optimizer and offload_param",
        "gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
        "leaf_module": _BLOCKS_ARE_LEAVES,
        "load_from_fp32_weights": _OWN_CHECKPOINTS,
        "mics_hierarchical_params_gather": _REMOVED,
        "mics_shard_size": _REMOVED,
        "pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
        "save_muon_momentum_buffer_in_memory": "remove it: the optimizer is AdamW",
        "stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
        "stage3_module_granularity_threshold": _BLOCKS_ARE_LEAVES,
        "zenflow": "remove it: it updates with gradients of earlier steps, and takes another optimizer",
        "zeropp_loco_param": _REMOVED,
    }
    | dict.fromkeys(
        (
            "enable_sanity_checks",
            "legacy_stage1",
            "log_trace_cache_warnings",
            "override_module_apply",
            "parameter_alignment",
            "stage3_allgather_sequential",
            "stage3_use_all_reduce_for_fetch_params",
        ),
        _UNTESTED,
    ),
)

SWITCHED_OFF = {
    "autotuning": SwitchedOff("launch/plan.py searches the best layout and writes its configuration"),
    "comet": SwitchedOff("the trainer writes log.jsonl and TensorBoard files to the run folder itself"),
    "comms_logger": SwitchedOff("it waits for every collective; launch/plan.py predicts how long they take"),
    "csv_monitor": SwitchedOff("the trainer writes log.jsonl and TensorBoard files to the run folder itself"),
    "data_efficiency": SwitchedOff("the trainer reads its own data (--data.*)"),
    "flops_profiler": SwitchedOff("the trainer logs its own MFU; DeepSpeed's count is wrong under ZeRO-3"),
    "fp16": SwitchedOff("use bf16, which needs no loss scale"),
    "hybrid_engine": SwitchedOff("it is for generating text"),
    "tensorboard": SwitchedOff("the trainer writes TensorBoard files to the run folder itself"),
    "torch_autocast": SwitchedOff("use bf16"),
    "wandb": SwitchedOff(
        "the trainer writes TensorBoard files to the run folder, which wandb sync --sync-tensorboard uploads"
    ),
}

KEYS = Block(
    {
        "train_batch_size": count("a whole number of at least 1, the global batch"),
        "train_micro_batch_size_per_gpu": count(
            "a whole number of at least 1, or absent for a rank's whole share"
        ),
        "gradient_clipping": number("a number of at least 0 (0 does not clip)", lambda value: value >= 0),
        "bf16": Block(
            {"enabled": one_of(True, False, "auto")},
            {
                "bf16_master_weights_and_grads": "remove it: master weights are float32",
                "bf16_optimizer_states": "remove it: moments are float32",
                "check_grad_overflow": "remove it: the trainer refuses updates that are not finite itself",
                "immediate_grad_update": "remove it: it is for an optimizer that is not used here",
            },
            ("enabled",),
        ),
        "data_types": Block(
            {"grad_accum_dtype": one_of("fp32", "bf16")},
            dict.fromkeys(("buffer_dtype", "keep_in_fp32_modules", "param_dtype"), _BF16_DECIDES),
        ),
        "communication_data_type": one_of("fp32", "bf16"),
        "optimizer": _OPTIMIZER,
        "zero_optimization": _ZERO,
        "dump_state": FLAG,
        "steps_per_print": count(),
        "wall_clock_breakdown": FLAG,
        "zero_allow_untested_optimizer": FLAG,
        "zero_force_ds_cpu_optimizer": FLAG,
        "gradient_allreduce_op": only("mean", _EACH_RANKS_MEAN),
        "gradient_predivide_factor": only(1, _EACH_RANKS_MEAN),
        "managed_gradient_accumulation": only(True, "the engine counts on it"),
        "memory_breakdown": only(
            False, "it collects garbage many times a step; the trainer logs its peak memory"
        ),
        "prescale_gradients": only(False, _EACH_RANKS_MEAN),
        **SWITCHED_OFF,
    },
    {
        "activation_checkpointing": "remove it: use --recompute none|full|selective",
        "aio": _NVME,
        "amp": "remove it: DeepSpeed 0.19 no longer has it; use bf16",
        "bfloat16": "call it bf16",
        "checkpoint": _OWN_CHECKPOINTS,
        "compile": "remove it: use --compile",
        "curriculum_learning": _REMOVED,
        "dataloader_drop_last": "remove it: the trainer reads its own data (--data.*)",
        "datastates_ckpt": _OWN_CHECKPOINTS,
        "expert_parallel": "remove it: the model has no experts",
        "gradient_accumulation_steps": (
            "remove it: it is derived, train_batch_size / (micro-batch x data-parallel ranks)"
        ),
        "keep_in_fp32_modules": _BF16_DECIDES,
        "pipeline": "remove it: pipeline parallelism is not supported; use --tensor_parallel_size",
        "scheduler": "remove it: the schedule is set with --schedule.name and --schedule.*_steps",
        "seq_parallel_communication_data_type": "remove it: sequence parallelism is not supported",
        "sequence_parallel_size": "remove it: sequence parallelism is not supported",
        "tensor_parallel": "remove it: use --tensor_parallel_size",
        "timers": "remove it: the trainer times its steps itself",
        "use_data_before_expert_parallelism": "remove it: the model has no experts",
        "vocabulary_size": "remove it: the model has no vocabulary",
        "weight_quantization": _UNTESTED,
    }
    | dict.fromkeys(("disable_allgather", "disable_python_gc", "log_level"), _UNTESTED)
    | dict.fromkeys(
        (
            "compression_training",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        ),
        _REMOVED,
    ),
    ("train_batch_size", "optimizer"),
)
