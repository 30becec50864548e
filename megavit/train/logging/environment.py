"""What one needs to know to repeat a run: versions, commit, machine, layout."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megavit.parallel.mesh import Mesh


def environment(mesh: Mesh) -> dict[str, Any]:
    """The content of a run's environment.json."""
    packages = (
        "megavit",
        "torch",
        "torchvision",
        "deepspeed",
        "einops",
        "webdataset",
        "numpy",
        "safetensors",
    )
    return {
        "python": sys.version.split()[0],
        "packages": {name: package_version(name) for name in packages},
        "commit": checkout_commit(),
        "host": platform.node(),
        "device": device_name(mesh.device),
        "ranks": mesh.world_size,
        "dp_size": mesh.dp_size,
        "tp_size": mesh.tp_size,
        "threads_per_rank": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "command": sys.argv,
    }


def device_name(device: torch.device) -> str:
    """Of a GPU its name, else that of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def checkout_commit() -> str:
    """The checkout's commit, with -dirty for local changes."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown: no git on this machine"
    return done.stdout.strip() if done.returncode == 0 else "unknown: not a git checkout"
