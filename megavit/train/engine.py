"""The model inside DeepSpeed: construction under ZeRO, one optimizer step, and reading whole weights back.

With `zero_state.py` and `ds_patches.py` the only place that knows DeepSpeed. What DeepSpeed 0.19 does
differently from its documentation is handled here and said where it is handled.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megavit.model.block import ParallelBlock, SequentialBlock
from megavit.model.vit import MegaVit
from megavit.parallel.collectives import reduce_from_tp
from megavit.parallel.init import Initializer, logical_parameters, logical_statistics
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from megavit.tasks.task import Sums, Task, make_task
from megavit.train.config import RunConfig
from megavit.train.ds_config import uses_bf16
from megavit.train.ds_patches import (
    deepspeed,
    keep_the_host_ahead,
    safe_get_full_fp32_param,
    set_z3_leaf_modules,
    without_waits,
)
from megavit.train.optim import freeze, frozen_parts, keep_until_backward, optimizer_groups
from megavit.train.step import PendingStep, StepResult
from megavit.train.zero_state import ZeroState


class Engine:
    """A task's root module (`module`) trained by DeepSpeed ZeRO on a mesh.

    Collective: every rank calls the same methods in the same order. `ds_config` is a resolved one
    (`resolve_ds_config`). Without `initialise` the weights hold anything: the caller loads them (`state`).
    """

    def __init__(self, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh, *, initialise: bool = True):
        self.run, self.mesh = run, mesh
        self.dtype = torch.bfloat16 if uses_bf16(ds_config) else torch.float32
        self.grad_accum: int = ds_config["gradient_accumulation_steps"]
        self.micro_batch: int = ds_config["train_micro_batch_size_per_gpu"]
        deepspeed.init_distributed(dist_init_required=False)  # adopts the mesh's process group
        self.task = make_task(run.task, run.model, run.data)
        self.module = build_module(self.task, run, ds_config, mesh)
        self.parameters = logical_parameters(self.module)
        self._frozen_parts = frozen_parts(self.module)
        if run.compile:  # after zero.Init, whose patched constructors torch._dynamo cannot be imported under
            for trunk in (part for part in self.module.modules() if isinstance(part, MegaVit)):
                trunk.compile_blocks()
        weight_decay = ds_config["optimizer"]["params"].get("weight_decay", 0.0)
        groups = optimizer_groups(self.task, self.parameters, weight_decay, run.schedule.layer_decay)
        self._deepspeed, *_ = deepspeed.initialize(
            model=_Root(self.module),
            model_parameters=groups,
            config=without_waits(ds_config),
            mpu=mesh,
            dist_init_required=False,
        )
        keep_the_host_ahead(self._deepspeed.optimizer)
        self._statistics = logical_statistics(self.module)
        self.state = ZeroState(self._deepspeed, self.parameters, mesh, self._statistics)
        self._check_state()
        if initialise:
            self.state.initialise()
        self._update = self._deepspeed.basic_optimizer.step
        self._deepspeed.basic_optimizer.step = self._update_unless_refused
        self._step: PendingStep | None = None

    def train_step(
        self,
        micro_batches: Iterable[Any],
        total_weight: Tensor,
        lr: float,
        norm_limit: float = math.inf,
        read: Tensor | None = None,
    ) -> StepResult:
        """`start_step`, and wait for its result."""
        return self.start_step(micro_batches, total_weight, lr, lambda: norm_limit, read).result()

    def start_step(
        self,
        micro_batches: Iterable[Any],
        total_weight: Tensor,
        lr: float,
        norm_limit: Callable[[], float],
        read: Tensor | None = None,
    ) -> PendingStep:
        """One optimizer step on `grad_accum` micro-batches, each as `Task.inputs` gives it.

        The loss and the task's metrics are their sums over the global batch divided by `total_weight`, its
        number of units: bad samples take no part. The update is refused, on all ranks alike, when some rank
        finds the gradient's norm not finite or above `norm_limit()`, which is called once, when the backward
        passes have been queued: it may read the result of the step before without making the device wait.

        Beside DeepSpeed's own communication one all-reduce of two numbers and the metrics, and one copy to
        the host, in which `read` (numbers on the device) comes along. Nothing waits for it here, unless the
        optimizer is one that cannot be told on the device to refuse (`_decides_on_device`).
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._deepspeed.train()
        for part in self._frozen_parts:
            part.eval()
        total = torch.zeros((), device=self.mesh.device)
        metrics: dict[str, Tensor] = {}
        divisor = total_weight.clamp(min=1)
        statistics = [statistic.clone() for statistic in self._statistics.values()]
        for index, inputs in enumerate(micro_batches):
            sums = Sums(*self._deepspeed(_forward, inputs))
            loss = sums.loss / divisor
            total += loss.detach()
            for name, value in sums.metrics.items():
                metrics[name] = metrics.get(name, 0) + value.detach() / divisor
            # DeepSpeed averages over micro-batches and DP ranks; the division above has done both.
            self._deepspeed.backward(loss * (self.grad_accum * self.mesh.dp_size))
            if index + 1 < self.grad_accum:
                self._deepspeed.step()  # counts the micro-batch; the weights move on the last one only
        self._step = step = PendingStep(self.mesh, total, metrics, norm_limit, read)
        if self._keeps_gradients_whole:
            step.grad_norm = self._whole_grad_norm()
        self._deepspeed.step()
        refused = self._decide(step) > 0
        for statistic, before in zip(self._statistics.values(), statistics, strict=True):
            statistic.copy_(torch.where(refused, before, statistic))
        self._step = None
        return step

    @torch.no_grad()
    def evaluate(self, inputs: Any) -> Sums:
        """The root module's sums over one micro-batch of an evaluation."""
        return self.call(_forward, inputs)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(module, *arguments)` in evaluation mode, whatever parts of the root module it uses: under
        ZeRO-3 their weights are gathered as they run. For what the model has beside its sums: its features
        (`module.trunk.forward_features(images)`), what observers are told, gradients of activations.

        Collective: every rank calls it equally often, with a function that uses the same parts in the same
        order. Data-parallel ranks may have different numbers of images, an empty batch [0, C, S, S] if they
        have none left; the ranks of one TP group have the same images.

        Gradients are taken inside the function, of and with respect to anything but weights: these require
        none meanwhile, so that nothing is accumulated, reduced or trained.
        """
        self._deepspeed.eval()
        results: list[Any] = []
        # Around DeepSpeed, which wraps tensors that go in and out, knows few types of results, and prepares
        # for a step when a gradient reaches one.
        with _without_gradients(self.module):
            self._deepspeed(lambda module: results.append(function(module, *arguments)))
        return results[0]

    @property
    def _keeps_gradients_whole(self) -> bool:
        """Stage 0 in float32: DeepSpeed steps the plain optimizer and reports no norm."""
        return not hasattr(self._deepspeed.optimizer, "_global_grad_norm")

    def _whole_grad_norm(self) -> Tensor:
        squares = [torch.zeros((), device=self.mesh.device)] * 2  # replicated, sharded
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                sharded = int(parameter.model_parallel)  # type: ignore[attr-defined]
                squares[sharded] = squares[sharded] + parameter.grad.float().square().sum()
        return (squares[0] + reduce_from_tp(self.mesh, squares[1])).sqrt()

    @property
    def _decides_on_device(self) -> bool:
        """Whether the optimizer leaves weights and moments as they are when a number on the device says so:
        torch's fused Adam does. Others are not called, for which the host has to wait."""
        optimizer = self._deepspeed.basic_optimizer
        groups_are_fused = all(group.get("fused") for group in optimizer.param_groups)
        return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and groups_are_fused

    def _update_unless_refused(self, *arguments: Any, **options: Any) -> Any:
        """In the optimizer's place: DeepSpeed calls it for each of its buffers, when the norm is known and
        nothing has moved yet, and then goes on as after any step."""
        step = self._step
        assert step is not None
        refused = self._decide(step)
        if self._decides_on_device:
            self._deepspeed.basic_optimizer.found_inf = refused
        elif step.result().refused:
            return None
        return self._update(*arguments, **options)

    def _decide(self, step: PendingStep) -> Tensor:
        if step.refused is None:
            known = step.grad_norm is not None
            return step.decide(step.grad_norm if known else self._deepspeed.optimizer._global_grad_norm)
        return step.refused

    def _check_state(self) -> None:
        """Write a pattern into one parameter through `state`, and read it through DeepSpeed's public API.
        Raises RuntimeError if they differ."""
        stage = self._deepspeed.zero_optimization_stage()
        if stage == 0 or self.mesh.is_fake:  # no buffers of DeepSpeed's; no data that move
            return
        trained = {name: part for name, part in self.parameters.items() if part.requires_grad}
        layouts = {name: layout_of(parameter) for name, parameter in trained.items()}
        matrices = [name for name, layout in layouts.items() if len(layout.shape) > 1]
        name = min(matrices or layouts, key=lambda name: math.prod(layouts[name].shape))
        shape = layouts[name].local_shape(self.mesh.tp_size)
        pattern = torch.arange(math.prod(shape), dtype=torch.float32, device=self.mesh.device)
        for part in self.state.slices(moments=False):
            if part.name == name:
                part.tensors["weight"].copy_(pattern[part.start : part.stop])
        found = safe_get_full_fp32_param(trained[name])
        if found is None or not torch.equal(found.flatten(), pattern.to(found.device)):
            raise RuntimeError(
                f"the weights of {name} as this trainer reads them from DeepSpeed's ZeRO stage {stage} are "
                f"not those that DeepSpeed reports: checkpoints would be wrong; reinstall the versions of "
                f"requirements.txt"
            )


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, nor does ZeRO-3 reduce any. Hooks of its reduce zeros for the weights
    of a block whenever a gradient passes through it."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hooks = {part: part._backward_hooks for part in module.modules()}
    for parameter in trained:
        parameter.requires_grad_(False)
    for part in hooks:
        part._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
        for part, own in hooks.items():
            part._backward_hooks = own


class _Root(nn.Module):
    """What DeepSpeed wraps: its `forward` runs any function on the task's module, so that ZeRO-3 sees every
    use of a parameter between the start and the end of a pass."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.module, *arguments)


def _forward(module: nn.Module, inputs: Any) -> Any:
    return module(inputs)


def build_module(task: Task, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> nn.Module:
    """The task's root module on the mesh's device, its weights not yet filled: whole for stages 0 to 2, for
    stage 3 partitioned parameter by parameter, so that no more than one of them is ever whole."""

    def build() -> nn.Module:
        return task.build(Initializer(run.seed, mesh, deferred=True), run.recompute)

    if ds_config.get("zero_optimization", {}).get("stage", 0) < 3:
        with mesh.device:
            module = build()
        freeze(module, run.freeze)
        return module
    # `data_parallel_group` is not optional: without it zero.Init partitions over the world and mixes TP
    # shards.
    with deepspeed.zero.Init(config_dict_or_path=ds_config, mpu=mesh, data_parallel_group=mesh.dp_group):
        module = build()
    freeze(module, run.freeze)
    if run.freeze:
        keep_until_backward(module)
    # A block's weights are gathered together, once: fewer collectives, and its forward may be compiled or
    # recomputed as plain functions because no ZeRO hook runs inside it.
    set_z3_leaf_modules(module, [ParallelBlock, SequentialBlock])
    return module
