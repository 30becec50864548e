"""Mistakes in flags and YAML files: each ends with exit status 2 and one line that names the flag or file,
the value found, and the fix."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megavit.cli import parse_run
from megavit.model.config import model_config
from megavit.recipe import RECIPES, read_recipe
from megavit.train.config import plain_config
from megavit.train.ds_config import load_ds_config

JSON = ["--deepspeed_config", "ds_configs/zero3.json"]
OWN = [*JSON, "--model.name", "vit_s16", "--data.shards", "/d/x.tar", "--max_steps", "100"]

# Flags after those of OWN, what the line must hold.
FLAGS: list[tuple[str, list[str]]] = [
    # names
    ("--modle.dim 3", ["unrecognized", "--modle.dim", "did you mean '--model.dim'"]),
    ("--model.head 12", ["unrecognized", "--model.head 12"]),
    ("--max_step 5", ["unrecognized", "--max_step 5", "did you mean '--max_steps'"]),
    ("-max_steps 5", ["unrecognized", "did you mean '--max_steps'"]),
    ("--model.num_class 5", ["did you mean '--model.num_classes'"]),
    ("--checkpoint.asyn true", ["did you mean '--checkpoint.async'"]),
    ("stray", ["unrecognized", "stray"]),
    ("--model.name vit_22c", ["vit_22c", "did you mean 'vit_22b'", "vit_tiny"]),
    # types
    ("--max_steps many", ["--max_steps must be a whole number, got 'many'"]),
    ("--max_steps 1e3", ["--max_steps must be a whole number, got '1e3'"]),
    ("--max_steps 1.5", ["--max_steps must be a whole number, got '1.5'"]),
    ("--max_steps=", ["--max_steps must be a whole number, got ''"]),
    ("--max_steps", ["--max_steps", "expected one argument"]),
    ("--max_steps true", ["--max_steps must be a whole number, got 'true'"]),
    ("--model.depth [12", ["--model.depth must be a whole number, got '[12'"]),
    ("--model.dropout nan", ["--model.dropout must be a finite number, got 'nan'"]),
    ("--model.dropout .nan", ["--model.dropout must be a finite number, got '.nan'"]),
    ("--timeout_s inf", ["--timeout_s must be a finite number, got 'inf'"]),
    ("--data.cache_gb 1e999", ["--data.cache_gb must be a finite number, got '1e999'"]),
    ("--model.layer_scale .inf", ["--model.layer_scale must be a finite number or none, got '.inf'"]),
    ("--model.head_bias big", ["--model.head_bias must be a finite number or log_prior, got 'big'"]),
    ("--model.norm_eps .inf", ["--model.norm_eps must be a finite number"]),
    ("--compile maybe", ["--compile must be true or false, got 'maybe'"]),
    ("--data.flip 1", ["--data.flip must be true or false, got '1'"]),
    ("--compile data/x.tar", ["--compile must be true or false", "data/x.tar"]),
    ("--data.crop_area 0.5", ["--data.crop_area must be [a finite number, a finite number], got '0.5'"]),
    ("--data.crop_area [0.5]", ["--data.crop_area must be", "[0.5]"]),
    ("--data.crop_area [a,b]", ["--data.crop_area must be", "[a,b]"]),
    # choices
    ("--loss softmaxx", ["--loss must be one of sigmoid, softmax, got 'softmaxx'; did you mean 'softmax'"]),
    ("--recompute all", ["--recompute must be one of none, full, selective, got 'all'"]),
    ("--schedule.name step", ["--schedule.name", "cosine", "step"]),
    ("--data.augment incep", ["--data.augment", "did you mean 'inception'"]),
    ("--data.decoder fast", ["--data.decoder must be one of full, region, got 'fast'"]),
    ("--data.tp both", ["--data.tp must be one of split, replicate, got 'both'"]),
    ("--checkpoint.on_damage go", ["--checkpoint.on_damage must be one of stop, previous, got 'go'"]),
    ("--model.block paralel", ["--model.block", "did you mean 'parallel'"]),
    ("--model.pool maap", ["--model.pool must be one of map, mean, cls, got 'maap'; did you mean 'map'"]),
    # ranges
    ("--max_steps 0", ["--max_steps is required"]),
    ("--max_steps -1", ["max_steps cannot be negative, got -1"]),
    (f"--seed {2**70}", ["seed must lie in 0 to 2**63 - 1", str(2**70)]),
    (f"--seed {2**63}", ["seed must lie in 0 to 2**63 - 1", str(2**63)]),
    ("--seed -1", ["seed must lie in 0 to 2**63 - 1, got -1"]),
    ("--log_every 0", ["log_every must be at least 1, got 0"]),
    ("--eval_every -1", ["eval_every cannot be negative, got -1"]),
    ("--stop_at_step 101", ["stop_at_step 101 is beyond max_steps 100", "--max_steps"]),
    ("--stop_at_step -1", ["stop_at_step cannot be negative, got -1"]),
    ("--head_weight_decay -1", ["head_weight_decay cannot be negative, got -1"]),
    ("--label_smoothing 1", ["label_smoothing must lie in [0, 1), got 1.0"]),
    ("--timeout_s 0", ["timeout_s must be positive, got 0"]),
    ("--tensor_parallel_size 0", ["tensor_parallel_size must be at least 1, got 0"]),
    ("--model.depth 0", ["model.depth must be at least 1, got 0"]),
    ("--model.num_classes 0", ["model.num_classes", "at least 1", "0"]),
    ("--model.num_classes -3", ["model.num_classes", "negative", "-3"]),
    ("--model.norm_eps 0", ["model.norm_eps must be positive, got 0"]),
    ("--model.dropout 1", ["model.dropout must lie in [0, 1), got 1"]),
    ("--model.emb_dropout -0.1", ["model.emb_dropout must lie in [0, 1), got -0.1"]),
    ("--model.channels 4", ["channels", "4"]),
    ("--model.image_size 225", ["image_size 225", "patch_size 16", "use image_size 224 or 240"]),
    ("--data.crop_area [0.9,0.1]", ["data.crop_area", "[0.9, 0.1]"]),
    ("--data.workers -1", ["data.workers cannot be negative, got -1"]),
    ("--data.max_bad_fraction 2", ["data.max_bad_fraction must lie in [0, 1], got 2"]),
    ("--data.skip_steps 5:3", ["data.skip_steps must be A:B", "5:3"]),
    ("--checkpoint.keep 0", ["checkpoint.keep must be at least 1, got 0"]),
    ("--guard.max_grad_norm_ratio 0.5", ["guard.max_grad_norm_ratio must be above 1", "0.5"]),
    ("--schedule.warmup_steps -5", ["schedule.warmup_steps", "negative", "-5"]),
    # what does not go together
    ("--model.dim 70 --model.num_heads 7 --tensor_parallel_size 2", ["2 does not divide model.num_heads 7"]),
    ("--compile --recompute full --tensor_parallel_size 2", ["--compile", "--recompute none", "full"]),
    ("--recompute selective --model.block sequential", ["selective", "--model.block parallel"]),
    ("--epochs 3", ["the flags give both epochs 3 and max_steps 100"]),
    ("--epochs -3 --max_steps 0", ["epochs cannot be negative, got -3"]),
    # values of the DeepSpeed JSON, which is checked later
    ("--ds.optimizer.params.lr", ["--ds.optimizer.params.lr needs a value"]),
    ("--ds.optimizer.params.lr --seed 3", ["--ds.optimizer.params.lr needs a value"]),
    ("--ds.optimizer.params.betas [0.9", ["--ds.optimizer.params.betas", "'[0.9' is no value"]),
    # files that are none
    ("--config none.yaml", ["none.yaml", "No such file"]),
    ("--config tests", ["tests", "Is a directory", "name a YAML file"]),
    ("--config", ["--config", "expected one argument"]),
]

# What people type who come from elsewhere, after OWN, what the line must hold.
BROUGHT: list[tuple[str, str]] = [
    ("--lr 3e-4", "--ds.optimizer.params.lr 3e-4"),
    ("--learning_rate=3e-4", "--ds.optimizer.params.lr 3e-4"),
    ("--batch-size 64", "--ds.train_batch_size"),
    ("--batch_size 64", "--ds.train_batch_size"),
    ("-b 64", "--ds.train_batch_size"),
    ("--weight-decay 0.1", "--ds.optimizer.params.weight_decay"),
    ("--opt adamw", "--ds.optimizer.params"),
    ("--num_epochs 90", "--epochs 90"),
    ("--num_train_epochs 90", "--epochs 90"),
    ("--resume runs/x", "--run_dir"),
    ("--output-dir runs/x", "--run_dir"),
    ("--gradient_checkpointing", "--recompute selective"),
    ("--grad-checkpointing", "--recompute selective"),
    ("--train-data x", "--data.shards"),
    ("--data-dir x", "--data.shards"),
    ("--val-data x", "--data.val_shards"),
    *((flag, "--ds.bf16.enabled") for flag in ("--amp", "--precision bf16", "--bf16", "--fp16")),
    ("--wandb", "TensorBoard files"),
    ("--report-to wandb", "TensorBoard files"),
    ("--model vit_b16", "--model.name vit_b16"),
    ("--img-size 224", "--model.image_size 224"),
    ("--num-classes 10", "--model.num_classes"),
    ("--warmup 5", "--schedule.warmup_steps"),
    ("--warmup_steps 5", "--schedule.warmup_steps"),
    ("--sched cosine", "--schedule.name cosine"),
    ("--workers 8", "--data.workers"),
    ("--drop-path 0.1", "stochastic depth is not implemented"),
    ("--mixup 0.8", "--data.mixup"),
    ("--smoothing 0.1", "--task.label_smoothing 0.1"),
    ("--clip-grad 1", "--ds.gradient_clipping 1"),
    ("--log-every 5", "--log_every"),
    ("--save-every 5", "--checkpoint.every"),
    ("--tp 8", "--tensor_parallel_size 8"),
    ("--zero 3", "--ds.zero_optimization.stage 3"),
    ("--deepspeed ds_configs/zero3.json", "--deepspeed_config ds_configs/zero3.json"),
    ("--max-steps 5", "did you mean '--max_steps'"),
]

# Flags of the DeepSpeed JSON, what the line must hold beside the file's name.
DS_FLAGS: list[tuple[str, list[str]]] = [
    (
        "--ds.optimizer.params.lr -1",
        ["with --ds.optimizer.params.lr -1: optimizer.params.lr is -1; it must be a number above 0"],
    ),
    ("--ds.optimizer.params.lr 3e-4x", ['with --ds.optimizer.params.lr "3e-4x": optimizer.params.lr is']),
    ("--ds.lr 1", ["with --ds.lr 1: lr is 1, an unknown key; did you mean 'optimizer.params.lr'?"]),
    ("--ds.optimizer.params.lrr 1", ["optimizer.params.lrr is 1, an unknown key; did you mean 'lr'"]),
    ("--ds.optimizer adam", ["with --ds.optimizer", 'optimizer is "adam"; it must be an object']),
    ("--ds.train_batch_size.x 3", ["--ds.train_batch_size.x: train_batch_size is 256, which has no keys"]),
    ("--ds.fp16.enabled true", ["fp16.enabled is true; it must be false: use bf16"]),
    (
        "--ds.zero_optimization.stage 0 --ds.bf16.enabled true",
        ["with --ds.zero_optimization.stage 0 --ds.bf16.enabled true: bf16 is on with"],
    ),
]

# Content of a file `run.yaml` given with --config, what the line must hold beside the file's name.
FILES: list[tuple[str | bytes, list[str]]] = [
    ("seed: 1\nmodel: {depth: 3}\nseed: 2\n", ["line 3", "seed is given twice", "line 1"]),
    ("model:\n  depth: 3\nmodel:\n  dim: 6\n", ["line 3", "model is given twice", "line 1"]),
    ("model:\n  depth: 3\n  depth: 4\n", ["line 3", "model.depth is given twice", "line 2"]),
    ("model.depth: 3\nmodel:\n  depth: 4\n", ["line 3", "model.depth is given twice", "line 1"]),
    ("seeed: 1\n", ["line 1", "unknown key 'seeed'", "did you mean 'seed'"]),
    ("seed: 1\nmodel:\n  num_head: 3\n", ["line 3", "'model.num_head'", "did you mean 'model.num_heads'"]),
    ("modle: {dim: 3}\n", ["line 1", "unknown key 'modle'", "did you mean 'model'"]),
    ("num_classes: 3\n", ["line 1", "unknown key 'num_classes'", "did you mean 'model.num_classes'"]),
    ("data:\n  warmup_steps: 3\n", ["line 2", "did you mean 'schedule.warmup_steps'"]),
    ("model:\n  dim:\n    deep: 3\n", ["line 2", "model.dim must be a whole number, got {'deep': 3}"]),
    ("model:\n  depth: abc\n", ["line 2", "model.depth must be a whole number, got 'abc'"]),
    ("model:\n  depth: '12'\n", ["line 2", "model.depth must be a whole number, got '12'"]),
    ("model:\n  depth: 1e6\n", ["line 2", "model.depth must be a whole number, got 1000000.0"]),
    ("model:\n  dropout: .nan\n", ["line 2", "model.dropout must be a finite number, got nan"]),
    ("model: {depth: null}\n", ["line 1", "model.depth must be a whole number, got None"]),
    ("compile: 1\n", ["line 1", "compile must be true or false, got 1"]),
    ("run_dir: 3\n", ["line 1", "run_dir must be text, got 3"]),
    ("loss: hinge\n", ["line 1", "loss must be one of sigmoid, softmax, got 'hinge'"]),
    ("data: {crop_area: [1]}\n", ["line 1", "data.crop_area must be", "[1]"]),
    (f"seed: {'9' * 5000}\n", ["line 1", "too long"]),
    ("model: 3\n", ["line 1", "model must hold its fields"]),
    ("- seed\n- 3\n", ["line 1", "must hold fields"]),
    ("seed 3\n", ["line 1", "must hold fields"]),
    ("[a]: 3\n", ["line 1", "a key must be a name"]),
    ("3: 4\n", ["line 1", "unknown key '3'"]),
    ("<<: {seed: 3}\n", ["line 1", "unknown key '<<'"]),
    ("a: &x\n  b: *x\n", ["line 1", "unknown key 'a'"]),
    ("seed: &x [*x]\n", ["run.yaml line 1", "recursive"]),
    ("seed: *x\n", ["line 1", "undefined alias"]),
    ("seed: !!python/object:os.system 3\n", ["line 1", "could not determine a constructor"]),
    ("seed: 3\n---\nseed: 4\n", ["line 2", "another document"]),
    ("model:\n\tdepth: 3\n", ["line 2", "cannot start any token"]),
    ("model: {depth: 3\n", ["line 2", "expected ',' or '}'"]),
    ("seed: " + "[" * 20_000, ["nested too deeply"]),
    ("seed: \x00\n", ["no YAML", "special characters"]),
    (b"seed: 3\nrun_dir: caf\xe9\n", ["not UTF-8", "byte 20", "save it as UTF-8"]),
    (b"\xff\xfes\x00e\x00e\x00d\x00", ["not UTF-8"]),
    ("ds: 3\n", ["line 1", "ds must hold its fields"]),
    (
        "ds:\n  train_batch_size: 3\nds.train_batch_size: 4\n",
        ["line 3", "ds.train_batch_size is given twice"],
    ),
    ("epochs: 3\nmax_steps: 5\n", ["give both epochs 3 and max_steps 5"]),
    ("model:\n  name: vit_s61\n", ["unknown model preset 'vit_s61'", "did you mean 'vit_s16'"]),
]

# The content of a run folder's config.yaml, what the line must hold beside the file's name.
SAVED: list[tuple[str, list[str]]] = [
    ("max_stepz: 3\n", ["line 1", "unknown key 'max_stepz'", "did you mean 'max_steps'", "repair"]),
    ("", ["is empty", "remove it"]),
    ("{", ["line 1", "repair"]),
]

# Program, its words, what the line must hold.
OTHERS: list[tuple[str, str, list[str]]] = [
    ("train", "", ["--deepspeed_config is required", "ds_configs/zero3.json"]),
    (
        "train",
        "--data.shards x",
        ["--deepspeed_config", "--model.name is required", "--max_steps is required"],
    ),
    ("train", "--deepspeed_config x --model.name vit_b16", ["--data.shards is required", "--max_steps"]),
    ("plan", "", ["--model.name is required", "launch/recipes/vit_22b_jft.yaml"]),
    ("plan", "--model.name vit_b16 --node 2", ["unrecognized", "did you mean '--nodes'"]),
    ("plan", "--model.name vit_b16 --nodes two", ["--nodes must be a whole number, got 'two'"]),
    ("plan", "--model.name vit_b16 --network_gb_per_s nan", ["--network_gb_per_s must be a finite number"]),
    ("plan", "--model.name vit_b16 --rehearse -1", ["--rehearse cannot be negative, got -1"]),
    ("plan", "--model.name vit_b61", ["unknown model preset 'vit_b61'", "did you mean 'vit_b16'"]),
    ("shards", "digits --hold 5", ["unrecognized", "--hold 5", "did you mean '--holdout'"]),
    ("shards", "stat x", ["'stat'", "stats"]),
    ("checkpoints", "verify runs/x --ste 3", ["unrecognized", "did you mean '--step'"]),
    ("export", "runs/x out --ste 3", ["unrecognized", "did you mean '--step'"]),
    ("bench", "data --image 32", ["unrecognized", "did you mean '--images'"]),
]

# Fields of an export's config.json that replace good ones, what the message must hold.
EXPORTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"depth": 1e6}, ["model.depth must be a whole number, got 1000000.0"]),
    ({"depth": "12"}, ["model.depth must be a whole number, got '12'"]),
    ({"depth": True}, ["model.depth must be a whole number, got True"]),
    ({"depth": None}, ["model.depth must be a whole number, got None"]),
    ({"name": None}, ["model.name must be text, got None"]),
    ({"dropout": "0"}, ["model.dropout must be a finite number, got '0'"]),
    ({"norm_eps": 10**400}, ["model.norm_eps must be a finite number, got 1000"]),
    ({"norm_eps": float("nan")}, ["model.norm_eps must be a finite number, got nan"]),
    ({"qk_norm": 1}, ["model.qk_norm must be true or false, got 1"]),
    ({"pool": ["map"]}, ["model.pool must be one of map, mean, cls, got ['map']"]),
    ({"block": 3}, ["model.block must be one of parallel, sequential, got 3"]),
    ({"layer_scale": float("inf")}, ["model.layer_scale must be a finite number or none, got inf"]),
    ({"head_bias": "log"}, ["model.head_bias must be a finite number or log_prior, got 'log'"]),
    ({"heads": 3}, ["unknown model field 'heads'"]),
]


def refusal(start: Callable[[list[str]], Any], words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command refuses its words."""
    try:
        status = start(words)
    except SystemExit as exit:
        status = exit.code
    message = capsys.readouterr().err
    assert status == 2, message
    assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 600, message
    return message


