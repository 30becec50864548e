"""The account of bad samples and its limits."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from megavit.data.bad import BadSample, BadSamples, SampleError, TooManyBadSamples


def bad(count: int, url: str = "a.tar", whole_shard: bool = False) -> list[BadSample]:
    return [BadSample(url, f"k{i}", "it is broken", whole_shard) for i in range(count)]


def test_every_bad_sample_is_recorded(tmp_path: Path) -> None:
    """Catches records without the step, or only the first of a batch."""
    account = BadSamples(0.5, 8, tmp_path / "bad.jsonl")
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


def test_the_fraction_is_of_all_samples_seen() -> None:
    """Catches a limit that a single early sample breaks, and one that never strikes."""
    account = BadSamples(0.01, 8)
    account.add(1, 100, bad(10))  # ten are free
    account.add(2, 9900, bad(90, "b.tar"))
    with pytest.raises(
        TooManyBadSamples, match=r"101 of 10000 .*max_bad_fraction 0.01.*b\.tar \(90 samples\)"
    ):
        account.add(3, 0, bad(1))
    with pytest.raises(TooManyBadSamples, match="1 of 100 samples"):
        BadSamples(0.0, 8).add(1, 100, bad(1))


def test_different_shards_failing_in_a_row_stop_the_run() -> None:
    """Catches a lost disk that is only noticed by the fraction, and one shard counted at every step."""
    account = BadSamples(1.0, 2)
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
