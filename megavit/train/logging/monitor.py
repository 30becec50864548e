"""What a run writes for people: a console line, log.jsonl, TensorBoard.

The only importer of SummaryWriter. Only the main rank writes; the others hold a `Monitor` that does nothing.
A disk that is full costs log lines, never the run.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from megavit.data.bad import BAD_SAMPLES_FILE
from megavit.model.count import num_params, train_flops
from megavit.parallel.mesh import Mesh
from megavit.tasks.task import Pictures
from megavit.train.checkpoint.saver import Progress, Saved
from megavit.train.config import RunConfig, flat_config, plain_config
from megavit.train.ds_config import uses_bf16
from megavit.train.logging.environment import environment
from megavit.train.logging.log_file import LogFile, discard_rows, read_rows
from megavit.train.logging.meters import memory_gib, rank_peak_flops
from megavit.train.logging.pictures import draw_pictures, save_pictures
from megavit.train.schedule import lr_at

if TYPE_CHECKING:
    from megavit.train.evaluation import Evaluation

LOG_FILE = "log.jsonl"
_PROGRESS_S = 15.0
_SLOW_STEP_S = 10.0
BASELINES_FILE = "baselines.json"
_HEADLINES = ("knn20_top1", "fewshot10_top1", "linear_top1")  # one number of each protocol of --eval.tasks


class Monitor:
    """Logs of one run; `log_step` is called every step and writes every `log_every`-th.

    Speed is over whole optimizer steps (data, communication, optimizer, logging), the median of the steps
    since the last line. MFU is three forwards of matmul FLOPs over the device's dense bf16 peak, or, where
    that does not apply (float32, unknown GPU), over the matmul rate measured at start; on a CPU there is
    none.
    """

    def __init__(
        self,
        run_dir: Path,
        run: RunConfig,
        ds_config: dict[str, Any],
        mesh: Mesh,
        ds_overrides: Mapping[str, Any] | None = None,
    ):
        """Touches no file: a start that fails leaves the run folder as it was. `open` comes next."""
        self.run, self.mesh = run, mesh
        self._ds_overrides = dict(ds_overrides or {})
        self._run_dir, self._ds_config = run_dir, ds_config
        self.global_batch: int = ds_config["train_batch_size"]
        dtype = torch.bfloat16 if uses_bf16(ds_config) else torch.float32
        peak_flops = rank_peak_flops(mesh, dtype)
        self.peak_flops = peak_flops * mesh.world_size if peak_flops else None
        self._step_times: list[float] = []
        self._data_times: list[float] = []
        self._enabled = False  # once opened, on the main rank
        self._board: Any = None
        self._next_progress_s = _PROGRESS_S
        self._first_step: threading.Timer | None = None

    def open(self, first_step: int = 0) -> None:
        """Write the run's configuration into its folder and go on with the logs after step `first_step`."""
        run_dir, run, ds_config, mesh = self._run_dir, self.run, self._ds_config, self.mesh
        if not mesh.is_main:
            return
        self._enabled = True
        run_dir.mkdir(parents=True, exist_ok=True)
        overrides = {"ds": self._ds_overrides} if self._ds_overrides else {}
        resolved = yaml.safe_dump(plain_config(run) | overrides, sort_keys=False)
        (run_dir / "config.yaml").write_text(resolved)
        (run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
        (run_dir / "environment.json").write_text(json.dumps(environment(mesh), indent=2) + "\n")
        self._purge_step = first_step + 1 if first_step else None
        discard_rows(run_dir / BAD_SAMPLES_FILE, first_step, self.say)
        self._log = LogFile(run_dir / LOG_FILE, self.say)
        self._log.rewind(first_step)
        if not first_step:
            self._on_board(lambda board: board.add_text("config/run", f"```yaml\n{resolved}```"))
            text = f"```json\n{json.dumps(ds_config, indent=2)}\n```"
            self._on_board(lambda board: board.add_text("config/deepspeed", text))
            self._on_board(lambda board: board.add_custom_scalars(_CHARTS))
        self.say(
            f"{run.model.name}: {num_params(run.model) / 1e6:,.1f}M parameters, "
            f"{train_flops(run.model) / 1e9:,.2f} GFLOP per image and step; {mesh.describe()}; "
            f"global batch {self.global_batch} = {ds_config['train_micro_batch_size_per_gpu']} x "
            f"{ds_config['gradient_accumulation_steps']} accumulation x {mesh.dp_size} dp; "
            f"run folder {run_dir}"
        )
        warmup, cooldown = run.schedule.warmup_steps, run.schedule.cooldown_steps
        if warmup + cooldown > run.max_steps:
            top = max(lr_at(step, run.max_steps, 1.0, run.schedule) for step in range(run.max_steps))
            self.say(
                f"note: warm-up {warmup} + cool-down {cooldown} exceed max_steps {run.max_steps}: the rate "
                f"reaches only {top:.1%} of its peak (--schedule.warmup_steps, --schedule.cooldown_steps)"
            )

    def say(self, text: str) -> None:
        """Print a line on the main rank."""
        say(self.mesh, text)

    def show_pictures(self, name: str, step: int, shown: Pictures | None) -> None:
        """Captioned pictures of a micro-batch, for TensorBoard and as a PNG in the run folder."""
        if self._enabled and shown:
            sheet = draw_pictures(*shown)
            self._on_board(lambda board: board.add_image(f"pictures/{name}", sheet, step, dataformats="HWC"))
            try:
                save_pictures(sheet, self._run_dir, name, step)
            except OSError as error:
                self.say(f"note: pictures cannot be written: {error}")

    def begin_step(self, step: int) -> None:
        """Update number `step` (from 0) begins. A line if the first of this start takes long."""
        if self._first_step is None:
            why = ", in which --compile compiles the blocks" if self.run.compile else ""
            text = f"  working on step {step + 1}, the first of this start, for {_SLOW_STEP_S:.0f} s now{why}"
            self._first_step = threading.Timer(_SLOW_STEP_S, self.say, (text,))
            self._first_step.daemon = True
            self._first_step.start()

    def is_logged(self, step: int) -> bool:
        """Whether update number `step` (from 0) has a line: every `log_every`-th, the first and the last."""
        return (step + 1) % self.run.log_every == 0 or step + 1 in (1, self.run.max_steps)

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        metrics: Mapping[str, float] = {},
        lr: float,
        grad_norm: float,
        epoch: float,
        bad_samples: int,
        skipped_updates: int,
        step_time_s: float,
        data_time_s: float,
        max_logit: float | None = None,
    ) -> None:
        """Record update number `step` (from 0); it is written if `is_logged`."""
        self._end_first_step()
        self._step_times.append(step_time_s)
        self._data_times.append(data_time_s)
        done = step + 1
        if not self._enabled or not self.is_logged(step):
            return
        step_time = statistics.median(self._step_times)
        data_time = statistics.median(self._data_times)
        self._step_times.clear()
        self._data_times.clear()
        images_per_s = self.global_batch / step_time
        peak = self.peak_flops
        # Frozen parts do less than a training step's work, and tasks may do more than the trunk's.
        mfu = images_per_s * train_flops(self.run.model) / peak if peak and not self.run.freeze else None
        record = {
            "step": done,
            "loss": loss,
            **{f"train/{name}": value for name, value in metrics.items()},
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": images_per_s,
            "tokens_per_s": images_per_s * self.run.model.num_tokens,
            "mfu": mfu,
            "step_time_s": step_time,
            "data_time_s": data_time,
            "memory_gib": memory_gib(self.mesh),
            "epoch": epoch,
            "bad_samples": bad_samples,
            "skipped_updates": skipped_updates,
            "max_logit": max_logit,
        }
        self._log.write(**record)
        for tag, key in {**_TAGS, **{f"train/{name}": f"train/{name}" for name in metrics}}.items():
            if (value := record[key]) is not None:
                self._scalar(tag, value, done)
        bad = f"{bad_samples} bad  " if bad_samples else ""
        share = "" if mfu is None else f"mfu {mfu:6.1%}  "
        left = int((self.run.max_steps - done) * step_time)
        self.say(
            f"step {done:>6}/{self.run.max_steps}  loss {loss:8.4f}  lr {lr:.2e}  grad {grad_norm:7.3f}  "
            f"{images_per_s:8,.0f} img/s  {share}wait {data_time / step_time:4.0%}  "
            f"epoch {epoch:6.2f}  {bad}{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )

    def log_eval(self, step: int, name: str, found: Evaluation, probed: Mapping[str, float] = {}) -> None:
        """Record an evaluation on the validation set `name` after `step` updates, and what the protocols of
        --eval.tasks have found: all of it, but for the console line."""
        if not self._enabled:
            return
        prefix = f"eval/{name}"
        counts = {f"{prefix}/samples": found.num_samples, f"{prefix}/bad": found.num_bad}
        results = {f"{prefix}/{metric}": value for metric, value in {**found.results, **probed}.items()}
        self._log.write(step=step, eval=name, **results, **counts)
        for tag, value in results.items():
            self._scalar(tag, value, step)
        headlines = {metric: value for metric, value in probed.items() if metric in _HEADLINES}
        # Whole numbers are counts: those that are zero say nothing.
        shown = [
            f"{metric} {value}" if isinstance(value, int) else f"{metric} {value:.4f}"
            for metric, value in {**found.results, **headlines}.items()
            if not (isinstance(value, int) and value == 0)
        ]
        left_out = f"; {found.num_bad} unusable left out, see {BAD_SAMPLES_FILE}" if found.num_bad else ""
        self.say(
            f"step {step:>6}/{self.run.max_steps}  evaluation on {name}: {', '.join(shown)} "
            f"({found.num_samples} samples{left_out})"
        )

    def log_hparams(self) -> None:
        """Record the configuration with the run's final results, for TensorBoard's table of runs."""
        if not self._enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        config = flat_config(plain_config(self.run) | {"ds": self._ds_config})
        values = {key: value for key, value in config.items() if isinstance(value, str | int | float)}
        rows = [row for row in read_rows(self._run_dir / LOG_FILE) if row.get("step") == self.run.max_steps]
        found = {key: value for row in rows for key, value in row.items() if value is not None}
        counts = ("/samples", "/bad")
        results = {key: found[key] for key in found if key.startswith("eval/") and not key.endswith(counts)}
        if "loss" in found:
            results["loss/train"] = found["loss"]

        def add(board: Any) -> None:  # SummaryWriter.add_hparams makes another run of it
            for summary in hparams(values, results):
                board.file_writer.add_summary(summary)

        self._on_board(add)

    def logged_results(self, step: int, name: str) -> dict[str, float] | None:
        """The results that an evaluation on the validation set `name` after `step` updates had, from the log;
        None if there was none, or its line is lost. The same on every rank; collective over the world."""
        prefix = f"eval/{name}/"

        def find() -> dict[str, float] | None:
            rows = [row for row in read_rows(self._run_dir / LOG_FILE) if row.get("step") == step]
            found = next((row for row in rows if row.get("eval") == name), None)
            return found and {
                key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)
            }

        return self.mesh.on_main(find)

    def event(self, step: int, kind: str, **fields: Any) -> None:
        """A line of log.jsonl about something other than a step or an evaluation."""
        if self._enabled:
            self._log.write(step=step, event=kind, time=time.time(), **fields)

    def log_skipped(self, step: int, reason: str, loss: float, grad_norm: float) -> None:
        """Update number `step` (from 1) was refused."""
        self.event(step, "skipped", reason=reason, loss=loss, grad_norm=grad_norm)
        self.say(f"step {step:>6}/{self.run.max_steps}  update refused: {reason}; weights unchanged")

    def log_saved(self, saved: Saved) -> None:
        """A save has ended, well or not."""
        if not self._enabled:
            return
        fields = (
            {"path": saved.folder.name, "error": saved.error} if saved.error else {"path": saved.folder.name}
        )
        times = {"bytes": saved.bytes, "stall_s": saved.stall_s, "write_s": saved.write_s}
        self.event(saved.step, "save failed" if saved.error else "saved", **fields, **times)
        if saved.error:
            self.say(
                f"step {saved.step:>6}/{self.run.max_steps}  CHECKPOINT NOT SAVED, training goes on, the one "
                f"before is kept: {saved.error}"
            )
            return
        self._scalar("speed/checkpoint_stall_s", saved.stall_s, saved.step)
        self.say(
            f"step {saved.step:>6}/{self.run.max_steps}  saved {saved.folder.name}: "
            f"{saved.bytes / 2**30:.3g} GiB; training held up {saved.stall_s:.2g} s, "
            f"written in {saved.write_s:.2g} s"
        )
        if saved.note:
            self.say(f"note: {saved.note}")

    def show_progress(self, progress: Progress) -> None:
        """A line now and then about a save that takes long."""
        if progress.elapsed_s < self._next_progress_s - _PROGRESS_S:  # another save
            self._next_progress_s = _PROGRESS_S
        if progress.elapsed_s > self._next_progress_s:
            self._next_progress_s = progress.elapsed_s + _PROGRESS_S
            done, total = progress.bytes / 2**30, progress.total_bytes / 2**30
            self.say(f"  saving: {done:.1f} of {total:.1f} GiB of rank 0's part, {progress.elapsed_s:.0f} s")

    def evaluation_progress(self, batches: int) -> Callable[[int], None]:
        """Takes the number of batches that an evaluation has done: a line now and then if it takes long."""
        started = shown = time.monotonic()

        def show(done: int) -> None:
            nonlocal shown
            if (now := time.monotonic()) - shown >= _PROGRESS_S:
                shown = now
                self.say(f"  evaluating: {done:,} of {batches:,} batches, {now - started:.0f} s")

        return show

    def _end_first_step(self) -> None:
        if self._first_step is not None:
            self._first_step.cancel()

    def close(self) -> None:
        self._end_first_step()
        if self._enabled:
            self._on_board(lambda board: board.close())
            self._log.close()

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: what was logged after it is set aside."""
        if self._enabled:
            discard_rows(self._run_dir / BAD_SAMPLES_FILE, step, self.say)
            self._log.rewind(step)
            self._on_board(lambda board: board.close())
            self._board, self._purge_step = None, step + 1

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._on_board(lambda board: board.add_scalar(tag, value, step))

    def _on_board(self, action: Callable[[Any], None]) -> None:
        """Write to TensorBoard. Its writer does not survive a failed write: it is replaced at the next
        one."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._board is None:
                self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=self._purge_step)
                self._purge_step = None
            action(self._board)
        except OSError as error:
            self._board = None
            self.say(f"note: TensorBoard's file cannot be written: {error}")


