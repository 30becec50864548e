"""Weights on disk: every TP rank writes its shards, anybody reads logical tensors back, without DeepSpeed or
ranks.

    <folder>/manifest.json           layouts, tp_size, step, data state, model configuration; written last
    <folder>/tp_000.safetensors      the float32 shards of tp_rank 0, and so on

The folder gets its name only when complete. `export_weights` turns it into the single-process form that
`MegaVit.from_pretrained` loads. Optimizer state is not stored.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from megavit.config import model_config
from megavit.model.vit import CONFIG_FILE, WEIGHTS_FILE
from megavit.parallel.layout import Layout, layout_of

if TYPE_CHECKING:  # reading weights must not start DeepSpeed
    from megavit.train.engine import Engine

MANIFEST_FILE = "manifest.json"
_FORMAT = "megavit-weights-1"


def save_weights(engine: Engine, run_dir: Path, step: int, data: dict[str, Any]) -> Path:
    """Write the float32 weights, and the state of the `data`, to `run_dir/checkpoints/step_<step>`;
    collective.

    Returns the committed folder. Gathers each parameter over the DP group, one at a time; DP rank 0 of each
    TP rank writes its shard.
    """
    mesh = engine.mesh
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    if mesh.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    shards = {}
    for name, shard in engine.shards():
        if mesh.dp_rank == 0:
            shards[name] = shard.contiguous()
    if mesh.dp_rank == 0:
        save_file(shards, _shard_file(partial, mesh.tp_rank))
    dist.barrier()
    if mesh.is_main:
        manifest = {
            "format": _FORMAT,
            "step": step,
            "tp_size": mesh.tp_size,
            "model": dataclasses.asdict(engine.run.model),
            "data": data,
            "layouts": _layouts(engine.model),
        }
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    dist.barrier()
    return folder


def export_weights(checkpoint: Path, out: Path) -> Path:
    """Join the shards of `checkpoint` into `out/model.safetensors` and `out/config.json`, in one process.

    Names and shapes are those of the tp=1 model, float32. Raises ValueError for a folder that is no committed
    checkpoint.
    """
    manifest = _read_manifest(checkpoint)
    tp_size: int = manifest["tp_size"]
    files = [safe_open(_shard_file(checkpoint, tp_rank), framework="pt") for tp_rank in range(tp_size)]
    weights: dict[str, Tensor] = {}
    for name, fields in tqdm(
        manifest["layouts"].items(), desc=f"export to {out}", unit="tensor", leave=False
    ):
        layout = Layout(tuple(fields["shape"]), fields["dim"], tuple(fields["parts"]))
        needed = files if layout.dim is not None else files[:1]
        weights[name] = layout.join([file.get_tensor(name) for file in needed])
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{WEIGHTS_FILE}.partial"
    save_file(weights, partial, metadata={"format": "pt", "step": str(manifest["step"])})
    (out / CONFIG_FILE).write_text(json.dumps(manifest["model"], indent=2) + "\n")
    os.replace(partial, out / WEIGHTS_FILE)
    return out


def newest_checkpoint(run_dir: Path) -> Path:
    """The committed checkpoint with the highest step; ValueError if the run folder has none."""
    folders = sorted(path.parent for path in (run_dir / "checkpoints").glob(f"step_*/{MANIFEST_FILE}"))
    if not folders:
        raise ValueError(
            f"{run_dir} holds no committed checkpoint (looked for checkpoints/step_*/{MANIFEST_FILE})"
        )
    return folders[-1]


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{checkpoint} is not a committed checkpoint: {MANIFEST_FILE} is missing")
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')!r} is not {_FORMAT!r}")
    missing = [
        file.name
        for rank in range(manifest["tp_size"])
        if not (file := _shard_file(checkpoint, rank)).is_file()
    ]
    if missing:
        raise ValueError(f"{checkpoint} lacks {', '.join(missing)}")
    model_config(manifest["model"])  # names a field that this version does not know, before any work
    return manifest


def _shard_file(folder: Path, tp_rank: int) -> Path:
    return folder / f"tp_{tp_rank:03d}.safetensors"


def _layouts(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(layout_of(parameter)) for name, parameter in model.named_parameters()}
