"""The model inside DeepSpeed: construction under ZeRO, one optimizer step, and reading whole weights back.

With `train.checkpoint` the only place that knows DeepSpeed. What DeepSpeed 0.19 does differently from its
documentation is handled here and said where it is handled.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavit.config import RunConfig
from megavit.model.block import ParallelBlock, SequentialBlock
from megavit.model.vit import MegaVit
from megavit.parallel.collectives import reduce_from_tp, sum_over_dp
from megavit.parallel.mesh import Mesh
from megavit.train.ds_config import uses_bf16
from megavit.train.inputs import Inputs
from megavit.train.loss import image_losses
from megavit.train.optim import parameter_groups
from megavit.train.zero_state import ZeroState

# DeepSpeed compiles its ops with the first `ninja` in PATH, and another version of it takes finished ops for
# outdated: without this, a start with the environment not activated costs half a minute, and so does the
# next.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# DeepSpeed prints dozens of lines a rank at start.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.utils import set_z3_leaf_modules  # noqa: E402

# An all-reduce over shared memory, for inference on CPUs only. At each start it would be compiled or looked
# up, and leave 32 MB or more a rank in /dev/shm, for ever.
# (The attribute deepspeed.comm.torch is PyTorch, hence the long way to the module.)
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

# Asked whether the optimizer is its Muon (none is), DeepSpeed imports functions that are compiled when
# imported: with all of inductor, a second of each start.
importlib.import_module("deepspeed.runtime.compiler").compile = lambda: lambda function: function  # type: ignore[attr-defined]


class StepResult(NamedTuple):
    """One optimizer step, the same on every rank. `grad_norm` is the global one before clipping; `refused` is
    empty, or says why the weights and moments were left as they were."""

    loss: float
    grad_norm: float
    refused: str


class Engine:
    """A `MegaVit` trained by DeepSpeed ZeRO on a mesh.

    Collective: every rank calls the same methods in the same order. `ds_config` is a resolved one
    (`resolve_ds_config`). Without `initialise` the weights hold anything: the caller loads them (`state`).
    """

    def __init__(self, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh, *, initialise: bool = True):
        self.run, self.mesh = run, mesh
        self.dtype = torch.bfloat16 if uses_bf16(ds_config) else torch.float32
        self.grad_accum: int = ds_config["gradient_accumulation_steps"]
        self.micro_batch: int = ds_config["train_micro_batch_size_per_gpu"]
        deepspeed.init_distributed(dist_init_required=False)  # adopts the mesh's process group
        self.model = build_model(run, ds_config, mesh)
        if run.compile:  # after zero.Init, whose patched constructors torch._dynamo cannot be imported under
            self.model.compile_blocks()
        body_decay = ds_config["optimizer"]["params"].get("weight_decay", 0.0)
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.model,
            model_parameters=parameter_groups(self.model, body_decay, run.head_weight_decay),
            config=ds_config,
            mpu=mesh,
            dist_init_required=False,
        )
        self.state = ZeroState(self._deepspeed, self.model, mesh)
        if initialise:
            self.state.initialise()
        self._update = self._deepspeed.basic_optimizer.step
        self._deepspeed.basic_optimizer.step = self._update_unless_refused
        self._grad_norm, self._norm_limit = math.nan, math.inf

    def train_step(
        self,
        micro_batches: Iterable[Inputs],
        total_weight: Tensor,
        lr: float,
        norm_limit: float = math.inf,
    ) -> StepResult:
        """One optimizer step on `grad_accum` micro-batches, of images in [-1, 1].

        The loss is the sum of the images' losses times their weights over `total_weight`, the global batch's
        sum of weights: bad samples take no part. The update is refused when the gradient's norm is not finite
        or above `norm_limit`. Beside DeepSpeed's own, one all-reduce of a scalar.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.train()
        total = torch.zeros((), device=self.mesh.device)
        divisor = total_weight.clamp(min=1)
        for index, (images, targets, weights) in enumerate(micro_batches):
            logits = self._deepspeed(images.to(self.dtype), local_logits=True)
            losses = image_losses(self.run.loss, logits, targets, self.run.model.num_classes, self.mesh)
            loss = (losses * weights).sum() / divisor
            total += loss.detach()
            # DeepSpeed averages over micro-batches and DP ranks; the division above has done both.
            self._deepspeed.backward(loss * (self.grad_accum * self.mesh.dp_size))
            if index + 1 < self.grad_accum:
                self._deepspeed.step()  # counts the micro-batch; the weights move on the last one only
        loss_sum = float(sum_over_dp(self.mesh, total))
        self._norm_limit = norm_limit
        self._grad_norm = self._whole_grad_norm() if self._keeps_gradients_whole else math.nan
        self._deepspeed.step()
        if not self._keeps_gradients_whole:
            self._grad_norm = float(self._deepspeed.optimizer._global_grad_norm)
        return StepResult(loss_sum, self._grad_norm, self._reason_to_refuse(total, loss_sum))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes], float32, of images [B, C, S, S], the same on all TP ranks."""
        self._deepspeed.eval()
        return self._deepspeed(images.to(self.dtype)).float()

    @property
    def _keeps_gradients_whole(self) -> bool:
        """Stage 0 in float32: DeepSpeed steps the plain optimizer and reports no norm."""
        return not hasattr(self._deepspeed.optimizer, "_global_grad_norm")

    def _whole_grad_norm(self) -> float:
        squares = [torch.zeros((), device=self.mesh.device)] * 2  # replicated, sharded
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                sharded = int(parameter.model_parallel)  # type: ignore[attr-defined]
                squares[sharded] = squares[sharded] + parameter.grad.float().square().sum()
        return float(squares[0] + reduce_from_tp(self.mesh, squares[1])) ** 0.5

    def _update_unless_refused(self, *arguments: Any, **options: Any) -> Any:
        """In the optimizer's place: DeepSpeed calls it for each of its buffers, when the norm is known and
        nothing has moved yet, and then goes on as after any step. (At stage 3 it leaves out such a call by
        itself if the norm is not finite.)"""
        if not self._keeps_gradients_whole:
            self._grad_norm = float(self._deepspeed.optimizer._global_grad_norm)
        return self._update(*arguments, **options) if self._norm_is_fine else None

    @property
    def _norm_is_fine(self) -> bool:
        return math.isfinite(self._grad_norm) and self._grad_norm <= self._norm_limit

    def _reason_to_refuse(self, local_loss: Tensor, loss: float) -> str:
        if self._norm_is_fine:
            return ""
        if math.isfinite(loss):
            what = "not finite" if not math.isfinite(self._grad_norm) else f"above {self._norm_limit:.4g}"
            return f"gradient norm {self._grad_norm:.4g} is {what}"
        flags = torch.zeros(self.mesh.dp_size, device=local_loss.device)
        flags[self.mesh.dp_rank] = float(not math.isfinite(float(local_loss)))
        bad = sum_over_dp(self.mesh, flags).nonzero().flatten().tolist()
        ranks = (
            ", ".join(str(dp_rank * self.mesh.tp_size) for dp_rank in bad) or "none alone (the sum overflows)"
        )
        return f"loss is {loss} on rank(s) {ranks}"


def build_model(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> MegaVit:
    """The model on the mesh's device, its weights not yet filled: whole for stages 0 to 2, for stage 3
    partitioned parameter by parameter, so that no more than one of them is ever whole."""

    def build() -> MegaVit:
        return MegaVit.from_config(
            run.model, mesh=mesh, seed=run.seed, recompute=run.recompute, deferred_init=True
        )

    if ds_config.get("zero_optimization", {}).get("stage", 0) < 3:
        with mesh.device:
            return build()
    # `data_parallel_group` is not optional: without it zero.Init partitions over the world and mixes TP
    # shards.
    with deepspeed.zero.Init(config_dict_or_path=ds_config, mpu=mesh, data_parallel_group=mesh.dp_group):
        model = build()
    # A block's weights are gathered together, once: fewer collectives, and its forward may be compiled or
    # recomputed as plain functions because no ZeRO hook runs inside it.
    set_z3_leaf_modules(model, [ParallelBlock, SequentialBlock])
    return model
