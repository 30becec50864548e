"""The whole trainer on one GPU, the engine with DeepSpeed at ZeRO stages 1 and 3, beside the bare model and
timm's at the same shape: images a second and MFU.

All have bfloat16 weights, torch's fused AdamW and compiled blocks. The bare models keep bfloat16 weights and
moments alone, the engine also float32 master weights, float32 moments, clipping, and the checks of the norm.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch

from megavit.bench.gpu.setting import Setting
from megavit.bench.gpu.stage import Case, Unavailable
from megavit.bench.model import training_step
from megavit.bench.peers import CONTESTANTS
from megavit.bench.report import Row
from megavit.bench.rounds import median_s
from megavit.model.count import train_flops
from megavit.parallel.mesh import Mesh

TIMM, OURS = "timm-parallel", "megavit"
# timm's usual block, which does less: no QK norm.
_USUAL = "timm-cls"


def cases(setting: Setting) -> Iterator[Case]:
    """The engine at stage 1 and 3 and timm's parallel block first, compiled; what is eager last."""
    reference: dict[bool, float] = {}  # timm's images a second, by whether it is compiled
    mesh = functools.cache(Mesh.from_environment)

    def case(step: str, compiled: bool, measure: Callable[..., Row]) -> Case:
        names = {"model": setting.trained.name, "micro_batch": setting.trained_batch}
        return Case(
            names | {"step": step, "compiled": compiled}, partial(measure, setting, compiled, reference)
        )

    # Engines are never freed: what needs the memory that they leave comes later only if it may fail.
    yield case(f"bare model, {TIMM}", True, partial(_bare, TIMM))
    yield case(f"bare model, {OURS}", True, partial(_bare, OURS))
    yield case("trainer, ZeRO stage 3", True, partial(_engine, 3, mesh))
    yield case("trainer, ZeRO stage 1", True, partial(_engine, 1, mesh))
    yield case(f"bare model, {_USUAL}", True, partial(_bare, _USUAL))
    yield case(f"bare model, {TIMM}", False, partial(_bare, TIMM))
    yield case(f"bare model, {OURS}", False, partial(_bare, OURS))
    yield case("trainer, ZeRO stage 3", False, partial(_engine, 3, mesh))


def _bare(name: str, setting: Setting, compiled: bool, reference: dict[bool, float]) -> Row:
    contestant, config = CONTESTANTS[name], setting.trained
    if not importlib.util.find_spec(contestant.package):
        raise Unavailable(f"{contestant.package} is not installed")
    torch.compiler.reset()
    with torch.device(setting.device):
        torch.manual_seed(0)
        model = contestant.build(config).to(setting.dtype).train()
        side, batch = config.image_size, setting.trained_batch
        images = torch.rand(batch, config.channels, side, side, dtype=setting.dtype) * 2 - 1
        labels = torch.randint(0, config.num_classes, (batch,))
    if compiled:
        for block in contestant.blocks(model):
            block.forward = torch.compile(block.forward, backend=setting.compiler)
    row = _speed(setting, training_step(model, images, labels))
    if name == TIMM:
        reference[compiled] = row["images_per_s"]
    return _beside(row, reference.get(compiled))


def _engine(
    stage: int, mesh: Callable[[], Mesh], setting: Setting, compiled: bool, reference: dict[bool, float]
) -> Row:
    if not importlib.util.find_spec("deepspeed"):
        raise Unavailable("DeepSpeed is not installed")
    from megavit.bench.trainer import engine_step
    from megavit.tasks.config import ClassifyConfig
    from megavit.train.config import RunConfig

    torch.compiler.reset()
    # A compiled run has no choice of compiler: a rehearsal on a CPU leaves it out.
    run = RunConfig(
        model=setting.trained,
        task=ClassifyConfig(loss="softmax"),
        compile=compiled and setting.compiler == "inductor",
    )
    adam = {"torch_adam": True, "fused": True}
    step = engine_step(run, setting.trained_batch, stage, setting.dtype, mesh(), **adam)
    return _beside(_speed(setting, step), reference.get(compiled))


def _speed(setting: Setting, step: Callable[[], object]) -> Row:
    on_gpu = setting.device == "cuda"
    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = median_s(step, setting.steps, setting.device)
    images_per_s = setting.trained_batch / seconds
    rate = images_per_s * train_flops(setting.trained)
    return {
        "ms": seconds * 1e3,
        "images_per_s": images_per_s,
        "tflop_per_s": rate / 1e12,
        "mfu": setting.of_peak(rate),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def _beside(row: Row, reference: float | None) -> Row:
    return row | {"ratio_to": TIMM, "ratio": row["images_per_s"] / reference if reference else None}
