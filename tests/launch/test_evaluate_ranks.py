"""`launch/evaluate.py` on several ranks, and killed while it works."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.exports import write_export
from tests.launch.commands import ROOT, environment, starter
from tests.launch.evaluations import THREE, Evaluation, evaluate, read_recorded, run_main, three_colours
from tests.ranks import run_ranks

TASKS = "head,linear,linear-sgd,knn,fewshot,calibration,selective,ood"
PROGRAM = str(ROOT / "launch" / "evaluate.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("models") / "small", THREE)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_colours(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_colours(tmp_path_factory.mktemp("data") / "outside", 1, 5)


@pytest.fixture(scope="module")
def single(model: Path, colours: Path, outside: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    out = tmp_path_factory.mktemp("single") / "out"
    return evaluate(model, out, *words(colours, outside))


def words(colours: Path, outside: Path, tasks: str = TASKS) -> list[object]:
    return ["--tasks", tasks, "--data", colours, "--ood", outside, "--layers", "pooled,patches"]


def same(found: Evaluation, expected: Evaluation, tasks: str = TASKS) -> None:
    """Whether the results are those which `expected` has for these tasks."""
    names = tasks.split(",")
    values, known = found.values(), {k: v for k, v in expected.values().items() if k[0] in names}
    assert list(values) == list(known) and {name for name, *_ in values} == set(names)
    assert values == pytest.approx(known, abs=1e-5)
    others = [one for one in expected.recorded.results if one.task in names]
    for one, other in zip(found.recorded.results, others, strict=True):
        assert one.count == other.count
        assert one.stderr == (None if other.stderr is None else pytest.approx(other.stderr, abs=1e-5))


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "tp_size"), [(3, 1), (4, 2)])
def test_all_layouts_find_the_same(
    ranks: int, tp_size: int, model: Path, colours: Path, outside: Path, single: Evaluation, tmp_path: Path
) -> None:
    """Catches an image that is counted twice or not at all, a rank without a piece (the 97 test images are
    two, the 5 outside one) that is waited for, and a choice in which ranks differ."""
    # The search of `linear` is long, and does not know whether features come from shards of the model.
    tasks = TASKS if tp_size == 1 else TASKS.replace("linear,", "")
    argv = [str(model), "--out", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    argv += map(str, [*words(colours, outside, tasks), "--tensor_parallel_size", tp_size, "--local_rank=0"])
    codes, outputs, errors = zip(*run_ranks(ranks, run_main, argv), strict=True)
    assert codes == (0,) * ranks, errors
    assert not any(outputs[1:])  # only the main rank speaks
    same(Evaluation(0, outputs[0], errors[0], read_recorded(tmp_path / "out")), single, tasks)
    layouts = {(one.dp_size, one.tp_size) for one in read_recorded(tmp_path / "out").results}
    assert layouts == {(ranks // tp_size, tp_size)}


@pytest.mark.dist
def test_errors_end_all_ranks(model: Path, colours: Path, tmp_path: Path) -> None:
    """Catches a rank that waits for one that has refused, and numbers of ranks that do not fit."""
    argv = [str(model), "--tasks", "head,knn", "--data", str(colours)]
    (tmp_path / "file").write_text("")
    cases = [
        (["--tensor_parallel_size", "2"], "does not divide the 3 ranks"),
        (["--out", str(tmp_path / "file" / "out")], str(tmp_path / "file")),
        (["--layers", "block.9"], "block.9"),
    ]
    for more, expected in cases:
        for code, _, errors in run_ranks(3, run_main, [*argv, "--out", str(tmp_path / "out"), *more]):
            assert code == 1 and expected in errors
    more = ["--out", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "file")]
    assert [code for code, _, _ in run_ranks(3, run_main, [*argv, *more])] == [1, 1, 1]
    assert {one.task for one in read_recorded(tmp_path / "out").failed} == {"head", "knn"}


@pytest.mark.dist
@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_error_of_one_rank_is_everyones(tp_size: int, model: Path, colours: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for ever for one whose piece cannot be written."""
    argv = [str(model), "--tasks", "head,knn", "--data", str(colours), "--out", str(tmp_path / "out")]
    argv += ["--cache_dir", str(tmp_path / "cache"), "--tensor_parallel_size", str(tp_size)]
    found = run_ranks(2 * tp_size, main_that_cannot_write, argv)
    assert [code for code, _, _ in found] == [1] * (2 * tp_size), found
    (head, knn) = read_recorded(tmp_path / "out").failed
    assert head.task == "head" and knn.task == "knn"
    assert "00000001.safetensors cannot be written" in head.error and "--cache_dir" in head.error


def main_that_cannot_write(argv: list[str]) -> tuple[int, str, str]:
    """In a rank: there is a folder in the place of every second piece."""
    import megavit.evaluate.cache as cache

    write = cache.os.replace

    def refuse(source: Path, target: Path) -> None:
        if target.name == "00000001.safetensors":
            raise OSError(28, "No space left on device")
        write(source, target)

    cache.os.replace = refuse
    try:
        return run_main(argv)
    finally:
        cache.os.replace = write


@pytest.mark.dist
@pytest.mark.slow
def test_with_the_launcher(
    model: Path, colours: Path, outside: Path, single: Evaluation, tmp_path: Path
) -> None:
    """Catches a launcher's own words that are taken for the model, and shards of it whose results differ."""
    more = ["--out", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--tensor_parallel_size", 2]
    tasks = "head,knn,ood"  # what the others find is seen without the launcher
    done = subprocess.run(
        [*starter(2), PROGRAM, str(model), *map(str, [*words(colours, outside, tasks), *more])],
        cwd=tmp_path,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    same(Evaluation(0, done.stdout, "", read_recorded(tmp_path / "out")), single, tasks)


def pieces(cache: Path) -> dict[str, int]:
    """Those that are whole, with the time at which each was written."""
    return {str(path): path.stat().st_mtime_ns for path in cache.glob("*/*/*.safetensors")}


@pytest.mark.dist
@pytest.mark.slow
def test_killed_in_the_middle_of_the_pass(model: Path, tmp_path: Path) -> None:
    """Catches a pass that begins again, numbers that differ for it, and a file that was half written."""
    data = three_colours(tmp_path / "many", 3000, 100, side=48)
    more = ["--tasks", "knn,fewshot", "--data", data, "--batch_size", 4, "--workers", 0]
    cache = tmp_path / "cache"
    command = [sys.executable, PROGRAM, str(model), "--out", str(tmp_path / "out"), "--cache_dir", str(cache)]
    process = subprocess.Popen(
        [*command, *map(str, more)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(pieces(cache)) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    before = pieces(cache)
    assert 5 <= len(before) < 47
    assert not read_recorded(tmp_path / "out").results
    found = evaluate(model, tmp_path / "out", *more)
    assert found.code == 0, found.output
    after = pieces(cache)
    assert len(after) == 47 + 2
    assert {name: after[name] for name in before} == before
    rest = 3000 - 64 * len(before)
    assert f"features of {rest:,} images of the 3,000 (the others are there)" in found.output
    (tmp_path / "whole").mkdir()
    whole = evaluate(model, tmp_path / "whole" / "out", *more)
    assert found.values() == whole.values()
