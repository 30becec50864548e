"""Going on with a saved run: whether this configuration may, and what it has otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megavit.data.json_data import json_field
from megavit.data.lanes import DataState, ranges_from_json
from megavit.model.config import ModelConfig
from megavit.train.checkpoint.checkpoint import MANIFEST_FILE, Checkpoint
from megavit.train.checkpoint.manifest import CheckpointError
from megavit.train.config import LAUNCH_FIELDS, RunConfig, flat_config, plain_config, saved_fields

# Expected to differ from one start of a run to the next.
_OF_THE_START = {
    *LAUNCH_FIELDS,
    *(f"deepspeed.{key}" for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu")),
}


def check_resumable(saved: Checkpoint, run: RunConfig) -> None:
    """ValueError, naming the fields, when `run` is another run than the one that was saved, and
    CheckpointError when the saved state is none that a run can go on from."""
    before, after = _saved_fields(saved), flat_config(plain_config(run))
    fixed = ["seed", "freeze", *(f"model.{field.name}" for field in dataclasses.fields(ModelConfig))]
    fixed.remove("model.matmul")  # how products are rounded, not what the weights are
    task = run.task
    fixed += [f"task.{field.name}" for field in dataclasses.fields(task) if field.name not in task.MAY_CHANGE]
    changed = [
        f"{key} is {after[key]}, was {before.get(key)}"
        for key in fixed
        if after[key] != before.get(key) and not (key == "task.name" and _is_moved(before[key], after[key]))
    ]
    if changed:
        raise ValueError(
            f"{saved.folder} belongs to a run with another {'; '.join(changed)}. Choose another --run_dir, "
            f"or start a new run from its exported weights (launch/export.py, --init_from)"
        )
    if saved.step > run.max_steps:
        raise ValueError(
            f"{saved.folder} is beyond --max_steps {run.max_steps}; raise it or choose another --run_dir"
        )
    try:
        _check_state(saved.state)
    except ValueError as error:
        raise CheckpointError(f"{saved.folder / MANIFEST_FILE}: its state cannot be used: {error}") from error


def _is_moved(before: str, after: str) -> bool:
    """Whether two names of tasks are of files that only lie elsewhere."""
    return Path(before).name == Path(after).name


def _saved_fields(saved: Checkpoint) -> dict[str, Any]:
    """The fields of the saved run by the names that they have now; those that there were not yet have their
    defaults."""
    found = saved_fields(saved.run)
    defaults = flat_config(plain_config(RunConfig()))
    if "task.name" in found:  # it has its own task's fields, which are not those of the default one
        defaults = {name: value for name, value in defaults.items() if not name.startswith("task.")}
    return defaults | found


def _check_state(state: dict[str, Any]) -> None:
    """The loop reads these: ValueError unless they are there and of the right kind."""
    DataState.from_json(json_field(state, "data", dict))
    ranges_from_json(json_field(state, "left_out", list))
    for name in ("guard", "bad_samples"):
        json_field(state, name, dict)


def describe_changes(saved: Checkpoint, run: RunConfig, ds_config: dict[str, Any]) -> list[str]:
    """What this start has otherwise than the one that saved: fields, keys of the DeepSpeed JSON, and the
    number of data-parallel ranks."""
    before = _saved_fields(saved) | flat_config(saved.ds_config, "deepspeed.")
    after = flat_config(plain_config(run)) | flat_config(ds_config, "deepspeed.")
    before["data-parallel ranks"] = saved.dp_size
    after["data-parallel ranks"] = ds_config["train_batch_size"] // (
        ds_config["train_micro_batch_size_per_gpu"] * ds_config["gradient_accumulation_steps"]
    )
    return [
        f"{key} {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in _OF_THE_START
    ]
