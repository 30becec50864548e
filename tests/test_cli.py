"""The command line: precedence, recipes, run folders, the number of classes, help."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megavit.cli import PROJECT_ROOT, Command, make_parser, parse_run
from megavit.coming_from import COMING_FROM, as_markdown
from megavit.data.class_names import class_names_beside, write_class_names
from megavit.data.config import DataConfig
from megavit.model.config import ModelConfig, model_preset
from megavit.recipe import RECIPES, read_fields, read_recipe
from megavit.train.config import (
    RunConfig,
    ScheduleConfig,
    plain_config,
    steps_of_epochs,
    with_max_steps,
)
from megavit.train.ds_config import load_ds_config
from megavit.train.ds_keys import KEYS

JSON = ["--deepspeed_config", "ds_configs/zero3.json"]
OWN = ["--model.name", "vit_s16", "--data.shards", "/d/x.tar", "--max_steps", "100"]


def command(*flags: str) -> Command:
    return parse_run([*JSON, *flags])


def parse(*flags: str) -> RunConfig:
    return command(*flags).run


def test_files_win_over_the_preset_and_flags_over_files(tmp_path: Path) -> None:
    """Catches a preset that overwrites a field that is given, and a later file that loses."""
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(
        "model: {name: vit_s16, depth: 5, num_heads: 8}\nseed: 7\ndata: {shards: x}\nmax_steps: 9\n"
    )
    two.write_text("model: {num_heads: 4}\nlog_every: 3\n")
    run = parse("--config", str(one), "--model.depth", "3", f"--config={two}")
    assert (run.model.name, run.model.dim, run.model.patch_size) == ("vit_s16", 384, 16)
    assert (run.model.depth, run.model.num_heads, run.seed, run.log_every) == (3, 4, 7, 3)


def test_a_flag_before_the_file_still_wins(tmp_path: Path) -> None:
    """Catches a user's flag that a later --config silently replaces."""
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 40000\nmodel:\n  name: vit_s16\n")
    run = parse("--max_steps", "10", "--model.name", "vit_ti16", "--data.shards", "x", "--config", str(file))
    assert (run.max_steps, run.model.name, run.model.dim) == (10, "vit_ti16", 192)


def test_the_last_of_repeated_flags_wins() -> None:
    """Catches a batch script whose own flags cannot be overruled by those that are appended."""
    assert parse(*OWN, "--seed", "1", "--seed=2").seed == 2


def test_an_architecture_brings_no_recipe() -> None:
    """Catches an ImageNet run that gets JFT's schedule, loss and head decay, and shards of one's own that are
    evaluated on the digits, because of the model's name."""
    for name in ("vit_tiny", "vit_b16", "vit_22b"):
        run = parse("--model.name", name, "--data.shards", "/d/x.tar", "--max_steps", "100")
        assert run == RunConfig(max_steps=100, model=model_preset(name), data=DataConfig(shards="/d/x.tar"))
    assert run.schedule.name == "cosine" and run.schedule.cooldown_steps == 0
    assert run.task.head_weight_decay is None and run.data.val_shards == ""


def test_the_command_that_names_nothing_is_the_demo() -> None:
    """Catches a default command that does not train the digits as it always has."""
    run = parse()
    data = dataclasses.replace(
        run.data, shards="data/digits/train-*.tar", val_shards="data/digits/test-*.tar"
    )
    assert run.data.shards.endswith("data/digits/train-*.tar")
    assert dataclasses.replace(run, data=data) == read_recipe(RECIPES / "digits.yaml")
    assert run == parse("--config", "launch/recipes/digits.yaml")
    assert (run.task.loss, run.task.head_weight_decay, run.max_steps) == ("sigmoid", 0.05, 750)
    assert run.schedule == ScheduleConfig("cosine", 75, 0) and run.model == model_preset("vit_tiny")
    assert parse("--seed", "3", "--run_dir", "no_such_folder").model.name == "vit_tiny"


