"""L-BFGS over a sum that the ranks share out: SciPy's optimizer on the main rank leads, the others follow.

Only the main rank decides what is evaluated next and when it is enough, so that ranks never part, be their
processors and libraries as different as they may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from megavit.parallel.collectives import broadcast_over_world
from megavit.parallel.mesh import Mesh


class Minimum(NamedTuple):
    """Where the optimizer stopped, the same on every rank. It has not `converged` if it ran out of steps, or
    found nothing smaller along the line although the gradient is above the tolerance."""

    point: Tensor
    value: float
    steps: int
    converged: bool


def minimize_over_world(
    mesh: Mesh,
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    gradient_tolerance: float,
    max_steps: int,
) -> Minimum:
    """Minimises `objective`, from `start`, until no component of the gradient exceeds the tolerance.

    Args:
        objective: from a point, float64, on the mesh's device, to the value (a scalar) and the gradient. It
            is called on all ranks with the same point, and may be collective.
    """
    device, shape = mesh.device, start.shape

    def evaluate(point: Tensor) -> tuple[float, np.ndarray]:
        value, gradient = objective(point.view(shape))
        return value.item(), gradient.reshape(-1).cpu().numpy()

    # A message is the next point and a number: 1 to evaluate it, 0 if it is the last one.
    def send(point: np.ndarray, more: bool) -> Tensor:
        message = torch.from_numpy(np.append(point, float(more))).to(device)
        return broadcast_over_world(mesh, message)[:-1]

    if not mesh.is_main:
        message = start.new_empty(start.numel() + 1)
        while (received := broadcast_over_world(mesh, message))[-1]:
            evaluate(received[:-1])
        return Minimum(received[:-1].view(shape), *mesh.broadcast(None))
    found = minimize(
        lambda point: evaluate(send(point, more=True)),
        start.reshape(-1).cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_steps, "maxfun": 2 * max_steps, "gtol": gradient_tolerance, "ftol": 1e-14},
    )
    point = send(found.x, more=False).view(shape)
    return Minimum(point, *mesh.broadcast((float(found.fun), int(found.nit), bool(found.success))))
