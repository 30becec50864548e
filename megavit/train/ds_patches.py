"""Everything that this project changes in DeepSpeed, for the one version that it was read and tested with.

The trainer also reads attributes of DeepSpeed that are not public (`zero_state.py`, `engine.py`); the engine
checks at each start that what it reads there is what DeepSpeed's public functions say. Import DeepSpeed from
here, so that the changes are in place.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

VERSION = "0.19.8"


def _require_version() -> None:
    found = importlib.metadata.version("deepspeed")
    if found != VERSION:
        raise ImportError(
            f"DeepSpeed {found} is installed, this version of MegaViT works with {VERSION} only: it changes "
            f"and reads parts of it that are not public; pip install deepspeed=={VERSION}"
        )


_require_version()

# DeepSpeed compiles its ops with the first `ninja` in PATH, and another version of it takes finished ops for
# outdated: without this, a start with the environment not activated costs half a minute, and so does the
# next.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# DeepSpeed prints dozens of lines a rank at start.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules  # noqa: E402

__all__ = [
    "VERSION",
    "deepspeed",
    "keep_the_host_ahead",
    "safe_get_full_fp32_param",
    "set_z3_leaf_modules",
    "without_waits",
]

# An all-reduce over shared memory, for inference on CPUs only. At each start it would be compiled or looked
# up, and leave 32 MB or more a rank in /dev/shm, for ever.
# (The attribute deepspeed.comm.torch is PyTorch, hence the long way to the module.)
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

# Asked whether the optimizer is its Muon (none is), DeepSpeed imports functions that are compiled when
# imported: with all of inductor, a second of each start.
importlib.import_module("deepspeed.runtime.compiler").compile = lambda: lambda function: function  # type: ignore[attr-defined]

_stage3 = importlib.import_module("deepspeed.runtime.zero.stage3")
_stage_1_and_2 = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")

# Whether a gradient is finite the engine decides, on the device, by the norm that DeepSpeed has computed;
# DeepSpeed itself would make the host wait for it, several times a step. What it makes of a norm that is not
# a number stays infinite until then.
_stage3.is_invalid_grad_norm = lambda norm: False  # type: ignore[attr-defined]
_stage_1_and_2.is_invalid_grad_norm = lambda norm: False  # type: ignore[attr-defined]
_stage_1_and_2.mask_nan_or_inf_with_val_inplace = lambda norm, device=None: None  # type: ignore[attr-defined]


def _grad_norm(optimizer: Any, gradients: Any, parameters: Any, norm_type: float = 2.0) -> Any:
    """Stage 3's norm of a group's gradients, with the same operations, but for a number that DeepSpeed copies
    to the device to mark what is not finite: the copy waits."""
    group = optimizer._get_param_partition_group(parameters[0])
    norms = [
        gradient.to(optimizer.device, non_blocking=True).double().norm(norm_type)
        for gradient, parameter in zip(gradients, parameters, strict=True)
        if _stage3.is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0
    ]
    total = torch.zeros((), dtype=torch.double, device=optimizer.device)
    if norms:
        total = torch.sum(torch.pow(torch.stack(norms), norm_type))
    deepspeed.comm.all_reduce(total, group=group)
    optimizer._model_parallel_all_reduce(tensor=total, op=deepspeed.comm.ReduceOp.SUM)
    return total ** (1.0 / norm_type)


_stage3.DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct = _grad_norm


class _Accelerator:
    """DeepSpeed's, which does not wait when it is told to."""

    def __getattr__(self, name: str) -> Any:
        return getattr(deepspeed.accelerator.get_accelerator(), name)

    def synchronize(self, *device: Any) -> None:
        pass


# Stage 3 gathers what is never partitioned again after each update, and waits for the whole device; but the
# collectives' own handles have made the current stream wait for them before.
_partition_parameters = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
_partition_parameters.get_accelerator = _Accelerator  # type: ignore[attr-defined]


def without_waits(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what makes the host wait for the device in each step to no purpose here: the
    timer of DeepSpeed's own throughput, and a second look at what the norm tells."""
    found = ds_config | {"timers": {"throughput": {"enabled": False}}}
    if "bf16" in found:
        found["bf16"] = found["bf16"] | {"check_grad_overflow": False}
    return found


class _OrderedStream(torch.cuda.Stream):
    """A stream for whose end the current stream waits, and not the host."""

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self)


def keep_the_host_ahead(optimizer: Any) -> None:
    """At stage 3 DeepSpeed makes the host wait, after each backward pass, until all gradients are reduced;
    here the device's own next work does. (With the optimizer's state on the host it is the host that needs
    them.)"""
    stream = getattr(optimizer, "reduce_and_partition_stream", None)
    if isinstance(stream, torch.cuda.Stream) and not optimizer.offload_optimizer:
        optimizer.reduce_and_partition_stream = _OrderedStream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )
