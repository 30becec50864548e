"""The command line: precedence, early refusals, help."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from megavit.cli import PROJECT_ROOT, make_parser, parse_run
from megavit.config import DataConfig, RunConfig, ScheduleConfig, plain_config, run_preset

JSON = ["--deepspeed_config", "ds_configs/zero3.json"]


def parse(*flags: str) -> RunConfig:
    return parse_run([*JSON, *flags])[0]


def test_precedence_is_preset_then_file_then_flags(tmp_path: Path) -> None:
    """Catches a preset that overwrites a flag, or defaults that overwrite a preset."""
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump(
            {"model": {"name": "vit_s16", "depth": 5, "num_heads": 8}, "seed": 7, "data": {"shards": "x"}}
        )
    )
    run = parse("--config", str(file), "--model.depth", "3")
    assert (run.model.name, run.model.dim, run.model.patch_size) == ("vit_s16", 384, 16)
    assert (run.model.depth, run.model.num_heads, run.seed) == (3, 8, 7)
    assert run.schedule == ScheduleConfig() and run.loss == "sigmoid" and run.head_weight_decay == 3.0


def test_a_flag_before_the_file_still_wins(tmp_path: Path) -> None:
    """Catches a user's flag that a later --config silently replaces."""
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 40000\nmodel:\n  name: vit_s16\n")
    run = parse("--max_steps", "10", "--model.name", "vit_ti16", "--data.shards", "x", "--config", str(file))
    assert (run.max_steps, run.model.name, run.model.dim) == (10, "vit_ti16", 192)


@pytest.mark.parametrize(
    "argv", [["--help"], ["--local_rank=0", "--help"], ["--model.name", "vit_22b", "-h"]]
)
def test_help_works_with_whatever_stands_before_it(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    """Catches `deepspeed launch/train.py --help`, where the launcher's flag comes first."""
    with pytest.raises(SystemExit) as exit:
        parse_run(argv)
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert f"defaults shown are those of {'vit_22b' if 'vit_22b' in argv else 'vit_tiny'}" in text


def test_default_is_the_demo() -> None:
    """Catches a default command that does not train the digits."""
    run = parse()
    assert dataclasses.replace(run, data=run_preset("vit_tiny").data) == run_preset("vit_tiny")
    assert run.data.shards.endswith("data/digits/train-*.tar")


def test_vit_22b_preset_is_the_papers_recipe() -> None:
    """Catches a recipe that drifted from the paper's (arXiv 2302.05442, appendix)."""
    run = parse("--model.name", "vit_22b", "--data.shards", "x")
    assert (run.max_steps, run.loss, run.head_weight_decay) == (177_000, "sigmoid", 3.0)
    assert run.schedule == ScheduleConfig("rsqrt", 10_000, 30_000, 10_000)
    assert run.data == DataConfig(shards="x", workers=8) and run.model.head_bias == -10.0


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    """Catches a config.yaml in the run folder that cannot repeat the run."""
    from megavit.train.monitor import plain_config

    run = parse("--model.name", "vit_b16", "--data.shards", "x", "--model.layer_scale", "0.1", "--compile")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain_config(run)))
    assert parse("--config", str(file)) == run


def test_switches_and_the_launchers_flag() -> None:
    """Catches a bare --compile that swallows the next flag, and the launcher's --local_rank refused."""
    run = parse("--compile", "--model.qkv_bias", "--seed", "3", "--local_rank=1", "--data.flip", "true")
    assert (run.compile, run.model.qkv_bias, run.seed, run.data.flip) == (True, True, 3, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--modle.dim", "3"], ["--modle.dim", "--model.dim"]),
        (["--model.name", "vit_22c"], ["vit_22c", "vit_22b"]),
        (["--max_steps", "many"], ["max_steps", "many"]),
        (["--max_steps", "0"], ["max_steps", "0"]),
        (
            ["--model.dim", "70", "--model.num_heads", "7", "--tensor_parallel_size", "2"],
            ["2", "num_heads 7"],
        ),
        (["--loss", "hinge"], ["loss", "hinge"]),
        (["--data.crop_area", "[0.9,0.1]"], ["crop_area", "0.9"]),
        (["--compile", "--recompute", "full", "--tensor_parallel_size", "2"], ["--compile", "--recompute"]),
        (["--schedule.name", "step"], ["step"]),
        (["--model.name", "vit_b16"], ["--data.shards", "required"]),
        (["--model.channels", "4"], ["channels", "4"]),
        (["--recompute", "selective", "--model.block", "sequential"], ["selective", "parallel"]),
    ],
)
def test_mistakes_end_with_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    """Catches tracebacks and usage screens where one sentence helps."""
    with pytest.raises(SystemExit) as exit:
        parse(*flags)
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert all(word in message for word in words), message


def test_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches keys of a configuration file that are silently ignored."""
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  num_head: 3\n")
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert "num_heads" in capsys.readouterr().err


def test_every_flag_is_explained() -> None:
    """Catches a field without a line in its dataclass's docstring."""
    help_text = " ".join(make_parser("vit_22b").format_help().split())
    for action in make_parser("vit_22b")._actions:
        for option in action.option_strings:
            assert option in help_text
        assert action.help, action.option_strings
    assert "default: 177000" in help_text


def test_project_paths_work_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches defaults that only work from the checkout's root, and local files that are passed over."""
    monkeypatch.chdir(tmp_path)
    run, ds_path = parse_run([*JSON, "--config", "launch/recipes/cifar10.yaml"])
    assert ds_path == PROJECT_ROOT / "ds_configs/zero3.json"
    assert (run.model.name, run.model.patch_size, run.max_steps) == ("vit_s16", 4, 40_000)
    (tmp_path / "ds_configs").mkdir()
    assert parse_run(JSON)[1] == Path("ds_configs/zero3.json")


def test_a_pattern_that_a_shell_expanded_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a hundred thousand shard names in an error message that does not say where they come from."""
    words = [f"data/train-{i:06}.tar" for i in range(1000)]
    with pytest.raises(SystemExit):
        parse_run(["--deepspeed_config", "x.json", "--data.shards", *words])
    error = capsys.readouterr().err
    assert "a shell has expanded a pattern" in error and len(error) < 600
    run, _ = parse_run(["--deepspeed_config", "x.json", "--data.shards", "'/d/train-*.tar'"])
    assert run.data.shards == "/d/train-*.tar"


def test_a_run_folder_brings_its_configuration(tmp_path: Path) -> None:
    """Catches a resumed run that falls back to defaults, and one that inherits what belongs to a single
    start."""
    start = ["--deepspeed_config", "x.json", "--run_dir", str(tmp_path)]
    first, _ = parse_run([*start, "--model.name", "vit_s16", "--data.shards", "/d/x.tar", "--max_steps", "7"])
    saved = dataclasses.replace(first, tensor_parallel_size=2, stop_at_step=3, init_from="w")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain_config(saved)))
    again, _ = parse_run(start)
    assert again == first and again.model.dim == 384
    longer, _ = parse_run([*start, "--max_steps", "9"])
    assert longer == dataclasses.replace(first, max_steps=9)
    other, _ = parse_run([*start, "--model.name", "vit_b16", "--data.shards", "/d/x.tar"])
    assert other.model.dim == 768 and other.max_steps == run_preset("vit_b16").max_steps
    (tmp_path / "config.yaml").write_text("max_stepz: 3\n")
    with pytest.raises(SystemExit):
        parse_run(start)
