"""The model inside DeepSpeed: construction under ZeRO, one optimizer step, and reading whole weights back.

With `train.checkpoint` the only place that knows DeepSpeed. What DeepSpeed 0.19 does differently from its
documentation is handled here and said where it is handled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

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

# DeepSpeed prints dozens of lines a rank at start.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules  # noqa: E402


class NonFiniteError(RuntimeError):
    """Loss or gradient norm is infinite or not a number; raised before the weights change."""


class Engine:
    """A `MegaVit` trained by DeepSpeed ZeRO on a mesh.

    Collective: every rank calls the same methods in the same order. `ds_config` is a resolved one
    (`resolve_ds_config`).
    """

    def __init__(self, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh):
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
        self._deepspeed.basic_optimizer.register_step_pre_hook(self._refuse_non_finite_norm)
        self._where = ""
        self._grad_norm = math.nan

    def train_step(
        self, micro_batches: Iterable[Inputs], total_weight: Tensor, step: int, lr: float
    ) -> tuple[float, float]:
        """One optimizer step on `grad_accum` micro-batches, of images in [-1, 1].

        The loss is the sum of the images' losses times their weights over `total_weight`, the global batch's
        sum of weights: bad samples take no part. Returns it and the gradient's global norm before clipping.
        Raises NonFiniteError, on all ranks alike, before the weights change. Beside DeepSpeed's own, one
        all-reduce of a scalar.
        """
        self._where = f"at step {step + 1}, learning rate {lr:.3g}"
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
        loss_sum = self._agreed_loss(total)
        if self._keeps_gradients_whole:
            self._grad_norm = self._whole_grad_norm()
        self._deepspeed.step()
        if getattr(self._deepspeed.optimizer, "overflow", False):  # ZeRO-3 skips such a step without a word
            raise NonFiniteError(
                f"gradient norm is not finite {self._where} (all ranks agree); weights unchanged"
            )
        return loss_sum, self._grad_norm

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes], float32, of images [B, C, S, S], the same on all TP ranks."""
        self._deepspeed.eval()
        return self._deepspeed(images.to(self.dtype)).float()

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and this TP rank's shard, float32 (the master copy), on the CPU of every
        rank.

        Collective over DP; holds one parameter at a time.
        """
        for name, parameter in self.model.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            # Without a ZeRO master copy the parameter itself is whole.
            yield name, (parameter.detach() if full is None else full).float().cpu()

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

    def _refuse_non_finite_norm(self, *_: Any) -> None:
        """Runs before each of the optimizer's updates, when DeepSpeed knows the norm and nothing has moved
        yet."""
        if not self._keeps_gradients_whole:
            self._grad_norm = float(self._deepspeed.optimizer._global_grad_norm)
        if not math.isfinite(self._grad_norm):
            raise NonFiniteError(
                f"gradient norm is {self._grad_norm} {self._where} (all ranks agree); weights unchanged"
            )

    def _agreed_loss(self, local: Tensor) -> float:
        """The sum over DP ranks; raises on every rank, naming the culprits, if one rank's loss is not
        finite."""
        total = float(sum_over_dp(self.mesh, local))
        if math.isfinite(total):
            return total
        flags = torch.zeros(self.mesh.dp_size, device=local.device)
        flags[self.mesh.dp_rank] = float(not math.isfinite(float(local)))
        bad = sum_over_dp(self.mesh, flags).nonzero().flatten().tolist()
        ranks = (
            ", ".join(str(dp_rank * self.mesh.tp_size) for dp_rank in bad) or "none alone (the sum overflows)"
        )
        raise NonFiniteError(f"loss is {total} {self._where}, on rank(s) {ranks}; weights unchanged")


def build_model(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> MegaVit:
    """The model on the mesh's device: whole for stages 0 to 2, partitioned parameter by parameter for stage
    3."""

    def build() -> MegaVit:
        return MegaVit.from_config(run.model, mesh=mesh, seed=run.seed, recompute=run.recompute)

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
