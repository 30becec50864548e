"""What a run learns: the tasks' own configuration, typed, frozen, validated on construction. Imports the
standard library only."""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from megavit.data.config import DataConfig
from megavit.fields import check_types, nearest, require_positive
from megavit.model.config import ModelConfig

Loss = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class TaskConfig:
    """What the run learns. A task of your own adds its fields to these (megavit/tasks/README.md).

    Args:
        name: a built-in task (classify, depth, segment, video), or path/to/file.py:Class for one of your own.
    """

    # Fields that a run which goes on may have otherwise than it was saved with.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ()
    # The field of a run that counts the classes of classes.txt beside the data; empty if none does.
    CLASSES: ClassVar[str] = "model.num_classes"

    name: str = "classify"

    def __post_init__(self) -> None:
        check_types(self, "task.")
        if not self.name:
            raise ValueError("task.name is empty; name a built-in task, or path/to/file.py:Class")

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """Raise ValueError, naming the flag and the fix, for an architecture or data that the task cannot
        use. Called on construction of a run, before anything is opened."""


@dataclass(frozen=True)
class ClassifyConfig(TaskConfig):
    """Classification of images.

    Args:
        loss: softmax cross-entropy, or sigmoid (one yes or no for each class: several labels, ViT-22B).
        label_smoothing: share of the target that is spread evenly over all classes.
        head_weight_decay: decoupled weight decay of the classifier; none takes the body's, which is in the
            DeepSpeed JSON.
    """

    MAY_CHANGE = ("label_smoothing", "head_weight_decay")

    loss: Loss = "softmax"
    label_smoothing: float = 0.0
    head_weight_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"task.label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if (self.head_weight_decay or 0) < 0:
            raise ValueError(f"task.head_weight_decay cannot be negative, got {self.head_weight_decay}")

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        if model.num_classes < 1:
            raise ValueError("classification needs model.num_classes of at least 1, got 0")