def holds(message: str, words: list[str]) -> None:
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("flags", "words"), FLAGS, ids=[flags[:40] for flags, _ in FLAGS])
def test_flags(capsys: pytest.CaptureFixture[str], flags: str, words: list[str]) -> None:
    """Catches tracebacks, usage screens, abbreviations and values that are taken for something else."""
    holds(refusal(parse_run, [*OWN, *flags.split(" ")], capsys), words)


@pytest.mark.parametrize(("flags", "words"), BROUGHT, ids=[flags for flags, _ in BROUGHT])
def test_flags_of_other_trainers(capsys: pytest.CaptureFixture[str], flags: str, words: str) -> None:
    """Catches a guess that leads somebody who comes from another trainer to something else."""
    message = refusal(parse_run, [*OWN, *flags.split(" ")], capsys)
    assert "unrecognized arguments" in message and words in message, message


def test_the_launchers_flag_in_both_spellings() -> None:
    """Catches a launcher that hands over --local-rank and is refused."""
    assert parse_run([*OWN, "--local-rank=1"]) == parse_run([*OWN, "--local_rank", "1"]) == parse_run(OWN)


@pytest.mark.parametrize(("flags", "words"), DS_FLAGS, ids=[flags for flags, _ in DS_FLAGS])
def test_flags_of_the_deepspeed_json(flags: str, words: list[str]) -> None:
    """Catches a replaced value that is not checked as the file is, and a message that blames the file."""
    command = parse_run([*OWN, *flags.split(" ")])
    with pytest.raises(ValueError) as error:
        load_ds_config(command.deepspeed_config, command.ds_overrides)
    assert "\n" not in str(error.value)
    holds(str(error.value), words)


