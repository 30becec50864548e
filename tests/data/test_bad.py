"""The account of bad samples and its limits."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from megavit.data.bad import BadSample, BadSamples, SampleError, TooManyBadSamples
from megavit.train.logging.log_file import LogFile
from tests.disks import fill, small_disk

MANY = 10**9


def bad(count: int, url: str = "a.tar", whole_shard: bool = False) -> list[BadSample]:
    return [BadSample(url, f"k{i}", "it is broken", whole_shard) for i in range(count)]


def test_every_bad_sample_is_recorded(tmp_path: Path) -> None:
    """Catches records without the step, or only the first of a batch."""
    account = BadSamples(0.5, 8, MANY, LogFile(tmp_path / "bad.jsonl", print).write)
    account.add(1, 100, [])
    assert not (tmp_path / "bad.jsonl").exists()
    account.add(3, 100, bad(2))
    account.add(4, 100, [])
    account.add(5, 100, bad(1, "b.tar"))
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(row["step"], row["url"], row["key"], row["reason"]) for row in rows] == [
        (3, "a.tar", "k0", "it is broken"),
        (3, "a.tar", "k1", "it is broken"),
        (5, "b.tar", "k0", "it is broken"),
    ]
    assert account.total == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_costs_records_and_not_the_run(tmp_path: Path) -> None:
    """Catches a run that ends because it cannot write a bad sample down, and one that says nothing of it."""
    said: list[str] = []
    with small_disk(tmp_path / "run", "64k"):
        file = tmp_path / "run" / "bad.jsonl"
        account = BadSamples(1.0, 8, MANY, LogFile(file, said.append).write)
        account.add(1, 100, bad(1))
        filler = tmp_path / "run" / "filler"
        with open(filler, "wb", buffering=0) as disk:
            fill(disk)
        account.add(2, 100, bad(99, "b.tar"))  # some fit into what the file's last page has left
        account.add(3, 100, bad(99, "c.tar"))
        assert account.total == 199
        assert len(said) == 1 and "bad.jsonl cannot be written, its lines are left out" in said[0]
        filler.unlink()
        account.add(4, 100, bad(1, "d.tar"))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["url"] for row in rows][:: len(rows) - 1] == ["a.tar", "d.tar"]
        lost = 200 - len(rows)
        assert lost > 99 and said[1:] == [f"note: bad.jsonl can be written again; {lost} lines were left out"]


def test_the_fraction_is_of_all_samples_seen() -> None:
    """Catches a limit that a single early sample breaks, and one that never strikes."""
    account = BadSamples(0.01, 8, MANY)
    account.add(1, 100, bad(10))  # ten are free
    account.add(2, 9900, bad(90, "b.tar"))
    with pytest.raises(
        TooManyBadSamples, match=r"101 of 10000 .*max_bad_fraction 0.01.*b\.tar \(90 samples\)"
    ):
        account.add(3, 0, bad(1, "c.tar"))
    with pytest.raises(TooManyBadSamples, match="1 of 100 samples"):
        BadSamples(0.0, 8, MANY).add(1, 100, bad(1))


def test_a_sample_counts_once_however_many_epochs_read_it() -> None:
    """Catches a small set with a few bad samples that ends every long run, and a limit that such a set never
    reaches."""
    account = BadSamples(1e-3, 8, 257)
    for epoch in range(100):
        state = json.loads(json.dumps(account.state()))  # through a checkpoint
        account = BadSamples(1e-3, 8, 257, state=state)
        account.add(epoch, 257, bad(3))
    assert account.total == 300
    account.add(100, 257, bad(7, "b.tar"))
    with pytest.raises(
        TooManyBadSamples, match=r"11 of 257 samples .*by shard: b\.tar \(8 samples\); a\.tar"
    ):
        account.add(101, 257, bad(8, "b.tar"))


def test_goes_on_from_a_checkpoint_that_does_not_know_which_samples_were_bad() -> None:
    """Catches runs that an update of this code cannot resume."""
    state = {"total": 30, "seen": 2570, "per_shard": {"a.tar": 30}, "failing": {"b.tar": "it is gone"}}
    account = BadSamples(1e-3, 1, 257, state=state)
    account.add(10, 257, bad(3) + bad(1, "b.tar", whole_shard=True))
    assert account.total == 34
    with pytest.raises(TooManyBadSamples, match="2 shards could not be read"):
        account.add(11, 257, bad(1, "c.tar", whole_shard=True))


def test_different_shards_failing_in_a_row_stop_the_run() -> None:
    """Catches a lost disk that is only noticed by the fraction, and one shard counted at every step."""
    account = BadSamples(1.0, 2, MANY)
    for step in range(5):
        account.add(step, 100, bad(1, "a.tar", True) + bad(1, "b.tar", True))
    account.add(5, 100, [])  # the streak ends
    account.add(6, 100, bad(1, "c.tar", True))
    account.add(7, 100, bad(1, "d.tar", True))
    with pytest.raises(TooManyBadSamples, match=r"3 shards could not be read.*max_bad_shards 2.*e\.tar"):
        account.add(8, 100, bad(1, "e.tar", True))


def test_errors_travel_between_processes() -> None:
    """Catches an error that loses its fields on the way from a worker."""
    error = pickle.loads(pickle.dumps(SampleError(bad(1)[0])))
    assert error.bad == bad(1)[0] and "a.tar: sample 'k0': it is broken" in str(error)
