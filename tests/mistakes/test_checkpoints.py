"""Checkpoints, logs and run folders that are harmed: each is one line that names the file.

Every row harms a copy of one small real run folder and then does what a user would do: start the run again,
list, verify, compare or export its checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavit.train.logging.log_file import discard_rows
from tests.data.shards import flip_bit
from tests.mistakes.harm import (
    DEEP,
    LATEST,
    MANIFEST,
    NEWEST,
    RANK_FILE,
    Act,
    Harm,
    check,
    cut,
    diff,
    export,
    folder_instead,
    framed,
    gone,
    header,
    launch,
    list_,
    make_run,
    manifest,
    nothing,
    put,
    rank_file,
    resume,
    resume_from_previous,
    text,
    verify,
    verify_8,
)

ENTRY = "weight/norm.weight"
SHAPE = "tensors/norm.weight/shape"


def entry(**fields: object) -> Harm:
    """The rank's file with another entry for one tensor."""
    return header(lambda entries: entries[ENTRY].update(fields))


def renamed(name: str) -> Harm:
    """The rank's file with another name for one tensor."""
    return header(lambda entries: entries.update(other=entries.pop(name)))


def replaced(path: str) -> Harm:
    """A file in the place of a folder."""
    return lambda run: (shutil.rmtree(run / path), (run / path).write_text(""))