@dataclass(frozen=True)
class DecoderConfig(TaskConfig):
    """A decoder on the patch tokens of chosen blocks.

    Args:
        layers: the blocks whose tokens the head reads, separated by commas, in the head's order; negative
            numbers count from the end, and a block may be named again. Empty takes the last one, or for
            heads of four taps the ends of the four quarters.
        norm_taps: apply the trunk's final norm to the tokens of every tap.
        head_width: channels of the head; none takes the head's own.
    """

    layers: str = ""
    norm_taps: bool = True
    head_width: int | None = None

    @property
    def num_taps(self) -> int:
        """How many blocks the head reads."""
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_width is not None and self.head_width < 1:
            raise ValueError(f"task.head_width must be at least 1, got {self.head_width}")
        self.named_layers()

    def named_layers(self) -> list[int]:
        """The numbers in `layers`. ValueError if it is anything else."""
        try:
            return [int(number) for number in self.layers.split(",") if self.layers]
        except ValueError as error:
            raise ValueError(
                f"task.layers must be numbers of blocks, such as 5,11 or -1, got {self.layers!r}"
            ) from error

    def taps(self, depth: int) -> list[int]:
        """The block of each of the head's taps, in a trunk of `depth`. ValueError if `layers` are not as
        many, or not in the trunk; one block may serve all taps."""
        named, count = self.named_layers(), self.num_taps
        if not named:
            return [max(0, depth * (number + 1) // count - 1) for number in range(count)]
        if len(named) not in (1, count) or not all(-depth <= number < depth for number in named):
            raise ValueError(
                f"task.layers {self.layers}: the head reads {count} of the blocks 0 to {depth - 1}; name "
                f"{count}, or one for all"
            )
        found = [number % depth for number in named]
        return found if len(found) == count else found * count

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        if data.mixup or data.cutmix:
            raise ValueError(f"task {self.name} cannot blend pictures; leave out data.mixup and data.cutmix")
        self.taps(model.depth)


@dataclass(frozen=True)
class DenseConfig(DecoderConfig):
    """A decoder that gives a map of the picture's size.

    Args:
        cache_features: folder that all hosts share, in which what the frozen trunk makes of each training
            picture is kept, so that epochs after the first skip the trunk. Pictures must not be augmented.
        cache_gb: size that this folder may have, in GB.
    """

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("cache_features", "cache_gb")

    cache_features: str = ""
    cache_gb: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cache_gb > 0:
            raise ValueError(f"task.cache_gb must be positive, got {self.cache_gb}")

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        super().check(model, data)
        if self.cache_features and data.augmented:
            raise ValueError(
                f"task.cache_features keeps what the trunk makes of a picture, which must be the same in "
                f"every epoch: give --data.augment none --data.flip false, without "
                f"{', '.join(f'data.{name}' for name in data.augmented)}"
            )


@dataclass(frozen=True)
class DepthConfig(DenseConfig):
    """Depth in metres of every pixel, from the samples' depth.png or depth.npy.

    Args:
        head: dpt (four taps), linear (batch norm and a 1 x 1 convolution), or bins (the same into 256 bins of
            depth, whose mean counts).
        loss: log1p (squared error of log(1 + metres), ViT-22B) or silog (scale-invariant log error).
        silog_lambda: share of the squared mean error that silog forgives.
        gradient: weight of the error of the gradients of the logarithm, at four scales; 0 leaves it out.
        min_m: least depth in metres that counts, in training and in evaluation; predictions are cut to it.
        max_m: largest depth; none takes what dense.json beside the training shards says, or else 10.
        scale: metres of the number 1 in the files; none takes what dense.json says, and one of the two must.
        invalid: the number in the files that means that nothing is known; none takes what dense.json says, or
            else 0.
        crop: the part of the picture that evaluations count: none, eigen (NYUv2's) or garg (KITTI's), as
            shares of the sides.
        align: what a prediction is brought to the truth with before it is measured, image by image: none,
            median (a factor), or least_squares (a factor and a shift).
    """

    MAY_CHANGE = (*DenseConfig.MAY_CHANGE, "crop", "align")
    CLASSES = ""

    name: str = "depth"
    head: Literal["dpt", "linear", "bins"] = "dpt"
    loss: Literal["log1p", "silog"] = "log1p"
    silog_lambda: float = 0.85
    gradient: float = 0.0
    min_m: float = 1e-3
    max_m: float | None = None
    scale: float | None = None
    invalid: float | None = None
    crop: Literal["none", "eigen", "garg"] = "none"
    align: Literal["none", "median", "least_squares"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.min_m < (self.max_m or float("inf")):
            raise ValueError(f"task.min_m {self.min_m} must be positive and below task.max_m {self.max_m}")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"task.scale must be positive, got {self.scale}")
        if self.gradient < 0 or not 0.0 <= self.silog_lambda < 1.0:
            raise ValueError(
                f"task.gradient cannot be negative and task.silog_lambda must lie in [0, 1), got "
                f"{self.gradient} and {self.silog_lambda}"
            )

    @property
    def num_taps(self) -> int:
        return 4 if self.head == "dpt" else 1


@dataclass(frozen=True)
class SegmentConfig(DenseConfig):
    """A class of every pixel, from the samples' mask.png, in which 255 means none.

    Args:
        classes: number of classes, such as ADE20K's 150; not given, as many as classes.txt beside the
            training shards names.
        head: linear (batch norm and a 1 x 1 convolution), upernet (a pyramid of four taps) or segmenter (a
            mask transformer).
        head_layers: blocks of the mask transformer.
        dice: weight of the soft dice loss beside the cross-entropy.
        class_iou: evaluations also give the IoU of each class.
    """

    MAY_CHANGE = (*DenseConfig.MAY_CHANGE, "class_iou")
    CLASSES = "task.classes"

    name: str = "segment"
    classes: int = 0
    head: Literal["linear", "upernet", "segmenter"] = "linear"
    head_layers: int = 2
    dice: float = 0.0
    class_iou: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.classes <= 255:
            raise ValueError(
                f"task.classes must be at most 255, the number that means none, got {self.classes}"
            )
        if self.dice < 0 or self.head_layers < 1:
            raise ValueError(
                f"task.dice cannot be negative and task.head_layers must be at least 1, got {self.dice} and "
                f"{self.head_layers}"
            )

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        super().check(model, data)
        if self.classes < 2:
            raise ValueError(
                f"segmentation needs the number of classes, e.g. --task.classes 150, got {self.classes}"
            )

    @property
    def num_taps(self) -> int:
        return 4 if self.head == "upernet" else 1


@dataclass(frozen=True)
class VideoConfig(DecoderConfig):
    """The class of a video, from the frames of its clips, each of which the trunk sees as an image.

    Args:
        classes: number of classes, such as Kinetics' 400; not given, as many as classes.txt beside the
            training shards names.
        head: attentive (a learned query attends to the tokens of all frames) or temporal (each frame is
            pooled, transformer blocks join the frames, and they are pooled in turn).
        head_layers: transformer blocks of the temporal head.
        time_embedding: add a learned embedding of its place in the clip to each frame; without it the head
            does not know their order.
        frames: of a clip.
        stride: frames of the video from one frame of the clip to the next.
        interval_s: seconds from one frame of the clip to the next, whatever the video's frame rate is; none
            goes by stride.
        views: in evaluations, clips of a video times crops of a clip (1 or 3), such as 4x3, whose
            probabilities are averaged.
        label_smoothing: share of the target that is spread evenly over all classes.
    """

    MAY_CHANGE = ("views", "label_smoothing")
    CLASSES = "task.classes"

    name: str = "video"
    classes: int = 0
    head: Literal["attentive", "temporal"] = "attentive"
    head_layers: int = 4
    time_embedding: bool = True
    frames: int = 16
    stride: int = 1
    interval_s: float | None = None
    views: str = "1x1"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("task.", self, "head_layers", "frames", "stride")
        if self.interval_s is not None and not 0 < self.interval_s < float("inf"):
            raise ValueError(f"task.interval_s must be a positive number of seconds, got {self.interval_s}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"task.label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.classes < 0:
            raise ValueError(f"task.classes cannot be negative, got {self.classes}")
        self.clips_and_crops()

    def clips_and_crops(self) -> tuple[int, int]:
        """The two numbers in `views`. ValueError if it is anything else."""
        clips, _, crops = self.views.partition("x")
        if not (clips.isdecimal() and int(clips) and crops in ("1", "3")):
            raise ValueError(
                f"task.views must be clips of a video times 1 or 3 crops, such as 4x3, got {self.views!r}"
            )
        return int(clips), int(crops)

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        super().check(model, data)
        if self.classes < 2:
            raise ValueError(
                f"videos need the number of classes, e.g. --task.classes 400, got {self.classes}"
            )
        if model.channels not in (1, 3):
            raise ValueError(f"videos have 1 or 3 channels; model.channels is {model.channels}")


@dataclass(frozen=True)
class InferenceConfig:
    """How a dense model sees a picture of any size.

    Args:
        inference: whole (all of the picture at once, filled up with grey to whole patches) or slide (squares
            of the model's size, whose maps are averaged).
        stride: of slide, pixels from one square to the next; 0 takes two thirds of a square.
        mirror: average with the map of the mirrored picture (test-time augmentation).
        short_side: pixels to which the picture's short side is brought first; 0 takes the scale at which the
            run saw its validation images.
    """

    inference: Literal["whole", "slide"] = "whole"
    stride: int = 0
    mirror: bool = False
    short_side: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if self.stride < 0 or self.short_side < 0:
            raise ValueError(
                f"--stride and --short_side cannot be negative, got {self.stride} and {self.short_side}"
            )


# Built-in tasks: where the class is, and its configuration.
_BUILT_IN: dict[str, tuple[str, type[TaskConfig]]] = {
    "classify": ("megavit.tasks.classify:Classify", ClassifyConfig),
    "depth": ("megavit.tasks.depth:Depth", DepthConfig),
    "segment": ("megavit.tasks.segment:Segment", SegmentConfig),
    "video": ("megavit.tasks.video:VideoTask", VideoConfig),
}


def config_class(name: str) -> type[TaskConfig]:
    """The class of the configuration of the task called `name` (`TaskConfig.name`). ValueError if there is no
    such task."""
    return _BUILT_IN[name][1] if name in _BUILT_IN else load_task(name).Config


def load_task(name: str) -> Any:
    """The class of the task called `name`: a subclass of `megavit.tasks.task.Task`.

    A file's folder is put at the front of `sys.path` and the file is imported under its own name, so that
    worker processes can import it too. ValueError, naming the file and what is wrong with it.
    """
    path, _, class_name = _BUILT_IN[name][0].rpartition(":") if name in _BUILT_IN else name.rpartition(":")
    if name in _BUILT_IN:
        return getattr(importlib.import_module(path), class_name)
    if not path.endswith(".py") or not class_name.isidentifier():
        near = nearest(name, _BUILT_IN)
        raise ValueError(
            f"task.name {name!r} is neither a built-in task ({', '.join(_BUILT_IN)}) nor "
            f"path/to/file.py:Class{near}"
        )
    before = list(sys.path)
    try:
        return _class_in_file(name, path, class_name)
    except ValueError:
        sys.path[:] = before  # processes that start later would take files there for modules of their own
        raise


def _class_in_file(name: str, path: str, class_name: str) -> Any:
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"task.name {name!r}: there is no file {path}; name the Python file of the task")
    found = getattr(_import_file(file), class_name, None)
    if not isinstance(found, type) or not issubclass(getattr(found, "Config", object), TaskConfig):
        raise ValueError(
            f"task.name {name!r}: {path} has no class {class_name} that derives from megavit.tasks.task.Task"
        )
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(f"task.name {name!r}: {class_name} must define {' and '.join(missing)}")
    return found


def _import_file(file: Path) -> ModuleType:
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    try:
        module = importlib.import_module(file.stem)
    except Exception as error:  # whatever a file of somebody else's raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        raise ValueError(
            f"the task's file {file} cannot be imported: {type(error).__name__}: {error} ({where})"
        ) from error
    found = Path(module.__file__ or "").resolve()
    if found != file:
        raise ValueError(
            f"the task's file {file} cannot be imported, because another module is called {file.stem} "
            f"({found}); rename the file"
        )
    return module
