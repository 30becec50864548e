"""Videos in folders of classes, as samples of an mp4 and its class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from megavit.data.images import DecodeError
from megavit.data.index import VIDEO_EXTENSIONS
from megavit.data.video import check_video, require_pyav
from megavit.data.write import DataSet, Files, Split, class_names, digest, folder_splits

BROKEN_FILE = "broken.txt"


def video_set(root: Path, out: Path, workers: int) -> DataSet:
    """Kinetics: `root/{train,val}/CLASS/*.mp4`, stored as they are.

    Videos that cannot be opened, are cut off, or whose first frame cannot be decoded are left out, and listed
    in `out/broken.txt` with the reason. Costs one read of every video.
    """
    require_pyav()
    splits, notes, lines = [], [], []
    for split in folder_splits(root, VIDEO_EXTENSIONS):
        if note := split.note_left_out():
            notes.append(f"{note}; samples are made of {', '.join(VIDEO_EXTENSIONS)} in class folders")
        whole, broken = _checked(split, workers)
        if broken:
            lines += broken
            notes.append(
                f"note: {split.name}: {len(broken):,} of {split.size:,} videos are broken and not written, "
                f"all listed in {out / BROKEN_FILE}: {'; '.join(broken[:3])}"
            )
        if not whole.size:
            raise ValueError(f"{root}: every video of {split.name} is broken, e.g. {broken[0]}")
        splits.append(whole)
    if lines:
        out.mkdir(parents=True, exist_ok=True)
        (out / BROKEN_FILE).write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")
    return DataSet(splits, class_names(root), notes=notes)


def _checked(split: Split, workers: int) -> tuple[Split, list[str]]:
    """The split without its broken videos, and a line for each of those."""
    files = split.load
    assert isinstance(files, Files)

    def reason(path: str) -> str:
        try:
            check_video((files.root / path).read_bytes())
        except DecodeError as error:
            return f"{path}: {error}"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(reason, files.paths), f"{split.name} videos", split.size, unit="video")
        reasons = list(found)
    broken = [text for text in reasons if text]
    if not broken:
        return split, []
    kept = [number for number, text in enumerate(reasons) if not text]
    whole = Files(files.root, tuple(files.paths[i] for i in kept), tuple(files.labels[i] for i in kept))
    return replace(split, size=len(kept), load=whole, fingerprint=digest(split.fingerprint, broken)), broken
