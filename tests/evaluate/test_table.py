"""The table of several models, its CSV, and the command that prints it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavit.evaluate.results import Count, Failed, Result, Skipped
from megavit.evaluate.results_file import Recorded, ResultsFile
from megavit.evaluate.table import Table, is_share, table, table_command
from megavit.evaluate.tensorboard import scalars, write_scalars
from tests.evaluate.made import made, measured

OTHER = {"model": "timm:vit_tiny", "checkpoint_digest": "b" * 32, "transform": "resize 224"}


def tables_of(markdown: str) -> list[list[list[str]]]:
    """The cells of every table, row by row, without the rules."""
    blocks = [block for block in markdown.split("\n\n") if block.startswith("|")]
    rows = [[[c.strip() for c in line.strip("|").split(" | ")] for line in b.splitlines()] for b in blocks]
    return [[row for i, row in enumerate(block) if i != 1] for block in rows]


def of(*results: Result, skipped: Sequence[Skipped] = (), failed: Sequence[Failed] = ()) -> Table:
    return table([Recorded(results, tuple(skipped), tuple(failed))])


def test_models_stand_side_by_side() -> None:
    """Catches numbers in another model's column, and settings of two models that keep them out of one row."""
    ours = [made(measured(value=0.9 + k / 1000, settings={"k": k, "norm": "l2"}), "knn") for k in (10, 20)]
    theirs = [
        made(measured(value=0.95 - k / 1000, settings={"k": k, "norm": "none"}), "knn", **OTHER)
        for k in (20, 200)
    ]
    found = table([Recorded(tuple(ours)), Recorded(tuple(theirs))])
    (lines,) = tables_of(found.markdown())
    assert lines[0] == ["task", "data", "metric", "settings", "n", "runs/digits", "timm:vit_tiny"]
    assert [line[3:] for line in lines[1:]] == [
        ["k 10", "360", "91.00 ± 1.15", ""],
        ["k 20", "360", "92.00 ± 1.15", "**93.00 ± 1.15**"],
        ["k 200", "360", "", "75.00 ± 1.15"],
    ]


def test_the_best_is_bold_whichever_way_is_up() -> None:
    """Catches a higher calibration error shown as the better one."""
    lower = {"metric": "ece", "higher_is_better": False, "stderr": None}
    found = of(
        made(measured(value=0.031234, **lower), "calibration"),
        made(measured(value=0.02, **lower), "calibration", **OTHER),
        made(measured(value=float("nan")), "linear"),
        made(measured(value=0.5), "linear", **OTHER),
    )
    (lines,) = tables_of(found.markdown())
    assert lines[1][2:] == ["ece ↓", "", "360", "0.0312", "**0.0200**"]
    assert lines[2][2:] == ["top1, %", "", "360", "nan ± 1.15", "50.00 ± 1.15"]


def test_one_name_for_two_models() -> None:
    """Catches the results of two trainings in folders of one name that are taken for one model's."""
    found = of(made(measured(value=0.1)), made(measured(value=0.2), checkpoint_digest="b" * 32))
    assert found.models == ("runs/digits [aaaaaaaa]", "runs/digits [bbbbbbbb]")


def test_trials_are_marked_and_never_the_best() -> None:
    """Catches a number of 100 images that is read, or printed bold, as the set's; and one that hides it."""
    found = of(
        made(measured(value=0.5), date="2026-01-01T00:00:00+00:00"),
        made(measured(value=0.8), limit=100, date="2026-02-01T00:00:00+00:00"),
        made(measured(value=0.9), limit=50, **OTHER),
    )
    text = found.markdown()
    (lines,) = tables_of(text)
    assert lines[1][5:] == ["50.00 ± 1.15", "90.00 ± 1.15 †"]
    assert "- † a trial, of at most 50 images a set (`--limit`)" in text and "Bold" not in text


