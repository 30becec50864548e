"""Labels: one or several classes, and every kind of nonsense."""

from __future__ import annotations

import pytest

from megavit.data.labels import pad_labels, parse_labels


@pytest.mark.parametrize(
    ("extension", "data", "labels"),
    [
        ("cls", b"7", [7]),
        ("cls", b" 7\n", [7]),
        ("json", b"[3, 1, 3]", [1, 3]),
        ("json", b'{"labels": [9], "source": "x"}', [9]),
        ("json", b"[]", []),
    ],
)
def test_labels(extension: str, data: bytes, labels: list[int]) -> None:
    """Catches a label counted twice, or the white space of a text file."""
    assert parse_labels(extension, data, 10, allow_none=True) == labels


@pytest.mark.parametrize(
    ("extension", "data", "words"),
    [
        ("cls", b"10", "label 10 is outside 0..9; set --model.num_classes"),
        ("cls", b"-1", "label -1 is outside"),
        ("cls", b"cat", "'cat' is not a class number"),
        ("cls", b"", "is not a class number"),
        ("cls", b"1.0", "is not a class number"),
        ("cls", b"\xff\xfe", "is not a class number"),
        ("json", b"[1, 10]", "label 10 is outside"),
        ("json", b"[1,", "cannot be parsed"),
        ("json", b'{"label": 3}', "neither a list"),
        ("json", b"[true]", "neither a list"),
        ("json", b'["1"]', "neither a list"),
        ("json", b"3", "neither a list"),
        ("json", b"[]", "only the sigmoid loss"),
        ("json", b"null", "neither a list"),
        ("json", b"[" * 200_000, "cannot be parsed: it is nested too deeply"),
        ("json", b'{"labels":' * 200_000, "cannot be parsed: it is nested too deeply"),
        ("json", b"[" + b"9" * 5000 + b"]", "cannot be parsed"),
        ("cls", b"9" * 5000, "is not a class number"),
    ],
)
def test_nonsense_is_refused(extension: str, data: bytes, words: str) -> None:
    """Catches training on a label that nobody meant."""
    with pytest.raises(ValueError, match=words):
        parse_labels(extension, data, 10, allow_none=False)


def test_padding() -> None:
    """Catches labels cut off in silence."""
    assert pad_labels([4, 5], 4).tolist() == [4, 5, -1, -1]
    with pytest.raises(ValueError, match=r"3 labels, more than --data.max_labels 2"):
        pad_labels([1, 2, 3], 2)
