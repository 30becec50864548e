"""What a task's root module does in a micro-step outside of the trunk's blocks: traced, with tensors that
have no data, on the very module, inputs and loss of a run. So it holds for any task.

The trunk's blocks are many and alike, and their cost has formulas (`memory.Activations`, `roofline`): in the
trace each keeps its input and computes nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh
from megavit.scale.counter import CollectiveCounter
from megavit.scale.inventory import Unit, module_unit
from megavit.tasks.task import Sums, Task, blank_samples
from megavit.train.optim import keep_until_backward


@dataclass(frozen=True)
class Trace:
    """One micro-step of a rank. `numbers` are, by name,

    ("bytes", call, backward): the most that activations take while the module of that number, in the order of
        calls, is the latest to have begun: without weights, of the trunk's blocks only what they are given;
    ("bytes on a CPU", call, backward): the same where convolutions copy what they read and write (oneDNN
        works on another memory order);
    ("flops", backward), ("moved", backward), ("kernels", backward): operations of matmuls and convolutions,
        bytes that all others read and write, kernels;
    ("tp", kind) and ("dp", kind): bytes of the collectives of that kind.
    """

    calls: Unit
    numbers: Counter[Any]


def fake_mesh(tp_size: int) -> Mesh:
    """Rank 0 of a grid whose collectives move nothing; several may be in one process. It has one more
    data-parallel rank than tensor-parallel ones: so their groups differ in size."""
    tp_group, dp_group = (_fake_group(size) for size in (tp_size, tp_size + 1))
    return Mesh(tp_size=tp_size, dp_size=tp_size + 1, tp_group=tp_group, dp_group=dp_group, is_fake=True)


def _fake_group(size: int) -> dist.ProcessGroup:
    group = dist.ProcessGroup(FakeStore(), 0, size)
    kind = dist.ProcessGroup.BackendType.CUSTOM
    group._register_backend(torch.device("cpu"), kind, FakeProcessGroup._create_internal(0, size))
    return group


def trace(task: Task, module: nn.Module, mesh: Mesh, micro_batch: int) -> Trace:
    """A forward and backward pass of `module`, which `task` has built on a `fake_mesh` with tensors without
    data (the caller's `FakeTensorMode` is active). Leaves hooks in the module."""
    keep_until_backward(module)
    meter = _Meter(module.parameters(), module.buffers())
    calls = _Calls(meter, [block for trunk in _trunks(module) for block in trunk.blocks])
    calls.watch(module)
    with CollectiveCounter() as collectives, meter:
        samples = blank_samples(task, micro_batch, mesh.device)
        inputs = task.inputs(samples, mesh, training=True)
        loss = Sums(*module.train()(inputs)).loss
        meter.enter(0, backward=True)
        loss.backward()
    numbers = meter.numbers
    for (kind, size), count in collectives.bytes.items():
        numbers["tp" if size == mesh.tp_size else "dp", kind] += count
    return Trace(calls.root(), numbers)


def _trunks(module: nn.Module) -> list[MegaVit]:
    return [part for part in module.modules() if isinstance(part, MegaVit)]


class _StandIn(torch.autograd.Function):
    """A block that keeps its input, which it may share with others, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(grad) if ctx.needs_input_grad[0] else None, None


def _stand_in(block: nn.Module, x: Tensor, *_: Any) -> Tensor:
    trained = next((one for one in block.parameters() if one.requires_grad), None)
    found: Tensor = _StandIn.apply(x, trained)
    return found


class _Calls:
    """The tree of the modules that run, as ZeRO-3 sees it, blocks as a whole; the `stood_in` are replaced."""

    def __init__(self, meter: _Meter, stood_in: Sequence[nn.Module]):
        self._meter, self._stood_in = meter, stood_in
        self._open: list[list[Unit]] = [[]]
        self._count = 0

    def root(self) -> Unit:
        ((found,),) = self._open
        return found

    def watch(self, module: nn.Module, path: str = "") -> None:
        """Note each call of a module from now on, and of those below it, and tell the meter of it."""
        unit, numbers = module_unit(path, module), []
        replaced = any(module is block for block in self._stood_in)
        if replaced:
            module.forward = partial(_stand_in, module)

        def begin(*_: Any) -> None:
            numbers.append(self._count)
            self._count += 1
            self._open.append([])
            self._meter.enter(numbers[-1], backward=False)

        def end(part: nn.Module, arguments: Any, output: Any) -> None:
            number, children = numbers.pop(), tuple(self._open.pop())
            reached = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            for tensor in reached if unit.sizes else ():
                tensor.register_hook(lambda grad: self._meter.enter(number, backward=True))
            called = replace(unit, children=children, has_backward=bool(reached), call=number)
            self._open[-1].append(replace(called, traced=not replaced))

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
        for name, child in () if unit.is_block else module.named_children():
            self.watch(child, f"{path}.{name}".lstrip("."))


_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Meter(TorchDispatchMode):
    """Counts what operators do and how much memory their results take, by what has begun last."""

    def __init__(self, *ignored: Iterable[Tensor]):
        super().__init__()
        self.numbers: Counter[Any] = Counter()
        self._live, self._now = 0, ("bytes", -1, False)
        self._known: dict[int, Any] = {}
        for tensor in (tensor for some in ignored for tensor in some):
            storage = tensor.untyped_storage()
            self._known[id(storage)] = storage
            if tensor.requires_grad:  # its gradient is gone as soon as it is there, into ZeRO's buffers
                tensor.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))

    def enter(self, call: int, *, backward: bool) -> None:
        self._now = ("bytes", call, backward)
        self._record()

    def _record(self, copies: int = 0) -> None:
        _, *where = self._now
        for name, size in (("bytes", self._live), ("bytes on a CPU", self._live + copies)):
            self.numbers[name, *where] = max(self.numbers[name, *where], size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        outputs = [item for item in tree_leaves(out) if isinstance(item, Tensor)]
        fresh = [self._is_new(tensor) for tensor in outputs]
        is_convolution = func.overloadpacket in _CONVOLUTIONS
        self._record(_size(inputs + outputs) if is_convolution else 0)
        if func.namespace != "c10d" and (any(fresh) or func._schema.is_mutable):
            self._count(func, args, kwargs, out, inputs + outputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        backward = self._now[2]
        self.numbers["kernels", backward] += 1
        if formula := flop_registry.get(func.overloadpacket):
            self.numbers["flops", backward] += formula(*args, **kwargs, out_val=out)
        else:
            self.numbers["moved", backward] += _size(tensors)

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return False
        size = storage.nbytes()
        self._live += size
        self._known[id(storage)] = weakref.ref(storage, partial(self._gone, id(storage), size))
        return True

    def _gone(self, number: int, size: int, _: Any) -> None:
        del self._known[number]
        self._live -= size