def test_a_mistake_of_the_file_is_not_blamed_on_a_flag(tmp_path: Path) -> None:
    """Catches a message that sends to the flag for what stands in the file."""
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 0, "optimizer": {"type": "AdamW", "params": {"lr": 1}}}')
    with pytest.raises(ValueError) as error:
        load_ds_config(file, {"optimizer.params.lr": -1})
    assert str(error.value).splitlines() == [
        f"{file}: train_batch_size is 0; it must be a whole number of at least 1, the global batch",
        f"{file} with --ds.optimizer.params.lr -1: optimizer.params.lr is -1; it must be a number above 0, "
        f"the peak learning rate",
    ]


@pytest.mark.parametrize(("content", "words"), FILES, ids=range(len(FILES)))
def test_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | bytes, words: list[str]
) -> None:
    """Catches keys that are silently ignored or overwritten, and files that end in a traceback."""
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = [*JSON, "--data.shards", "/d/x.tar", "--max_steps", "9", "--config", str(file)]
    message = refusal(parse_run, argv, capsys)
    holds(message, words)
    assert str(file) in message or "preset" in message


@pytest.mark.parametrize(("content", "words"), SAVED, ids=range(len(SAVED)))
def test_run_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, words: list[str]
) -> None:
    """Catches a damaged run folder that is taken for a new run, or for the demo."""
    (tmp_path / "config.yaml").write_text(content)
    message = refusal(parse_run, [*JSON, "--run_dir", str(tmp_path)], capsys)
    holds(message, [str(tmp_path / "config.yaml"), *words])


