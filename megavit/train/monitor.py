"""What a run writes for people: a console line, log.jsonl, TensorBoard; and the speed and memory that go into
them.

The only importer of SummaryWriter. Only the main rank writes; the others hold a `Monitor` that does nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from megavit.config import RunConfig
from megavit.data.bad import BAD_SAMPLES_FILE
from megavit.model.count import num_params, train_flops
from megavit.parallel.mesh import Mesh
from megavit.train.ds_config import uses_bf16
from megavit.train.inputs import Inputs
from megavit.train.schedule import lr_at

LOG_FILE = "log.jsonl"
BASELINES_FILE = "baselines.json"

# Dense bf16 matmul peak, FLOP/s, by a part of torch.cuda.get_device_name(); the first match counts.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}


class Monitor:
    """Logs of one run; `log_step` is called every step and writes every `log_every`-th.

    Speed is over whole optimizer steps (data, communication, optimizer, logging), the median of the steps
    since the last line. MFU is three forwards of matmul FLOPs over
    the device's dense bf16 peak, or, where that does not apply (CPU, float32, unknown GPU), over the matmul
    rate measured at start.
    """

    def __init__(self, run_dir: Path, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh):
        self.run, self.mesh = run, mesh
        self.global_batch: int = ds_config["train_batch_size"]
        dtype = torch.bfloat16 if uses_bf16(ds_config) else torch.float32
        self.peak_flops = _peak_flops(mesh, dtype) * mesh.world_size
        self._step_times: list[float] = []
        self._data_times: list[float] = []
        self._enabled = mesh.is_main
        if not self._enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(plain_config(run), sort_keys=False)
        (run_dir / "config.yaml").write_text(resolved)
        (run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
        (run_dir / "environment.json").write_text(json.dumps(_environment(mesh), indent=2) + "\n")
        self._log = open(run_dir / LOG_FILE, "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        self._board = SummaryWriter(str(run_dir / "tensorboard"))
        self._board.add_text("config/run", f"```yaml\n{resolved}```")
        self._board.add_text("config/deepspeed", f"```json\n{json.dumps(ds_config, indent=2)}\n```")
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
        if self._enabled:
            print(text, flush=True)

    def show_first(self, micro_batches: Iterable[Inputs]) -> Iterator[Inputs]:
        """Passes micro-batches through; of the first, up to 64 augmented images go to TensorBoard as a
        grid."""
        for index, inputs in enumerate(micro_batches):
            if self._enabled and index == 0:
                from torchvision.utils import make_grid

                grid = make_grid((inputs.images[:64].cpu() + 1) / 2, nrow=8, padding=1, pad_value=0.5)
                self._board.add_image("data/augmented", grid, 0)
            yield inputs

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        epoch: float,
        bad_samples: int,
        step_time_s: float,
        data_time_s: float,
    ) -> None:
        """Record update number `step` (from 0); every `log_every`-th, the first and the last are written."""
        self._step_times.append(step_time_s)
        self._data_times.append(data_time_s)
        done = step + 1
        if not self._enabled or not (done % self.run.log_every == 0 or done in (1, self.run.max_steps)):
            return
        step_time = statistics.median(self._step_times)
        data_time = statistics.median(self._data_times)
        self._step_times.clear()
        self._data_times.clear()
        images_per_s = self.global_batch / step_time
        record = {
            "step": done,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": images_per_s,
            "tokens_per_s": images_per_s * self.run.model.num_tokens,
            "mfu": images_per_s * train_flops(self.run.model) / self.peak_flops,
            "step_time_s": step_time,
            "data_time_s": data_time,
            "memory_gib": _memory_gib(self.mesh),
            "epoch": epoch,
            "bad_samples": bad_samples,
        }
        self._write(record)
        for tag, key in _TAGS.items():
            self._board.add_scalar(tag, record[key], done)
        bad = f"{bad_samples} bad  " if bad_samples else ""
        left = int((self.run.max_steps - done) * step_time)
        self.say(
            f"step {done:>6}/{self.run.max_steps}  loss {loss:8.4f}  lr {lr:.2e}  grad {grad_norm:7.3f}  "
            f"{images_per_s:8,.0f} img/s  mfu {record['mfu']:6.1%}  wait {data_time / step_time:4.0%}  "
            f"epoch {epoch:6.2f}  {bad}{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )

    def log_eval(self, step: int, top1: float, num_samples: int, num_bad: int) -> None:
        """Record an evaluation after `step` updates, on `num_samples` images; `num_bad` more were
        unusable."""
        if self._enabled:
            self._write({"step": step, "eval_top1": top1, "eval_samples": num_samples, "eval_bad": num_bad})
            self._board.add_scalar("eval/top1", top1, step)
            left_out = f" ({num_bad} unusable left out, see {BAD_SAMPLES_FILE})" if num_bad else ""
            self.say(
                f"step {step:>6}/{self.run.max_steps}  evaluation: top-1 {top1:.4f} on {num_samples} images"
                f"{left_out}"
            )

    def close(self) -> None:
        if self._enabled:
            self._board.close()
            self._log.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._log.write(json.dumps(record) + "\n")


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
}


def new_run_dir(run: RunConfig, mesh: Mesh) -> Path:
    """The run's folder, the same on every rank. ValueError if it already holds a run. Collective."""
    name = run.run_dir or f"runs/{run.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, taken = mesh.broadcast((Path(name), (Path(name) / LOG_FILE).exists()))
    if taken:
        raise ValueError(
            f"--run_dir {path} already holds a run ({LOG_FILE}); choose another folder or remove it"
        )
    return path


