"""Bytes that this rank's collectives carry, counted in a running program. `communication.py` says what counts
as a collective's bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# c10d's operations, and which argument is the whole tensor.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}


class CollectiveCounter(TorchDispatchMode):
    """Counts the bytes of collectives inside `with CollectiveCounter() as counter:`, on this thread and its
    backward passes, whoever starts them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, int]] = Counter()  # by (collective, ranks in its group)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name in _COLLECTIVES:
                kind, whole = _COLLECTIVES[name]
                key = kind, _group_size(args)
                self.bytes[key] += sum(t.numel() * t.element_size() for t in _tensors(args[whole]))
        return func(*args, **(kwargs or {}))


def _group_size(args: Any) -> int:
    for argument in args:
        if (
            hasattr(argument, "_type")
            and callable(argument._type)
            and "ProcessGroup" in str(argument._type())
        ):
            return int(dist.ProcessGroup.unbox(argument).size())
    raise AssertionError(args)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]
