"""Recipes, and every other YAML file with fields of a run: read strictly, so that a typing mistake is an
error with a line number, and not silently another run.

A recipe (`launch/recipes/*.yaml`) says how a model is trained; it may name an architecture and data. A run
folder's `config.yaml` has the same form and holds every field. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megavit.fields import as_type, fields_of, groups_of, nearest, shown
from megavit.model.config import model_preset
from megavit.tasks.config import TaskConfig, config_class
from megavit.train.config import LAUNCH_FIELDS, MOVED_FIELDS, RunConfig

_PACKAGE = Path(__file__).resolve().parent
# Recipes and DeepSpeed JSONs lie beside the package in a checkout; an installed package has a copy of them.
IS_CHECKOUT = (_PACKAGE.parent / "launch" / "recipes").is_dir()
PROJECT_ROOT = _PACKAGE.parent if IS_CHECKOUT else _PACKAGE / "_project"
RECIPES = PROJECT_ROOT / "launch" / "recipes"
DEFAULT_TASK = TaskConfig.name
# Fields that people write otherwise: Python has no name `async`.
OTHER_NAMES = {"checkpoint.async": "checkpoint.async_save", "task": "task.name", **MOVED_FIELDS}
DS_PREFIX = "ds."  # before the dotted key of a value of the DeepSpeed JSON that is replaced
# Two ways of saying the same thing: the one that is given later replaces the other.
_LENGTHS = {"max_steps": "epochs", "epochs": "max_steps"}


def read_recipe(path: str | Path) -> RunConfig:
    """The run that a file describes by itself, without its changes to the DeepSpeed JSON. ValueError naming
    the file, the line and the key."""
    return make_run(split_overrides(read_fields(path))[0])


def make_run(fields: Mapping[str, Any]) -> RunConfig:
    """A run from fields under dotted names; what they leave out has its default, and in the architecture that
    of the preset `model.name`. ValueError for a value that does not fit."""
    task = config_class(fields.get("task.name", DEFAULT_TASK))
    groups = groups_of(RunConfig) | {"task": task}
    parts: dict[str, dict[str, Any]] = {name: {} for name in ("", *groups)}
    for name, value in fields.items():
        group, _, field = name.rpartition(".")
        parts[group][field] = value
    make: dict[str, Callable[..., Any]] = {**groups}
    if "name" in parts["model"]:
        make["model"] = model_preset
    return RunConfig(**parts[""], **{name: make[name](**parts[name]) for name in groups})


def split_overrides(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a run, and the values that replace those of the DeepSpeed JSON, by dotted key."""
    overrides = {
        name.removeprefix(DS_PREFIX): value for name, value in fields.items() if name.startswith(DS_PREFIX)
    }
    return {name: value for name, value in fields.items() if not name.startswith(DS_PREFIX)}, overrides


def layered(fields: Mapping[str, Any], more: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`fields` with those of `more`, which win, and come from `where`. ValueError if `more` gives the length
    of the run twice."""
    if more.get("epochs") and more.get("max_steps"):
        raise ValueError(
            f"{where} give both epochs {more['epochs']:g} and max_steps {more['max_steps']}; keep one"
        )
    replaced = {_LENGTHS[name] for name in _LENGTHS if more.get(name)}
    return {name: value for name, value in fields.items() if name not in replaced} | dict(more)


def saved_fields(run_dir: str, task: str = "") -> dict[str, Any]:
    """The fields of the run that a folder holds, without those that belong to one start of it; empty if it
    holds none. ValueError for a file that is no run configuration."""
    path = Path(run_dir) / "config.yaml"
    if not run_dir or not path.exists():
        return {}
    try:
        fields = read_fields(path, task)
    except ValueError as error:
        raise ValueError(f"{error}; repair the run folder's configuration or remove it") from error
    if not fields:
        raise ValueError(f"{path} is empty; remove it and give the run's flags again")
    return {name: value for name, value in fields.items() if name not in LAUNCH_FIELDS}


def read_fields(path: str | Path, task: str = "") -> dict[str, Any]:
    """The fields that a YAML file gives, under dotted names (`model.depth`), each of its type. Those of
    `task.*` are of the task called `task`; if that is empty, of the one that the file names, or the default.

    ValueError, in one line with the file, the line and the key, for a key that is unknown or given twice, a
    value of another type, and a file that is no YAML or cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; name a YAML file, e.g. launch/recipes/digits.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        return _Reader(text, config_class(task or named_task(text) or DEFAULT_TASK)).fields()
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem or 'this is no YAML'}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a configuration") from error