# What is wrong, how it came, what is done, what is said.
Row = tuple[str, Harm, Act, str]
POINTER: list[Row] = [
    ("a folder", folder_instead(LATEST), resume, "latest cannot be read: Is a directory ... remove it"),
    (
        "names what is not there",
        text(LATEST, "step_00000077"),
        resume,
        "latest names 'step_00000077', which is",
    ),
    ("names no checkpoint", text(LATEST, "best"), resume, "latest names 'best' ... step_00000008; write one"),
    ("leads elsewhere", text(LATEST, "../step_00000008"), resume, "latest names ... which is no checkpoint"),
    ("empty", text(LATEST, ""), resume, "latest names '' ... remove it to go on from the last"),
    ("no text", text(LATEST, b"\xff\xfe\x00"), resume, "latest names ... which is no checkpoint"),
    ("nul bytes", text(LATEST, b"\0" * 14), resume, "latest names ... which is no checkpoint"),
    (
        "a folder, list",
        folder_instead(LATEST),
        list_,
        "step_00000004 ... no new start ... latest ... status 1",
    ),
    ("empty, verify", text(LATEST, ""), verify, "all well ... no new start ... latest ... status 1"),
    ("empty, export", text(LATEST, ""), export, "error: ... latest names '' ... status 1"),
    ("empty, previous", text(LATEST, ""), resume_from_previous, "note: ... latest names ... after step 8"),
    (
        "gone and back",
        text(LATEST, "step_00000006"),
        resume_from_previous,
        "step_00000008 is set aside ... after step 4",
    ),
]
MANIFESTS: list[Row] = [
    (
        "gone",
        gone(MANIFEST),
        resume,
        "latest names 'step_00000008', which is missing or has no manifest.json",
    ),
    ("gone, verify", gone(MANIFEST), verify_8, "of step 8; there are: step_00000004 ... status 1"),
    ("a folder", folder_instead(MANIFEST), resume, "manifest.json cannot be read: Is a directory"),
    ("empty", text(MANIFEST, ""), resume, "manifest.json is damaged"),
    ("cut off", cut(MANIFEST, 999), resume, "manifest.json is damaged ... --checkpoint.on_damage previous"),
    (
        "cut off, previous",
        cut(MANIFEST, 999),
        resume_from_previous,
        "manifest.json is damaged ... after step 4",
    ),
    ("no text", text(MANIFEST, b"\xff" * 99), resume, "manifest.json is damaged: ... decode"),
    ("nul bytes", text(MANIFEST, b"\0" * 99), resume, "manifest.json is damaged"),
    ("null", text(MANIFEST, "null"), resume, "manifest.json is damaged: it is no JSON object"),
    ("a list", text(MANIFEST, "[]"), list_, "not usable: ... manifest.json is damaged: it is no JSON object"),
    ("nested", text(MANIFEST, DEEP), resume, "manifest.json is damaged: ... recursion"),
    ("nested, export", text(MANIFEST, DEEP), export, "error: ... manifest.json is damaged ... status 1"),
    ("another format", text(MANIFEST, '{"format": [1]}'), resume, "manifest.json: its format is [1], this"),
    (
        "a flipped bit",
        lambda run: flip_bit(run / MANIFEST, 999),
        verify_8,
        "manifest.json ... checksum ... status 1",
    ),
    (
        "no checksum",
        text(MANIFEST, '{"format": "megavit-checkpoint-2"}'),
        resume,
        "manifest.json ... checksum",
    ),
    ("another step", put("step", 6), resume, "step_00000008 holds the checkpoint of step 6; was it renamed?"),
    (
        "a field less",
        manifest(lambda fields: fields.pop("files")),
        resume,
        "manifest.json ... files is missing",
    ),
    ("a field more", put("epoch", 1), resume, "manifest.json is damaged: epoch is unknown"),
    ("a text for a number", put("step", "8"), resume, "manifest.json ... step is '8', not a whole number"),
    ("true for a number", put("tp_size", True), resume, "manifest.json ... tp_size is True"),
    ("no ranks", put("dp_size", 0), resume, "manifest.json ... dp_size is 0"),
    ("more ranks than files", put("dp_size", 3), resume, "manifest.json ... files lists 1 ranks of dp 3"),
    ("no weights", put("kinds", ["exp_avg"]), resume, "manifest.json ... kinds is ['exp_avg']"),
    ("no moments", put("kinds", ["weight"]), resume, "manifest.json does not fit ... kinds lacks exp_avg"),
    ("no tensors", put("tensors", []), resume, "manifest.json ... tensors is [], not an object"),
    (
        "null for a tensor",
        put("tensors/norm.weight", None),
        resume,
        "manifest.json ... tensors.norm.weight is None",
    ),
    ("a negative shape", put(SHAPE, [-1]), resume, "manifest.json ... tensors.norm.weight has shape [-1]"),
    ("a huge shape", put(SHAPE, [10**15]), export, "step_00000008: the slices ... do not fill ... status 1"),
    (
        "no such dim",
        put("tensors/norm.weight/dim", 5),
        resume,
        "manifest.json ... norm.weight ... along dim 5",
    ),
    (
        "odd slices",
        put("files/0/slices", [[0, 9]]),
        resume,
        "manifest.json ... files[0] has the slice [0, 9]",
    ),
    (
        "a slice of no tensor",
        put("files/0/slices/0", [99, 0, 1]),
        resume,
        "manifest.json ... slice [99, 0, 1]",
    ),
    ("a file elsewhere", put("files/0/name", "../x"), resume, "manifest.json ... files[0].name is '../x'"),
    ("another TP rank", put("files/0/tp_rank", 1), resume, "manifest.json ... files[0].tp_rank is 1"),
    (
        "no optimizer",
        put("optimizer", {}),
        list_,
        "not usable: ... manifest.json ... optimizer.type is missing",
    ),
    (
        "odd update counts",
        put("optimizer/steps", {"a": "3"}),
        resume,
        "manifest.json ... optimizer.steps.a is '3'",
    ),
    (
        "no update counts",
        put("optimizer/steps", {}),
        resume,
        "manifest.json ... optimizer.steps lacks embed.weight",
    ),
    ("no model", put("run", {}), resume, "manifest.json ... run.model is None, not an object"),
    ("an unknown model field", put("run/model/width", 1), resume, "manifest.json ... run.model: ... 'width'"),
    ("an odd model field", put("run/model/depth", "2"), resume, "manifest.json ... run.model: "),
    (
        "another model",
        put("run/model/dim", 32),
        resume,
        "step_00000008 belongs to ... model.dim is 16, was 32",
    ),
    (
        "another model, export",
        put("run/model/dim", 32),
        export,
        "manifest.json ... (16, 4) ... (32, 4) ... status 1",
    ),
    (
        "a million blocks",
        put("run/model/depth", 10**6),
        export,
        "manifest.json ... depth is 1000000 ... status 1",
    ),
    ("no state", put("state", {}), resume, "manifest.json: its state cannot be used: it has no field 'data'"),
    (
        "an odd position",
        put("state/data/epoch", "0"),
        resume,
        "manifest.json ... state ... 'epoch' is a string ('0'), not a whole number",
    ),
    (
        "odd ranges left out",
        put("state/left_out", [["a", 1]]),
        resume,
        "manifest.json ... state ... a range of steps is a list, not a list of two numbers",
    ),
]
RANK_FILES: list[Row] = [
    ("gone", gone(RANK_FILE), resume, "rank_00000.safetensors cannot be read: No such file"),
    ("a folder", folder_instead(RANK_FILE), verify, "rank_00000.safetensors cannot be read ... status 1"),
    (
        "cut off",
        cut(RANK_FILE, 100),
        verify,
        "step_00000008/rank_00000.safetensors is truncated ... status 1",
    ),
    ("cut off, diff", cut(RANK_FILE, 100), diff, "error: ... rank_00000.safetensors is damaged: a header"),
    ("empty, diff", cut(RANK_FILE, 0), diff, "rank_00000.safetensors is damaged: a header of ... file of 0"),
    (
        "a flipped bit",
        lambda run: flip_bit(run / RANK_FILE, 9999),
        export,
        "rank_00000.safetensors ... checksum",
    ),
    (
        "an endless header",
        rank_file(lambda data: b"\xff" * 8 + data[8:]),
        verify,
        "rank_00000.safetensors is damaged",
    ),
    (
        "a long header",
        rank_file(lambda data: b"\0\0\2" + data[3:]),
        verify,
        "rank_00000.safetensors is damaged: a header of 131,072 bytes",
    ),
    ("no header", rank_file(lambda data: data[:7]), resume, "rank_00000.safetensors is damaged"),
    (
        "null for a header",
        rank_file(lambda data: framed(b"null")),
        resume,
        "rank_00000.safetensors ... no JSON",
    ),
    (
        "a nested header",
        rank_file(lambda data: framed(DEEP.encode())),
        verify,
        "rank_00000.safetensors ... recursion",
    ),
    (
        "no text in the header",
        rank_file(lambda data: framed(b"\xff" * 8)),
        resume,
        "rank_00000.safetensors is damaged",
    ),
    (
        "beyond its end",
        entry(data_offsets=[10**9, 10**9 + 64]),
        verify,
        "rank_00000.safetensors ... begins at byte",
    ),
    (
        "before its begin",
        entry(data_offsets=[-64, 0]),
        resume,
        "rank_00000.safetensors ... begins at byte -64",
    ),
    ("odd offsets", entry(data_offsets="all"), resume, "rank_00000.safetensors ... data_offsets 'all'"),
    ("one offset", entry(data_offsets=[0]), resume, "rank_00000.safetensors ... lies at [0]"),
    (
        "offsets of another size",
        entry(data_offsets=[0, 8]),
        resume,
        "rank_00000.safetensors ... lies at [0, 8]",
    ),
    ("an unknown type", entry(dtype="F99"), verify, "rank_00000.safetensors ... 'F99'; known are F32, U8"),
    ("a list as a type", entry(dtype=["F32"]), resume, "rank_00000.safetensors ... type ['F32']"),
    ("a negative shape", entry(shape=[-16]), resume, "rank_00000.safetensors ... shape [-16]"),
    (
        "null for an entry",
        header(lambda entries: entries.update({ENTRY: None})),
        resume,
        "rank_00000 ... type None",
    ),
    (
        "more data",
        rank_file(lambda data: data + b"more"),
        verify,
        "rank_00000.safetensors ... entries end at byte",
    ),
    (
        "a tensor less",
        renamed(ENTRY),
        verify,
        "rank_00000.safetensors holds None as weight/norm.weight ... status 1",
    ),
    (
        "another shape",
        entry(shape=[4, 4]),
        verify,
        "rank_00000.safetensors ... (4, 4) ... manifest says ... status 1",
    ),
    ("no generators", renamed("rng"), resume, "rank_00000.safetensors lacks 'rng'"),
]
FOLDERS: list[Row] = [
    ("run folder is a file", replaced(""), resume, "File exists ... /run"),
    ("checkpoints is a file", replaced("checkpoints"), resume, "Not a directory: ... run/checkpoints"),
    ("lock is a folder", folder_instead("run.lock"), resume, "Is a directory: ... run/run.lock"),
    ("a checkpoint is a file", replaced(NEWEST), resume, "latest names ... missing or has no manifest.json"),
    ("list, none", nothing, launch("checkpoints list RUN/none"), "error: ... none ... status 1"),
    ("verify, none", nothing, launch("checkpoints verify RUN/none"), "error: ... none ... status 1"),
    (
        "verify, no such step",
        nothing,
        launch("checkpoints verify RUN --step 5"),
        "step 5; there are: ... status 1",
    ),
    (
        "verify, a word",
        nothing,
        launch("checkpoints verify RUN --step last"),
        "--step ... 'last' ... status 2",
    ),
    ("diff, one step", nothing, launch("checkpoints diff RUN --steps 4"), "--steps ... status 2"),
    (
        "diff, no such step",
        nothing,
        launch("checkpoints diff RUN --steps 4 9"),
        "of step 9; there ... status 1",
    ),
    ("diff, none", nothing, launch("checkpoints diff RUN RUN/none"), "run/none does not exist ... status 1"),
    ("diff, one", lambda run: shutil.rmtree(run / NEWEST), diff, "holds 1 checkpoint(s) ... status 1"),
    ("no command", nothing, launch("checkpoints"), "command ... status 2"),
    ("unknown command", nothing, launch("checkpoints repair RUN"), "'repair' ... status 2"),
]
GROUPS = {"latest": POINTER, "manifest": MANIFESTS, "rank file": RANK_FILES, "folder": FOLDERS}
TABLE = {f"{group}: {row[0]}": row[1:] for group, rows in GROUPS.items() for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_one_line_that_names_the_file(run: Path, name: str) -> None:
    """Catches a traceback, a message that names no file or no fix, and damage that is taken for data."""
    harm, act, words = TABLE[name]
    harm(run)
    check(act(run), words)


@pytest.mark.parametrize("path", [LATEST, MANIFEST, RANK_FILE, NEWEST, "checkpoints"])
def test_what_may_not_be_read_is_named(run: Path, path: str) -> None:
    """Catches a checkpoint that counts as absent because it may not be read: the run would start anew."""
    (run / path).chmod(0)
    with as_nobody(run):
        message = resume(run)
    assert "Permission denied" in message and path in message, message


@contextlib.contextmanager
def as_nobody(run: Path) -> Iterator[None]:
    """Root may read everything: for a while this process is a user who may enter the run folder."""
    if os.geteuid():
        yield
        return
    run.chmod(0o777)
    for folder in run.parents:
        if not folder.stat().st_mode & 0o001:  # pytest's own folders are nobody else's
            folder.chmod(0o777)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


ODD_LINES = {
    "null": b"null\n",
    "list": b"[1]\n",
    "number": b"3\n",
    "text": b'"step"\n',
    "cut off": b'{"step": 2, "lo',
    "cut off after a whole record": b'{"step": 2}',
    "empty": b"\n",
    "no text": b"\xff\xfe\n",
    "nul bytes": b"\0\0\0\0\n",
    "nested": DEEP.encode() + b"\n",
    "step is null": b'{"step": null}\n',
    "step is a text": b'{"step": "2"}\n',
    "step is a list": b'{"step": [2]}\n',
    "later": b'{"step": 5}\n',
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_odd_lines_of_a_log_are_set_aside(tmp_path: Path, name: str) -> None:
    """Catches a run that cannot go on because of one line of its log, and good lines that are lost by it."""
    log, odd = tmp_path / "log.jsonl", ODD_LINES[name]
    before, after = b'{"step": 1, "loss": 2.5}\n', b'{"note": "of no step"}\n{"step": 4.0}\n'
    log.write_bytes(before + odd + (after if odd.endswith(b"\n") else b""))
    discard_rows(log, 4, print)
    assert log.read_bytes() == before + (after if odd.endswith(b"\n") else b"")
    assert (tmp_path / "log.jsonl.discarded").read_bytes() == odd.rstrip(b"\n") + b"\n"