def test_a_recipe_with_another_architecture() -> None:
    """Catches a recipe that is lost with the architecture it names, and explicit fields that are lost with
    it."""
    small = parse("--config", "launch/recipes/imagenet1k_vit_s16.yaml", "--data.shards", "x")
    base = parse(
        "--config", "launch/recipes/imagenet1k_vit_s16.yaml", "--data.shards", "x", "--model.name", "vit_b16"
    )
    assert base.model.dim == 768 and base.model.block == "sequential" and base.model.pool == "mean"
    assert dataclasses.replace(base, model=small.model) == small


def test_vit_22b_recipe_is_the_papers() -> None:
    """Catches a recipe that drifted from the paper's (arXiv 2302.05442, appendix)."""
    run = parse("--config", "launch/recipes/vit_22b_jft.yaml", "--data.shards", "x")
    assert (run.max_steps, run.task.loss, run.task.head_weight_decay) == (177_000, "sigmoid", 3.0)
    assert run.schedule == ScheduleConfig("rsqrt", 10_000, 30_000, 10_000)
    assert run.data == DataConfig(shards="x", workers=8) and run.model == model_preset("vit_22b")
    assert (run.recompute, run.log_every) == ("selective", 10) and run.model.head_bias == -10.0


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_used(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a recipe whose own command is refused or trains something else, and a typing mistake in one."""
    monkeypatch.chdir(PROJECT_ROOT)
    comment = [line[1:].strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(comment).replace("\\\n", " ")
    (words,) = [
        shlex.split(line) for line in text.splitlines() if "launch/train.py --deepspeed_config" in line
    ]
    found = parse_run(words[words.index("launch/train.py") + 1 :])
    assert Path(found.deepspeed_config).is_file()
    expected = read_recipe(recipe)
    assert dataclasses.replace(found.run, data=expected.data) == expected


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    """Catches a config.yaml in the run folder that cannot repeat the run."""
    run = parse(*OWN, "--model.layer_scale", "0.1", "--compile", "--data.crop_area", "[0.4,1]")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain_config(run)))
    assert parse("--config", str(file)) == run


def test_spellings_of_flags() -> None:
    """Catches a spelling that scripts use and that is no longer taken: switches with and without a value,
    dotted and renamed flags, numbers, lists, none, and the launcher's flag."""
    run = parse(
        *OWN,
        *("--compile", "--model.qkv_bias", "--seed", "3", "--local_rank=1", "--data.flip", "false"),
        *("--model.qk_norm=false", "--data.antialias=true", "--checkpoint.async", "false"),
        *("--data.crop_area", "[0.4, 1.0]", "--model.head_bias", "-10", "--model.layer_scale", "1e-5"),
        *("--data.max_bad_fraction=1e-3", "--data.skip_steps", "10:20", "--head_weight_decay", "none"),
    )
    assert (run.compile, run.model.qkv_bias, run.seed, run.data.flip) == (True, True, 3, False)
    assert (run.model.qk_norm, run.data.antialias, run.checkpoint.async_save) == (False, True, False)
    assert (run.data.crop_area, run.model.head_bias, run.model.layer_scale) == ((0.4, 1.0), -10.0, 1e-5)
    assert (run.data.max_bad_fraction, run.data.skips) == (1e-3, ((10, 20),))
    assert run.task.head_weight_decay is None
    assert (
        parse(*OWN, "--checkpoint.async_save=false", "--model.layer_scale", "null").model.layer_scale is None
    )
    assert parse(*OWN, "--run_dir", "2026-01-01", "--seed", "010").seed == 10


def test_spellings_in_files(tmp_path: Path) -> None:
    """Catches YAML 1.1's surprises (1e-3 as text, 10:20 as minutes, 010 as 8, a date) and what files may
    hold: dotted keys, empty groups, a byte order mark, aliases, yes and no."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "\ufeffmodel.name: vit_s16\nmodel:\n  layer_scale: none\n  head_bias: log_prior\n"
        "schedule:  # nothing\n"
        "data: {max_bad_fraction: 1e-3, skip_steps: 10:20, crop_area: &a [0.4, 1], flip: no, cache_gb: 5}\n"
        "run_dir: 2026-01-01\nseed: 010\ncheckpoint.async: false\nmax_steps: 1_000\nhead_weight_decay: null\n"
    )
    assert read_fields(file) == {
        "model.name": "vit_s16",
        "model.layer_scale": None,
        "model.head_bias": "log_prior",
        "data.max_bad_fraction": 1e-3,
        "data.skip_steps": "10:20",
        "data.crop_area": (0.4, 1.0),
        "data.flip": False,
        "data.cache_gb": 5.0,
        "run_dir": "2026-01-01",
        "seed": 10,
        "checkpoint.async_save": False,
        "max_steps": 1000,
        "task.head_weight_decay": None,
    }


def test_values_take_their_annotated_type() -> None:
    """Catches a run whose config.yaml or config.json differs by how a number was written."""
    import numpy as np

    config = ModelConfig(dim=np.int64(64), num_heads=4, dropout=0, head_bias=-10)  # type: ignore[arg-type]
    assert [type(value) for value in (config.dim, config.dropout, config.head_bias)] == [int, float, float]
    assert DataConfig(crop_area=[1, 1]).crop_area == (1.0, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("argv", [["--help"], ["--local_rank=0", "--help"], [*OWN, "-h"]])
def test_help_works_with_whatever_stands_before_it(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    """Catches `deepspeed launch/train.py --help`, where the launcher's flag comes first."""
    with pytest.raises(SystemExit) as exit:
        parse_run(argv)
    assert exit.value.code == 0 and "launch/recipes" in capsys.readouterr().out


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parse_run(["--help", *words])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_help_is_one_screen_and_says_where_the_rest_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches 400 lines in answer to the first question, and flags that are shown nowhere."""
    short, full = help_of(capsys), help_of(capsys, "all")
    assert short.count("\n") < 45 and "example:\n  deepspeed launch/train.py" in short
    for words in ("--data.shards", "--ds.KEY", "--epochs", "--help all", "--help coming-from"):
        assert words in short
    assert "--guard.rollback" not in short and "--guard.rollback" in full
    assert "--ds.optimizer.params.lr 3e-4" in help_of(capsys, "coming-from")
    with pytest.raises(SystemExit) as exit:
        parse_run(["--help", "me"])
    assert exit.value.code == 2 and "all, coming-from or nothing, got 'me'" in capsys.readouterr().err
    parser = make_parser("prog", "What it does.", common=("run_dir",))
    assert "--run_dir" in parser.format_short_help() and "--max_steps" not in parser.format_short_help()


def test_the_table_of_other_peoples_names_is_true_and_in_the_readme() -> None:
    """Catches a row that sends to a flag or a key of the DeepSpeed JSON that does not exist, a name that is
    one of our own flags with another meaning, and a README that has another table."""
    assert as_markdown() in (PROJECT_ROOT / "launch" / "README.md").read_text()
    known = set(make_parser("prog", "text")._flags())
    keys = {f"--ds.{path}" for path in KEYS.paths()}
    for names, sentence in COMING_FROM.items():
        for flag in re.findall(r"--[\w.]+", sentence):
            assert flag.rstrip(".") in known | keys or flag == "--num_gpus", flag
        for name in names:
            assert f"--{name}" not in known or f"--{name} " in sentence, name


def test_every_flag_is_explained() -> None:
    """Catches a field without a line in its dataclass's docstring, and a default that is not the field's."""
    parser = make_parser("prog", "text")
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        for option in action.option_strings:
            assert option in text
        assert action.help, action.option_strings
    assert "--data.crop_area VALUE" in text and "(default: [0.05, 1.0])" in text
    assert "--data.flip [true|false]" in text and "--loss {sigmoid,softmax}" in text
    assert "(no default)" in text and "(default: the preset's)" in text


def test_flags_replace_values_of_the_deepspeed_json(tmp_path: Path) -> None:
    """Catches a sweep over the learning rate that needs a file for each of its values: flags in both
    spellings, values as JSON has them, new objects, and the order of files and flags."""
    file = tmp_path / "run.yaml"
    file.write_text("ds:\n  optimizer: {params: {lr: 1e-2, eps: 1e-6}}\n  gradient_clipping: 2.0\n")
    found = command(
        *(*OWN, "--ds.optimizer.params.lr", "3e-4", "--ds.train_batch_size=512", "--config", str(file)),
        *("--ds.optimizer.params.betas", "[0.9, 0.95]", "--ds.bf16.enabled", "false", "--seed", "3"),
        *("--ds.zero_optimization.offload_optimizer.device", "cpu"),
    )
    assert found.run == parse(*OWN, "--seed", "3")
    config = load_ds_config(found.deepspeed_config, found.ds_overrides)
    plain = load_ds_config(found.deepspeed_config)
    assert config["optimizer"]["params"] == plain["optimizer"]["params"] | {
        "lr": 3e-4,
        "eps": 1e-6,
        "betas": [0.9, 0.95],
    }
    assert (config["train_batch_size"], config["gradient_clipping"]) == (512, 2.0)
    assert config["bf16"] == {"enabled": False}
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert plain == load_ds_config(found.deepspeed_config) and plain["train_batch_size"] == 256
    assert command(*OWN).ds_overrides == {}


def test_a_run_folder_keeps_the_values_that_replace_those_of_the_json(tmp_path: Path) -> None:
    """Catches a resumed run of a sweep that falls back to the JSON's learning rate, without a word."""
    start = ["--run_dir", str(tmp_path)]
    saved = plain_config(parse(*start, *OWN)) | {"ds": {"optimizer.params.lr": 3e-4, "train_batch_size": 64}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    again = command(*start, "--ds.train_batch_size", "128")
    assert again.ds_overrides == {"optimizer.params.lr": 3e-4, "train_batch_size": 128}
    assert again.notes == (f"note: --ds.optimizer.params.lr 0.0003, as in {tmp_path}/config.yaml",)


def test_the_length_of_a_run_in_epochs(tmp_path: Path) -> None:
    """Catches a recipe's number of steps that wins over the flag, a rounding error that adds a step, and an
    unfinished last epoch."""
    recipe = ["--config", "launch/recipes/cifar10.yaml"]
    run = parse(*recipe, "--epochs", "2.5")
    assert (run.epochs, run.max_steps) == (2.5, 0)
    assert with_max_steps(run, 50_000, 256).max_steps == 489  # 488.3
    assert with_max_steps(run, 50_000, 256) == parse(*recipe, "--max_steps", "489")
    assert with_max_steps(parse(*recipe), 50_000, 256) == parse(*recipe)
    assert [steps_of_epochs(epochs, 1000, 100) for epochs in (1.1, 0.3, 1.11, 1e-9)] == [11, 3, 12, 1]
    with pytest.raises(ValueError, match="stop_at_step 500 is beyond max_steps 489"):
        with_max_steps(parse(*recipe, "--epochs", "2.5", "--stop_at_step", "500"), 50_000, 256)
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\n")
    assert parse(*recipe, "--config", str(file)).epochs == 3
    assert parse(*recipe, "--config", str(file), "--max_steps", "7").epochs == 0
    start = ["--run_dir", str(tmp_path)]
    resolved = plain_config(parse(*recipe, "--max_steps", "489"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved))
    assert parse(*start).max_steps == 489
    assert (parse(*start, "--epochs", "3").epochs, parse(*start, "--epochs", "3").max_steps) == (3.0, 0)


def test_project_paths_work_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches defaults that only work from the checkout's root, and local files that are passed over."""
    monkeypatch.chdir(tmp_path)
    found = command("--config", "launch/recipes/cifar10.yaml")
    assert found.deepspeed_config == str(PROJECT_ROOT / "ds_configs/zero3.json")
    assert (found.run.model.name, found.run.model.patch_size, found.run.max_steps) == ("vit_s16", 4, 40_000)
    (tmp_path / "ds_configs").mkdir()
    assert command().deepspeed_config == "ds_configs/zero3.json"


def test_quotes_for_a_remote_shell_are_taken_off() -> None:
    """Catches a pattern that pdsh's second shell would have expanded, and that is no file with its quotes."""
    assert parse(*OWN, "--data.shards", "'/d/train-*.tar'").data.shards == "/d/train-*.tar"


def test_a_run_folder_brings_its_configuration(tmp_path: Path) -> None:
    """Catches a resumed run that falls back to the defaults, to the demo or to one TP rank, and one that
    inherits what belongs to a single start."""
    start = ["--run_dir", str(tmp_path)]
    first = parse(*start, *OWN, "--head_weight_decay", "3", "--model.pool", "mean")
    saved = dataclasses.replace(first, tensor_parallel_size=2, stop_at_step=3, init_from="w")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain_config(saved)))
    again = parse(*start)
    assert again == dataclasses.replace(first, tensor_parallel_size=2)
    assert parse(*start, "--max_steps", "9") == dataclasses.replace(again, max_steps=9)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 8\nlog_every: 2\n")
    assert parse(*start, "--config", str(recipe)) == dataclasses.replace(again, max_steps=8, log_every=2)
    other = parse(*start, "--model.name", "vit_b16")
    assert other == dataclasses.replace(again, model=model_preset("vit_b16"))


