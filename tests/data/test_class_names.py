"""Where the names of the classes come from, and what is no list of names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavit.data.class_names import class_names_of_run, read_class_names, write_class_names


def test_text_files_of_other_systems_are_read(tmp_path: Path) -> None:
    """Catches a first class that is called \\ufeffcat, and names with a carriage return."""
    (tmp_path / "names").write_bytes("\ufeffcat\r\nñandú\r\ncrane\r\ncrane".encode())
    assert read_class_names(tmp_path / "names") == ["cat", "ñandú", "crane", "crane"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "a line is empty"), (b"cat\n\ndog\n", "a line is empty"), (b"\x89PNG\0\0", "it is no text")],
)
def test_what_is_no_list_of_names(tmp_path: Path, content: bytes, said: str) -> None:
    """Catches a picture, or a file with a gap, whose lines become names."""
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/names must have .*{said}"):
        read_class_names(tmp_path / "names")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Is a directory; it must be a"):
        read_class_names(tmp_path)


def test_the_names_of_a_run(tmp_path: Path) -> None:
    """Catches names that change under a run that goes on, and names of another data set."""
    run_dir, shards, given = tmp_path / "run", tmp_path / "data", tmp_path / "mine.txt"
    run_dir.mkdir()
    shards.mkdir()
    write_class_names(shards, ["a", "b"])
    given.write_text("c\nd\n")
    beside = f"{shards}/train-*.tar"
    assert class_names_of_run(run_dir, "s3://x/y.tar", "", 2) == []
    assert class_names_of_run(run_dir, beside, "", 2) == ["a", "b"]
    assert class_names_of_run(run_dir, beside, "", 3) == []  # of a model with more classes
    assert class_names_of_run(run_dir, beside, str(given), 2) == ["c", "d"]
    with pytest.raises(ValueError, match=r"mine.txt has 2 names, model.num_classes is 3; .*class_names FILE"):
        class_names_of_run(run_dir, beside, str(given), 3)
    write_class_names(run_dir, ["e", "f"])
    assert class_names_of_run(run_dir, beside, "", 2) == ["e", "f"]
    assert class_names_of_run(run_dir, beside, str(given), 2) == ["c", "d"]
    with pytest.raises(ValueError, match=r"run/classes.txt has 2 names"):
        class_names_of_run(run_dir, beside, "", 3)
