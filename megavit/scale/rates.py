"""What the planner takes hardware to reach of its data sheet: assumed, or measured on a card.

A file of measured rates, which `launch/bench.py gpu --stage rates` writes, is JSON:
{"gpu": its name in `megavit/gpus.py`, "card": the name that CUDA gives it, "date": ..., "versions": {...},
"rates": {field of `Rates`: value}}. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavit.fields import nearest
from megavit.gpus import Gpu
from megavit.model.config import ModelConfig

_TILE_ROWS, _TILE_COLUMNS = 128, 256  # of a matmul's result, the work of one processor at a time
MEASURED = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Rates:
    """Shares are of the nominal rate. The values here are assumptions, from published measurements; where
    each comes from is in `megavit/scale/README.md`.

    Args:
        matmul_share: large matmuls, as long as clocks are high: 790 to 795 of an H100's 989 TFLOP/s.
        sustained_share: of the matmuls' and attention's rates in a long run: clocks under full power,
            processors that communication takes.
        attention_share: fused attention of 256 tokens, forward and backward.
        memory_share: of the memory bandwidth.
        elementwise_traffic: of norms, GELU and sums, in units of the tensors counted by hand.
        link_share: of the bandwidth of GPU links and the network, for large collectives.
        host_link_share: of the bandwidth to the host, for copies to and from pinned memory.
        overlap_tax: of hidden communication: it takes processors and bandwidth from compute.
        latency_s: of a collective within a node.
        latency_per_node_s: more for each node that it spans.
        kernel_s: between the starts of two kernels: blocks that are too small wait for Python.
        kernels: of a block, forward and backward, eager.
        update_bytes: that the optimizer's update on a GPU moves for each weight.
        host_adam_gb_per_s: of host memory, by DeepSpeed's Adam on all cores of a node.
        decode_per_core_s: images that a core decodes in a second.
        source: the card, the date and the file of what is measured; empty if nothing is.
        measured: which of the values are.
    """

    matmul_share: float = 0.80
    sustained_share: float = 0.87
    attention_share: float = 0.45
    memory_share: float = 0.85
    elementwise_traffic: float = 1.0
    link_share: float = 0.80
    host_link_share: float = 0.80
    overlap_tax: float = 0.10
    latency_s: float = 20e-6
    latency_per_node_s: float = 2e-6
    kernel_s: float = 5e-6
    kernels: float = 75.0
    update_bytes: float = 56.0
    host_adam_gb_per_s: float = 100.0
    decode_per_core_s: float = 1000.0
    source: str = ""
    measured: tuple[str, ...] = ()

    def describe(self) -> str:
        """Which rates the predicted times rest on, in a line."""
        if not self.measured:
            return (
                "rates: assumed, from published measurements, none measured on this GPU "
                "(python launch/bench.py gpu --stage rates measures them)"
            )
        values = ", ".join(f"{name} {getattr(self, name):.3g}" for name in self.measured)
        assumed = ", ".join(name for name in RATE_NAMES if name not in self.measured)
        return f"rates: measured on {self.source}: {values}; assumed: {assumed}"


RATE_NAMES = tuple(
    field.name for field in dataclasses.fields(Rates) if field.name not in ("source", "measured")
)


def wave_share(model: ModelConfig, micro_batch: int, tp_size: int, gpu: Gpu) -> float:
    """How full the last wave of tiles leaves the processors, over a block's matmuls: `matmul_share` is of
    matmuls that fill every wave."""
    rows, dim, t = micro_batch * model.num_tokens, model.dim, tp_size
    shapes = [(3 * dim // t, dim), (dim, dim // t), (model.mlp_dim // t, dim), (dim, model.mlp_dim // t)]
    ideal = real = 0.0
    for columns, depth in shapes:
        tiles = math.ceil(rows / _TILE_ROWS) * math.ceil(columns / _TILE_COLUMNS)
        ideal += rows * columns / (_TILE_ROWS * _TILE_COLUMNS) / gpu.processors * depth
        real += math.ceil(tiles / gpu.processors) * depth
    return ideal / real


def rates_for(gpu: str, file: str = "") -> Rates:
    """Those of a file, or of the one that is kept for the kind of GPU, or else the assumed ones. ValueError
    for a file that holds something else."""
    kept = MEASURED / f"{gpu}.json"
    if file:
        return read_rates(Path(file))
    return read_rates(kept) if kept.is_file() else Rates()


def read_rates(path: Path) -> Rates:
    try:
        content: Any = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--rates {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--rates {path} is not valid JSON: {error}") from error
    values = content.get("rates") if isinstance(content, dict) else None
    if not isinstance(values, dict) or not values:
        raise ValueError(
            f'--rates {path} has no "rates"; launch/bench.py gpu --stage rates writes such a file'
        )
    for name, value in values.items():
        if name not in RATE_NAMES:
            raise ValueError(f"--rates {path}: unknown rate {name!r}{nearest(name, RATE_NAMES)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"--rates {path}: {name} must be a positive number, got {value!r}")
    source = f"{content.get('card', 'an unknown card')}, {content.get('date', 'no date')} ({path})"
    return Rates(**values, source=source, measured=tuple(name for name in RATE_NAMES if name in values))


def write_rates(
    path: Path, gpu: str, card: str, date: str, versions: dict[str, str], rates: Mapping[str, float]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": gpu, "card": card, "date": date, "versions": versions, "rates": dict(rates)}
    path.write_text(json.dumps(content, indent=2) + "\n")
