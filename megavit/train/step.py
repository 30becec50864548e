"""What became of an optimizer step: the device decides, and the host reads it when it asks.

A host that waits for the device in each step leaves it idle until the next work is queued. So the decision
whether an update is refused is made, and obeyed, on the device, and its numbers are copied to pinned memory
behind it: whoever reads them a step later does not wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavit.parallel.collectives import sum_over_dp, sum_over_world
from megavit.parallel.mesh import Mesh


class StepResult(NamedTuple):
    """One optimizer step, the same on every rank. `grad_norm` is the global one before clipping; `refused` is
    empty, or says why the weights and moments were left as they were; `read` are the numbers that the caller
    asked for; `metrics` are the task's, per unit."""

    loss: float
    grad_norm: float
    refused: str
    read: tuple[float, ...] = ()
    metrics: Mapping[str, float] = {}


class PendingStep:
    """A step that the device has been told to take. `result` waits for it."""

    def __init__(
        self,
        mesh: Mesh,
        local_loss: Tensor,
        metrics: dict[str, Tensor],
        norm_limit: Callable[[], float],
        read: Tensor | None,
    ):
        self._mesh, self._local_loss, self._metrics = mesh, local_loss, metrics
        self._norm_limit, self._read = norm_limit, read
        self.grad_norm: Tensor | None = None  # where DeepSpeed does not tell
        # Once decided: float32 [] on the device, 1 or 0, on all ranks alike.
        self.refused: Tensor | None = None
        self._result: StepResult | None = None

    def decide(self, grad_norm: Any) -> Tensor:
        """Add up the ranks' losses and decide: what one rank refuses all refuse. Returns `refused`.
        Collective over the world; one all-reduce."""
        mesh, none = self._mesh, torch.empty(0, device=self._mesh.device)
        self._limit = self._norm_limit()
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=mesh.device)
        refused = ~(norm.isfinite() & (norm <= self._limit))
        mine = torch.stack([self._local_loss, *self._metrics.values()]).double()
        mine = mine if mesh.tp_rank == 0 else torch.zeros_like(mine)
        shared = sum_over_world(mesh, torch.cat([mine, refused.double()[None]]))
        self.refused = (shared[-1] > 0).float()
        read = none if self._read is None else self._read
        self._numbers = torch.cat([shared, norm[None], read.double()])
        self._arrived: torch.cuda.Event | None = None
        if mesh.device.type == "cuda":
            on_device = self._numbers
            self._numbers = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._numbers.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return self.refused

    @property
    def is_read(self) -> bool:
        """Whether `result` has been called."""
        return self._result is not None

    def result(self) -> StepResult:
        """The step's numbers, once the device has decided. The first call, on all ranks in the same place, is
        collective over the data-parallel ranks if the loss is not finite."""
        if self._result is None:
            if self._arrived:
                self._arrived.synchronize()
            loss, *numbers = self._numbers.tolist()
            count = len(self._metrics)
            refusals, grad_norm, *read = numbers[count:]
            reason = self._reason_to_refuse(loss, grad_norm) if refusals else ""
            metrics = dict(zip(self._metrics, numbers[:count], strict=True))
            self._result = StepResult(loss, grad_norm, reason, tuple(read), metrics)
        return self._result

    def _reason_to_refuse(self, loss: float, grad_norm: float) -> str:
        if math.isfinite(loss):
            what = "not finite" if not math.isfinite(grad_norm) else f"above {self._limit:.4g}"
            return f"gradient norm {grad_norm:.4g} is {what}"
        mesh = self._mesh
        flags = torch.zeros(mesh.dp_size, device=mesh.device)
        flags[mesh.dp_rank] = float(not math.isfinite(float(self._local_loss)))
        bad = sum_over_dp(mesh, flags).nonzero().flatten().tolist()
        ranks = ", ".join(str(dp_rank * mesh.tp_size) for dp_rank in bad) or "none alone (the sum overflows)"
        return f"loss is {loss} on rank(s) {ranks}"
