"""The command line of a run: flags and YAML files onto the dataclasses of `*/config.py`.

Precedence: defaults < `--config` files, in their order < flags. A run folder that holds a run has its own
`config.yaml`, which takes the place of a recipe: `--config` files and flags win over it. A command for
training that names no file, no data, no architecture and no such folder is the demo's,
`launch/recipes/digits.yaml`. `model.name`, wherever it comes from, fills the fields of the architecture that
none of these gives.

Imports neither torch nor deepspeed, so that `--help` is quick and a mistake is reported before anything is
started.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from megavit import coming_from
from megavit.data.class_names import class_names_file, read_class_names
from megavit.fields import Field, as_type, describe, fields_of, groups_of, nearest
from megavit.model.config import PRESET_FIELDS, PRESETS
from megavit.recipe import (
    DEFAULT_TASK,
    DS_PREFIX,
    IS_CHECKOUT,
    OTHER_NAMES,
    PROJECT_ROOT,
    RECIPES,
    layered,
    make_run,
    parse_value,
    read_fields,
    saved_fields,
    split_overrides,
    task_in_file,
)
from megavit.tasks.config import config_class
from megavit.train.config import RunConfig

DEMO_RECIPE = RECIPES / "digits.yaml"
_TRAINING_NEEDS = {
    "deepspeed_config": "the DeepSpeed JSON, e.g. ds_configs/zero3.json",
    "model.name": f"the architecture, one of {', '.join(PRESETS)}",
    "data.shards": "the training shards, e.g. 'data/train-{000000..000099}.tar'",
    "max_steps": "the optimizer steps of the whole run (or --epochs), which a recipe has, e.g. --config "
    "launch/recipes/imagenet1k_vit_s16.yaml",
}
_DS_FLAG = f"--{DS_PREFIX}"
_COMMON_FLAGS = (
    *("deepspeed_config", "ds.KEY", "config", "model.name", "data.shards", "data.val_shards", "run_dir"),
    *("max_steps", "epochs", "schedule.warmup_steps", "eval_every", "checkpoint.every", "init_from"),
    *("tensor_parallel_size", "recompute"),
)


def without_local_rank(words: Sequence[str]) -> list[str]:
    """A command line without the flag that the deepspeed launcher puts first, before any subcommand."""
    return [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line with the nearest known flag. Parsers of
    subcommands are of this class too."""

    def __init__(self, **options: Any):
        super().__init__(**options | {"allow_abbrev": False})
        self.common: tuple[str, ...] = ()
        self.example = ""
        self.task = DEFAULT_TASK  # whose fields are among the flags

    def add_fields(self, config: type, **parts: type) -> None:
        """A flag for every field of a dataclass; those of a nested one, of the class that `parts` names, if
        it does, are dotted, `--model.depth`. The parsed namespace holds only what was given."""
        groups = {"": self.add_argument_group(_summary(config))}
        for name, inner in (groups_of(config) | parts).items():
            groups[name] = self.add_argument_group(f"--{name}.*", _summary(inner))
        for name, item in fields_of(config, **parts).items():
            others = [other for other, meant in OTHER_NAMES.items() if meant == name]
            options: dict[str, Any] = {"type": _converter(item.hint), "metavar": _metavar(item.hint)}
            if item.hint is bool:
                options |= {"nargs": "?", "const": True}
            elif get_origin(item.hint) is tuple and get_args(item.hint)[-1] is Ellipsis:
                options = {"action": "append", "metavar": _metavar(get_args(item.hint)[0])}
            groups[name.rpartition(".")[0]].add_argument(
                *(f"--{spelling}" for spelling in (name, *others)),
                dest=name,
                default=argparse.SUPPRESS,
                help=f"{item.help} ({_default(name, item)})".replace("%", "%%"),
                **options,
            )

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): must be", r"\1 must be", message.strip())
        hint = ""
        if unknown := re.search(r"unrecognized arguments: (-[^\s=]+)", message):
            known = coming_from.what_to_write(unknown[1]) if self.common else ""
            hint = f"; {known}" if known else nearest(unknown[1], self._flags())
        if re.search(r"unrecognized arguments: [^-\s]", message) and len(message) > 200:
            message = message[:200] + " ..."
        if re.search(r"unrecognized arguments: \S+\.tar", message):
            hint = (
                "; a shell has expanded a pattern of shards (deepspeed over pdsh has a second one on the "
                "hosts): name a manifest, or write the pattern in both "
                "kinds of quotes, \"'data/train-*.tar'\""
            )
        print(f"error: {message}{hint} (see --help)", file=sys.stderr)
        sys.exit(2)

    def format_short_help(self) -> str:
        """The first screen of a command about a run: an example, the common flags, and where the rest is."""
        by_flag = {flag: action for action in self._actions for flag in action.option_strings}
        lines = [*textwrap.wrap(f"{self.description}", 100), ""]
        lines += ["example:", f"  {self.example}", ""] if self.example else []
        lines.append("the flags that most runs need:")
        for flag in (f"--{name}" for name in self.common):
            action = by_flag[flag]
            sentence = re.split(r"(?<!e\.g)\. |; | \(|\.$", f"{action.help}")[0]
            start = f"  {flag} {action.metavar} ".ljust(33)
            lines += textwrap.wrap(start + sentence, 110, subsequent_indent=" " * 33)
        lines += [
            "",
            "more:",
            "  --help all".ljust(33) + "every flag, with its default",
            "  --help coming-from".ljust(33) + "what flags of timm, open_clip, DeepSpeed and Hugging Face "
            "are called here",
        ]
        return "\n".join(lines) + "\n"

    def _flags(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._flags()


class _Help(argparse.Action):
    """`--help`, `--help all` and `--help coming-from`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, topic: Any, option: Any = None
    ) -> None:
        assert isinstance(parser, Parser)
        texts = {
            "": parser.format_short_help,
            "all": parser.format_help,
            "coming-from": coming_from.as_text,
        }
        if topic not in texts:
            parser.error(f"{option} must be followed by all, coming-from or nothing, got {topic!r}")
        print(texts[topic](), end="")
        parser.exit()


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    `deepspeed_config` is the path of the JSON, or empty, and `ds_overrides` the values in it that flags and
    files replace, by dotted key. `notes` are lines for the person who wrote the command: the main rank prints
    them. `more` holds the flags that were given beside those of every run.
    """

    run: RunConfig
    deepspeed_config: str
    ds_overrides: dict[str, Any]
    notes: tuple[str, ...]
    more: dict[str, Any]


def make_parser(
    prog: str,
    description: str,
    *,
    example: str = "",
    common: Sequence[str] = _COMMON_FLAGS,
    argv: Sequence[str] | None = (),
) -> Parser:
    """A parser with the flags of a run, those of the task that the command line `argv` asks for. `--help`
    shows the `common` ones, named without their dashes, and an `example`, which are arguments of the
    command."""
    usage = f"{prog} --deepspeed_config FILE [--config FILE] [--FLAG VALUE ...]"
    parser = Parser(prog=prog, usage=usage, description=description, add_help=False)
    parser.common, parser.example = tuple(common), example and f"{prog} {example}"
    parser.add_argument(
        "-h",
        "--help",
        action=_Help,
        nargs="?",
        const="",
        default=argparse.SUPPRESS,
        metavar="all|coming-from",
        help="explain the flags",
    )
    parser.add_argument(
        "--deepspeed_config", default="", metavar="FILE", help="DeepSpeed JSON, see ds_configs/README.md"
    )
    parser.add_argument(
        f"{_DS_FLAG}KEY",
        default=argparse.SUPPRESS,
        metavar="VALUE",
        help="in place of what the DeepSpeed JSON has, e.g. --ds.optimizer.params.lr 3e-4; the run folder "
        "keeps it. A file of --config may have the same keys below `ds:`",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file with any of the fields below, e.g. launch/recipes/imagenet1k_vit_s16.yaml; flags win "
        "over it, and with several the later one. The flag --model.name replaces the architecture that it "
        "names, but not the model.* fields that it gives beside the name",
    )
    parser.add_argument(
        "--trunk",
        default="",
        metavar="FOLDER",
        help="an exported model whose weights the run starts from (in place of --init_from), and whose "
        "architecture it has, whatever files of --config say of model.* but image_size; flags --model.* win",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", metavar="N", help="appended by the deepspeed launcher; not used"
    )
    try:
        parser.task = _named_task(sys.argv[1:] if argv is None else argv)
        parser.add_fields(RunConfig, task=config_class(parser.task))
    except ValueError as error:
        parser.error(str(error))
    return parser


def parse_run(argv: Sequence[str] | None = None) -> Command:
    """The command line of `launch/train.py`; exits with a message on any mistake."""
    parser = make_parser(
        "deepspeed launch/train.py" if IS_CHECKOUT else "deepspeed --module megavit.launch.train",
        "Train a vision transformer of the ViT-22B family with tensor parallelism and DeepSpeed. Batch "
        "sizes, precision, clipping, ZeRO, optimizer and learning rate are in the DeepSpeed JSON, everything "
        "else is in the flags and YAML files described here; the recipes of launch/recipes are such files. "
        "Without any of them launch/recipes/digits.yaml is trained, the demo. Architectures for "
        f"--model.name: {', '.join(PRESETS)}.",
        example="--deepspeed_config ds_configs/zero2_imagenet1k.json \\\n"
        "      --config launch/recipes/imagenet1k_vit_s16.yaml --data.shards 'data/train-*.tar' \\\n"
        "      --ds.optimizer.params.lr 1e-3 --run_dir runs/first",
        argv=argv,
    )
    return parse(parser, argv, needs=_TRAINING_NEEDS, otherwise=DEMO_RECIPE)


def parse(
    parser: Parser, argv: Sequence[str] | None, *, needs: Mapping[str, str], otherwise: Path | None = None
) -> Command:
    """The command line of any command that is about a run. `needs` names what must be given, and says what it
    is; `otherwise` is the recipe of a command that names neither a file nor data nor an architecture."""
    try:
        words, overrides = take_ds_flags(sys.argv[1:] if argv is None else argv)
        given = vars(parser.parse_args(words)) | overrides
        return _command(given, needs, otherwise, parser.task)
    except ValueError as error:
        parser.error(str(error))


def take_ds_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words of a command line without the flags `--ds.KEY VALUE` and `--ds.KEY=VALUE`, and their values
    under `ds.KEY`. Which keys there are is checked together with the JSON, by `load_ds_config`. ValueError
    for a flag without a value, or with one that YAML cannot read."""
    rest, overrides = [], {}
    words = iter(argv)
    for word in words:
        if not word.startswith(_DS_FLAG):
            rest.append(word)
            continue
        flag, equals, text = word.partition("=")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise ValueError(f"{flag} needs a value, e.g. --ds.optimizer.params.lr 3e-4")
        try:
            overrides[flag.removeprefix("--")] = parse_value(text)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from error
    return rest, overrides


def _named_task(words: Sequence[str]) -> str:
    """The task of a run, which decides what flags there are: of the flags, else of the last file of --config
    that names one, else of the run folder."""
    given: dict[str, list[str]] = {"task": [], "config": [], "run_dir": []}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        name = {"--task.name": "task"}.get(flag, flag.removeprefix("--"))
        if flag.startswith("--") and name in given:
            given[name].append(value if equals else following)
    files = [_from_root(file) for file in reversed(given["config"])]
    folders = [str(Path(folder) / "config.yaml") for folder in given["run_dir"][-1:] if folder]
    named = [*given["task"][-1:], *(task_in_file(file) for file in (*files, *folders))]
    return next(filter(None, named), DEFAULT_TASK)


def _command(given: dict[str, Any], needs: Mapping[str, str], otherwise: Path | None, task: str) -> Command:
    known = fields_of(RunConfig, task=config_class(task))
    del given["local_rank"]
    ds_path = _from_root(given.pop("deepspeed_config"))
    files = [_from_root(name) for name in given.pop("config")]
    trunk = given.pop("trunk")
    flags = {name: value for name, value in given.items() if name in known or name.startswith(DS_PREFIX)}
    more = {name: value for name, value in given.items() if name not in flags}
    if trunk and flags.get("init_from", trunk) != trunk:
        raise ValueError(
            f"--trunk {trunk} and --init_from {flags['init_from']} name two exports to start from; keep one"
        )
    chosen = layered(_merged(files, task), flags, "the flags")
    saved = saved_fields(chosen.get("run_dir", ""), task)
    if otherwise and not (saved or files or flags.keys() & {"model.name", "data.shards"}):
        files = [str(otherwise)]
        chosen = layered(_merged(files, task), flags, "the flags")
    if "model.name" in chosen and chosen["model.name"] != saved.get("model.name"):
        saved = {name: value for name, value in saved.items() if not name.startswith("model.")}
    values, overrides = split_overrides(layered(saved, chosen, "the flags and files"))
    if trunk and saved:
        values["init_from"] = trunk
    elif trunk:
        values = _of_trunk(trunk, values) | {name: flags[name] for name in flags if name.startswith("model.")}
    # What a recipe says of the default task is not for this one.
    values = {name: value for name, value in values.items() if name in known} | {"task.name": task}
    for name in ("data.shards", "data.val_shards", "data.class_names"):
        if name in values:  # perhaps in quotes that were meant for a remote shell, see Parser.error
            values[name] = _from_root(values[name].strip("'"))
    found = values | {"deepspeed_config": ds_path}
    found["max_steps"] = found.get("max_steps") or found.get("epochs")
    missing = [name for name in needs if not found.get(name)]
    if missing:
        raise ValueError("; ".join(f"--{name} is required: {needs[name]}" for name in missing))
    notes = [
        *_take_number_of_classes(values, config_class(task).CLASSES),
        *_note_validation_shards(values, flags, files),
        *(
            f"note: --{name} {value}, as in {values['run_dir']}/config.yaml"
            for name, value in saved.items()
            if name.startswith(DS_PREFIX) and name not in chosen
        ),
    ]
    return Command(make_run(values), ds_path, overrides, tuple(notes), more)


def _of_trunk(folder: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run that starts from an export, or that of a run folder, with its architecture."""
    places = [Path(folder) / "config.json", Path(folder) / "export" / "config.json"]
    path = next((place for place in places if place.is_file()), places[0])
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"--trunk {folder}: {path} is not the configuration of an exported model ({error}); "
            f"launch/export.py writes one"
        ) from error
    if found.get("name") not in PRESETS:  # all that a preset fills is given
        found["name"] = PRESETS[0]
    trunk = {f"model.{name}": value for name, value in found.items() if name != "num_classes"}
    kept = {name: value for name, value in values.items() if name not in trunk or name == "model.image_size"}
    return trunk | kept | {"init_from": folder}


