"""Holds the picture of who may import whom, so that the layers stay apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "megavit"

ROOMS = tuple(f"megavit.{path.name}" for path in ROOT.iterdir() if path.is_dir())

# package -> what it must not import
FORBIDDEN = {
    "fields.py": ("torch", "deepspeed", "numpy", "yaml", "megavit"),
    "gpus.py": ("torch", "deepspeed", "numpy", *ROOMS),
    "recipe.py": ("torch", "deepspeed", "numpy", *ROOMS),
    "cli.py": ("torch", "deepspeed", "numpy", "megavit.model", "megavit.train", "megavit.parallel"),
    "parallel": ("deepspeed", "megavit.model", "megavit.data", "megavit.train", "megavit.evaluate"),
    "model": (
        "deepspeed",
        "torch.distributed",
        "megavit.data",
        "megavit.train",
        "megavit.tasks",
        "megavit.evaluate",
    ),
    "model/config.py": ("torch", "deepspeed", "numpy", "yaml", *ROOMS),
    "data": (
        "deepspeed",
        "torch.distributed",
        "megavit.model",
        "megavit.parallel",
        "megavit.train",
        "megavit.evaluate",
    ),
    "data/config.py": ("torch", "deepspeed", "numpy", "yaml", *ROOMS),
    "data/class_names.py": ("torch", "numpy", "megavit"),
    "tasks": ("deepspeed", "torch.distributed", "megavit.train", "megavit.evaluate"),
    "tasks/config.py": ("torch", "deepspeed", "numpy", "yaml", *ROOMS),
    "evaluate": ("deepspeed", "torch.distributed", "megavit.train.loop", "megavit.scale", "megavit.bench"),
    "evaluate/config.py": ("torch", "deepspeed", "numpy", "yaml", *ROOMS),
    "explain": ("deepspeed", "torch.distributed", "captum", "megavit.launch", "megavit.scale"),
    "scale": ("deepspeed", "megavit.data", "megavit.evaluate"),
    "train": ("megavit.scale", "megavit.bench", "megavit.evaluate", "megavit.explain"),
    "train/config.py": ("torch", "deepspeed", "numpy", "yaml", *ROOMS),
    "train/schedule.py": ("torch", "deepspeed"),
    "train/ds_config.py": ("torch", "deepspeed"),
    "train/preempt.py": ("torch", "deepspeed"),
    "train/checkpoint/tensorfile.py": ("torch", "deepspeed", "megavit"),
    "train/checkpoint/checkpoint.py": ("torch", "deepspeed", "megavit.parallel.mesh"),
    "train/checkpoint/folder.py": ("torch", "deepspeed", "megavit.parallel.mesh"),
    "train/checkpoint/export.py": ("torch.distributed", "deepspeed"),
}
# What a file may import in spite of that: the loop measures with the protocols of --eval.tasks, and shows the
# maps of --explain_every.
ALLOWED = {"train/loop.py": ("megavit.evaluate.while_training", "megavit.explain.while_training")}
ONLY_IN = {
    "deepspeed": {"train/ds_patches.py", "train/engine.py"},
    "SummaryWriter": {"train/logging/monitor.py", "evaluate/tensorboard.py"},
}
# The configurations are plain dataclasses, which every room may read.
CONFIGURATIONS = tuple(f"megavit.{room}.config" for room in ("model", "data", "tasks", "train"))
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "MASTER_ADDR")


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, also inside functions; not what only type checkers see."""
    tree = ast.parse(path.read_text())
    type_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("part", FORBIDDEN)
def test_layers_import_downwards_only(part: str) -> None:
    """Catches a lower layer reaching up, or a light file pulling in torch."""
    files = [ROOT / part] if part.endswith(".py") else sorted((ROOT / part).rglob("*.py"))
    assert files
    for path in files:
        allowed = [*CONFIGURATIONS, *ALLOWED.get(str(path.relative_to(ROOT)), ())]
        found = {name for name in imports(path) if not any(is_within(name, one) for one in allowed)}
        bad = {name for name in found for package in FORBIDDEN[part] if is_within(name, package)}
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_deepspeed_and_summary_writer_have_one_importer() -> None:
    """Catches a second place that knows DeepSpeed or TensorBoard."""
    for path in ROOT.rglob("*.py"):
        where = str(path.relative_to(ROOT))
        for name, owners in ONLY_IN.items():
            if any(name in imported.split(".") for imported in imports(path)):
                assert where in owners, f"{where} imports {name}"


def test_only_rendezvous_reads_the_launcher_variables() -> None:
    """Catches code that asks the environment instead of the mesh for its rank."""
    for path in [*ROOT.rglob("*.py"), *(ROOT.parent / "launch").glob("*.py")]:
        if path.name == "rendezvous.py":
            continue
        strings = {
            node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
        }
        assert not strings & set(RANK_VARIABLES), f"{path} reads {strings & set(RANK_VARIABLES)}"


def test_config_and_cli_load_without_torch() -> None:
    """Catches an import that makes --help slow."""
    heavy = "bool({'torch', 'deepspeed', 'numpy'} & set(sys.modules))"
    code = f"import sys, megavit.cli, megavit.train.ds_config; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
