"""Rates that are measured in place of assumed ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megavit.gpus import gpu_named
from megavit.launch.plan import main
from megavit.model.config import model_preset
from megavit.scale import rates as rates_module
from megavit.scale.cluster import Cluster
from megavit.scale.job import Layout, ZeroSettings
from megavit.scale.rates import RATE_NAMES, Rates, rates_for, read_rates, write_rates
from megavit.scale.roofline import StepTime, predict_step

SMALL = ["--model.name", "vit_s16", "--global_batch", "1024", "--only", "tp=1,stage=3,recompute=none"]


@pytest.mark.parametrize("name", RATE_NAMES)
def test_every_rate_counts(name: str) -> None:
    """Catches a rate that is measured, printed and not used."""
    model = model_preset("vit_b16")
    zeros = (ZeroSettings(3, True), ZeroSettings(3, True, offload_optimizer=True))

    def steps(rates: Rates) -> list[StepTime]:
        cluster = Cluster(gpu_named("h100"), 16, 8, rates=rates)
        layouts = (Layout(2, 64, micro_batch) for micro_batch in (1, 64))  # launches count, and do not
        return [predict_step(model, "none", layout, zero, cluster) for layout in layouts for zero in zeros]

    changed = dataclasses.replace(Rates(), **{name: getattr(Rates(), name) / 100})
    assert steps(changed) != steps(Rates())


def test_the_planner_reads_a_file_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan that says it rests on a card's rates and does not."""

    def matmuls(*flags: str) -> tuple[float, str]:
        assert main([*SMALL, *flags, "--json", "-"]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out)["plans"][0]["step_s"]["matmuls"], printed.err

    before, said = matmuls()
    assert "rates: assumed, from published measurements, none measured on this GPU" in said
    file = tmp_path / "rates_h100.json"
    write_rates(file, "h100", "NVIDIA H100 80GB HBM3", "2030-01-02", {}, {"matmul_share": 0.4})
    after, said = matmuls("--rates", str(file))
    assert after == pytest.approx(2 * before)
    assert (
        f"rates: measured on NVIDIA H100 80GB HBM3, 2030-01-02 ({file}): matmul_share 0.4; assumed:" in said
    )


def test_a_file_that_is_kept_for_the_kind_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches measured rates that need a flag, or that another kind of GPU gets."""
    monkeypatch.setattr(rates_module, "MEASURED", tmp_path)
    write_rates(tmp_path / "h200.json", "h200", "NVIDIA H200", "2030-01-02", {}, {"memory_share": 0.9})
    assert rates_for("h200").memory_share == 0.9 and rates_for("h200").measured == ("memory_share",)
    assert rates_for("h100") == Rates()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", 'has no "rates"'),
        ('{"rates": {}}', 'has no "rates"'),
        ('{"rates": {"matmul_shares": 1}}', "unknown rate 'matmul_shares'; did you mean 'matmul_share'"),
        ('{"rates": {"source": 1}}', "unknown rate 'source'"),
        ('{"rates": {"matmul_share": 0}}', "matmul_share must be a positive number, got 0"),
        ('{"rates": {"matmul_share": true}}', "must be a positive number, got True"),
        ('{"rates": {"matmul_share": NaN}}', "must be a positive number, got nan"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    """Catches a misspelt rate that is ignored, and a step that takes no time or for ever."""
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rates(file)
    with pytest.raises(ValueError, match="--rates .*y.json: No such file"):
        read_rates(tmp_path / "y.json")