# TensorBoard's tab of custom scalars, in this order: the loss comes first. Its other tabs have the tags in
# alphabetical order.
_CHARTS = {
    "loss": {
        "loss": ["Multiline", ["loss/train", "eval/.*/loss"]],
        "evaluation": ["Multiline", ["eval/.*/(?!loss$)"]],
    },
    "optimization": {
        "learning rate": ["Multiline", ["optim/lr"]],
        "gradient norm": ["Multiline", ["optim/grad_norm"]],
        "attention": ["Multiline", ["attention/max_logit"]],
    },
    "speed": {
        "images per second": ["Multiline", ["speed/images_per_s"]],
        "seconds per step": ["Multiline", ["speed/step_time_s", "speed/data_time_s"]],
        "MFU": ["Multiline", ["speed/mfu"]],
        "memory": ["Multiline", ["memory/peak_gib"]],
    },
}

_TAGS = {
    "loss/train": "loss",
    "optim/lr": "lr",
    "optim/grad_norm": "grad_norm",
    "speed/images_per_s": "images_per_s",
    "speed/tokens_per_s": "tokens_per_s",
    "speed/mfu": "mfu",
    "speed/step_time_s": "step_time_s",
    "speed/data_time_s": "data_time_s",
    "memory/peak_gib": "memory_gib",
    "data/epoch": "epoch",
    "data/bad_samples": "bad_samples",
    "optim/skipped_updates": "skipped_updates",
    "attention/max_logit": "max_logit",
}


def say(mesh: Mesh, text: str) -> None:
    """Print a line on the main rank. Whoever reads it may be gone (a launcher that was ended): that must not
    keep the ranks from saving."""
    if not mesh.is_main:
        return
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def choose_run_dir(run: RunConfig, mesh: Mesh) -> Path:
    """The run's folder, the same on every rank: the one given, or a new one named after the time.
    Collective."""
    name = run.run_dir or f"runs/{run.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(mesh.broadcast(name))


def reference_results(shards: str, metric: str, result: float) -> str:
    """The final result beside those recorded with the validation shards (`baselines.json`), best first."""
    path = Path(shards).parent / BASELINES_FILE
    known: dict[str, float] = {}
    sign = -1
    if path.is_file():
        recorded = json.loads(path.read_text())
        same = recorded.get("metric", metric) == metric and Path(shards).name.startswith(
            f"{recorded['split']}-"
        )
        known = recorded["results"] if same else {}
        sign = -1 if recorded.get("higher_is_better", True) else 1
    rows = sorted([*known.items(), ("this run", result)], key=lambda row: sign * row[1])
    return "\n".join(
        [
            f"final {metric} on the validation shards:",
            *(f"  {name:<24} {value:.4f}" for name, value in rows),
        ]
    )
