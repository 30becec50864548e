"""Real training jobs under the `deepspeed` launcher, to be started, watched, harmed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lab.hosts import HostsLab
from tests.processes import command_of, descendants, is_running
from tests.ranks import free_port
from tests.train.runs import log_of, steps_of

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STEPS, EVERY, RANKS = 40, 4, 2
TIMEOUT_S = 20
LIMIT_S = 900  # for what takes a minute on a quiet machine


class Job:
    """A training job in a run folder of its own; `start` again on the same one goes on with it."""

    def __init__(self, folder: Path, data: Path, *flags: str, recipe: str = "digits"):
        self.folder, self.data, self.flags, self.recipe = folder, data, flags, recipe
        self.run_dir = folder / "run"
        self.output = folder / "output.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self._pids: set[int] = set()
        self._output_before = 0
        folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        return [
            *(str(BIN / "deepspeed"), "--num_accelerators", str(RANKS), "--master_port", str(free_port())),
            *self.train_command(),
        ]

    def train_command(self) -> list[str]:
        return [
            *(
                str(ROOT / "launch" / "train.py"),
                "--deepspeed_config",
                str(ROOT / "ds_configs" / "zero3.json"),
            ),
            *(
                "--run_dir",
                str(self.run_dir),
                "--config",
                str(ROOT / "launch" / "recipes" / f"{self.recipe}.yaml"),
                "--data.shards",
                f"{self.data}/train-*.tar",
                "--data.val_shards=",
            ),
            *(
                "--max_steps",
                str(STEPS),
                "--log_every",
                "1",
                "--eval_every",
                "0",
                "--schedule.warmup_steps",
                "5",
            ),
            *("--checkpoint.every", str(EVERY), "--timeout_s", str(TIMEOUT_S), "--data.workers", "2"),
            *self.flags,
        ]

    def start(self, **popen: Any) -> None:
        self._pids = set()
        self._output_before = self.output.stat().st_size if self.output.exists() else 0
        environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **popen,
            )

    def ranks(self) -> list[int]:
        """The training processes, in rank order."""
        assert self.process
        others = ("deepspeed.launcher", "multiprocessing")
        found = {pid: command_of(pid) for pid in descendants(self.process.pid)}
        return sorted(
            pid
            for pid, command in found.items()
            if "launch/train.py" in command and not any(other in command for other in others)
        )

    def data_workers(self) -> list[int]:
        """Processes forked from the forkservers, of all ranks."""
        assert self.process
        return [
            pid
            for pid in descendants(self.process.pid)
            if "forkserver" in command_of(pid) and not any(True for _ in descendants(pid))
        ]

    def alive(self) -> list[int]:
        assert self.process
        self._pids |= {self.process.pid, *descendants(self.process.pid)}
        self.process.poll()
        return [pid for pid in self._pids if is_running(pid)]

    def has_begun(self) -> bool:
        """Whether this life has taken a step."""
        with open(self.output, "rb") as output:
            output.seek(self._output_before)
            return b"\nstep " in output.read()

    def has_said(self, *texts: str) -> bool:
        said = self.output.read_text()
        return all(text in said for text in texts)

    def saves(self) -> list[dict[str, Any]]:
        """The checkpoints that were committed, as logged."""
        return [row for row in log_of(self.run_dir) if row.get("event") == "saved"]

    def step(self) -> int:
        log = self.run_dir / "log.jsonl"
        return max((row["step"] for row in steps_of(self.run_dir)), default=0) if log.exists() else 0

    def wait_for(self, ready: Callable[[], Any], timeout_s: float = LIMIT_S) -> None:
        """Until `ready()`; the job must not end before."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.alive()
            assert self.process
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not reached:\n{self.output.read_text()[-3000:]}")
            time.sleep(0.005)

    def wait_until_gone(self, timeout_s: float = LIMIT_S) -> float | None:
        """Seconds until no process of the job is left; None if some stay."""
        started = time.monotonic()
        while self.alive():
            if time.monotonic() - started > timeout_s:
                for pid in self.alive():
                    os.kill(pid, signal.SIGKILL)
                return None
            time.sleep(0.02)
        return time.monotonic() - started

    def finish(self) -> tuple[int, int]:
        """Start again, without a fault, to the end: the step that it went on from, and the exit status."""
        self.start()
        assert self.process
        code = self.process.wait(timeout=LIMIT_S)
        resumed = [row["step"] for row in log_of(self.run_dir) if row.get("event") == "resumed"]
        return (resumed[-1] if resumed else 0), code

    def losses(self) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in steps_of(self.run_dir)]


class HostsJob(Job):
    """The same job with its two ranks on two hosts."""

    def __init__(self, folder: Path, data: Path, lab: HostsLab):
        super().__init__(folder, data)
        self.lab = lab
        variables = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        (folder / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()))

    def start(self, **popen: Any) -> None:
        hostfile = ["--hostfile", str(self.lab.hostfile(1)), "--master_port", "29611"]
        with open(self.output, "ab") as output:
            command = [str(BIN / "deepspeed"), *hostfile, *self.train_command()]
            command[command.index("--data.shards") + 1] = f"'{self.data}/train-*.tar'"  # for the remote shell
            self.process = self.lab.head(command, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT)

    def pids(self) -> list[int]:
        """The ranks, their launchers and their data workers on all hosts."""
        return [pid for host in self.lab.hosts for pid in self.lab.pids(host, "python")]
