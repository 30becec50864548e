"""Names that people bring from timm, open_clip, DeepSpeed and Hugging Face, and what to write here.

One table: the command line's errors look names up in it, `--help coming-from` prints it, and
`launch/README.md` holds it. Imports the standard library only.
"""

from __future__ import annotations

import textwrap

# Names as flags without their dashes, with underscores -> what to write.
COMING_FROM: dict[tuple[str, ...], str] = {
    ("model", "arch", "model_name"): "write --model.name vit_b16",
    ("img_size", "image_size", "input_size", "resolution"): "write --model.image_size 224",
    ("num_classes", "nb_classes", "num_labels"): (
        "write --model.num_classes 1000, or nothing if the shards have a classes.txt beside them"
    ),
    ("train_data", "data_dir", "data", "data_path", "dataset", "train_dir"): (
        "write --data.shards 'data/train-*.tar'; launch/shards.py makes shards of a folder of images"
    ),
    ("val_data", "eval_data", "val_dir", "imagenet_val"): "write --data.val_shards 'data/val-*.tar'",
    (
        "workers",
        "num_workers",
        "j",
        "dataloader_num_workers",
    ): "write --data.workers 4, processes of each rank",
    ("lr", "learning_rate", "base_lr", "blr"): (
        "the peak learning rate is in the DeepSpeed JSON; write --ds.optimizer.params.lr 3e-4 to change it"
    ),
    ("batch_size", "b", "train_batch_size", "global_batch_size"): (
        "the batch of all ranks together is in the DeepSpeed JSON; write --ds.train_batch_size 1024 to "
        "change it"
    ),
    ("per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu"): (
        "the largest micro-batch is in the DeepSpeed JSON; write --ds.train_micro_batch_size_per_gpu 32 to "
        "change it"
    ),
    ("gradient_accumulation_steps", "grad_accum_steps", "accum_freq", "accum_iter"): (
        "it follows from --ds.train_batch_size, --ds.train_micro_batch_size_per_gpu and the number of ranks"
    ),
    ("weight_decay", "wd"): (
        "it is in the DeepSpeed JSON; write --ds.optimizer.params.weight_decay 0.05 to change it, and "
        "--task.head_weight_decay for the classifier's"
    ),
    ("opt", "optim", "optimizer"): "AdamW is the only optimizer; its settings are --ds.optimizer.params.*",
    ("opt_betas", "opt_eps", "beta1", "beta2", "adam_beta1", "adam_beta2", "adam_epsilon", "eps"): (
        "write --ds.optimizer.params.betas [0.9,0.95] or --ds.optimizer.params.eps 1e-8"
    ),
    ("clip_grad", "max_grad_norm", "grad_clip_norm", "gradient_clipping"): "write --ds.gradient_clipping 1.0",
    ("amp", "precision", "bf16", "fp16", "mixed_precision", "amp_dtype", "dtype"): (
        "write --ds.bf16.enabled true, false or auto (true on GPUs); float16 is not supported"
    ),
    ("zero", "zero_stage", "fsdp", "distributed_state_dict"): "write --ds.zero_optimization.stage 3",
    ("deepspeed", "ds_config", "deepspeed_json", "use_deepspeed"): (
        "write --deepspeed_config ds_configs/zero3.json"
    ),
    ("tp", "tp_size", "tensor_parallel", "tensor_model_parallel_size"): "write --tensor_parallel_size 8",
    ("gradient_checkpointing", "grad_checkpointing", "checkpoint_activations", "activation_checkpointing"): (
        "write --recompute selective, or --recompute full where memory is short"
    ),
    ("torchcompile", "torch_compile"): "write --compile",
    ("num_epochs", "num_train_epochs", "max_epochs", "n_epochs"): "write --epochs 90",
    ("steps", "num_steps", "max_iters", "max_train_steps", "total_steps"): "write --max_steps 10000",
    ("sched", "scheduler", "lr_scheduler", "lr_scheduler_type"): (
        "write --schedule.name cosine, or one of the others that --help all lists"
    ),
    ("warmup", "warmup_steps", "num_warmup_steps", "warmup_epochs", "warmup_ratio"): (
        "write --schedule.warmup_steps 10000"
    ),
    ("smoothing",): "write --task.label_smoothing 0.1",
    ("mixup", "mixup_alpha"): "write --data.mixup 0.2",
    ("cutmix", "cutmix_alpha"): "write --data.cutmix 1.0",
    ("scale", "rrc_scale"): "write --data.crop_area [0.08,1.0]",
    ("hflip",): "write --data.flip true or false",
    ("color_jitter",): "write --data.brightness 0.4 --data.contrast 0.4 --data.saturation 0.4",
    ("aa", "auto_augment", "reprob"): (
        "RandAugment and random erasing are not implemented; there are --data.augment, --data.mixup and "
        "--data.cutmix"
    ),
    ("drop", "dropout"): "write --model.dropout 0.1",
    ("drop_path", "drop_path_rate"): "stochastic depth is not implemented; there is --model.dropout",
    ("model_ema", "ema", "model_ema_decay"): "an average of the weights is not implemented",
    ("output_dir", "output", "save_dir", "log_dir", "logs", "experiment"): "write --run_dir runs/x",
    ("resume", "resume_from_checkpoint", "auto_resume"): (
        "write --run_dir runs/x: a run that is started again on its folder goes on where it was"
    ),
    ("pretrained", "finetune", "initial_checkpoint", "model_name_or_path"): (
        "write --init_from FOLDER, where launch/export.py has written a model"
    ),
    ("log_every", "log_interval", "logging_steps", "print_freq"): "write --log_every 50, in steps",
    (
        "save_every",
        "save_steps",
        "save_interval",
        "save_frequency",
    ): "write --checkpoint.every 1000, in steps",
    ("save_total_limit", "checkpoint_hist"): "write --checkpoint.keep 3",
    ("eval_steps", "eval_interval", "val_frequency"): "write --eval_every 5000, in steps",
    ("wandb", "log_wandb", "report_to", "tensorboard"): (
        "nothing is needed: the run folder holds TensorBoard files and log.jsonl"
    ),
    ("gpus", "devices", "num_gpus", "nproc_per_node", "num_nodes"): (
        "it belongs to the launcher, before the script: deepspeed --num_gpus 8 launch/train.py ..."
    ),
}
_SENTENCES = {name: sentence for names, sentence in COMING_FROM.items() for name in names}


def what_to_write(flag: str) -> str:
    """What to write for a flag that people bring from elsewhere; '' if the table does not know it."""
    return _SENTENCES.get(flag.lstrip("-").replace("-", "_"), "")


def as_text() -> str:
    """The table for a terminal."""
    lines = ["What flags of timm, open_clip, DeepSpeed and Hugging Face are called here:", ""]
    for names, sentence in COMING_FROM.items():
        lines += textwrap.wrap(
            ", ".join(map(_spelled, names)), 100, initial_indent="  ", subsequent_indent="  "
        )
        lines += textwrap.wrap(sentence, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def as_markdown() -> str:
    """The table for a README."""
    rows = [
        f"| {', '.join(f'`{_spelled(name)}`' for name in names)} | {text} |"
        for names, text in COMING_FROM.items()
    ]
    return "\n".join(["| you know | here |", "|---|---|", *rows]) + "\n"


def _spelled(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"
