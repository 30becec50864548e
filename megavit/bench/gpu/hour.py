"""The stages of the hour, each a process and a file of its own, and what they come to.

A stage that runs out of its time leaves out cases and says which; one that hangs is ended; whatever becomes of
it, its rows so far are in its file and the next stage starts on a fresh process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from megavit.bench.gpu import anchors, block, fp8, matmul, rates, rehearse, trainer, whole
from megavit.bench.gpu.setting import Setting, dry_setting, hour_setting
from megavit.bench.gpu.stage import Stage, run_stage
from megavit.bench.report import Report

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
    import torch

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


def run_each(
    names: Sequence[str],
    out: Path,
    minutes: float,
    command: Callable[[str, float], list[str]],
) -> None:
    """One process after the other, as long as `minutes` last. `command` starts one stage with a limit in
    seconds."""
    ends = time.monotonic() + 60 * minutes
    for place, name in enumerate(names):
        left = ends - time.monotonic() - _GRACE_S
        limit_s = min(STAGES[name].limit_s, left)
        if limit_s < min(30.0, STAGES[name].limit_s):
            print(f"left out, {minutes:g} minutes are over: {', '.join(names[place:])}", file=sys.stderr)
            break
        most = min(limit_s + _GRACE_S, _LONGEST_S)
        print(f"\nstage {name}: {STAGES[name].answers} (at most {most / 60:.1f} minutes)", flush=True)
        try:
            code = subprocess.run(command(name, limit_s), timeout=most).returncode
            if code:
                print(f"stage {name} ended with {code}; what it has is in {out / name}.json", file=sys.stderr)
        except subprocess.TimeoutExpired:
            print(f"stage {name} was ended after {most:.0f} s", file=sys.stderr)


def conclude(out: Path, device: str) -> None:
    """What the files in `out` hold beside published figures: `out`/anchors.json and anchors.md."""
    files = (out / "anchors.json", out / "anchors.md")
    report = Report("gpu, beside published figures", {"out": str(out)}, device, *files)
    for row in anchors.verdicts(out):
        report.add(row)
