"""The configuration of a run: typed, frozen, validated on construction. Imports the standard library only.

Who owns what: the DeepSpeed JSON owns batch sizes, precision, clipping, ZeRO, the optimizer and its peak
learning rate; the dataclasses here, of the model and of the data own everything else. Their defaults belong
to no recipe: those are `launch/recipes/*.yaml` (see `megavit.cli` for the precedence).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from megavit.data.config import DataConfig
from megavit.fields import check_types, nearest, require_positive
from megavit.model.config import ModelConfig, Recompute, model_preset
from megavit.tasks.config import ClassifyConfig, DenseConfig, TaskConfig

PROBES = ("knn", "fewshot", "linear")  # protocols that need nothing but features
_MAX_SEED = 2**63 - 1  # the order of the data and torch's generators take 63 bits


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate against the step. The peak is the optimizer's `lr` in the DeepSpeed JSON.

    Args:
        name: rsqrt (ViT-22B), cosine, linear or constant, after the warm-up.
        warmup_steps: linear rise from 0 to the peak.
        warmup_from_zero: the first update has the rate 0 and the one after the warm-up the peak, as in
            optax; else the first has peak / warmup_steps, and the last of the warm-up the peak.
        cooldown_steps: linear fall to 0 over the last steps, on top of the shape.
        timescale_steps: rsqrt decays as 1/sqrt(1 + (step - warmup) / timescale).
        layer_decay: layer-wise decay of the rate: that of the layer k below the last is multiplied by
            layer_decay^k, with timm's numbering (the embedding is the lowest, then each block with its own
            number, the last norm counts to the last block, pooling and heads are above); 1 has one rate.
    """

    name: Literal["rsqrt", "cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 500
    cooldown_steps: int = 0
    timescale_steps: int = 10_000
    layer_decay: float = 1.0
    warmup_from_zero: bool = False

    def __post_init__(self) -> None:
        check_types(self, "schedule.")
        if self.warmup_steps < 0 or self.cooldown_steps < 0:
            raise ValueError(
                f"schedule.warmup_steps and schedule.cooldown_steps cannot be negative, "
                f"got {self.warmup_steps} and {self.cooldown_steps}"
            )
        require_positive("schedule.", self, "timescale_steps")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"schedule.layer_decay must lie in (0, 1], got {self.layer_decay}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole training state is saved, and what is kept. It is always saved at the end.

    Args:
        every: steps between two checkpoints; 0 saves at the end and on a stop request only.
        keep: newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this, for ever; 0 keeps none.
        async_save: write while training goes on, which is then held up only for the copy to host memory
            (written --checkpoint.async too).
        on_damage: when the newest checkpoint is damaged, stop with an error, or set it aside and go on from
            the previous one.
    """

    every: int = 1000
    keep: int = 3
    keep_every: int = 0
    async_save: bool = True
    on_damage: Literal["stop", "previous"] = "stop"

    def __post_init__(self) -> None:
        check_types(self, "checkpoint.")
        require_positive("checkpoint.", self, "keep")
        if self.every < 0 or self.keep_every < 0:
            raise ValueError(
                f"checkpoint.every and checkpoint.keep_every cannot be negative, got {self.every} and "
                f"{self.keep_every}"
            )


@dataclass(frozen=True)
class GuardConfig:
    """Which updates are refused. A refused one counts as a step, but weights and moments stay.

    Args:
        max_grad_norm_ratio: refuse a gradient whose norm, before clipping, is above this many times the
            median of the last accepted ones; 0 refuses only what is not finite.
        max_skipped: give up after this many refused updates in a row.
        rollback: instead of giving up, go back to the newest checkpoint and leave out the data that led
            there.
    """

    max_grad_norm_ratio: float = 0.0
    max_skipped: int = 10
    rollback: bool = False

    def __post_init__(self) -> None:
        check_types(self, "guard.")
        require_positive("guard.", self, "max_skipped")
        if self.max_grad_norm_ratio and self.max_grad_norm_ratio <= 1:
            raise ValueError(
                f"guard.max_grad_norm_ratio must be above 1 (or 0 for none), got {self.max_grad_norm_ratio}"
            )


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on frozen features at each evaluation, beside the task's own results.

    Args:
        tasks: protocols, separated by commas: knn, fewshot, linear; empty measures none. They learn from
            training images that have one class each, are tested on every validation set when it is evaluated,
            and are logged as eval/SET/knn20_top1 etc.
        train_samples: training images that they learn from, spread evenly over the shards.
    """

    tasks: str = ""
    train_samples: int = 10_000

    def __post_init__(self) -> None:
        check_types(self, "eval.")
        require_positive("eval.", self, "train_samples")
        for name in self.names:
            if name not in PROBES:
                raise ValueError(
                    f"eval.tasks has {name!r}, not one of {', '.join(PROBES)}{nearest(name, PROBES)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        run_dir: folder for logs, TensorBoard and checkpoints; empty makes runs/<model>-<time>. A folder that
            holds a run goes on with it, with its configuration but for the flags and --config files that are
            given.
        init_from: folder of an exported model whose weights a new run starts from; a classifier of another
            size is left out, the position embedding is resized. A run that goes on takes only its frozen
            weights from there.
        freeze: modules that are not trained, separated by commas, e.g. trunk or trunk.embed,trunk.blocks.0;
            their weights have no gradients and no optimizer state, and checkpoints do not hold them: they
            name the export that the weights came from (init_from), or the seed.
        seed: fixes the weights, the order of the data, the augmentation and dropout.
        max_steps: optimizer steps of the whole run. Training needs a recipe or the flag to give it, because
            no number suits everybody; 0 means that nobody has.
        epochs: passes over the training samples, in place of max_steps, which is worked out at the start: as
            many steps as are needed to read so many times the number of samples; 0 takes max_steps.
        stop_at_step: save and end after this step, leaving the schedule as it is; 0 runs to max_steps.
        log_every: steps between two log lines.
        eval_every: steps between two evaluations; 0 evaluates at the end only.
        explain_every: in evaluations after a multiple of so many steps, and at the end, TensorBoard shows
            where in the same eight validation images the evidence for what the model says lies (see
            megavit/explain); 0 shows none.
        tensor_parallel_size: ranks that share one copy of each block; must divide heads, mlp_dim and the rank
            count.
        recompute: activations to recompute in backward; selective keeps the matmul inputs that are expensive
            to recompute.
        compile: torch.compile each block.
        export_dir: also write the final model.safetensors and config.json here; empty exports to
            <run_dir>/export.
        check_every: steps between two comparisons of the TP ranks' copies of replicated parameters (norms,
            biases, embeddings); one that differs is replaced by TP rank 0's, and said. 0 compares none.
        timeout_s: seconds without any progress after which a rank prints its stacks and ends the job.
        heartbeat_s: seconds between two signs of life in log.jsonl.
        model: the architecture.
        task: what the run learns.
        data: the input.
        schedule: the learning rate.
        checkpoint: what is saved when.
        guard: which updates are refused.
        eval: what is measured on frozen features.
    """

    run_dir: str = ""
    init_from: str = ""
    freeze: str = ""
    seed: int = 0
    max_steps: int = 0
    epochs: float = 0.0
    stop_at_step: int = 0
    log_every: int = 50
    eval_every: int = 5_000
    explain_every: int = 0
    tensor_parallel_size: int = 1
    recompute: Recompute = "none"
    compile: bool = False
    export_dir: str = ""
    check_every: int = 100
    timeout_s: float = 1800.0
    heartbeat_s: float = 60.0
    model: ModelConfig = field(default_factory=lambda: model_preset("vit_tiny"))
    task: TaskConfig = field(default_factory=ClassifyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require_positive("", self, "log_every", "tensor_parallel_size")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"seed must lie in 0 to 2**63 - 1, got {self.seed}")
        for name in ("timeout_s", "heartbeat_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_steps", "stop_at_step", "eval_every", "explain_every", "check_every", "epochs"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}")
        if self.epochs and self.max_steps:
            raise ValueError(
                f"max_steps {self.max_steps} and epochs {self.epochs:g} are both given; keep one"
            )
        if self.stop_at_step > self.max_steps and not self.epochs:
            raise ValueError(
                f"stop_at_step {self.stop_at_step} is beyond max_steps {self.max_steps}; raise --max_steps "
                f"for a longer run"
            )
        self.task.check(self.model, self.data)
        frozen = [name.strip() for name in self.freeze.split(",")]
        if isinstance(self.task, DenseConfig) and self.task.cache_features and "trunk" not in frozen:
            raise ValueError("task.cache_features is for a trunk that stays as it is: give --freeze trunk")
        if self.eval.names and not self.data.val_sets:
            raise ValueError("eval.tasks needs validation images: give --data.val_shards or --data.val")
        if self.explain_every and not (self.task.name == "classify" and self.data.val_sets):
            raise ValueError(
                "explain_every shows maps of classes of validation images: it needs the task classify and "
                "--data.val_shards or --data.val; leave it out"
            )
        if self.model.channels not in (1, 3):
            raise ValueError(f"images are decoded to 1 (grey) or 3 (RGB) channels, not {self.model.channels}")
        self.model.check_tensor_parallel(self.tensor_parallel_size)
        if self.recompute == "selective" and self.model.block != "parallel":
            raise ValueError("--recompute selective is made for --model.block parallel; use full or none")
        if self.compile and self.tensor_parallel_size > 1 and self.recompute != "none":
            # The collectives break the graph inside the recomputed region, where torch.compile then gives up
            # silently.
            raise ValueError(
                f"--compile with --tensor_parallel_size {self.tensor_parallel_size} needs --recompute none, "
                f"got {self.recompute}; leave --compile out or use one TP rank"
            )


def steps_of_epochs(epochs: float, num_samples: int, global_batch: int) -> int:
    """Optimizer steps that read `epochs` times `num_samples`, rounded up."""
    # A fraction, because 1.1 * 1000 is a little more than 1100 in floating point.
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch)


def with_max_steps(run: RunConfig, num_samples: int, global_batch: int) -> RunConfig:
    """The run with the number of its steps in place of the number of its epochs."""
    if not run.epochs:
        return run
    return dataclasses.replace(
        run, epochs=0.0, max_steps=steps_of_epochs(run.epochs, num_samples, global_batch)
    )


def plain_config(run: RunConfig) -> dict[str, Any]:
    """The configuration as `--config` reads it: nested dictionaries of plain values."""
    fields = dataclasses.asdict(run)
    for name in ("crop_area", "scale_range", "val"):
        fields["data"][name] = list(fields["data"][name])
    return fields


def flat_config(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys: the names of the flags."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flat_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# Fields of a run that were called otherwise before: their old names stand in saved runs, and are accepted.
MOVED_FIELDS = {
    "loss": "task.loss",
    "label_smoothing": "task.label_smoothing",
    "head_weight_decay": "task.head_weight_decay",
}


def saved_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run that was saved, by the dotted names that they have now."""
    return {MOVED_FIELDS.get(name, name): value for name, value in flat_config(saved).items()}


# Fields that belong to one start of a run rather than to the run: a new start does not take them over.
LAUNCH_FIELDS = ("run_dir", "init_from", "stop_at_step", "epochs", "data.class_names")
