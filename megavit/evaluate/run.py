"""Doing the tasks one after the other, and writing what is found after each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megavit.data.worker import WorkerError
from megavit.evaluate.model import ExportedModel, FrozenModel
from megavit.evaluate.results import Failed, Result, Skipped, versions
from megavit.evaluate.results_file import ResultsFile
from megavit.evaluate.session import Session
from megavit.evaluate.sets.image_set import MissingData
from megavit.evaluate.table import table, write_table
from megavit.evaluate.tasks import Task
from megavit.evaluate.tensorboard import write_scalars
from megavit.evaluate.timm_model import PREFIX, TimmModel
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import InferenceConfig
from megavit.tasks.exported import task_of_export
from megavit.train.logging.environment import device_name

_MOST_BAD_SHOWN = 3


def check_kind(name: str, tasks: Sequence[Task]) -> None:
    """ValueError if a task measures maps of a kind that the model does not give. Reads no weights."""
    found = None if name.startswith(PREFIX) else task_of_export(name)
    kind = found.name if found else ""
    for task in tasks:
        if task.protocol.maps not in ("", kind):
            raise ValueError(
                f"--tasks: {task.name} measures exports of --task {task.protocol.maps}, and {name} is "
                f"{f'one of --task {kind}' if kind else 'none of depth or segmentation'}"
            )


def open_model(name: str, mesh: Mesh, dtype: str, inference: InferenceConfig | None = None) -> FrozenModel:
    """An export, the folder of a run that has ended, or timm:NAME[@FILE]; a model of depth or segmentation
    goes about pictures as `inference` says. Collective."""
    found = getattr(torch, dtype)
    if not name.startswith(PREFIX):
        return ExportedModel.open(name, mesh, found, inference)
    if mesh.tp_size > 1:
        raise ValueError(
            f"{name} cannot be shared out over --tensor_parallel_size {mesh.tp_size}; leave it out"
        )
    return TimmModel.open(name, mesh, found)


def out_folder(name: str, out: str) -> Path:
    """Where the results go: --out, or a folder in the model's."""
    return Path(out) if out else Path("evaluation") if name.startswith(PREFIX) else Path(name) / "evaluation"


def run_tasks(session: Session, tasks: Sequence[Task], out: Path) -> int:
    """Do the tasks, write `out`/results.json after each and the tables and plots at the end, print the table.

    A task whose data are missing is skipped, one that fails is named, and the others go on. Returns the exit
    status: 0, 1 if some task failed, 3 with --strict if data were missing. Collective over the world.
    WorkerError, on the rank whose decoding processes have died, if there are several ranks.
    """
    mesh, file = session.mesh, session.mesh.on_main(lambda: ResultsFile(out))
    skipped, failed = [], []
    for number, task in enumerate(tasks, 1):
        session.tell(f"{task.name} ({number} of {len(tasks)}): {task.protocol.title}")
        entries: list[Result | Skipped | Failed] = []
        try:
            entries += _results(session, task)
        except MissingData as error:
            entries.append(Skipped(task.name, str(error), model=session.model.name))
            skipped.append(task.name)
            session.say(f"skipped {task.name}: {error}")
        except (ValueError, OSError) as error:
            if isinstance(error, WorkerError) and mesh.world_size > 1:
                raise  # of this rank alone: the others wait for it, and only its end ends them
            entries.append(Failed(task.name, str(error), model=session.model.name))
            failed.append(task.name)
            session.say(f"error: {task.name}: {error}")
        mesh.on_main(lambda found=tuple(entries): file.add(*found))  # type: ignore[misc]
    _say_bad(session)
    mesh.on_main(lambda: _show(session, file, out))
    if failed:
        session.say(f"{len(failed)} of {len(tasks)} tasks failed: {', '.join(failed)}")
        return 1
    return 3 if skipped and session.config.strict else 0


def _results(session: Session, task: Task) -> list[Result]:
    """What the task has measured, with all that is known of the circumstances."""
    started, config, mesh = time.perf_counter(), session.config, session.mesh
    found = list(task.run(session))
    facts: dict[str, Any] = {
        "task": task.name,
        "model": session.model.name,
        "protocol": task.protocol.title,
        "checkpoint_digest": session.model.digest,
        "limit": config.limit or None,
        "versions": versions(),
        "device": device_name(mesh.device),
        "dp_size": mesh.dp_size,
        "tp_size": mesh.tp_size,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if not any(measurement.count.used for measurement, _ in found):
        raise ValueError("none of the images could be used")
    results = []
    for measurement, images in found:
        own = {"data_digest": images.digest, "transform": session.transform(images)}
        result = Result.of(measurement, data=images.name, **facts, **own)
        results.append(result)
        session.tell(f"  {_line(result)}")
    return results


def _line(result: Result) -> str:
    chosen = [
        f"{name} {result.settings[name]}" for name in ("layer", "k", "shots") if name in result.settings
    ]
    what = " ".join([result.data, result.metric, *chosen])
    error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    return f"{what:<48} {result.value:.4f}{error}  ({result.count.used:,} images)"


def _say_bad(session: Session) -> None:
    for name, reasons in session.bad():
        more = f"; and {len(reasons) - _MOST_BAD_SHOWN} more" if len(reasons) > _MOST_BAD_SHOWN else ""
        shown = "; ".join(reasons[:_MOST_BAD_SHOWN])
        session.say(f"{name}: images that could not be used and are left out: {len(reasons)}: {shown}{more}")


def _show(session: Session, file: ResultsFile, out: Path) -> None:
    recorded = file.read()
    made = table([recorded])
    write_table(made, recorded.results, out)
    write_scalars(recorded.results, out)
    session.say(f"\n{made.markdown()}")
    session.say(f"results.json, table.md, table.csv, the plots and TensorBoard's scalars are in {out}")