def task_in_file(path: str | Path) -> str:
    """The name of the task that a YAML file gives, or nothing, also if it cannot be read."""
    try:
        return named_task(Path(path).read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError):  # `read_fields` says what is wrong
        return ""


def named_task(text: str) -> str:
    """The name of the task in a YAML file's text, or nothing. What is wrong with the text is left to
    `read_fields`."""
    try:
        root = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    if not isinstance(root, dict):
        return ""
    task = root.get("task", root.get("task.name"))
    found = task.get("name") if isinstance(task, dict) else task
    return found if isinstance(found, str) else ""


def parse_value(text: str) -> Any:
    """What `text` would be as a value in a YAML file. ValueError if it is no value."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{shown(text)} is no value") from error


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, and `10:20`, `010` and `2026-01-01` are neither a sum of minutes, an
    octal number nor a date, as they are in YAML 1.1."""


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?[0-9][0-9_]*$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
}
_REPLACED = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        return int(str(loader.construct_scalar(node)).replace("_", ""))
    except ValueError as error:  # Python reads no more than some thousand digits
        raise yaml.constructor.ConstructorError(
            None, None, "the number is too long", node.start_mark
        ) from error


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _Reader:
    """One file's mapping, walked with the fields of a run in hand."""

    def __init__(self, text: str, task: type[TaskConfig]):
        self._loader = _Loader(text)
        # A recipe for the default task may be used with another one: what belongs to the former is left out
        # by the caller.
        self._known = fields_of(RunConfig, task=config_class(DEFAULT_TASK)) | fields_of(RunConfig, task=task)
        self._groups = {*(name.rpartition(".")[0] for name in self._known), "ds"} - {""}
        self._lines: dict[str, int] = {}

    def fields(self) -> dict[str, Any]:
        root = self._loader.get_single_node()
        return self._mapping(root, "") if root else {}

    def _mapping(self, node: yaml.Node, group: str) -> dict[str, Any]:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return {}  # `data:` with nothing, or only comments, below it
        if not isinstance(node, yaml.MappingNode):
            what = f"{group} must hold its fields" if group else "a configuration must hold fields"
            raise self._error(node, f"{what}, one a line as `name: value`")
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be a name")
            name = f"{group}.{key.value}" if group else str(key.value)
            if name not in self._groups or (
                isinstance(value, yaml.ScalarNode) and value.value
            ):  # `task: NAME`
                name = OTHER_NAMES.get(name, name)
            line = key.start_mark.line + 1
            if name in self._lines:
                raise self._error(
                    key, f"{name} is given twice, first in line {self._lines[name]}; keep one of them"
                )
            self._lines[name] = line
            # Which keys the DeepSpeed JSON may have is checked together with the JSON.
            is_group = name.startswith(DS_PREFIX) and isinstance(value, yaml.MappingNode)
            found |= (
                self._mapping(value, name)
                if is_group or name in self._groups
                else {name: self._value(key, name, value)}
            )
        return found

    def _value(self, key: yaml.Node, name: str, node: yaml.Node) -> Any:
        if name.startswith(DS_PREFIX):
            return self._loader.construct_object(node, deep=True)
        if name not in self._known:
            raise self._error(key, f"unknown key {name!r}{self._hint(name)}")
        try:
            return as_type(self._loader.construct_object(node, deep=True), self._known[name].hint)
        except ValueError as error:
            raise self._error(key, f"{name} {error}") from error

    def _hint(self, name: str) -> str:
        """The key of this name in another group, or else the nearest one of the same group."""
        group, _, last = name.rpartition(".")
        for known in self._known:
            if known.rpartition(".")[2] == last:
                return f"; did you mean {known!r}?"
        return nearest(name, [n for n in (*self._known, *self._groups) if n.rpartition(".")[0] == group])

    @staticmethod
    def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
