"""What is planned for tasks with a root module of their own: traced on the module itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavit.gpus import gpu_named
from megavit.model.config import ModelConfig
from megavit.scale.choices import Only
from megavit.scale.cluster import Cluster
from megavit.scale.job import Layout, ZeroSettings
from megavit.scale.memory import predict_memory
from megavit.scale.program import Program, module_on_meta, program
from megavit.scale.search import search
from megavit.tasks.config import DepthConfig, SegmentConfig, TaskConfig, load_task
from megavit.train.config import RunConfig

MODEL = ModelConfig(
    image_size=32, patch_size=4, channels=1, num_classes=0, dim=64, depth=6, num_heads=4, mlp_dim=128
)
DPT = DepthConfig(head_width=16)
SEGMENTER = SegmentConfig(classes=5, head="segmenter", head_width=128)  # two heads
BODY = MODEL.num_patches * MODEL.dim * 2  # bytes of one image's patch tokens in bfloat16


@pytest.mark.parametrize("task", [DPT, SEGMENTER], ids=lambda task: task.name)
def test_every_parameter_counts_once(task: TaskConfig) -> None:
    """Catches a norm that counts for each tap, and pooling that nobody calls but that is there."""
    for tp_size in (1, 2):
        module = module_on_meta(MODEL, tp_size, "trunk", task)
        found = program(MODEL, tp_size, "trunk", task)
        assert found.tree.numel() == sum(part.numel() for part in module.parameters())
        trained = sum(part.numel() for part in module.parameters() if part.requires_grad)
        assert found.tree.trained_part().numel() == found.reduced().numel() == trained
    whole = program(MODEL, 1, "", task)
    unused = sum(
        part.numel()
        for name, part in module_on_meta(MODEL, 1, "", task).named_parameters()
        if name.startswith("trunk.pool.")
    )
    assert whole.tree.numel() - whole.reduced().numel() == unused > 0


def test_calls_are_those_of_a_step() -> None:
    """Catches blocks after the last tap that are planned for, and a backward pass through a frozen trunk."""
    task = DepthConfig(head_width=16, layers="0,1,2,3")
    frozen, whole = (program(MODEL, 1, freeze, task) for freeze in ("trunk", ""))
    for found, reached in ((frozen, False), (whole, True)):
        blocks = found.blocks()
        assert [block.name for block in blocks] == [f"trunk.blocks.{number}" for number in range(4)]
        assert [block.has_backward for block in blocks] == [reached] * 4
    names = [unit.name for unit in whole.calls.walk()]
    assert names.count("trunk.norm") == 4 and names.index("decoder") > names.index("trunk.blocks.3")


def test_a_frozen_trunk_keeps_the_taps_only() -> None:
    """Catches activations of frozen blocks that are planned for, and a head's that are not."""
    layout, zero = Layout(1, 2, 8), ZeroSettings(stage=3, bf16=True)

    def kept(depth: int, freeze: str) -> int:
        model = ModelConfig(**(vars(MODEL) | {"depth": depth}))
        found = predict_memory(model, "none", layout, zero, freeze, DPT).transient
        return sum(size for name, size in found.items() if name.startswith("activations"))

    assert kept(6, "trunk") == kept(24, "trunk")
    assert kept(24, "") - kept(6, "") > 18 * 10 * 8 * BODY
    whole, parts = program(MODEL, 1, "trunk", DPT).numbers(8), program(MODEL, 1, "trunk", DPT).numbers(1)
    assert max(size for name, size in whole.items() if name[0] == "bytes") > 4 * 8 * BODY
    assert whole["flops", True] == 8 * parts["flops", True] > whole["flops", False] > 0


def test_tp_sizes_that_the_head_cannot_have_are_left_out() -> None:
    """Catches a search that a head of a single attention head ends, and one that does not say why."""
    task = SegmentConfig(classes=5, head="segmenter", head_width=64)
    run = RunConfig(model=MODEL, task=task)
    cluster = Cluster(gpu_named("h100"), 1, 2)
    assert {plan.layout.tp_size for plan in search(run, 8, cluster)} == {1}
    with pytest.raises(ValueError, match="does not divide model.num_heads 1"):
        search(run, 8, cluster, Only(tp=2))


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    """Catches a planner that knows its own tasks only, and a traceback where one cannot be planned for."""
    source = (Path(__file__).parents[1] / "tasks" / "own_task.py").read_text()
    (tmp_path / "planned_ink.py").write_text(source)
    (tmp_path / "looks_at_values.py").write_text(
        source.replace("squares =", "assert error.max() < 9; squares =")
    )

    def planned(name: str) -> Program:
        task = load_task(f"{tmp_path}/{name}.py:Ink").Config(name=f"{tmp_path}/{name}.py:Ink")
        return program(MODEL, 1, "trunk.embed,trunk.blocks,trunk.norm", task)

    found = planned("planned_ink")
    assert 0 < found.tree.trained_part().numel() < 0.6 * found.tree.numel()
    assert found.numbers(2)["flops", True] > 0
    with pytest.raises(ValueError, match=r"looks_at_values.py:Ink cannot be planned for.*without data"):
        planned("looks_at_values")