def test_the_newest_of_a_kind_is_shown() -> None:
    """Catches an old file that wins because it was given last."""
    new = made(measured(value=0.5), date="2026-02-01T00:00:00+00:00")
    old = made(measured(value=0.8), date="2026-01-01T00:00:00+00:00")
    (lines,) = tables_of(table([Recorded((new,)), Recorded((old,))]).markdown())
    assert lines[1][5:] == ["50.00 ± 1.15"]


def test_what_was_found_does_not_make_a_row() -> None:
    """Catches a trial, or another run, in a row of its own because its L2 was another; and two results of one
    run that differ in nothing else, of which one is dropped."""
    one = made(measured(value=0.5, settings={"l2": 1.0, "images": 90}), date="2026-02-01T00:00:00+00:00")
    trial = made(measured(value=0.6, settings={"l2": 0.1, "images": 9}), limit=10, seconds=1.0)
    again = made(measured(value=0.7, settings={"l2": 0.1, "images": 90}), seconds=2.0)
    (lines,) = tables_of(of(one, trial, again).markdown())
    assert [line[3:] for line in lines[1:]] == [["", "360", "70.00 ± 1.15"]]
    both = [made(measured(value=v, settings={"temperature": v})) for v in (0.5, 0.75)]
    (lines,) = tables_of(of(*both).markdown())
    assert [line[3] for line in lines[1:]] == ["temperature 0.5", "temperature 0.75"]


def test_a_caveat_is_printed_once() -> None:
    """Catches numbers of groups of people without what must be said beside them."""
    caveat = {"caveat": "only to verify\na technical claim"}
    found = of(
        *(made(measured(name, settings=caveat), "celeba") for name in ("accuracy_gap", "accuracy_ratio"))
    )
    assert found.markdown().count("\n- only to verify a technical claim\n") == 1


def test_images_and_what_was_left_out() -> None:
    """Catches a count of the images given in the place of those used, and reasons that break the list."""
    found = of(
        made(measured(count=Count(50_000, 46_836, 1))),
        made(measured(count=Count(50_000, 46_837, 0)), **OTHER),
        skipped=[
            Skipped("imagenet-c", "not at /data\nget it there"),
            Skipped("ood", "no svhn", "svhn", "runs/digits"),
        ],
        failed=[Failed("ood", "out of memory", "svhn", name) for name in ("runs/digits", "timm:vit_tiny")],
    )
    text = found.markdown()
    assert tables_of(text)[0][1][4] == "46,836 (1 bad) / 46,837"
    assert "\n- skipped: imagenet-c: not at /data get it there\n" in text
    assert "\n- skipped: ood on svhn of runs/digits: no svhn\n" in text
    assert text.endswith("\n- failed: ood on svhn: out of memory\n"), "of all models: named once"


