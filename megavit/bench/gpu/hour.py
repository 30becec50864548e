"""The stages of the hour, each a process and a file of its own, and what they come to.

A stage that runs out of its time leaves out cases and says which; one that hangs is ended; whatever becomes
of it, its rows so far are in its file and the next stage has a fresh process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megavit.bench.gpu import anchors, block, fp8, matmul, rates, rehearse, trainer, whole
from megavit.bench.gpu.setting import Setting, dry_setting, hour_setting
from megavit.bench.gpu.stage import Stage, run_stage
from megavit.bench.report import Report
from megavit.fields import nearest

# The most valuable first.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("block", "MFU of ViT-22B's blocks, and where the rest goes", 480, block.cases),
        Stage("trainer", "images/s and MFU of the trainer on ViT-g/14, beside timm", 480, trainer.cases),
        Stage("whole", "MFU of all of ViT-22B on one GPU", 360, whole.cases),
        Stage("matmul", "what matmuls reach at the block's shapes, bf16 and fp8", 180, matmul.cases),
        Stage("rates", "the planner's rates, and its prediction with them", 240, rates.cases),
        Stage("rehearse", "memory of one true rank beside the plan's", 240, rehearse.rank_cases),
        Stage("fp8", "speed and loss of fp8 against bf16", 420, fp8.cases),
        Stage("offload", "ViT-22B with its optimizer in host memory", 120, rehearse.offload_cases),
    )
}
ANCHORS = "anchors"  # what they come to; measures nothing
_LEAST_S = 30.0  # of a stage: less is not worth its start
_GRACE_S = 90.0  # for the case that a stage is in when its time is over, and for its start
_LONGEST_S = 585.0  # of a stage with its grace: it must end within a command of 10 minutes


def budget() -> str:
    """How long the stages take at most, as a table."""
    lines = ["| stage | minutes | it answers |", "|---|---|---|"]
    lines += [f"| {stage.name} | {stage.limit_s / 60:g} | {stage.answers} |" for stage in STAGES.values()]
    total = sum(stage.limit_s for stage in STAGES.values())
    return "\n".join([*lines, f"| all | {total / 60:g} | |"])


def setting_of(out: Path, *, dry: bool) -> Setting:
    """ValueError without a GPU, unless it is dry."""
    if dry:
        return dry_setting(out)
    if not torch.cuda.is_available():
        raise ValueError("gpu needs a CUDA device, and torch sees none; --dry goes through it at tiny sizes")
    return hour_setting(out)


def run_one(stage: Stage, out: Path, limit_s: float, *, dry: bool) -> None:
    """In this process: `out`/NAME.json and NAME.md."""
    setting = setting_of(out, dry=dry)
    settings = {"answers": stage.answers, "limit_s": limit_s, **_plain(setting)}
    files = (out / f"{stage.name}.json", out / f"{stage.name}.md")
    report = Report(f"gpu --stage {stage.name}", settings, setting.device, *files)
    run_stage(stage, setting, report, limit_s)


def _plain(setting: Setting) -> dict[str, object]:
    """The sizes as JSON has them; of an architecture its name."""
    found: dict[str, object] = {}
    for name, value in asdict(setting).items():
        found[name] = value["name"] if isinstance(value, dict) else value
    return found | {"out": str(setting.out), "dtype": str(setting.dtype)}


def run(names: Sequence[str], out: Path, minutes: float, *, dry: bool) -> None:
    """The stages called `names`, one process after the other as long as `minutes` last, and at last what
    they come to, if that is among them. A single stage is measured in this process. ValueError for an
    unknown name."""
    known = [*STAGES, ANCHORS]
    for name in names:
        if name not in known:
            raise ValueError(
                f"--stage {name}: no such stage{nearest(name, known)}; known: {', '.join(known)}"
            )
    if minutes <= 0:
        raise ValueError(f"--minutes {minutes:g}: give more than 0")
    stages = [STAGES[name] for name in names if name != ANCHORS]
    if stages:
        setting_of(out, dry=dry)  # a mistake is said once
    if len(names) == len(stages) == 1:
        run_one(stages[0], out, min(stages[0].limit_s, 60 * minutes), dry=dry)
        return
    if stages:
        print(budget(), flush=True)
        run_each(stages, out, minutes, dry=dry)
    if ANCHORS in names:
        conclude(out)


def run_each(stages: Sequence[Stage], out: Path, minutes: float, *, dry: bool) -> None:
    """Each in a process of its own; those for which `minutes` leave no time are named."""
    ends = time.monotonic() + 60 * minutes
    for place, stage in enumerate(stages):
        limit_s = min(stage.limit_s, ends - time.monotonic() - _GRACE_S)
        if limit_s < _LEAST_S:
            late = ", ".join(stage.name for stage in stages[place:])
            print(f"left out, the {minutes:g} minutes are over: {late}", file=sys.stderr)
            return
        most_s = min(limit_s + _GRACE_S, _LONGEST_S)
        print(f"\nstage {stage.name}: {stage.answers} (at most {most_s / 60:.1f} minutes)", flush=True)
        words = ["gpu", "--out", str(out), "--stage", stage.name, "--minutes", str(limit_s / 60)]
        words += ["--dry"] if dry else []
        try:
            code = subprocess.run(
                [sys.executable, "-m", "megavit", "bench", *words], timeout=most_s
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"stage {stage.name} was ended after {most_s:.0f} s", file=sys.stderr)
            continue
        if code:
            print(f"stage {stage.name} ended with {code}", file=sys.stderr)


def conclude(out: Path) -> None:
    """What the files in `out` hold beside published figures: `out`/anchors.json and anchors.md."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = (out / f"{ANCHORS}.json", out / f"{ANCHORS}.md")
    report = Report("gpu, beside published figures", {"out": str(out)}, device, *files)
    for row in anchors.verdicts(out):
        report.add(row)