def _merged(files: Sequence[str], task: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in files:
        merged = layered(merged, read_fields(name, task), name)
    return merged


def _take_number_of_classes(values: dict[str, Any], field: str) -> Iterator[str]:
    """Set `field`, which counts the classes of the task, to the number of names that are given or lie beside
    the training shards, if there are names and it is not given; what is to be said about it. ValueError if a
    model has too few, or more than are named in a file that is given."""
    names_given = values.get("data.class_names", "")
    path = class_names_file(values.get("data.shards", ""), names_given)
    if path is None or not field:
        return
    names = read_class_names(path)
    where = f"{len(names)} classes in {path}"
    if field not in values:
        values[field] = len(names)
        yield f"note: {field} is {len(names)}: there are {where}"
    given = values[field]
    if given < len(names):
        raise ValueError(
            f"{field} {given} is too small: there are {where}; leave it out, or give --{field} {len(names)}"
        )
    if given > len(names) and names_given:
        raise ValueError(f"{field} is {given}, but --data.class_names names only {where}; name every class")
    if given > len(names):
        yield f"note: {field} is {given}, but there are only {where}, which are not taken as names"


def _note_validation_shards(
    values: dict[str, Any], flags: dict[str, Any], files: Sequence[str]
) -> Iterator[str]:
    """A line when the training shards are given by flag, and a recipe's validation shards are evaluated
    on."""
    if "data.shards" in flags and "data.val_shards" not in flags and values.get("data.val_shards"):
        owner = " and ".join(files) or "the run folder"
        yield (
            f"note: evaluations are on {values['data.val_shards']}, which {owner} names; give "
            f"--data.val_shards too if yours are others"
        )


def _converter(hint: Any) -> Any:
    """Text of the command line as a value of type `hint`, read as in a YAML file; texts need no quotes."""

    def convert(text: str) -> Any:
        try:
            is_text = hint is str or (get_origin(hint) is Literal and text in get_args(hint))
            return text if is_text else as_type(parse_value(text), hint)
        except ValueError:
            near = nearest(text, get_args(hint)) if get_origin(hint) is Literal else ""
            raise argparse.ArgumentTypeError(f"must be {describe(hint)}, got {text[:80]!r}{near}") from None

    return convert


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    return {int: "N", float: "X", bool: "true|false", str: "TEXT"}.get(hint, "VALUE")


def _default(name: str, item: Field) -> str:
    if name in _TRAINING_NEEDS:
        return "no default"
    if name in PRESET_FIELDS:
        return "default: the preset's"
    if item.default is None or isinstance(item.default, bool):
        return f"default: {str(item.default).lower()}"
    if isinstance(item.default, tuple):
        return f"default: {list(item.default)}"
    return f"default: {'empty' if item.default == '' else item.default}"


def _summary(config: type) -> str:
    """The first paragraph of a dataclass's docstring, as a heading."""
    return " ".join((config.__doc__ or "").partition("\n\n")[0].split()).rstrip(".")


def _from_root(path: str) -> str:
    """A relative path that starts in no folder or file here is taken from the project's root, so that the
    defaults and `ds_configs/...` work from any working directory."""
    first = Path(path).parts[:1]
    if (
        not first
        or Path(path).is_absolute()
        or Path(first[0]).exists()
        or not (PROJECT_ROOT / first[0]).exists()
    ):
        return path
    return str(PROJECT_ROOT / path)