def test_the_columns_are_aligned() -> None:
    """Catches a table that can only be read once it is rendered, and names that break it."""
    found = of(made(measured()), made(measured("ece", 0.1, None), model="a|b", checkpoint_digest="c"))
    lines = [line for line in found.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "a\\|b" in lines[0] and all(line.replace("\\|", "").count("|") == 8 for line in lines)
    assert lines[1].split("|")[5].strip().endswith("-:")


def test_the_csv_has_the_values_as_they_are() -> None:
    """Catches rounded or bold numbers where somebody goes on calculating."""
    name = 'runs/a,"b"'
    found = of(
        made(measured(value=1 / 3, count=Count(10, 9, 1)), model=name, data="imagenet"),
        made(measured(value=0.5, stderr=None), limit=5, data="imagenet", **OTHER),
        made(measured("ece", 0.25, higher_is_better=False), "calibration", model=name),
    )
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert len(rows) == 2
    assert float(rows[0][name]) == 1 / 3 and rows[0][f"{name} stderr"] == "0.0115"
    assert (rows[0][f"{name} n"], rows[0][f"{name} bad"], rows[0][f"{name} limit"]) == ("9", "1", "")
    assert (rows[0]["timm:vit_tiny"], rows[0]["timm:vit_tiny limit"]) == ("0.5", "5")
    assert (rows[0]["ViT-22B, linear probe"], rows[0]["ViT-22B, linear probe mark"]) == (
        "0.895",
        "second-hand",
    )
    assert (rows[1]["timm:vit_tiny"], rows[1]["ViT-22B, linear probe"]) == ("", "")
    assert rows[1]["higher_is_better"] == "False" and rows[1]["metric"] == "ece"


@pytest.mark.parametrize(
    "metric", ["top1", "top5", "precision_at_1", "mce", "relative_mce", "accuracy_at_90", "fpr95_msp"]
)
def test_shares_are_in_percent(metric: str) -> None:
    """Catches accuracy as 0.95 in one row and 95.00 in the next."""
    assert is_share(metric)


@pytest.mark.parametrize(
    "metric", ["ece", "nll", "auroc_msp", "aupr_msp", "error_consistency", "positive_rate_ratio"]
)
def test_others_are_not(metric: str) -> None:
    """Catches a kappa or a ratio with a percent sign."""
    assert not is_share(metric)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches files that are promised and not written, or a table that differs from the printed one."""
    ResultsFile(tmp_path / "ours").add(made(measured(settings={"layer": 3})))
    ResultsFile(tmp_path / "theirs").add(made(measured(value=0.5, settings={"layer": 3}), **OTHER))
    out = tmp_path / "out"
    assert table_command([tmp_path / "ours", tmp_path / "theirs" / "results.json"], out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((out / "table.md").read_text())
    assert len(list(csv.reader((out / "table.csv").open()))) == 2
    for path in out.iterdir():
        assert str(path) in printed
    assert table_command([tmp_path / "ours"]) == 0
    assert "wrote" not in capsys.readouterr().out


def test_the_command_names_what_is_no_results_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback for a wrong path, or half a table."""
    good, bad, file = tmp_path / "good", tmp_path / "log.jsonl", tmp_path / "file"
    ResultsFile(good).add(made(measured()))
    bad.write_text('{"step": 1}\n')
    file.touch()
    for paths, out, message in (
        ([good, bad], None, f'error: {bad} is no results file: it lacks "format"; give the results.json'),
        ([tmp_path / "no"], None, "no: there is no such file; give the results.json"),
        ([], None, "error: no results files; give those"),
        ([good], file, f"error: --out {file} is a file; name a folder"),
    ):
        assert table_command(paths, out) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and message in printed.err


def test_an_empty_file_has_an_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a crash when every task was skipped."""
    ResultsFile(tmp_path).add(Skipped("imagenet", "no data"))
    assert table_command([tmp_path], tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("No results.\n\n- skipped: imagenet: no data\n")


def test_scalars_have_tags_of_their_own(tmp_path: Path) -> None:
    """Catches several values under one tag, of which TensorBoard shows a zigzag, and NaN."""
    results = [
        made(measured(value=0.1)),
        *(made(measured(value=k / 100, settings={"k": k}), "knn") for k in (10, 20)),
        *(made(measured("auroc_msp", 0.5, data=data), "ood") for data in ("svhn", "cifar 10")),
        made(measured("ece", float("nan")), "calibration"),
    ]
    found = scalars(results)
    assert found == {
        "evaluate/linear/top1": 0.1,
        "evaluate/knn/top1/k_10": 0.1,
        "evaluate/knn/top1/k_20": 0.2,
        "evaluate/ood/auroc_msp/svhn": 0.5,
        "evaluate/ood/auroc_msp/cifar_10": 0.5,
    }
    write_scalars(results, tmp_path, step=7)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == set(found)
    (event,) = board.Scalars("evaluate/knn/top1/k_20")
    assert event.step == 7 and event.value == pytest.approx(0.2)