def reference_results(val_shards: str, top1: float) -> str:
    """The final top-1 beside the results recorded with the validation data (`baselines.json`), best first."""
    path = Path(val_shards).parent / BASELINES_FILE
    known: dict[str, float] = {}
    if path.is_file():
        recorded = json.loads(path.read_text())
        known = recorded["results"] if Path(val_shards).name.startswith(f"{recorded['split']}-") else {}
    rows = sorted([*known.items(), ("this run", top1)], key=lambda row: -row[1])
    return "\n".join(
        ["final top-1 on the validation shards:", *(f"  {name:<24} {value:.4f}" for name, value in rows)]
    )


def plain_config(run: RunConfig) -> dict[str, Any]:
    """The configuration as `--config` reads it."""
    fields = dataclasses.asdict(run)
    fields["data"]["crop_area"] = list(fields["data"]["crop_area"])
    return fields


def _memory_gib(mesh: Mesh) -> float:
    """Peak memory of this rank: the allocator's on a GPU, resident memory on a CPU."""
    if mesh.device.type == "cuda":
        return torch.cuda.max_memory_allocated(mesh.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peak_flops(mesh: Mesh, dtype: torch.dtype) -> float:
    """FLOP/s of one rank's device in the matmuls' dtype: the data sheet's, else the best of a few matmuls
    (0.1 s)."""
    on_gpu = mesh.device.type == "cuda"
    if on_gpu and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(mesh.device)
        for part, peak in _PEAK_FLOPS.items():
            if part in name:
                return peak
    side = 8192 if on_gpu else 1024
    a = torch.randn(side, side, device=mesh.device, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def _environment(mesh: Mesh) -> dict[str, Any]:
    """Versions, commit and layout: what one needs to know to repeat the run."""
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
        "packages": {name: _version(name) for name in packages},
        "commit": _commit(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(mesh.device)
        if mesh.device.type == "cuda"
        else platform.processor() or "cpu",
        "ranks": mesh.world_size,
        "dp_size": mesh.dp_size,
        "tp_size": mesh.tp_size,
        "threads_per_rank": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "command": sys.argv,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The checkout's commit, with -dirty for local changes."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown: no git on this machine"
    return done.stdout.strip() if done.returncode == 0 else "unknown: not a git checkout"
