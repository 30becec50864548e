"""In which precision bfloat16 gradients are divided and added over the data-parallel ranks: what DeepSpeed
really sends and does, not what it is told."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavit.model.count import num_params
from megavit.parallel.mesh import Mesh
from megavit.train.ds_config import ds_config_problems, resolve_ds_config
from tests.ranks import run_ranks
from tests.train.test_engine import BATCH, LR, RUN, WEIGHTS, ds_config, inputs

SCALARS = 8  # elements: losses and norms


class SentElements(TorchDispatchMode):
    """Counts the elements of collectives inside `with SentElements() as sent:` by (operation, dtype), whoever
    starts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            largest = max(tensors, key=torch.Tensor.numel, default=torch.empty(0))
            if largest.numel() > SCALARS:
                self.count[func._schema.name.removeprefix("c10d::"), largest.dtype] += largest.numel()
        return func(*args, **(kwargs or {}))


def train(
    cases: list[tuple[int, dict[str, Any], dict[str, Any]]],
) -> list[tuple[float, dict[tuple[str, torch.dtype], int]]]:
    """For each case (stage, keys of the file, keys of ZeRO that are set behind the checks' back): the norm of
    the first step's gradient, and the elements that the step sent."""
    from megavit.train.engine import Engine

    mesh, found = Mesh.from_environment(1), []
    global_batch = BATCH // mesh.dp_size * mesh.dp_size
    for stage, keys, forced in cases:
        raw = ds_config(stage, micro_batch=1, bf16={"enabled": True}, **copy.deepcopy(keys))
        raw["train_batch_size"] = global_batch
        assert ds_config_problems(raw) == []
        config = resolve_ds_config(raw, mesh.dp_size, "cpu")
        config["zero_optimization"] |= forced
        engine = Engine(RUN, config, mesh)
        weight = WEIGHTS[:global_batch].sum()
        with SentElements() as sent:
            result = engine.train_step(inputs(RUN, mesh, 0, 1), weight, LR)
        found.append((result.grad_norm, dict(sent.count)))
    return found


TOLD = {"communication_data_type": "bf16"}
ROUNDED = {"data_types": {"grad_accum_dtype": "bf16"}}


@pytest.mark.dist
def test_gradients_are_sent_in_float32_and_weights_in_bfloat16() -> None:
    """Catches a reduction in bfloat16, DeepSpeed's default, at any stage; and weights that are gathered in
    float32, twice the bytes."""
    cases = [(stage, keys, {}) for stage in (1, 2, 3) for keys in ({}, ROUNDED, TOLD)]
    for found in run_ranks(2, train, cases):
        close = found[-1][0]
        for (stage, keys, _), (norm, sent) in zip(cases, found, strict=True):
            reduce = "_reduce_scatter_base_" if stage == 3 else "allreduce_"
            reduced = torch.bfloat16 if keys is TOLD else torch.float32
            assert {kind for kind in sent if kind[0] == reduce} == {(reduce, reduced)}, (stage, sent)
            times = 1 if stage == 1 else BATCH // 2  # once a step, or for each micro-batch
            assert sent[reduce, reduced] >= times * num_params(RUN.model), (stage, sent)
            gathers = {kind[1] for kind in sent if "allgather" in kind[0]}
            assert gathers == {torch.bfloat16}, (stage, sent)
            assert norm == pytest.approx(close, rel=1e-3), stage


@pytest.mark.dist
def test_gradients_are_divided_in_float32() -> None:
    """Catches an average that is rounded to bfloat16 before or after it is taken. With three ranks a division
    is not exact; that rounding would be seen is checked with the keys that round."""
    exact = [(2, {}, {}), (3, {}, {})]
    rounded = [(2, {}, {"reduce_scatter": True}), (2, TOLD, {}), (3, TOLD, {}), (3, ROUNDED, {})]
    for found in run_ranks(3, train, exact + rounded):
        (reference, _), (same, _), *others = found
        assert same == pytest.approx(reference, rel=1e-6)
        for (stage, *keys), (norm, _) in zip(rounded, others, strict=True):
            assert norm != pytest.approx(reference, rel=1e-6), (stage, keys)
