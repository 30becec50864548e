"""The trainer under the launchers other than deepspeed's and SLURM's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.runs import LIMIT_S, check_equal, flags
from tests.launch.commands import BIN, TRAIN


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (Debian: openmpi-bin)")
def test_mpirun(digits: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    """Catches ranks that each think they are alone."""
    run_dir = tmp_path / "run"
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, TRAIN]
    done = subprocess.run(
        [*command, *flags(digits, run_dir)], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s) = dp 2 x tp 1" in done.stdout
    check_equal(run_dir, whole)


@pytest.mark.dist
@pytest.mark.slow
def test_torchrun(digits: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    """Catches a launcher among the promised ones that does not start the script."""
    run_dir = tmp_path / "run"
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", TRAIN]
    done = subprocess.run(
        [*command, *flags(digits, run_dir, "--tensor_parallel_size", "2")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_equal(run_dir, whole)
