"""Injects faults into real training jobs and measures what they cost: `python -m tests.faults [--saves N]
[--task TASK] [NAME ...]`.

Prints a Markdown table: what happened, seconds until every process of the job was gone, steps that had to be
done again, and whether the resumed run's losses equal an uninterrupted run's to the bit. Each job is two
ranks under the `deepspeed` launcher, ZeRO-3, with a checkpoint every few steps.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megavit.data.write import digits_splits, write_splits
from megavit.train.checkpoint.folder import checkpoints_of, committed, find_latest
from tests.data.shards import flip_bit, reading_hangs, truncate
from tests.disks import fill, small_disk
from tests.jobs import EVERY, LIMIT_S, RANKS, STEPS, TIMEOUT_S, HostsJob, Job
from tests.lab.hosts import HostsLab, hosts_missing
from tests.tasks.dense_data import SIDE, write_dense
from tests.train.runs import steps_of


@dataclass
class Outcome:
    """One line of the table."""

    fault: str
    happened: str
    gone_s: float | None
    lost_steps: int
    equal: str

    def row(self) -> str:
        gone = "still running" if self.gone_s is None else f"{self.gone_s:.1f}"
        return f"| {self.fault} | {self.happened} | {gone} | {self.lost_steps} | {self.equal} |"


HEADER = (
    "| fault | what happened | s until all processes were gone | steps done again | "
    "resumed = uninterrupted |\n|---|---|---|---|---|"
)


# What the jobs train: a recipe, and flags. The heads stand on a frozen trunk, of the seed's weights.
_DENSE = ("--init_from=", "--model.name", "vit_tiny", "--model.image_size", str(SIDE))
_DENSE += ("--ds.train_batch_size", "32", "--ds.train_micro_batch_size_per_gpu", "16")
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "classify": ("digits", ()),
    "depth": ("depth_dpt", ("--task.head_width", "8", *_DENSE)),
    "segment": ("ade20k_linear", ("--task.classes", "3", *_DENSE)),
}


class Faults:
    """The faults, each a method; `whole` is the run that has none. Those of other tasks than `classify` have
    one shard only."""

    def __init__(self, folder: Path, saves: int = 20, task: str = "classify"):
        self.folder, self.saves, self.task = folder, saves, task
        self.data = folder / "data"
        if task == "classify":
            write_splits(digits_splits(), self.data, shard_size=100, workers=2)
        else:
            write_dense(self.data)
        self._whole: dict[tuple[str, ...], list[tuple[int, float]]] = {}
        self._random = random.Random(0)

    def whole(self, *flags: str) -> list[tuple[int, float]]:
        """Losses of an uninterrupted run with these flags."""
        if flags not in self._whole:
            job = self.job(f"whole-{len(self._whole)}", *flags)
            _, code = job.finish()
            assert code == 0, job.output.read_text()[-3000:]
            self._whole[flags] = job.losses()
        return self._whole[flags]

    def job(self, name: str, *flags: str) -> Job:
        recipe, own = TASKS[self.task]
        return Job(self.folder / name, self.data, *own, *flags, recipe=recipe)

    def end(
        self, job: Job, fault: str, happened: str, gone_s: float | None, flags: tuple[str, ...] = ()
    ) -> Outcome:
        """Go on after the fault, and compare."""
        reached = job.step()
        resumed, code = job.finish()
        equal = code == 0 and job.losses() == self.whole(*flags)
        return Outcome(fault, happened, gone_s, reached - resumed, "yes" if equal else "NO")

    def _kill(self, name: str, fault: str, choose: Callable[[Job], int], happened: str) -> Outcome:
        job = self.job(name)
        job.start()
        job.wait_for(lambda: job.step() >= EVERY + 2)
        os.kill(choose(job), signal.SIGKILL)
        gone = job.wait_until_gone()
        return self.end(job, fault, happened, gone)

    def kill_rank(self) -> Outcome:
        happened = "the other rank sees a closed connection, the launcher ends with an error"
        return self._kill(
            "kill-rank", "SIGKILL of rank 1 while computing", lambda job: job.ranks()[1], happened
        )

    def kill_rank_0(self) -> Outcome:
        return self._kill("kill-rank-0", "SIGKILL of rank 0", lambda job: job.ranks()[0], "the same")

    def kill_data_worker(self) -> Outcome:
        happened = "its rank names the sample it was reading and ends, the launcher ends the other"
        return self._kill(
            "kill-worker", "SIGKILL of a data worker", lambda job: job.data_workers()[0], happened
        )

    def kill_in_save(self) -> Outcome:
        """Many lives of one run, each ended at a random moment of a save."""
        shape = ("--model.dim", "128", "--model.mlp_dim", "512")
        flags = (*shape, "--checkpoint.every", "2", "--max_steps", str(20 + 4 * self.saves))
        fault = f"SIGKILL of a rank during a save, {self.saves} random moments in a row"
        happened = "the newest committed checkpoint is used, the half-written one is deleted"

        def in_save(job: Job) -> None:
            job.wait_for(job.has_begun)
            saved = len(job.saves())
            folder = checkpoints_of(job.run_dir)
            job.wait_for(lambda: list(folder.glob("*.partial")) or len(job.saves()) > saved)
            time.sleep(self._random.uniform(0, 0.03))

        return self._many_lives("kill-in-save", fault, happened, in_save, flags)

    def kills(self) -> Outcome:
        """Many lives of one run, each ended at a random moment, also while it starts."""

        def anytime(job: Job) -> None:
            if self._random.random() < 0.8:
                job.wait_for(job.has_begun)
            else:
                job.wait_for(lambda: len(job.ranks()) == RANKS)
            time.sleep(self._random.uniform(0, 1.0))

        fault = f"SIGKILL of a rank, {self.saves} random moments in a row"
        flags = ("--checkpoint.every", "1", "--max_steps", str(40 + 10 * self.saves))
        return self._many_lives("kills", fault, "each life goes on from the last commit", anytime, flags)

    def _many_lives(
        self, name: str, fault: str, happened: str, moment: Callable[[Job], None], flags: tuple[str, ...]
    ) -> Outcome:
        job = self.job(name, *flags)
        lost, slowest = 0, 0.0
        for _ in range(self.saves):
            job.start()
            moment(job)
            os.kill(self._random.choice(job.ranks()), signal.SIGKILL)
            gone = job.wait_until_gone()
            if gone is None:
                return Outcome(fault, "processes stayed", None, 0, "NO")
            slowest = max(slowest, gone)
            latest = find_latest(job.run_dir)
            lost = max(lost, job.step() - (int(latest.name[5:]) if latest else 0))
        outcome = self.end(job, fault, happened, slowest, flags)
        outcome.lost_steps = lost
        return outcome

    def full_disk(self) -> Outcome:
        """With a shard missing, so that there are bad samples to record in every step."""
        flags = self._copied_data("incomplete")
        (self.folder / "incomplete" / "train-000003.tar").unlink()
        job = self.job("full-disk", *flags)
        with small_disk(job.run_dir, "20m"):
            job.start()
            job.wait_for(lambda: job.step() >= EVERY + 1)
            filler = job.run_dir / "filler"
            with open(filler, "wb", buffering=0) as file:
                fill(file)
            job.wait_for(lambda: job.has_said("CHECKPOINT NOT SAVED", "bad_samples.jsonl cannot be written"))
            filler.unlink()
            assert job.process
            code = job.process.wait(timeout=LIMIT_S)
            gone = job.wait_until_gone()
            logged = dict(job.losses())  # without the lines for which there was no room
            equal = code == 0 and STEPS in logged and logged.items() <= dict(self.whole(*flags)).items()
            equal = equal and job.has_said("bad_samples.jsonl can be written again")
            happened = (
                "the save fails and is reported, training goes on although bad samples cannot be recorded, "
                "later saves succeed"
            )
            return Outcome("disk full during a save", happened, gone, 0, "yes" if equal else "NO")

    def _damage(self, name: str, fault: str, harm: Callable[[Path], None], happened: str) -> Outcome:
        job = self.job(name)
        job.start()
        job.wait_for(lambda: job.step() >= 2 * EVERY + 2)
        for pid in job.ranks():
            os.kill(pid, signal.SIGKILL)
        gone = job.wait_until_gone()
        harm(committed(checkpoints_of(job.run_dir))[-1] / "rank_00001.safetensors")
        reached = job.step()
        _, code = job.finish()
        said = job.output.read_text()
        refused = code != 0 and "rank_00001.safetensors" in said and "on_damage previous" in said
        job.flags = (*job.flags, "--checkpoint.on_damage", "previous")
        resumed, code = job.finish()
        equal = refused and code == 0 and job.losses() == self.whole()
        return Outcome(fault, happened, gone, reached - resumed, "yes" if equal else "NO")

    def flipped_bit(self) -> Outcome:
        return self._damage(
            "flipped-bit",
            "one bit flipped in the newest checkpoint",
            lambda path: flip_bit(path, path.stat().st_size // 2),
            "the start names the file; with `on_damage previous` it goes on from the one before",
        )

    def truncated_file(self) -> Outcome:
        return self._damage(
            "truncated", "a file of it truncated", lambda path: truncate(path, 1000), "the same"
        )

    def deleted_shard(self) -> Outcome:
        job = self.job("deleted-shard", *self._copied_data("less"))
        job.start()
        job.wait_for(lambda: job.step() >= EVERY + 2)
        (self.folder / "less" / "train-000003.tar").unlink()
        assert job.process
        open_until_the_end = job.process.wait(timeout=LIMIT_S) == 0 and job.losses() == self.whole()
        job.flags = (*job.flags, "--max_steps", str(STEPS + 10))
        resumed, code = job.finish()
        bad = steps_of(job.run_dir)[-1]["bad_samples"]
        went_on = code == 0 and resumed == STEPS and bad > 0
        happened = (
            "open shards are read to the end; the next start, which has to open it, gives its samples "
            f"weight 0 and records them ({bad} in 10 steps)"
        )
        equal = "while it is open" if open_until_the_end and went_on else "NO"
        return Outcome("a training shard deleted", happened, 0.0, 0, equal)

    def _copied_data(self, name: str) -> tuple[str, ...]:
        """Flags for training on a copy of the shards, of which some may be harmed."""
        shutil.copytree(self.data, self.folder / name)
        manifest = str(self.folder / name / "train.manifest.json")
        return ("--data.max_bad_fraction", "1", "--data.shards", manifest)

    def hanging_shard(self) -> Outcome:
        flags = self._copied_data("hanging")
        shard = self.folder / "hanging" / "train-000003.tar"
        job = self.job("hanging-shard", *flags)
        with reading_hangs([shard]):
            job.start()
            job.wait_for(lambda: job.has_said("no progress for"))
            gone = job.wait_until_gone()
        named = job.has_said("last read sample", shard.name)
        happened = (
            f"after --timeout_s {TIMEOUT_S} the watchdogs say what the data workers were reading and end the "
            "ranks; seconds from there on"
        )
        return self.end(job, "reading a shard hangs", happened if named else "no report", gone)

    def stopped_rank(self) -> Outcome:
        job = self.job("stopped-rank")
        job.start()
        job.wait_for(lambda: job.step() >= EVERY + 2)
        os.kill(job.ranks()[1], signal.SIGSTOP)
        gone = job.wait_until_gone()
        happened = f"the other rank's watchdog prints its stacks after --timeout_s {TIMEOUT_S} and ends it"
        if "no progress for" not in job.output.read_text():
            happened = "no report"
        return self.end(job, "rank 1 stops for ever (SIGSTOP)", happened, gone)

    def term_to_launcher(self) -> Outcome:
        job = self.job("term")
        job.start()
        job.wait_for(lambda: job.step() >= EVERY + 2)
        assert job.process
        os.killpg(job.process.pid, signal.SIGTERM)
        gone = job.wait_until_gone()
        marker = (job.run_dir / "PREEMPTED").exists()
        happened = "the ranks finish the step, save and exit 0" if marker else "no save"
        return self.end(job, "TERM to the launcher's process group", happened, gone)

    def link_down(self) -> Outcome:
        if reason := hosts_missing():
            return Outcome("a host's link down", f"not tried: {reason}", None, 0, "NO")
        with HostsLab(self.folder / "hosts") as lab:
            job = HostsJob(self.folder / "link-down", self.data, lab)
            job.start()
            job.wait_for(lambda: job.step() >= EVERY + 2)
            lab.cut("h2")
            started = time.monotonic()
            while job.pids() and time.monotonic() - started < LIMIT_S:
                time.sleep(0.05)
            ranks_gone = time.monotonic() - started
            assert job.process
            job.process.wait(timeout=LIMIT_S)
            lab.restore("h2")
            happened = (
                f"all ranks end by their watchdogs (--timeout_s {TIMEOUT_S}), then ssh by its keepalive"
            )
            return self.end(job, "a host's link down (two hosts, pdsh)", happened, ranks_gone)


NAMES = (
    "kill_rank kill_in_save kill_rank_0 kill_data_worker kills stopped_rank hanging_shard full_disk "
    "flipped_bit truncated_file deleted_shard link_down term_to_launcher"
).split()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"faults to inject ({', '.join(NAMES)})")
    parser.add_argument("--task", choices=TASKS, default="classify", help="what the jobs train (classify)")
    parser.add_argument("--saves", type=int, default=20, help="random moments in a row (20)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown fault {sorted(unknown)[0]!r}; there are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), arguments.saves, arguments.task)
        print(HEADER, flush=True)
        outcomes = []
        for name in arguments.names or NAMES:
            outcomes.append(getattr(faults, name)())
            print(outcomes[-1].row(), flush=True)
    return 1 if any(outcome.equal == "NO" or outcome.gone_s is None for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
