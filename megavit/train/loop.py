"""The training run from first to last: read `Trainer.train` to know what MegaViT does."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megavit.data.bad import BAD_SAMPLES_FILE, BadSample, BadSamples, TooManyBadSamples
from megavit.data.lanes import DataState, mix
from megavit.data.loader import Batch, EvalLoader
from megavit.data.manifest import DATA_FILE
from megavit.explain.while_training import explained
from megavit.parallel.fp8 import check_device
from megavit.parallel.mesh import Mesh
from megavit.tasks.task import DeviceBatch, Training, make_task
from megavit.train.checkpoint.checkpoint import Checkpoint
from megavit.train.checkpoint.export import export_weights, load_exported
from megavit.train.checkpoint.folder import open_step
from megavit.train.checkpoint.frozen import check_digest, frozen_of, frozen_reader
from megavit.train.checkpoint.resume import check_resumable, describe_changes
from megavit.train.checkpoint.run_lock import RunLock
from megavit.train.checkpoint.saver import SaveError, Saver, open_latest, restore
from megavit.train.checkpoint.shared_io import run_together
from megavit.train.config import RunConfig, plain_config, with_max_steps
from megavit.train.ds_config import batch_advice, resolve_ds_config, slow_parts, uses_bf16
from megavit.train.engine import Engine
from megavit.train.evaluation import evaluate
from megavit.train.guard import Guard, TooManySkipped
from megavit.train.inputs import (
    check_replicas,
    eval_loader,
    gather_bad,
    open_data,
    start_counts,
    to_samples,
    train_loader,
)
from megavit.train.logging.attention import learns_attention, max_attention
from megavit.train.logging.log_file import LogFile
from megavit.train.logging.monitor import LOG_FILE, Monitor, choose_run_dir, reference_results, say
from megavit.train.preempt import PREEMPTED_FILE, StopRequest, stop_signals_blocked
from megavit.train.schedule import lr_at
from megavit.train.step import PendingStep, StepResult
from megavit.train.watchdog import Watchdog

if TYPE_CHECKING:
    from megavit.evaluate.while_training import Probes

_NUM_SHOWN = 8  # pictures of a micro-batch
_MAX_ROLLBACKS = 3  # to one checkpoint


class UselessRun(RuntimeError):
    """The run has come to its end, but has nothing to show for it; its state is saved, and not exported."""


class OutOfMemory(RuntimeError):
    """This rank's device, or its host, has no memory left; the message says what it was doing."""


@dataclass
class _Taken:
    """An optimizer step that has been started: what its log line will need."""

    step: int  # from 0
    pending: PendingStep
    lr: float
    epoch: float
    bad: list[BadSample]  # of this rank
    data_time_s: float
    step_time_s: float = 0.0


def train(
    run: RunConfig,
    raw_ds_config: dict[str, Any],
    mesh: Mesh,
    stop: StopRequest,
    ds_overrides: Mapping[str, Any] | None = None,
) -> float | None:
    """Train `run` on this rank of `mesh`, from its newest checkpoint or the start on; see `Trainer`."""
    trainer = Trainer(run, raw_ds_config, mesh, ds_overrides)
    try:
        trainer.build()
        result = trainer.train(stop)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory while {trainer.watchdog.phase}: {str(error).partition(chr(10))[0]}; lower "
            f"train_micro_batch_size_per_gpu, use --recompute, a higher ZeRO stage, more ranks or "
            f"--tensor_parallel_size (launch/plan.py predicts what fits)"
        ) from error
    finally:
        trainer.close()
    trainer.release()  # after an error, with a save under way perhaps, the end of the process does it
    return result


