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
from megavit.fields import check_types, nearest
from megavit.model.config import ModelConfig

Loss = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class TaskConfig:
    """What the run learns. A task of your own adds its fields to these (megavit/tasks/README.md).

    Args:
        name: a built-in task (classify), or path/to/file.py:Class for one of your own.
    """

    # Fields that a run which goes on may have otherwise than it was saved with.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ()

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


# Built-in tasks: where the class is, and its configuration.
_BUILT_IN: dict[str, tuple[str, type[TaskConfig]]] = {
    "classify": ("megavit.tasks.classify:Classify", ClassifyConfig),
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
