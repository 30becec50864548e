"""Whole training runs inside test ranks: the production loop on the digits, without the launcher's
start-up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megavit.recipe import RECIPES, read_recipe
from megavit.train.config import RunConfig

DEMO = read_recipe(RECIPES / "digits.yaml")


def small_run(data: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """20 logged steps of a two-block model on the digits; `data__x=1` changes field `x` of `data`."""
    nested: dict[str, dict[str, Any]] = {"model": {"depth": 2}, "schedule": {"warmup_steps": 5}}
    nested |= {
        "task": {},
        "data": {"shards": f"{data}/train-*.tar", "val_shards": ""},
        "checkpoint": {},
        "guard": {},
    }
    flat = {"run_dir": str(run_dir), "max_steps": 20, "log_every": 1, "eval_every": 0}
    for key, value in changes.items():
        part, nests, field = key.partition("__")
        if nests:
            nested[part][field] = value
        else:
            flat[key] = value
    parts = {name: dataclasses.replace(getattr(DEMO, name), **fields) for name, fields in nested.items()}
    return dataclasses.replace(DEMO, **parts, **flat)


def ds_config(stage: int, batch: int = 48, micro_batch: int = 48, **zero: Any) -> dict[str, Any]:
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.05}},
        "zero_optimization": {"stage": stage} | zero,
    }


def train_here(run: RunConfig, raw: dict[str, Any]) -> str:
    """In a test rank: the run, to its end; the text of the error that ended it, or nothing."""
    from megavit.parallel.mesh import Mesh
    from megavit.train.loop import train
    from megavit.train.preempt import StopRequest

    mesh = Mesh.from_environment(run.tensor_parallel_size)
    try:
        train(run, raw, mesh, StopRequest())
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps of a run folder."""
    return [row for row in log_of(run_dir) if "loss" in row and "event" not in row]


def log_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