@pytest.mark.parametrize(("program", "words", "expected"), OTHERS, ids=range(len(OTHERS)))
def test_programs(capsys: pytest.CaptureFixture[str], program: str, words: str, expected: list[str]) -> None:
    """Catches a program that crashes without arguments, completes what was typed, or tells nobody the fix."""
    # train.py's main would take over this process's signals before it parses.
    start = parse_run if program == "train" else importlib.import_module(f"megavit.launch.{program}").main
    holds(refusal(start, words.split(), capsys), expected)


@pytest.mark.parametrize(("fields", "words"), EXPORTS, ids=range(len(EXPORTS)))
def test_exported_configurations(fields: dict[str, Any], words: list[str]) -> None:
    """Catches an export's config.json that fails deep inside the model, or builds another one."""
    good = plain_config(read_recipe(RECIPES / "digits.yaml"))["model"]
    assert model_config(good).dim == 64
    with pytest.raises(ValueError) as error:
        model_config(good | fields)
    holds(str(error.value), words)


def test_too_few_classes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a model that cannot name some of the data's classes: their samples would all count as bad."""
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    argv = [*OWN, "--data.shards", f"{tmp_path}/x.tar", "--model.num_classes", "1"]
    message = refusal(parse_run, argv, capsys)
    holds(message, ["model.num_classes 1", "2 classes", str(tmp_path), "--model.num_classes 2"])
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    holds(refusal(parse_run, argv, capsys), [f"{tmp_path}/classes.txt", "empty"])


def test_a_pattern_that_a_shell_expanded(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a hundred thousand shard names in a message that does not say where they come from."""
    words = [f"data/train-{i:06}.tar" for i in range(1000)]
    message = refusal(parse_run, [*JSON, "--data.shards", *words], capsys)
    assert "a shell has expanded a pattern" in message
