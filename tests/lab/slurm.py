"""A real SLURM of two nodes on 127.0.0.1: controller, two node daemons and munge, in one folder.

Nothing of the machine's own SLURM is read or changed. The nodes share the machine's file system and process
ids; each believes that it has `cpus` CPUs. No accounting database, no cgroups, no GPUs.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

NODES = ("node1", "node2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED")
_SLURMD = ("slurmd", "-D", "-N")  # and the node
_DAEMONS = ("munged", "slurmctld", "slurmd")
_CLIENTS = ("srun", "sbatch", "scancel", "scontrol", "sinfo", "setpriv")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where daemons lie need not be in a user's PATH
_LONGEST_SOCKET = 107  # bytes of a unix socket's name

_CONF = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as a credential lives; two minutes by default.
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldDebug=info
SlurmdDebug=info
ReturnToService=2
JobRequeue=1
KillWait=5
OverTimeLimit=0
MinJobAge=3600
SlurmdTimeout=60
MessageTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# SLURM 23 and newer call this PreemptParameters=send_user_signal.
SlurmctldParameters=preempt_send_user_signal
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[0]} CPUs={cpus} RealMemory=4000
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=4000
PartitionName=debug Nodes=node1,node2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=high Nodes=node1,node2 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def slurm_missing() -> str:
    """Why this machine cannot run the lab, as one sentence; empty if it can."""
    if os.geteuid() != 0:
        return "a SLURM for tests needs root: its node daemons start jobs as other users"
    absent = [name for name in (*_DAEMONS, *_CLIENTS) if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return ""


class SlurmLab:
    """Two nodes, `node1` and `node2`, in two partitions: `debug`, the default, and `high`, for whose jobs
    those of `debug` are told, given 30 s and requeued.

    Args:
        folder: an empty folder for configuration, state and logs; its path must be short enough for a socket.
        cpus: CPUs of each node, whatever the machine has.

    `env` is the environment in which SLURM's commands, and programs that use them, find this lab. Leaving the
    context ends all jobs and everything else that was started in that environment.
    """

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.folder = folder.resolve()
        self.cpus = cpus
        socket_name = str(self.folder / "munge" / "sock")
        if len(socket_name) > _LONGEST_SOCKET:
            raise ValueError(f"{socket_name} is too long for a socket: above {_LONGEST_SOCKET} characters")
        self._conf = self.folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_"))}
        path = f"{Path(sys.executable).parent}:{_PATH}"
        self.env = outer | {"SLURM_CONF": str(self._conf), "GLOO_SOCKET_IFNAME": "lo", "PATH": path}

    def __enter__(self) -> SlurmLab:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- jobs ------------------------------------------------------------------------------------------------

    def run(
        self,
        *command: str | Path | int,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """A command (srun, sinfo, ...) in the lab, to its end; check `returncode` yourself."""
        return subprocess.run(
            [str(word) for word in command],
            env=self.env | (env or {}),
            cwd=cwd or self.folder,
            text=True,
            capture_output=True,
            timeout=timeout_s,
        )

    def sbatch(
        self,
        script: str | Path,
        *args: str | Path,
        options: Collection[str] = (),
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> int:
        """Submits `script` with its arguments from `cwd` (the lab's folder by default); returns the job's id.

        `env` is added to the job's environment. RuntimeError says why SLURM refused it.
        """
        printed = self._checked("sbatch", "--parsable", *options, script, *args, cwd=cwd, env=env)
        return int(printed.strip().partition(";")[0])

    def scancel(self, *args: str | int) -> None:
        """`scancel` with these arguments, e.g. `("--batch", "--signal=USR1", job)`."""
        self._checked("scancel", *args)

    def job(self, jobid: int) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode, StdOut, NodeList, ..."""
        line = self._checked("scontrol", "-o", "show", "job", jobid).strip()
        return dict(item.split("=", 1) for item in re.split(r" (?=[A-Z][\w:/]*=)", line))

    def output(self, jobid: int) -> str:
        """What the job has printed so far, over all its lives."""
        path = Path(self.job(jobid)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(
        self, jobid: int, states: str | Collection[str] = ENDED, timeout_s: float = 60
    ) -> dict[str, str]:
        """Waits until the job is in one of the states; TimeoutError carries the job's output."""
        wanted = {states} if isinstance(states, str) else set(states)
        return self.wait_until(jobid, lambda job: job["JobState"] in wanted, timeout_s)

    def wait_for_output(self, jobid: int, text: str, timeout_s: float = 60) -> None:
        """Waits until the job has printed `text`."""
        self.wait_until(jobid, lambda job: text in self.output(jobid), timeout_s)

    def wait_until(
        self, jobid: int, ready: Callable[[dict[str, str]], bool], timeout_s: float = 60
    ) -> dict[str, str]:
        """Waits until `ready(job(jobid))`; TimeoutError carries the job's output."""
        deadline = time.monotonic() + timeout_s
        while not ready(job := self.job(jobid)):
            self._restart_crashed()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"after {timeout_s} s job {jobid} is {job['JobState']} ({job['Reason']}) and has printed "
                    f"{self.output(jobid)[-4000:]}"
                )
            time.sleep(0.1)
        return job

    def crash(self, node: str) -> None:
        """Kills a node's daemon; its steps live on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def clear(self) -> None:
        """Ends all jobs and waits until both nodes are idle."""
        self.scancel("--user=root")
        self._until(self._idle, "both nodes to be idle")

    # -- the cluster -----------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends the daemons and all processes of the lab. Their state is thrown away, so none is asked
        to save it."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """All processes whose environment names this lab's configuration: its steps, their tasks, clients."""
        mark = f"SLURM_CONF={self._conf}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:  # it has just ended
                    continue
                if mark in environment + b"\0":
                    found.append(int(entry.name))
        return found

    def _start(self) -> None:
        for name in ("munge", "state", "log", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o700, parents=True)
        ctld_port, *ports = _free_ports(1 + len(NODES))
        self._conf.write_text(
            _CONF.format(folder=self.folder, ctld_port=ctld_port, ports=ports, cpus=self.cpus)
        )
        munge = self.folder / "munge"
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o400)
        files = {
            "socket": "sock",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        self._until((munge / "sock").exists, "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-c")
        for node in NODES:
            self._daemon(node, *_SLURMD, node)
        self._until(self._idle, "both nodes to be idle")

    def _daemon(self, name: str, *command: str) -> None:
        """Starts a daemon as a child of this process, which the kernel ends when this process is killed."""
        with (self.folder / "log" / name).open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _restart_crashed(self) -> None:
        """A node daemon that a signal ended starts again, as under systemd, and finds its steps running:
        SLURM 22.05's corrupts its heap once in some hundred starts of a job."""
        for node in NODES:
            if (self._daemons[node].poll() or 0) < 0:
                self._daemon(node, *_SLURMD, node)

    def _idle(self) -> bool:
        done = self.run("sinfo", "-h", "-p", "debug", "-t", "idle", "-o", "%D")
        return done.stdout.strip() == str(len(NODES))

    def _until(self, ready: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            gone = [daemon for daemon in self._daemons.values() if daemon.poll() is not None]
            if gone or time.monotonic() > deadline:
                logs = sorted((self.folder / "log").iterdir())
                tails = "".join(f"\n{log.name}: {log.read_text()[-1000:]}" for log in logs)
                raise RuntimeError(f"the SLURM lab waited in vain for {what}{tails}")
            time.sleep(0.05)

    def _checked(self, *command: str | Path | int, **options: Any) -> str:
        done = self.run(*command, **options)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
