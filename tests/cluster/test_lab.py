"""The labs themselves, and the batch scripts on a stand-in for the trainer: what other tests here rest on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.lab.hosts import HostsLab
from tests.lab.slurm import SlurmLab

SCRIPTS = Path(__file__).parents[2] / "launch" / "slurm"
ONE_RANK_A_NODE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"]

# Says which life of the job it is, and goes back into the queue when told.
TOLD = """#!/bin/bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@60
echo "life ${SLURM_RESTART_COUNT:-0}"
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
trap 'echo told; scontrol requeue $SLURM_JOB_ID' USR1
sleep 60 & wait
"""

# What launch/train.py is to the batch script. `--mode done` just ends, `obey` stops on request in its first
# life, `deaf` dies of the request in its first life, `fail` exits with 7 everywhere, `lose` on rank 1.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--run_dir") + 1])
mode = sys.argv[sys.argv.index("--mode") + 1]
rank, life = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
requests = {signal.SIGUSR1, signal.SIGTERM}
if mode in ("obey", "fail"):
    signal.pthread_sigmask(signal.SIG_BLOCK, requests)
print(f"life {life} rank {rank}: marker {(folder / 'PREEMPTED').exists()}, RANK {os.environ.get('RANK')}")
print("arguments", *sys.argv[1:])
folder.mkdir(parents=True, exist_ok=True)
if mode == "fail":  # both, although srun sends TERM to the second
    (folder / f"failing-{life}-{rank}").touch()
    while len(list(folder.glob(f"failing-{life}-*"))) < 2:
        time.sleep(0.02)
if mode == "fail" or (mode == "lose" and rank == 1):
    sys.exit(7)
if mode == "obey" and life == 0:
    print(f"rank {rank} obeys {signal.sigwait(requests).name}")
    if rank == 0:
        (folder / "PREEMPTED").touch()
elif mode == "lose" or (mode == "deaf" and life == 0):
    signal.pause()
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the real batch scripts and the stand-in."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(SCRIPTS, root / "launch" / "slurm")
    (root / "launch" / "train.py").write_text(STAND_IN)
    return root


def submit(
    slurm: SlurmLab,
    checkout: Path,
    mode: str,
    *args: str,
    script: str = "train.sbatch",
    options: list[str] = ONE_RANK_A_NODE,
    env: dict[str, str] | None = None,
) -> int:
    """Submits a batch script of the checkout, from its root, for a stand-in in this mode."""
    words = [f"launch/slurm/{script}", "--mode", mode, *args]
    return slurm.sbatch(*words, options=options, cwd=checkout, env=env)


@pytest.mark.slurm
def test_srun_starts_tasks_on_both_nodes(slurm: SlurmLab) -> None:
    """Catches nodes that share an identity, or that do not believe in their CPUs."""
    shell = "echo $SLURMD_NODENAME $SLURM_PROCID $SLURM_LOCALID"
    done = slurm.run("srun", "--nodes=2", "--ntasks-per-node=2", "bash", "-c", shell)
    assert sorted(done.stdout.splitlines()) == ["node1 0 0", "node1 1 1", "node2 2 0", "node2 3 1"], done


@pytest.mark.slurm
def test_jobs_are_told_and_come_back(slurm: SlurmLab, tmp_path: Path) -> None:
    """Catches a notice that does not reach the batch script, a second life that looks like the first, and
    preemption that kills instead of telling or that never gives the nodes back."""
    told, short = tmp_path / "told", tmp_path / "short"
    told.write_text(TOLD)
    short.write_text("#!/bin/bash\nhostname\n")
    by_hand, preempted = (slurm.sbatch(told, options=[f"--nodelist={node}"]) for node in ("node1", "node2"))
    for job in (by_hand, preempted):
        slurm.wait_for_output(job, "life 0")
    slurm.scancel("--batch", "--signal=USR1", by_hand)
    high = slurm.sbatch(short, options=["--partition=high", "--exclusive", "--nodelist=node2"])
    assert slurm.wait(high)["JobState"] == "COMPLETED"
    for job in (by_hand, preempted):
        assert slurm.wait(job)["Restarts"] == "1"
        said = [line for line in slurm.output(job).splitlines() if line.startswith(("life", "told"))]
        assert said == ["life 0", "told", "life 1"]


@pytest.mark.slurm
def test_node_daemon_that_crashed_starts_again(slurm: SlurmLab, tmp_path: Path) -> None:
    """Catches a job that waits for ever for the end of its step on a node whose daemon is gone."""
    script = tmp_path / "job"
    task = "echo task of $SLURMD_NODENAME; sleep 2"
    script.write_text(f"#!/bin/bash\nsrun --unbuffered --nodes=2 --ntasks=2 bash -c '{task}'\n")
    job = slurm.sbatch(script, options=["--nodes=2"])
    slurm.wait_for_output(job, "task of node2")  # earlier, SLURM may rightly fail the step's launch
    slurm.crash("node2")
    assert slurm.wait(job)["JobState"] == "COMPLETED"


@pytest.mark.slurm
def test_labs_side_by_side_end_alone(slurm: SlurmLab, tmp_path: Path) -> None:
    """Catches a lab on another's ports, one that ends another's daemons, and one that leaves daemons or jobs
    behind, also when it could not start."""
    script = tmp_path / "job"
    script.write_text("#!/bin/bash\necho running\nsrun sleep 60\n")
    with SlurmLab(tmp_path / "other") as other:
        other.wait_for_output(other.sbatch(script), "running")
    assert not other.processes()
    broken = SlurmLab(tmp_path / "broken", cpus=-1)
    with pytest.raises(RuntimeError, match=r"CPUs value \(-1\)"), broken:
        pass
    assert not broken.processes()
    assert slurm.run("srun", "hostname").returncode == 0


@pytest.mark.slurm
def test_batch_script_starts_again_as_often_as_it_should(slurm: SlurmLab, checkout: Path) -> None:
    """Catches ranks that are not told, an interrupted run taken for a finished one, a marker that outlives
    its life of the job, ranks that died of an early notice taken for a failure, and endless restarts."""
    asked = {
        "obey": {"RANK": "5"},
        "deaf": {},
        "fail": {"MEGAVIT_REQUEUE_ON_FAILURE": "1", "MEGAVIT_MAX_RESTARTS": "1"},
    }
    jobs = {}
    for mode, env in asked.items():
        folder = checkout / "runs" / mode
        folder.mkdir(parents=True)
        (folder / "PREEMPTED").touch()  # left over by an earlier job
        jobs[mode] = submit(slurm, checkout, mode, "--run_dir", f"runs/{mode}", env=env)
    for mode in ("obey", "deaf"):
        for rank in (0, 1):
            slurm.wait_for_output(jobs[mode], f"life 0 rank {rank}: marker False, RANK None")
        slurm.scancel("--batch", "--signal=USR1", jobs[mode])
    ends = {mode: slurm.wait(job) for mode, job in jobs.items()}
    said = {mode: slurm.output(job) for mode, job in jobs.items()}
    for mode, end in ends.items():
        expected = ("FAILED", "7:0") if mode == "fail" else ("COMPLETED", "0:0")
        assert (end["JobState"], end["ExitCode"]) == expected, said[mode]
        assert end["Restarts"] == "1" and "life 1 rank 1: marker False" in said[mode], said[mode]
    assert "rank 0 obeys SIGUSR1" in said["obey"] and "rank 1 obeys SIGUSR1" in said["obey"]
    assert "has saved and stopped on request; requeueing" in said["obey"]
    assert "before they could save; requeueing" in said["deaf"]
    assert "failed with code 7" in said["fail"] and "not requeued after 1 restarts" in said["fail"]


@pytest.mark.slurm
def test_batch_script_hands_on_failures(slurm: SlurmLab, checkout: Path) -> None:
    """Catches an exit code that gets lost, ranks that wait for a dead one, and restarts nobody asked for."""
    fail = submit(slurm, checkout, "fail", "--run_dir", "runs/fail-once")
    lose = submit(slurm, checkout, "lose", "--run_dir", "runs/lose")
    ended = slurm.wait(fail)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "7:0", "0")
    ended = slurm.wait(lose)  # srun's code is the largest: that of the TERM which it sent to rank 0
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "143:0", "0")
    assert "task 1: Exited with exit code 7" in slurm.output(lose)


@pytest.mark.slurm
def test_batch_script_lets_scancel_be_the_end(slurm: SlurmLab, checkout: Path, tmp_path: Path) -> None:
    """Catches a cancelled run that saves, as it should, and thereupon rises again: also when SLURM's TERM
    comes to what the batch script runs after the ranks, and when the controller does not answer at once."""
    squeue = tmp_path / "squeue"
    lines = ["#!/bin/bash", "kill -TERM $$", "[ -e busy ] || { touch busy; exit 1; }"]
    squeue.write_text("\n".join([*lines, f'exec {shutil.which("squeue")} "$@"', ""]))
    squeue.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = submit(slurm, checkout, "obey", "--run_dir", "runs/cancelled", env=path)
    for rank in (0, 1):
        slurm.wait_for_output(job, f"life 0 rank {rank}")
    slurm.scancel(job)
    slurm.wait_for_output(job, "SLURM is ending the job")
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    assert "rank 0 obeys SIGTERM" in slurm.output(job) and "requeueing" not in slurm.output(job)
    assert (checkout / "busy").exists()


@pytest.mark.slurm
def test_batch_script_refuses_what_could_not_resume(slurm: SlurmLab, checkout: Path, tmp_path: Path) -> None:
    """Catches a run without a folder to come back to, and a submission from elsewhere that ends in python's
    words."""
    nameless = submit(slurm, checkout, "done")
    assert slurm.wait(nameless)["ExitCode"] == "2:0"
    assert "error: --run_dir is missing" in slurm.output(nameless)
    words = [checkout / "launch" / "slurm" / "train.sbatch", "--mode", "done", "--run_dir", "x"]
    lost = slurm.sbatch(*words, options=ONE_RANK_A_NODE, cwd=tmp_path)
    assert slurm.wait(lost)["ExitCode"] == "2:0"
    assert "submit from the checkout's root" in slurm.output(lost)
    by_hand = subprocess.run(
        ["bash", str(words[0]), "--run_dir", "x"], cwd=checkout, text=True, capture_output=True
    )
    assert by_hand.returncode == 2 and "start it with sbatch" in by_hand.stderr


@pytest.mark.slurm
def test_22b_script_is_train_sbatch_with_other_defaults(slurm: SlurmLab, checkout: Path) -> None:
    """Catches a script that looks for its other half beside SLURM's copy, or whose flags beat the user's."""
    options = [*ONE_RANK_A_NODE, "--cpus-per-task=2"]
    flags = ["--run_dir=runs/mine", "--data.shards", "s-*.tar"]
    job = submit(slurm, checkout, "done", *flags, script="train_22b.sbatch", options=options)
    assert slurm.wait(job)["JobState"] == "COMPLETED", slurm.output(job)
    output = slurm.output(job)
    assert "--config launch/recipes/vit_22b_jft.yaml" in output and "run folder runs/mine" in output
    assert output.index("--run_dir runs/vit_22b") < output.index(f"--mode done {' '.join(flags)}")


@pytest.mark.dist
def test_hosts_are_apart_and_answer_pdsh(hosts: HostsLab) -> None:
    """Catches hosts that see each other's processes (a launcher's pkill would end all), share a name or a
    shared memory, or are not reached by name."""
    shell = "hostname; cat /proc/[0-9]*/comm | sort -u | grep -c -e slurmctld -e pytest; ls /dev/shm | wc -l"
    done = hosts.run("pdsh", "-S", "-w", ",".join(hosts.hosts), shell)
    for host in hosts.hosts:
        said = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith(host)]
        assert said == [host, "0", "0"], done


@pytest.mark.dist
def test_a_cut_host_falls_silent_and_comes_back(hosts: HostsLab) -> None:
    """Catches a cut that ends connections, as a crash would, or that also cuts the other host."""
    ticks = hosts.head(
        ["ssh", "h2", "while :; do echo tick; sleep 0.1; done"], stdout=subprocess.PIPE, text=True
    )
    assert ticks.stdout is not None and ticks.stdout.readline() == "tick\n"
    reach = ["ssh", "-o", "ConnectTimeout=1"]
    hosts.cut("h2")
    assert hosts.run(*reach, "h2", "true").returncode == 255
    assert hosts.run(*reach, "h1", "true").returncode == 0
    assert ticks.poll() is None
    hosts.restore("h2")
    assert ticks.stdout.readline() == "tick\n"
    assert hosts.run(*reach, "h2", "true").returncode == 0


@pytest.mark.dist
def test_a_process_of_a_host_is_found_and_ends_with_its_lab(hosts: HostsLab, tmp_path: Path) -> None:
    """Catches a fault injected into the wrong process, and hosts, or what runs on them, that outlive their
    lab or end with another."""
    sleeper = hosts.head(["ssh", "h1", "exec sleep 61"])
    with HostsLab(tmp_path / "other", count=1) as other:
        survivor = other.head(["ssh", "h1", "exec sleep 61"])
        while not hosts.pids("h1", "sleep 61") or not other.pids("h1", "sleep 61"):
            assert sleeper.poll() is None and survivor.poll() is None
        (pid,) = [pid for pid in hosts.pids("h1", "sleep 61") if "sshd" not in _command(pid)]
        os.kill(pid, signal.SIGKILL)
        assert sleeper.wait(timeout=10) == 255  # a command ended by a signal has no code of its own
        assert other.pids("h1", "sleep 61")
        ended = other.pids("h1") + other.pids("head")
    assert survivor.wait(timeout=10) != 0
    assert not any(_command(pid) for pid in ended)
    assert hosts.run("ssh", "h1", "true").returncode == 0


def _command(pid: int) -> str:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_text().replace("\0", " ") if path.exists() else ""
