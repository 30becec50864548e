"""The command line of a training run: flags and `--config` files onto the dataclasses of `megavit.config`.

Precedence: defaults < preset (`--model.name`) < the configuration that --run_dir holds already < `--config
file.yaml` < flags. Imports neither torch nor deepspeed, so that `--help` is quick and a mistake is reported
before anything is started.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from megavit.config import LAUNCH_FIELDS, PRESETS, RunConfig, flat_config, nearest, plain_config, run_preset

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class _Parser(ArgumentParser):
    """Reports a mistake in one line, with the nearest known flag or field."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        flags = [option for action in self._actions for option in action.option_strings]
        hint = ""
        if unknown := re.search(r"unrecognized arguments: (--[^\s=]+)", message):
            hint = nearest(unknown[1], flags)
        elif unknown := re.search(r"does not accept option '([^']+)'", message):
            hint = nearest(unknown[1], [part for flag in flags for part in flag.lstrip("-").split(".")])
        if re.search(r"unrecognized arguments: [^-\s]", message) and len(message) > 200:
            message = message[:200] + " ..."
        if re.search(r"unrecognized arguments: \S+\.tar", message):
            hint = (
                "; a shell has expanded a pattern of shards (deepspeed over pdsh has a second one on the "
                "hosts): name a manifest, or write the pattern in both "
                "kinds of quotes, \"'data/train-*.tar'\""
            )
        print(f"error: {message.strip()}{hint} (see --help)", file=sys.stderr)
        sys.exit(2)


def make_parser(
    preset: str, saved: dict[str, Any] | None = None, *, json_required: bool = True
) -> ArgumentParser:
    """A parser whose defaults are those of `preset`'s model and recipe, or of a run that `saved` tells of."""
    parser = _Parser(
        prog="deepspeed launch/train.py",
        description="Train a vision transformer of the ViT-22B family with tensor parallelism and DeepSpeed. "
        "Batch sizes, precision, clipping, ZeRO, optimizer and learning rate are in the DeepSpeed JSON. "
        f"Presets for --model.name: {', '.join(PRESETS)}; the defaults shown are those of {preset}.",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=str,
        required=json_required,
        help="DeepSpeed JSON, see ds_configs/README.md",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the flags below")
    parser.add_argument(
        "--local_rank", type=int, default=0, help="appended by the deepspeed launcher; not used"
    )
    parser.add_class_arguments(RunConfig, None)
    parser.set_defaults(flat_config(plain_config(run_preset(preset))) | (saved or {}))
    return parser


def parse_run(argv: Sequence[str] | None = None) -> tuple[RunConfig, Path]:
    """(run configuration, path of the DeepSpeed JSON) from the command line; exits with a message on any
    mistake."""
    run, values, parser = parse_flags(argv)
    if not run.data.shards:
        parser.error("--data.shards is required: the training shards, e.g. 'data/train-{000000..000099}.tar'")
    return run, Path(_from_root(values.deepspeed_config))


def parse_flags(
    argv: Sequence[str] | None = None, add_flags: Callable[[ArgumentParser], None] | None = None
) -> tuple[RunConfig, Any, ArgumentParser]:
    """(run configuration, all flags' values, parser); `add_flags` gives the parser flags of another command,
    which needs no DeepSpeed JSON then. Exits with a message on any mistake."""
    argv = _file_first(_complete_switches(_rename(list(sys.argv[1:] if argv is None else argv))))

    def make(preset: str, saved: dict[str, Any] | None, *, json_required: bool) -> ArgumentParser:
        parser = make_parser(preset, saved, json_required=json_required)
        if add_flags:
            add_flags(parser)
        return parser

    first = make("vit_tiny", None, json_required=False)
    words = [word for word in argv if word not in ("-h", "--help")]
    try:
        saved = _saved_config(first.parse_args(words).run_dir)
        first.set_defaults({"model.name": saved.get("model.name", "vit_tiny")})
        preset = first.parse_args(words).model.name
        saved_flags = saved if saved.get("model.name") == preset else None
        parser = make(preset, saved_flags, json_required=add_flags is None)
        values = parser.instantiate(parser.parse_args(argv))
        run = RunConfig(**{f.name: values[f.name] for f in dataclasses.fields(RunConfig)})
    except ValueError as error:
        first.error(str(error))
    # Quotes that were meant for a remote shell, see _Parser.error.
    shards, val_shards = (_from_root(text.strip("'")) for text in (run.data.shards, run.data.val_shards))
    data = dataclasses.replace(run.data, shards=shards, val_shards=val_shards)
    return dataclasses.replace(run, data=data), values, parser


def _complete_switches(argv: list[str]) -> list[str]:
    """`--compile` alone means `--compile=true`."""
    switches = {f"--{name}" for name, hint in flat_config(_types(RunConfig)).items() if hint is bool}
    words = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        words.append(f"{word}=true" if word in switches and following.startswith("--") else word)
    return words


def _rename(argv: list[str]) -> list[str]:
    """`--checkpoint.async`: a field cannot have that name in Python."""
    return [re.sub(r"^--checkpoint\.async(?=$|=)", "--checkpoint.async_save", word) for word in argv]


def _saved_config(run_dir: str) -> dict[str, Any]:
    """The flags of the run in `run_dir`, without those that belong to one start of it; empty if there is
    none.

    ValueError for a file that is no configuration.
    """
    path = Path(run_dir) / "config.yaml"
    if not run_dir or not path.is_file():
        return {}
    try:
        fields = flat_config(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{path} is no run configuration: {error}; remove it or repair it") from error
    known = flat_config(plain_config(run_preset("vit_tiny")))
    if unknown := sorted(fields.keys() - known.keys()):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}{nearest(unknown[0], known)}")
    return {key: value for key, value in fields.items() if key not in LAUNCH_FIELDS}


def _file_first(argv: list[str]) -> list[str]:
    """`--config FILE` moved to the front: jsonargparse lets the later word win, and flags must win over
    files."""
    files, rest, words = [], [], iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            _, given, path = word.partition("=")
            files.append(f"--config={_from_root(path if given else next(words, ''))}")
        else:
            rest.append(word)
    return files + rest


def _types(config: type) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {name: _types(hint) if dataclasses.is_dataclass(hint) else hint for name, hint in hints.items()}


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
