"""Counts where a program looks at the values of tensors, or makes tensors of values: on a GPU the host waits
for the device at each of these places. Works on any device."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_OPERATORS = {
    _aten._local_scalar_dense.default,  # item(), float(), int(), bool()
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten._unique2.default,
    _aten.bincount.default,
}
_METHODS = ("tolist", "numpy", "cpu")
_OWN = ("megavit", "deepspeed")


class HostReads:
    """`with HostReads() as reads:` counts in `reads.places`, by "module.function" of MegaViT or DeepSpeed.

    A boolean mask as an index counts, since its size must be known; `torch.tensor(number, device=...)`
    counts, since the copy waits. What the data loader does on the host does not.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def __enter__(self) -> HostReads:
        self._stack = ExitStack()
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def note(self) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("torch.optim"):
                return  # its count of updates, which an unfused optimizer keeps on the host
            if module.split(".")[0] in _OWN:
                break
            frame = frame.f_back  # type: ignore[assignment]
        else:
            return
        if not module.startswith("megavit.data.") or module == "megavit.data.device":
            self.places[f"{module}.{frame.f_code.co_name}"] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_mask = func is _aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in _OPERATORS or is_mask:
            self._reads.note()
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _METHODS or (func is torch.tensor and kwargs.get("device") is not None):
            self._reads.note()
        return func(*args, **kwargs)
