"""Run configuration: typed, frozen, validated on construction; imports neither torch nor deepspeed.

Who owns what: the DeepSpeed JSON owns batch sizes, precision, clipping, ZeRO, the optimizer and its peak
learning rate; the dataclasses here own everything else. Their defaults belong to no recipe: how a model is
trained stands in `launch/recipes/*.yaml` (see `megavit.cli` for the precedence), and a preset is an
architecture, nothing else. Sizes are those of the papers: ViT-22B (arXiv 2302.05442, table 1) and Scaling
ViTs (arXiv 2106.04560) for its family.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from megavit.fields import check_types, nearest

Pool = Literal["map", "mean", "cls"]
Recompute = Literal["none", "full", "selective"]
Loss = Literal["sigmoid", "softmax"]
Augment = Literal["inception", "none"]
_MAX_SEED = 2**63 - 1  # the order of the data and torch's generators take 63 bits
_PILLOWS_PIXELS = 178_956_970  # twice PIL.Image.MAX_IMAGE_PIXELS


def _require_positive(owner: str, config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{owner}{name} must be at least 1, got {getattr(config, name)}")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one vision transformer. The defaults are ViT-22B's choices (arXiv 2302.05442, section
    2).

    Args:
        name: preset that fills every field not given (vit_tiny, vit_s16, ..., vit_22b).
        image_size: height and width of the square input, in pixels.
        patch_size: height and width of a patch, in pixels; must divide image_size.
        channels: input channels (1 decodes to grey, 3 to RGB).
        num_classes: width of the classifier; 0 returns the pooled features instead.
        dim: token width D.
        depth: number of transformer blocks.
        num_heads: attention heads; must divide dim.
        mlp_dim: hidden width F of the MLP.
        dropout: drop rate after the MLP's GELU and on each block's output.
        emb_dropout: drop rate after the position embedding.
        block: parallel (one norm, attention and MLP side by side, one add) or sequential (the classic
            pre-norm pair).
        pool: map (attention pooling), mean (over patch tokens) or cls (a learned class token).
        num_registers: learned tokens without position that join the sequence and are dropped before pooling.
        qk_norm: normalise queries and keys over head_dim before the dot product.
        qkv_bias: biases on query, key and value projections, in the blocks and in the MAP head.
        norm_centring: subtract the mean too (LayerNorm); false is RMSNorm.
        norm_bias: a learned bias in the norms.
        norm_eps: added to the variance inside the norms.
        layer_scale: initial value of a learned per-channel scale on each residual branch; none leaves it out.
        head_bias: initial classifier bias; log_prior is -log(num_classes), ViT-22B uses -10.
    """

    name: str = "vit_tiny"
    image_size: int = 224
    patch_size: int = 14
    channels: int = 3
    num_classes: int = 1000
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_dim: int = 1536
    dropout: float = 0.0
    emb_dropout: float = 0.0
    block: Literal["parallel", "sequential"] = "parallel"
    pool: Pool = "map"
    num_registers: int = 0
    qk_norm: bool = True
    qkv_bias: bool = False
    norm_centring: bool = False
    norm_bias: bool = False
    norm_eps: float = 1e-6
    layer_scale: float | None = None
    head_bias: float | Literal["log_prior"] = "log_prior"

    def __post_init__(self) -> None:
        check_types(self, "model.")
        _require_positive(
            "model.", self, "image_size", "patch_size", "channels", "dim", "depth", "num_heads", "mlp_dim"
        )
        if self.image_size % self.patch_size:
            lower = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"model.image_size {self.image_size} is no multiple of model.patch_size {self.patch_size}; "
                f"use image_size {lower or self.patch_size} or {lower + self.patch_size}"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"model.dim {self.dim} is not a multiple of model.num_heads {self.num_heads}; "
                f"use dim {self.num_heads * max(1, self.dim // self.num_heads)} or another head count"
            )
        for name in ("dropout", "emb_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.num_classes < 0 or self.num_registers < 0:
            raise ValueError(
                f"model.num_classes and model.num_registers cannot be negative, "
                f"got {self.num_classes} and {self.num_registers}"
            )
        if not self.norm_eps > 0:
            raise ValueError(f"model.norm_eps must be positive, got {self.norm_eps}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: registers and, with pool='cls', the class token."""
        return self.num_registers + (self.pool == "cls")

    @property
    def num_tokens(self) -> int:
        """Sequence length N inside the blocks."""
        return self.num_patches + self.num_prefix_tokens

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise ValueError unless `tp_size` divides what tensor parallelism shards (classes are padded
        instead)."""
        for name in ("num_heads", "mlp_dim"):
            if getattr(self, name) % tp_size:
                divisors = [n for n in range(1, tp_size) if self.num_heads % n == 0 and self.mlp_dim % n == 0]
                raise ValueError(
                    f"tensor_parallel_size {tp_size} does not divide model.{name} {getattr(self, name)}; "
                    f"use --tensor_parallel_size {divisors[-1]} or change model.{name}"
                )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate against the step. The peak is the optimizer's `lr` in the DeepSpeed JSON.

    Args:
        name: rsqrt (ViT-22B), cosine, linear or constant, after the warm-up.
        warmup_steps: linear rise from 0 to the peak.
        cooldown_steps: linear fall to 0 over the last steps, on top of the shape.
        timescale_steps: rsqrt decays as 1/sqrt(1 + (step - warmup) / timescale).
    """

    name: Literal["rsqrt", "cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 500
    cooldown_steps: int = 0
    timescale_steps: int = 10_000

    def __post_init__(self) -> None:
        check_types(self, "schedule.")
        if self.warmup_steps < 0 or self.cooldown_steps < 0:
            raise ValueError(
                f"schedule.warmup_steps and schedule.cooldown_steps cannot be negative, "
                f"got {self.warmup_steps} and {self.cooldown_steps}"
            )
        _require_positive("schedule.", self, "timescale_steps")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are augmented.

    Args:
        shards: training shards: a manifest (data/train.manifest.json) or paths and urls with braces or, for
            local ones, wildcards, e.g. data/train-{000000..000099}.tar; http(s), s3, gs and pipe are fetched
            whole.
        val_shards: validation shards, same notation; empty trains without evaluation.
        workers: decoding processes per rank; 0 decodes in the training process. Not given, there is one for
            each core that the rank has, and no more than 4.
        augment: inception (random crop of crop_area of the image, aspect 3/4 to 4/3) or none (the evaluation
            transform).
        crop_area: smallest and largest share of the image's area that the inception crop keeps.
        flip: mirror half of the training images left to right.
        shift: move training images by up to this share of their side (black border); for tiny images.
        rotate_degrees: turn training images by up to this angle (black border); for tiny images.
        zoom: scale training images by 1 - zoom to 1 + zoom (black border); for tiny images.
        mixup: alpha of mixup's Beta(alpha, alpha) blend of neighbouring slots; 0 leaves it out.
        cutmix: alpha of cutmix, as mixup; with both, each pair of slots gets one or the other.
        eval_crop: share of the side kept by the evaluation's centre crop (0.875 is the ImageNet convention).
        antialias: low-pass before shrinking a crop; without it decoding is faster and images are harsher.
        decoder: full (libjpeg-turbo) or region (decodes the crop only; needs nvidia-nvimgcodec-cu13).
        max_labels: most labels of an image; one with more counts as bad.
        max_pixels: most pixels of an image by its header; one with more counts as bad. Decoding takes up to
            16 bytes a pixel (WebP; PNG 14, JPEG 3 to 14): 0.8 GB at the default.
        lanes: parallel streams of the order, fixed for a run; every global batch size it uses must be a
            multiple. 0 takes the greatest common divisor of the global batch and 1024.
        shuffle_block: samples that are shuffled among themselves within a lane.
        skip_steps: data to leave out, e.g. 12000:12100,15000:15050; after step 12000 the data jump ahead by
            100 steps, so that what steps 12001 to 12100 would have read is left out.
        allow_changed_manifest: go on with a saved run although its training shards have changed.
        tp: split (each rank of a TP group decodes its part and the group gathers the batch) or replicate
            (every rank decodes everything; no communication, compared every check_every steps).
        check_every: steps between two comparisons of the TP ranks' batches under tp replicate.
        max_bad_fraction: stop when more than this share of the samples seen was unusable, each counted once
            however many epochs read it (ten are free; with 0 none is).
        max_bad_shards: stop when more than so many shards fail as a whole, without a good step in between.
        allow_pipe: let a manifest name shell commands (pipe:COMMAND) as shards; those in shards and
            val_shards themselves need no permission.
        cache_dir: node-local folder for remote shards, shared by the node's ranks; empty takes
            megavit-shards-UID in $TMPDIR (/tmp), which only this user can open.
        cache_gb: size that the cache folder may have, in GB.
        timeout_s: seconds after which a stalled download, or a batch that does not come, is an error.
    """

    shards: str = ""
    val_shards: str = ""
    workers: int | None = None
    augment: Augment = "inception"
    crop_area: tuple[float, float] = (0.05, 1.0)
    flip: bool = True
    shift: float = 0.0
    rotate_degrees: float = 0.0
    zoom: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    eval_crop: float = 0.875
    antialias: bool = True
    decoder: Literal["full", "region"] = "full"
    max_labels: int = 32
    max_pixels: int = 50_000_000
    lanes: int = 0
    shuffle_block: int = 16_384
    skip_steps: str = ""
    allow_changed_manifest: bool = False
    tp: Literal["split", "replicate"] = "split"
    check_every: int = 100
    max_bad_fraction: float = 1e-3
    max_bad_shards: int = 8
    allow_pipe: bool = False
    cache_dir: str = ""
    cache_gb: float = 100.0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        check_types(self, "data.")
        low, high = self.crop_area
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"data.crop_area must satisfy 0 < smallest <= largest <= 1, got [{low}, {high}]")
        if not 0.0 < self.eval_crop <= 1.0:
            raise ValueError(f"data.eval_crop must lie in (0, 1], got {self.eval_crop}")
        for name in "shift rotate_degrees zoom mixup cutmix workers lanes max_bad_shards".split():
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"data.{name} cannot be negative, got {getattr(self, name)}")
        _require_positive("data.", self, "max_labels", "shuffle_block", "check_every")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ValueError(f"data.max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}")
        for name in ("cache_gb", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.max_pixels <= _PILLOWS_PIXELS:
            raise ValueError(
                f"data.max_pixels must lie in 1 to {_PILLOWS_PIXELS}, where Pillow refuses images, got "
                f"{self.max_pixels}"
            )
        _step_ranges(self.skip_steps)

    @property
    def skips(self) -> tuple[tuple[int, int], ...]:
        """`skip_steps` as ranges (A, B), ascending."""
        return _step_ranges(self.skip_steps)


def _step_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """`A:B,C:D` as ranges, ascending. ValueError for anything but A < B, and ranges that overlap."""
    ranges = []
    for part in filter(None, text.replace(" ", "").split(",")):
        first, _, last = part.partition(":")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError(
                f"data.skip_steps must be A:B[,C:D...] with A < B, e.g. 12000:12100, got {part!r}"
            )
        ranges.append((int(first), int(last)))
    ranges.sort()
    for one, following in pairwise(ranges):
        if following[0] < one[1]:
            raise ValueError(f"data.skip_steps: {one[0]}:{one[1]} and {following[0]}:{following[1]} overlap")
    return tuple(ranges)


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
        _require_positive("checkpoint.", self, "keep")
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
        _require_positive("guard.", self, "max_skipped")
        if self.max_grad_norm_ratio and self.max_grad_norm_ratio <= 1:
            raise ValueError(
                f"guard.max_grad_norm_ratio must be above 1 (or 0 for none), got {self.max_grad_norm_ratio}"
            )


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        run_dir: folder for logs, TensorBoard and checkpoints; empty makes runs/<model>-<time>. A folder that
            holds a run goes on with it, with its configuration but for the flags and --config files that are
            given.
        init_from: folder of an exported model whose weights a new run starts from; a classifier of another
            size is left out, the position embedding is resized.
        seed: fixes the weights, the order of the data, the augmentation and dropout.
        max_steps: optimizer steps of the whole run. Training needs a recipe or the flag to give it, because
            no number suits everybody; 0 means that nobody has.
        stop_at_step: save and end after this step, leaving the schedule as it is; 0 runs to max_steps.
        log_every: steps between two log lines.
        eval_every: steps between two evaluations; 0 evaluates at the end only.
        tensor_parallel_size: ranks that share one copy of each block; must divide heads, mlp_dim and the rank
            count.
        recompute: activations to recompute in backward; selective keeps the matmul inputs that are expensive
            to recompute.
        loss: softmax cross-entropy, or sigmoid (one yes or no for each class: several labels, ViT-22B).
        label_smoothing: share of the target that is spread evenly over all classes.
        head_weight_decay: decoupled weight decay of the classifier; none takes the body's, which is in the
            DeepSpeed JSON.
        compile: torch.compile each block.
        export_dir: also write the final model.safetensors and config.json here; empty exports to
            <run_dir>/export.
        check_every: steps between two comparisons of the TP ranks' copies of replicated parameters (norms,
            biases, embeddings); one that differs is replaced by TP rank 0's, and said. 0 compares none.
        timeout_s: seconds without any progress after which a rank prints its stacks and ends the job.
        heartbeat_s: seconds between two signs of life in log.jsonl.
        model: the architecture.
        data: the input.
        schedule: the learning rate.
        checkpoint: what is saved when.
        guard: which updates are refused.
    """

    run_dir: str = ""
    init_from: str = ""
    seed: int = 0
    max_steps: int = 0
    stop_at_step: int = 0
    log_every: int = 50
    eval_every: int = 5_000
    tensor_parallel_size: int = 1
    recompute: Recompute = "none"
    loss: Loss = "softmax"
    label_smoothing: float = 0.0
    head_weight_decay: float | None = None
    compile: bool = False
    export_dir: str = ""
    check_every: int = 100
    timeout_s: float = 1800.0
    heartbeat_s: float = 60.0
    model: ModelConfig = field(default_factory=lambda: model_preset("vit_tiny"))
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        check_types(self)
        _require_positive("", self, "log_every", "tensor_parallel_size")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"seed must lie in 0 to 2**63 - 1, got {self.seed}")
        for name in ("timeout_s", "heartbeat_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_steps", "stop_at_step", "eval_every", "check_every", "head_weight_decay"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}")
        if self.stop_at_step > self.max_steps:
            raise ValueError(
                f"stop_at_step {self.stop_at_step} is beyond max_steps {self.max_steps}; raise --max_steps "
                f"for a longer run"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.model.num_classes < 1:
            raise ValueError("training needs model.num_classes of at least 1, got 0")
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


def plain_config(run: RunConfig) -> dict[str, Any]:
    """The configuration as `--config` reads it: nested dictionaries of plain values."""
    fields = dataclasses.asdict(run)
    fields["data"]["crop_area"] = list(fields["data"]["crop_area"])
    return fields


def flat_config(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys: the names of the flags."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flat_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# Fields that belong to one start of a run rather than to the run: a new start does not take them over.
LAUNCH_FIELDS = ("run_dir", "init_from", "stop_at_step")


def _sized(
    dim: int, depth: int, mlp_dim: int, num_heads: int, patch_size: int, **fields: Any
) -> dict[str, Any]:
    shape = {"dim": dim, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads, "patch_size": patch_size}
    return shape | fields


# Width, depth, MLP width, heads, patch. The family's classifiers are ImageNet's; ViT-22B keeps JFT-3B's
# 29,593 classes.
_SHAPES: dict[str, dict[str, Any]] = {
    "vit_tiny": _sized(64, 3, 256, 4, 2, image_size=8, channels=1, num_classes=10),
    "vit_ti16": _sized(192, 12, 768, 3, 16),
    "vit_s16": _sized(384, 12, 1536, 6, 16),
    "vit_b16": _sized(768, 12, 3072, 12, 16),
    "vit_l16": _sized(1024, 24, 4096, 16, 16),
    "vit_h14": _sized(1280, 32, 5120, 16, 14),
    "vit_g14": _sized(1408, 40, 6144, 16, 14),
    "vit_G14": _sized(1664, 48, 8192, 16, 14),
    "vit_e14": _sized(1792, 56, 15360, 16, 14),
    "vit_22b": _sized(6144, 48, 24576, 48, 14, num_classes=29_593, head_bias=-10.0),
}

PRESETS: tuple[str, ...] = tuple(_SHAPES)
# What presets differ in.
PRESET_FIELDS: frozenset[str] = frozenset(f"model.{key}" for shape in _SHAPES.values() for key in shape)


def model_preset(name: str, **overrides: Any) -> ModelConfig:
    """The architecture called `name`, with fields replaced by `overrides`; ValueError for an unknown name or
    field, or a value that does not fit."""
    if name not in _SHAPES:
        raise ValueError(
            f"unknown model preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}"
        )
    return model_config({"name": name} | _SHAPES[name] | overrides)


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` from a dictionary; ValueError for an unknown field, with the nearest known one."""
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    for key in fields:
        if key not in known:
            raise ValueError(f"unknown model field {key!r}{nearest(key, known)}")
    return ModelConfig(**fields)
