"""What a search may choose from: layouts that divide the model and the batch, narrowed down by `--only`.
Imports neither torch nor deepspeed, so that what is impossible is said at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from megavit.fields import nearest
from megavit.model.config import ModelConfig, Recompute
from megavit.scale.cluster import Cluster
from megavit.scale.job import OFFLOADS, Layout, Offload

_MAX_MICRO_BATCH = 512
_CHOICES: dict[str, dict[str, Any]] = {
    "recompute": {name: name for name in ("none", "selective", "full")},
    "offload": {name: name for name in OFFLOADS} | {"true": "optimizer", "false": "none"},
    "stage": {"2": 2, "3": 3},
}


@dataclass(frozen=True)
class Only:
    """What a search is restricted to; None is free."""

    tp: int | None = None
    stage: int | None = None
    recompute: Recompute | None = None
    offload: Offload | None = None
    micro_batch: int | None = None

    @staticmethod
    def parse(text: str) -> Only:
        """`tp=8,stage=3,...`. ValueError for anything else."""
        known = [field.name for field in fields(Only)]
        found: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, separator, value = part.partition("=")
            if key not in known:
                raise ValueError(f"--only: unknown {key!r}{nearest(key, known)}; known: {', '.join(known)}")
            if not separator:
                raise ValueError(f"--only: {key} has no value; write e.g. {key}={_example(key)}")
            if key in found:
                raise ValueError(
                    f"--only: {key} is given twice; a search can be restricted to one {key} only"
                )
            if key in _CHOICES and value not in _CHOICES[key]:
                choices = " or ".join(_CHOICES[key])
                raise ValueError(f"--only: {key} must be {choices}, got {value!r}")
            if key not in _CHOICES and not (value.isdecimal() and int(value)):
                raise ValueError(f"--only: {key} must be a whole number of at least 1, got {value!r}")
            found[key] = _CHOICES[key][value] if key in _CHOICES else int(value)
        only = Only(**found)
        if only.offload == "params" and only.stage == 2:
            raise ValueError("--only: stage=2 cannot offload weights, which only ZeRO-3 shards; say stage=3")
        return only

    def allows(self, **choice: Any) -> bool:
        return all(getattr(self, key) in (None, value) for key, value in choice.items())


ANYTHING = Only()


def _example(key: str) -> str:
    return next(iter(_CHOICES[key])) if key in _CHOICES else "8"


def tp_sizes(model: ModelConfig, cluster: Cluster) -> list[int]:
    """TP sizes that divide heads, MLP width and a node."""
    limit = min(cluster.gpus_per_node, model.num_heads)
    return [
        t
        for t in range(1, limit + 1)
        if model.num_heads % t == 0 and model.mlp_dim % t == 0 and cluster.gpus_per_node % t == 0
    ]


def policies(model: ModelConfig) -> tuple[Recompute, ...]:
    """What can be recomputed in backward; selective is made for parallel blocks."""
    return ("none", "selective", "full") if model.block == "parallel" else ("none", "full")


def layouts(
    model: ModelConfig, global_batch: int, cluster: Cluster, only: Only = ANYTHING
) -> Iterator[tuple[int, list[Layout]]]:
    """(TP size, its layouts by rising micro-batch) for every TP size with at least one layout."""
    for tp_size in tp_sizes(model, cluster):
        dp_size = cluster.gpus // tp_size
        share, rest = divmod(global_batch, dp_size)
        if rest or not only.allows(tp=tp_size):
            continue
        found = [
            Layout(tp_size, dp_size, micro_batch, share // micro_batch)
            for micro_batch in range(1, min(share, _MAX_MICRO_BATCH) + 1)
            if share % micro_batch == 0 and only.allows(micro_batch=micro_batch)
        ]
        if found:
            yield tp_size, found


def require_choice(model: ModelConfig, global_batch: int, cluster: Cluster, only: Only = ANYTHING) -> None:
    """ValueError, with the reason and a way out, when no layout is possible at all."""
    if only.recompute and only.recompute not in policies(model):
        raise ValueError(
            f"--only: recompute={only.recompute} is made for --model.block parallel, and {model.name} has "
            f"{model.block} blocks; say recompute=none or recompute=full"
        )
    sizes = tp_sizes(model, cluster)
    if only.tp and only.tp not in sizes:
        raise ValueError(
            f"--only: no layout is possible with tp={only.tp}: a TP size must divide the {model.num_heads} "
            f"heads, the MLP width {model.mlp_dim} and the {cluster.gpus_per_node} GPUs of a node; say one "
            f"of {', '.join(map(str, sizes))}"
        )
    if any(True for _ in layouts(model, global_batch, cluster, only)):
        return
    without = Only(tp=only.tp)
    if only.micro_batch and any(True for _ in layouts(model, global_batch, cluster, without)):
        raise ValueError(
            f"--only: no layout is possible with micro_batch={only.micro_batch}: it must divide a "
            f"data-parallel rank's share of the global batch {global_batch}, and be at most "
            f"{_MAX_MICRO_BATCH}"
        )
    multiple = max(1, round(global_batch / cluster.gpus)) * cluster.gpus
    raise ValueError(
        f"no layout is possible: the data-parallel ranks, which are {cluster.gpus} GPUs divided by a TP size "
        f"of {', '.join(map(str, sizes))}, must divide the global batch of {global_batch}; --global_batch "
        f"{multiple} would do for every layout"
    )