def test_a_run_folder_that_a_file_names_counts_too(tmp_path: Path) -> None:
    """Catches a run that starts from its recipe again because --run_dir is in the file."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain_config(parse(*OWN, "--seed", "5"))))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run_dir: {tmp_path}\n")
    assert parse("--config", str(recipe)).seed == 5


def test_the_model_has_as_many_classes_as_the_data(tmp_path: Path) -> None:
    """Catches a model of 1,000 classes that is trained on 5 without a word, and names that are not found
    beside a manifest."""
    write_class_names(tmp_path, ["cat", "dog", "great white shark", "Eskimohund", "ñandú"])
    assert class_names_beside(f"{tmp_path}/x.manifest.json")[3:] == ["Eskimohund", "ñandú"]
    assert class_names_beside("s3://bucket/x-{000..009}.tar") == class_names_beside("") == []
    for shards in (
        f"{tmp_path}/train-{{000..004}}.tar",
        f"{tmp_path}/train-*.tar",
        f"{tmp_path}/t.manifest.json",
    ):
        found = command("--model.name", "vit_22b", "--data.shards", shards, "--max_steps", "9")
        assert found.run.model.num_classes == 5 and found.run.model.head_bias == -10.0
        assert found.notes == (
            f"note: model.num_classes is 5: there are 5 classes in {tmp_path}/classes.txt",
        )
    more = command(*OWN, "--data.shards", f"{tmp_path}/x.tar", "--model.num_classes", "9")
    assert more.run.model.num_classes == 9 and "is 9, but there are only 5 classes" in more.notes[0]
    assert command(*OWN, "--data.shards", f"{tmp_path}/x.tar", "--model.num_classes", "5").notes == ()
    assert command(*OWN).run.model.num_classes == 1000 and command(*OWN).notes == ()


def test_the_classes_are_named_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches names that lose against those beside the shards, or that do not fit the model, and a list that
    a run that goes on asks for again."""
    write_class_names(tmp_path, ["cat", "dog"])
    names = tmp_path / "mine.txt"
    names.write_text("a\nb\nc\n")
    words = [*OWN, "--data.shards", f"{tmp_path}/x.tar", "--data.class_names", str(names)]
    found = command(*words)
    assert found.run.model.num_classes == 3 and found.run.data.class_names == str(names)
    assert found.notes == (f"note: model.num_classes is 3: there are 3 classes in {names}",)
    for number, said in ((2, "too small: there are 3 classes"), (4, "name every class")):
        with pytest.raises(SystemExit):
            command(*words, "--model.num_classes", str(number))
        assert said in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain_config(found.run)))
    again = command("--deepspeed_config", "ds_configs/zero3.json", "--run_dir", str(tmp_path))
    assert again.run.data.class_names == "" and again.run.model.num_classes == 3
    with pytest.raises(SystemExit):
        command(*OWN, "--data.class_names", "none.txt")
    assert "none.txt cannot be read: No such file" in capsys.readouterr().err


def test_a_recipes_validation_shards_with_other_training_shards_are_said() -> None:
    """Catches a run on shards of one's own that is evaluated on the recipe's, without a word."""
    recipe = ["--config", "launch/recipes/cifar10.yaml"]
    (note,) = command(*recipe, "--data.shards", "/d/x.tar").notes
    assert "data/cifar10/test-*.tar" in note and "launch/recipes/cifar10.yaml names" in note
    assert command(*recipe, "--data.shards", "/d/x.tar", "--data.val_shards=").notes == ()
    assert command(*recipe).notes == ()
