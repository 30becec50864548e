"""Ways to harm one file of a small run folder, and what a user does then.

A harm is a function of the run folder. What is done then is one too, and returns what the user is told.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint.export import export_weights
from megavit.train.checkpoint.folder import open_step
from megavit.train.checkpoint.manifest import seal
from megavit.train.checkpoint.resume import check_resumable
from megavit.train.checkpoint.run_lock import RunLock
from megavit.train.checkpoint.saver import open_latest, restore
from megavit.train.checkpoint.tensorfile import checksum_of
from tests.data.shards import truncate
from tests.train.saving import RUN, ModelState, save_steps

LATEST = "checkpoints/latest"
NEWEST = "checkpoints/step_00000008"
MANIFEST = f"{NEWEST}/manifest.json"
RANK_FILE = f"{NEWEST}/rank_00000.safetensors"
WEIGHTS, CONFIG = "export/model.safetensors", "export/config.json"
DEEP = "[" * 100_000
Harm = Callable[[Path], object]
Act = Callable[[Path], str]


def make_run(folder: Path) -> Path:
    """A run folder with checkpoints of steps 4 and 8, and an export."""
    save_steps(folder, 4, 8)
    export_weights(open_step(folder), folder / "export")
    return folder


def nothing(run: Path) -> None:
    """The mistake lies in what is done."""


def text(path: str, content: str | bytes) -> Harm:
    data = content.encode() if isinstance(content, str) else content
    return lambda run: (run / path).write_bytes(data)


def gone(path: str) -> Harm:
    return lambda run: (run / path).unlink()


def folder_instead(path: str) -> Harm:
    def harm(run: Path) -> None:
        (run / path).unlink(missing_ok=True)
        (run / path).mkdir()

    return harm


def cut(path: str, keep: int) -> Harm:
    return lambda run: truncate(run / path, keep)


def manifest(change: Callable[[dict[str, Any]], object]) -> Harm:
    """A manifest whose content is changed and whose checksum is right nevertheless."""

    def harm(run: Path) -> None:
        fields = json.loads((run / MANIFEST).read_text())
        del fields["format"], fields["checksum"]
        change(fields)
        (run / MANIFEST).write_text(json.dumps(seal(fields)))

    return harm


def put(place: str, value: Any) -> Harm:
    """The manifest with another value at `place`, e.g. files/0/name."""
    *above, last = place.split("/")

    def change(fields: Any) -> None:
        for key in above:
            fields = fields[int(key)] if isinstance(fields, list) else fields[key]
        fields[int(last) if isinstance(fields, list) else last] = value

    return manifest(change)


def rank_file(change: Callable[[bytes], bytes]) -> Harm:
    """A rank's file with other content, of which the manifest holds the size and checksum nevertheless."""

    def harm(run: Path) -> None:
        path = run / RANK_FILE
        path.write_bytes(change(path.read_bytes()))
        size, checksum = checksum_of(path)
        manifest(lambda fields: fields["files"][0].update(bytes=size, crc32=checksum))(run)

    return harm


def header(change: Callable[[dict[str, Any]], object]) -> Harm:
    """A rank's file with another header."""

    def changed(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        return framed(json.dumps(entries).encode()) + data[8 + length :]

    return rank_file(changed)


def framed(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def resume(run: Path, on_damage: str = "stop") -> str:
    """Start the run again, as the trainer does."""
    said: list[str] = []
    mesh = Mesh.single()
    lock = RunLock(run, said.append)
    try:
        mesh.on_main(lock.acquire)
        saved = open_latest(run, on_damage, mesh, said.append)
        assert saved
        check_resumable(saved, RUN)
        restore(saved, ModelState(RUN, mesh), mesh)  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        return "\n".join([*said, str(error)])
    finally:
        lock.release()
    return "\n".join([*said, f"going on after step {saved.step}"])


def resume_from_previous(run: Path) -> str:
    return resume(run, "previous")


def launch(command: str) -> Act:
    """A program of `launch/` and its arguments, in this process; RUN stands for the run folder."""
    program, *words = command.split()

    def act(run: Path) -> str:
        path = Path(__file__).parents[2] / "launch" / f"{program}.py"
        spec = spec_from_file_location(f"launch_{program}", path)
        assert spec and spec.loader
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            try:
                code = module.main([word.replace("RUN", str(run)) for word in words])
            except SystemExit as error:
                code = error.code
        return f"{shown.getvalue()}exit status {code}"

    return act


list_, verify, diff = (launch(f"checkpoints {word} RUN") for word in ("list", "verify", "diff"))
verify_8 = launch("checkpoints verify RUN --step 8")
export = launch("export RUN RUN/out")


def check(message: str, words: str) -> None:
    """The message says these words (` ... ` stands for anything in between), shortly and without a
    traceback."""
    assert re.search(".*".join(map(re.escape, words.split(" ... "))), message, re.DOTALL), message
    assert "Traceback" not in message
    assert all(len(line) < 400 for line in message.splitlines()), message