class Trainer:
    """A run on one rank. Collective: every rank calls the same methods in the same order.

    Everything that can fail early (shards, batch arithmetic, checkpoints) is touched before the model is
    built. `ds_overrides` are the values of `raw_ds_config` that the command line replaced: the run folder
    keeps them.
    """

    _unread: _Taken | None  # the step whose result the device still owes
    _unlogged: _Taken | None  # the step that has been read, and not been accounted for
    _some_rank_stops: bool  # as far as has been read
    _is_under_way: bool  # a step of this start has been taken

    def __init__(
        self,
        run: RunConfig,
        raw_ds_config: dict[str, Any],
        mesh: Mesh,
        ds_overrides: Mapping[str, Any] | None = None,
    ):
        self.run, self.mesh = run, mesh
        self.ds_config = resolve_ds_config(raw_ds_config, mesh.dp_size, mesh.device.type)
        if run.model.matmul == "fp8":
            check_device(mesh.device, bf16=uses_bf16(self.ds_config))
        if advice := batch_advice(self.ds_config, raw_ds_config):
            self._say(f"warning: {advice}")
        self.global_batch: int = self.ds_config["train_batch_size"]
        self.peak_lr: float = self.ds_config["optimizer"]["params"]["lr"]
        self.run_dir = choose_run_dir(run, mesh)
        self.lock = RunLock(self.run_dir, self._say)
        mesh.on_main(self.lock.acquire)
        self.saved = open_latest(self.run_dir, run.checkpoint.on_damage, mesh, self._say)
        self.task = make_task(run.task, run.model, run.data)
        self._fields = self.task.fields()
        self._shards = open_data(run.data.shards, run.data, mesh)
        self._num_samples = int(self._shards.num_samples * run.data.share)
        self.run = run = self._with_max_steps(run)
        self.last_step = run.stop_at_step or run.max_steps
        if self.saved:
            check_resumable(self.saved, run)
        mesh.on_main(lambda: self.task.open(self.run_dir))
        dtype = torch.bfloat16 if uses_bf16(self.ds_config) else torch.float32
        mesh.on_main(lambda: self.task.reserve(self._num_samples, dtype))
        left_out = self.saved.state["left_out"] if self.saved else ()
        self._take_position(self.saved, [(first, last) for first, last in left_out])
        self._rollbacks: Counter[int] = Counter()
        self._saved_bytes = 0
        self.eval_loaders = {
            one: eval_loader(one.shards, self.task, run.data, self.ds_config, mesh)
            for one in run.data.val_sets
        }
        self.probes = _probes(run, mesh) if run.eval.names else None
        self.monitor = Monitor(self.run_dir, run, self.ds_config, mesh, ds_overrides)
        name = f"rank {mesh.global_rank}"
        self.watchdog = Watchdog(run.timeout_s, name, self._reading, self._heartbeat, run.heartbeat_s)

    def _with_max_steps(self, run: RunConfig) -> RunConfig:
        found = with_max_steps(run, self._num_samples, self.global_batch)
        if run.epochs:
            self._say(
                f"epochs {run.epochs:g} of {self._num_samples:,} samples are max_steps "
                f"{found.max_steps:,} with a global batch of {self.global_batch:,}"
            )
        return found

    def build(self) -> None:
        """The engine, with the weights and moments of the checkpoint, of --init_from, or of the seed."""
        run, mesh, saved = self.run, self.mesh, self.saved
        self.watchdog.at("building the engine")
        for note in slow_parts(self.ds_config, mesh.device.type):
            self._say(f"note: {note}")
        with stop_signals_blocked():
            self.engine = Engine(run, self.ds_config, mesh, initialise=saved is None)
        if self.probes:
            self.probes.check(self.engine)
        if saved:
            self.watchdog.at(f"restoring {saved.folder.name}")
            self._restore(saved)
            changes = describe_changes(saved, run, self.ds_config)
            self.monitor.open(self.step)
            self.monitor.event(self.step, "resumed", path=saved.folder.name, changes=changes)
            self._say(f"going on after step {self.step}, saved {saved.saved_at} as {saved.folder.name}")
            for change in changes:
                self._say(f"  changed: {change}")
        elif run.init_from:
            loaded = load_exported(Path(run.init_from), self.engine.state, run.model)
            self.monitor.open()
            self.monitor.event(0, "initialised", what=loaded)
            self._say(loaded)
        else:
            self.monitor.open()
        if not saved:
            self.watchdog.at("reading the frozen weights")
            self.frozen = frozen_of(run.init_from, self.engine.state.frozen_layouts, run.model, mesh)
        frozen = f"{self.frozen.digest}{f' seed {run.seed}' if self.frozen.initial else ''}"
        training = Training(self._shards.num_samples, self._shards.digest, frozen)
        self.task.begin(self.engine.module, training)
        self.saver = Saver(self.run_dir, run.checkpoint, mesh, self.engine.state, self.step)
        if mesh.is_main:
            self.loader.save_order(self.run_dir / DATA_FILE, self.step)
            self.task.keep(self.run_dir)
            (self.run_dir / PREEMPTED_FILE).unlink(missing_ok=True)

    def _restore(self, saved: Checkpoint) -> None:
        """The weights, moments and update counts of a checkpoint, and the frozen weights that it names."""
        run, mesh, state = self.run, self.mesh, self.engine.state
        self.frozen = saved.frozen
        folder = run.init_from or saved.frozen.folder
        if saved.frozen.exported:
            check_digest(saved.frozen, folder, mesh)
        with frozen_reader(saved.frozen, folder, run.model, state.read_initial) as read_frozen:
            restore(saved, state, mesh, read_frozen)

    def train(self, stop: StopRequest) -> float | None:
        """Train to the last step, or until some rank is asked to `stop`; the state is saved either way.

        Returns the final result (`Task.metric`) on the first validation set, or None without one or before
        the end. Raises SaveError when
        that save failed, UselessRun when there is nothing to export, TooManySkipped and TooManyBadSamples,
        after saving, when the run needs a person.
        """
        if self.step >= self.last_step:
            self._say(f"nothing is left to do: the run is at step {self.step} of {self.last_step}")
        result = self._evaluate_if_due(resuming=True)
        while self.step < self.last_step:
            taken = self._take_step(stop)
            if taken is None:
                continue  # nothing depends on what became of it, which is read while the device goes on
            if taken.refused and self.guard.gives_up:
                self._roll_back(taken.refused)
                continue
            if _is_due(self.step, self.run.checkpoint.every):
                self._save()
            if self._some_rank_stops:
                self._stop_on_request(stop)
                return None
            result = self._evaluate_if_due()
        self._save_and_wait()
        if self.step < self.run.max_steps:
            self._say(f"stopped at step {self.step}; start again on {self.run_dir} to go on")
            return None
        self._refuse_if_useless()
        self.monitor.log_hparams()
        self._export()
        if result is not None:
            first = self.run.data.val_sets[0]
            self._say(reference_results(first.shards, self.task.metric, result))
        return result

    def close(self) -> None:
        self.watchdog.stop()
        self.monitor.close()

    def release(self) -> None:
        """Leave the run folder and the data workers. Workers that the garbage collector finds in a cycle no
        longer hear that they are to end, and are waited for, ten seconds each."""
        del self._batches
        self.lock.release()

    def _take_step(self, stop: StopRequest) -> StepResult | None:
        """One optimizer step: data, forward and backward, update or refusal. What became of it, if something
        depends on it; else None, and the next step reads it, once the device has work to go on with."""
        started, step = time.perf_counter(), self.step
        self.monitor.begin_step(step)
        self.watchdog.at(f"waiting for the data of step {step + 1}")
        # All of a step's micro-batches at once: the loss is divided by the weight of the whole global batch.
        batches = [next(self._batches) for _ in range(self.engine.grad_accum)]
        data_time_s = time.perf_counter() - started
        self.watchdog.at(f"computing step {step + 1}")
        if self.run.data.tp == "replicate" and step % self.run.data.check_every == 0:
            check_replicas(batches, step, self.mesh)
        counts = start_counts(batches, bool(stop), self.task, self.run.data, self.mesh)
        largest = self._max_attention(batches[0]) if self.monitor.is_logged(step) else None
        micro_batches = self._inputs(batches)
        _seed_dropout(self.run.seed, step, self.mesh)
        lr = lr_at(step, self.run.max_steps, self.peak_lr, self.run.schedule)
        read = counts if largest is None else torch.cat([counts, largest[None].to(counts.dtype)])
        pending = self.engine.start_step(micro_batches, counts[0], lr, self._norm_limit, read=read)
        self.step += 1
        bad = [found for batch in batches for found in batch.bad]
        self._unread = taken = _Taken(step, pending, lr, self.loader.passes(self.step), bad, data_time_s)
        self._log_saves()
        self._account()
        if self._is_known_now():
            self._read()
            taken.step_time_s = time.perf_counter() - started
            return self._account()
        taken.step_time_s = time.perf_counter() - started
        return None

    def _is_known_now(self) -> bool:
        """Whether the device is waited for after this step, because something depends on what became of it.
        The same on all ranks."""
        run, step = self.run, self.step
        everies = [run.checkpoint.every, run.check_every if self.mesh.tp_size > 1 else 0]
        everies += [run.eval_every if one.every is None else one.every for one in self.eval_loaders]
        is_first_of_start = not self._is_under_way
        self._is_under_way = True
        return (
            is_first_of_start
            or step == self.last_step
            or any(_is_due(step, every) for every in everies)
            or self.guard.may_give_up
            or self._some_rank_stops
            or (self._unread is not None and self._unread.pending.is_read)
        )

    def _norm_limit(self) -> float:
        """For the update that comes next. What became of the one before has a part in it."""
        self._read()
        return self.guard.limit

    def _read(self) -> None:
        """Wait until the device has decided on the step that is not read yet."""
        if taken := self._unread:
            self._unread, self._unlogged = None, taken
            result = taken.pending.result()
            self.guard.record(not result.refused, result.grad_norm)

    def _account(self) -> StepResult | None:
        """Accounts and log line of the step that was read last; what became of it, None if all are done.
        The `read` of a result are the units and the usable samples of the global batch, the number of ranks
        that were asked to stop, and the largest attention score if it was measured."""
        taken, self._unlogged = self._unlogged, None
        if taken is None:
            return None
        result, done = taken.pending.result(), taken.step + 1
        _, usable, stopping, *largest = result.read
        self._some_rank_stops = self._some_rank_stops or bool(stopping)
        if result.refused:
            self.monitor.log_skipped(done, result.refused, result.loss, result.grad_norm)
        self._align_replicas_if_due(done)
        self._account_for_bad_samples(done, taken.bad, int(usable))
        self.monitor.log_step(
            taken.step,
            loss=result.loss,
            metrics=result.metrics,
            lr=taken.lr,
            grad_norm=result.grad_norm,
            epoch=taken.epoch,
            bad_samples=self.bad_samples.total,
            skipped_updates=self.guard.skipped,
            step_time_s=taken.step_time_s,
            data_time_s=taken.data_time_s,
            max_logit=largest[0] if largest else None,
        )
        return result

    def _max_attention(self, batch: Batch) -> Tensor | None:
        if not learns_attention(self.engine.module):
            return None
        # Before dropout is seeded and with inputs of its own: the step that follows is the same to the bit.
        samples = to_samples(batch, self._fields, self.run.data, self.mesh)
        return max_attention(self.engine, self.task.inputs(samples, self.mesh, training=True))

    def _inputs(self, batches: list[Batch]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            samples = to_samples(batch, self._fields, self.run.data, self.mesh)
            inputs = self.task.inputs(samples, self.mesh, training=True)
            if number == self.step == 0:
                self.monitor.show_pictures("train", 0, self.task.pictures(samples, inputs, _NUM_SHOWN))
            yield inputs

    def _align_replicas_if_due(self, step: int) -> None:
        """Keep the copies of replicated parameters equal to TP rank 0's, which is the one that is saved."""
        if self.mesh.tp_size == 1 or not _is_due(step, self.run.check_every):
            return
        if drifted := self.engine.state.align_replicas():
            self.monitor.event(step, "replicas drifted", parameters=drifted)
            self._say(
                f"note: after step {step} the TP ranks' copies of {', '.join(drifted[:5])}"
                f"{f' and {len(drifted) - 5} more' if len(drifted) > 5 else ''} were not the same; all have "
                f"TP rank 0's now"
            )

    def _account_for_bad_samples(self, step: int, mine: list[BadSample], usable: int) -> None:
        # The number of usable samples, and so this decision, is the same on every rank.
        bad = gather_bad(mine, self.run.data, self.mesh) if usable < self.global_batch else []
        try:
            self.bad_samples.add(step, self.global_batch, bad)
        except TooManyBadSamples:
            self._read()  # the step that has been taken meanwhile
            self._account()
            self._save_and_wait()
            raise

    def _evaluate_if_due(self, *, resuming: bool = False) -> float | None:
        """Evaluate on the validation sets that are due after this step. The result (`Task.metric`) on the
        first set, None if it is not due. A run that was interrupted in an evaluation (`resuming`) does it
        again, and takes the results of one that was finished from the log."""
        run, step = self.run, self.step
        results: list[float | None] = []
        for one, loader in self.eval_loaders.items():
            every = run.eval_every if one.every is None else one.every
            if (resuming and not step) or not (step == run.max_steps or _is_due(step, every)):
                results.append(None)
            elif resuming and (logged := self.monitor.logged_results(step, one.name)):
                results.append(logged[self.task.metric])
            else:
                results.append(self._evaluate(one.name, loader)[self.task.metric])
        if self.probes:
            self.probes.forget()
        return results[0] if results else None

    def _evaluate(self, name: str, loader: EvalLoader) -> dict[str, float]:
        self.watchdog.at(f"evaluating after step {self.step}")
        progress = self.monitor.evaluation_progress(loader.num_batches)
        show = functools.partial(self._show_predictions, name)
        found = evaluate(self.engine, loader, self.bad_samples, self.step, self.watchdog, progress, show)
        probed = self.probes.results(self.engine, name, self.watchdog.at) if self.probes else {}
        self.monitor.log_eval(self.step, name, found, probed)
        return found.results

    @torch.no_grad()
    def _show_predictions(self, name: str, samples: DeviceBatch, inputs: Any) -> None:
        shown = self.engine.call(lambda module: self.task.pictures(samples, inputs, _NUM_SHOWN, module))
        self.monitor.show_pictures(name, self.step, shown)
        every, is_last = self.run.explain_every, self.step == self.run.max_steps
        if shown and (_is_due(self.step, every) or (every and is_last)):
            images = self.engine.call(explained, inputs.images[:_NUM_SHOWN])
            self.monitor.show_pictures(f"{name}/located", self.step, shown._replace(images=images))

    def _refuse_if_useless(self) -> None:
        """Raise UselessRun if the weights are those of the start, or not numbers."""
        step, skipped = self.step, self.guard.skipped
        why = ""
        if skipped == step:
            why = f"every one of its {step} updates was refused, the weights are those of the start"
        elif not self.engine.state.is_finite():
            why = f"its weights are not finite ({skipped} of {step} updates were refused)"
        if why:
            raise UselessRun(
                f"the run has ended, but {why}: nothing was exported. See {self.run_dir / LOG_FILE}; look at "
                f"the learning rate, the data and the numbers in the configuration"
            )

    def _save(self) -> None:
        self._wait_for_saves()
        self.watchdog.at(f"saving step {self.step}")
        state = {
            "data": self.loader.state_at(self.step),
            "left_out": self._left_out,
            "bad_samples": self.bad_samples.state(),
            "guard": self.guard.state(),
        }
        fields = {"state": state, "run": plain_config(self.run), "ds_config": self.ds_config}
        self.saver.save(self.step, fields | {"frozen": self.frozen})
        if not self.run.checkpoint.async_save:
            self._wait_for_saves()
        self._log_saves()

    def _wait_for_saves(self) -> None:
        """Until the save under way has ended. The watchdog sees whether bytes move on any rank."""
        self.watchdog.at("waiting for a checkpoint to be written")
        while not self.saver.wait(1.0):
            self._log_saves()
        self._log_saves()

    def _save_and_wait(self) -> None:
        """Save, and raise SaveError unless this step's checkpoint is committed."""
        self._save()
        self._wait_for_saves()
        if self.saver.committed_step != self.step:
            raise SaveError(
                f"the state after step {self.step} could not be saved; the newest checkpoint is that of step "
                f"{self.saver.committed_step}; start again on {self.run_dir} to go on from there"
            )

    def _log_saves(self) -> None:
        if progress := self.saver.progress():
            if progress.moved_bytes != self._saved_bytes:
                self._saved_bytes = progress.moved_bytes
                self.watchdog.at(f"saving, after step {self.step}")
            self.monitor.show_progress(progress)
        for saved in self.saver.finished():
            self.monitor.log_saved(saved)

    def _stop_on_request(self, stop: StopRequest) -> None:
        reason = stop.signal_name or "a signal to another rank"
        self._say(f"{reason}: saving step {self.step}, then stopping")
        if self.step:
            try:
                self._save_and_wait()
            except SaveError as error:  # the next life goes on from the checkpoint before
                self._say(f"error: {error}")
        self.monitor.event(self.step, "stopped", reason=reason)
        if self.mesh.is_main:
            (self.run_dir / PREEMPTED_FILE).write_text(f"{reason} after step {self.step}\n")

    def _roll_back(self, reason: str) -> None:
        """After too many refused updates: go back to the newest checkpoint and leave out their data; or,
        unless that is wanted and possible, save and raise TooManySkipped."""
        count = self.guard.in_a_row
        first = self.step - count
        message = f"{count} updates in a row were refused, the last at step {self.step}: {reason}"
        if not self.run.guard.rollback:
            self._save_and_wait()
            raise TooManySkipped(
                f"{message}; see --guard.max_skipped, --guard.rollback and --data.skip_steps "
                f"{first}:{self.step}"
            )
        self._wait_for_saves()
        # A checkpoint saved after the first refusal has the same weights, and would leave out too little.
        saved = self.saver.go_back(first)
        if saved is None:
            raise TooManySkipped(f"{message}; nothing was saved before the first of them")
        self._rollbacks[saved.step] += 1
        if self._rollbacks[saved.step] > _MAX_ROLLBACKS:
            raise TooManySkipped(f"{message}; {_MAX_ROLLBACKS} rollbacks to step {saved.step} did not help")
        self._restore(saved)
        longer = max((b for a, b in self._left_out if a == first), default=first) + self.step - first
        left_out = [skip for skip in self._left_out if skip[0] != first] + [(first, longer)]
        self._take_position(saved, left_out)
        self.monitor.rewind(self.step)
        self.monitor.event(self.step, "rolled back", reason=message, left_out=f"{first}:{longer}")
        self._say(f"{message}; back to step {self.step}, leaving out the data of steps {first}:{longer}")
        if self.mesh.is_main:
            self.loader.save_order(self.run_dir / DATA_FILE, self.step)

    def _take_position(self, saved: Checkpoint | None, left_out: Sequence[tuple[int, int]]) -> None:
        """Set the step, the data and the accounts to those of a checkpoint, or of the start."""
        state = saved.state if saved else {}
        self.step = saved.step if saved else 0
        self._left_out = list(left_out)
        self.guard = Guard(self.run.guard, state.get("guard"))
        self.bad_samples = BadSamples(
            self.run.data.max_bad_fraction,
            self.run.data.max_bad_shards,
            self._num_samples,
            LogFile(self.run_dir / BAD_SAMPLES_FILE, self._say).write if self.mesh.is_main else None,
            state.get("bad_samples"),
        )
        data = DataState.from_json(state["data"]) if saved else None
        self.loader = train_loader(
            self._shards, self.task, self.run, self.ds_config, self.mesh, data, left_out
        )
        self._batches = self.loader.batches(self.step, self.run.max_steps)
        self._unread = self._unlogged = None
        self._some_rank_stops = self._is_under_way = False

    def _export(self) -> None:
        out = Path(self.run.export_dir) if self.run.export_dir else self.run_dir / "export"

        def export(count: Callable[[int], None]) -> None:
            if self.mesh.is_main:
                source = open_step(self.run_dir, self.step)
                export_weights(source, out, init_from=self.run.init_from, verify=False, progress=count)

        # The other ranks stay: a launcher may take the first one that ends for the end of the job.
        self.watchdog.at("exporting the weights")
        run_together(self.mesh, export, lambda _: self.watchdog.at("exporting the weights"))
        self._say(f"exported the model to {out} (megavit.load and launch/predict.py use it)")

    def _say(self, text: str) -> None:
        say(self.mesh, text)

    def _reading(self) -> str:
        return self.loader.reading()

    def _heartbeat(self, phase: str, idle_s: float) -> None:
        self.monitor.event(self.step, "heartbeat", phase=phase, idle_s=round(idle_s, 1))


def _probes(run: RunConfig, mesh: Mesh) -> Probes:
    # Its imports take a second, which most runs need not wait for.
    from megavit.evaluate.while_training import Probes

    return Probes(run, mesh, functools.partial(say, mesh))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _is_out_of_memory(error: Exception) -> bool:
    """CPUs raise a plain RuntimeError."""
    no_memory = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(t in str(error) for t in no_memory)


def _seed_dropout(seed: int, step: int, mesh: Mesh) -> None:
    """Dropout of a step depends on (seed, step, dp_rank): equal on all TP ranks, and a resumed run repeats
    it."""
    torch.manual_seed(int(mix(seed, step, mesh.dp_rank)) >> 1)  # manual_seed takes 63 bits
