"""The search on clusters whose answers are known."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from megavit.gpus import gpu_named
from megavit.recipe import RECIPES, read_recipe
from megavit.scale.choices import Only
from megavit.scale.cluster import Cluster
from megavit.scale.inventory import inventory
from megavit.scale.job import Offload, ZeroSettings
from megavit.scale.rates import Rates
from megavit.scale.report import planned_ds_config
from megavit.scale.search import Plan, advice, reason, scaling, search

RUN = read_recipe(RECIPES / "vit_22b_jft.yaml")
BATCH = 65_536
GIB = 2**30


def cluster(gpu: str, nodes: int, gpus_per_node: int = 8) -> Cluster:
    return Cluster(gpu_named(gpu), nodes, gpus_per_node)


def test_22b_on_128_h100() -> None:
    """Catches a planner that prefers what is known to be slow: full recomputation, TP over a node."""
    plans = search(RUN, BATCH, cluster("h100", 16))
    best = plans[0]
    assert (best.zero.stage, best.layout.tp_size, best.recompute) == (3, 1, "selective") and best.fits
    assert best.layout.global_batch == BATCH and best.layout.ranks == 128
    assert 0.5 < best.mfu < 0.65
    by_name = {plan.name: plan for plan in plans}
    assert "recomputation" in reason(by_name["ZeRO-3 tp 1 full"], best)
    assert "slower" in reason(by_name["ZeRO-3 tp 8 selective"], best)
    assert reason(best, best) == "best"
    assert all(a.step.total <= b.step.total for a, b in pairwise(plans) if b.fits)


def test_22b_does_not_fit_eight_small_gpus() -> None:
    """Catches a plan that hides an offload: 18 bytes a parameter over 8 are 47 GiB, a GPU has 40."""
    small = cluster("a100_40", 1)
    plans = search(RUN, BATCH, small)
    fitting = [plan for plan in plans if plan.fits]
    assert fitting and all(plan.zero.offload_optimizer for plan in fitting)
    lines = advice(RUN, BATCH, small, plans)
    assert "without offloading, the smallest plan" in lines[0] and "more than one a100_40 has" in lines[0]
    assert lines[1] == "it would fit without offloading on 2 such nodes (16 GPUs)"
    assert "h100" in lines[2] and "cpu" not in lines[2]
    without = search(RUN, BATCH, small, Only(offload="none"))
    assert not without[0].fits and "does not fit" in reason(without[0], without[0])


def test_offloading_needs_host_memory() -> None:
    """Catches a plan that moves 450 GB to hosts with 256."""
    poor = dataclasses.replace(cluster("a100_40", 1), host_gib=256)
    plans = search(RUN, BATCH, poor)
    assert not plans[0].fits
    assert "GiB of host memory a node" in " ".join(reason(plan, plans[0]) for plan in plans)


def test_more_memory_is_never_slower_and_more_gpus_need_no_more() -> None:
    """Catches a search that misses the larger micro-batch."""

    def best(gpu: str, nodes: int) -> Plan:
        return search(RUN, BATCH, cluster(gpu, nodes))[0]

    assert best("h200", 4).step.total <= best("h100", 4).step.total
    fixed = Only.parse("tp=8,stage=3,recompute=selective,offload=false,micro_batch=8")
    needed = [search(RUN, BATCH, cluster("h100", nodes), fixed)[0].needed_gib for nodes in (2, 4, 8, 16)]
    assert needed == sorted(needed, reverse=True)


def test_scaling_loses_efficiency_to_communication() -> None:
    """Catches a model in which 4096 GPUs are as good as 64."""
    few, many = scaling(RUN, BATCH, cluster("h100", 8), [64, 4096])
    assert few and many and many.mfu < few.mfu
    assert many.step.sharding / many.step.total > few.step.sharding / few.step.total


def test_a_frozen_trunk_is_cheaper_by_what_it_does_not_do() -> None:
    """Catches frozen parts that cost a backward pass, one that is left out where it is needed,
    and an MFU of work that is not done."""
    only = Only.parse("tp=8,stage=3,recompute=selective,offload=none,micro_batch=8")

    def best(freeze: str) -> Plan:
        run = dataclasses.replace(RUN, freeze=freeze)
        return search(run, BATCH, cluster("h100", 1), only)[0]

    whole, trunk, inside = best(""), best("trunk.embed,trunk.blocks,trunk.norm"), best("trunk.blocks.20")
    assert trunk.step.matmuls == pytest.approx(whole.step.matmuls / 3, rel=0.05)
    assert trunk.step.attention == pytest.approx(whole.step.attention / 3)
    assert trunk.step.recomputation == 0 and trunk.step.tensor_parallel < whole.step.tensor_parallel
    assert trunk.step.update < 0.03 * whole.step.update
    # A third of one of 48 blocks' matmuls: the gradients of its weights.
    assert inside.step.matmuls == pytest.approx(whole.step.matmuls * (1 - 1 / 3 / 48), rel=1e-3)
    assert inside.step.attention == whole.step.attention
    assert whole.mfu and trunk.mfu is None and inside.mfu is None
    head = best("trunk.embed,trunk.blocks,trunk.norm,trunk.pool")
    assert head.zero.reduce_bucket < whole.zero.reduce_bucket and head.zero.gathers == whole.zero.gathers


def test_mistakes_are_named() -> None:
    """Catches a KeyError, a division by zero, and an empty table."""
    with pytest.raises(ValueError, match=r"unknown GPU 'h10'; did you mean 'h100'"):
        gpu_named("h10")
    with pytest.raises(ValueError, match="nodes must be positive, got 0"):
        cluster("h100", 0)
    with pytest.raises(ValueError, match="must divide the global batch of 100; --global_batch 96 would do"):
        search(RUN, 100, cluster("h100", 4), Only(tp=1))
    for text, message in [
        ("stages=2", r"unknown 'stages'; did you mean 'stage'"),
        ("stage=1", "stage must be 2 or 3"),
        ("offload=params,stage=2", "which only ZeRO-3 shards; say stage=3"),
        ("offload=yes", "offload must be none or optimizer or params or true or false"),
        ("tp=0", "tp must be a whole number of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Only.parse(text)


def test_offloading_weights_trains_what_nothing_else_fits() -> None:
    """Catches a search that never offloads weights: 22e9 of two bytes are more than 24 GiB."""
    card = dataclasses.replace(cluster("rtx_4090", 1, 1), host_gib=600.0)
    found = {plan.zero.offload: plan for plan in reversed(search(RUN, 16, card))}
    assert found["params"].fits and not found["optimizer"].fits and not found["none"].fits
    assert 20 * 22e9 / GIB < found["params"].needed_host_gib < 23 * 22e9 / GIB
    assert (
        Only.parse("offload=true") == Only(offload="optimizer")
        and Only.parse("offload=false").offload == "none"
    )
    assert {plan.zero.offload for plan in search(RUN, 16, card, Only(offload="params"))} == {"params"}


def test_offloaded_weights_cross_the_link_with_every_gather() -> None:
    """Catches copies that are free, that do not grow with the micro-steps, or a link that does not matter."""
    slow = cluster("h100", 1)
    fast = dataclasses.replace(slow, gpu=dataclasses.replace(slow.gpu, host_gb_per_s=450.0))

    def copies(machines: Cluster, offload: Offload, micro_batch: int) -> float:
        only = Only(tp=1, stage=3, recompute="full", offload=offload, micro_batch=micro_batch)
        return search(RUN, 256, machines, only)[0].step.host_copies

    assert copies(slow, "none", 32) == 0
    # Gradients: down, and down once more to Adam; weights: up once, or twice if they are gathered twice.
    elements = inventory(RUN.model, 1).shared(8)
    link = 64e9 * Rates().host_link_share
    assert copies(slow, "optimizer", 32) == pytest.approx((8 + 2) * elements / link, rel=1e-3)
    assert copies(slow, "params", 32) == pytest.approx((8 + 2 * 2) * elements / link, rel=0.05)
    assert copies(slow, "params", 8) == pytest.approx(4 * copies(slow, "params", 32), rel=1e-3)
    assert copies(fast, "params", 32) == pytest.approx(64 / 450 * copies(slow, "params", 32))


def test_a_plan_that_offloads_weights_writes_that_json() -> None:
    """Catches a JSON that offloads less than the plan counts on."""
    base = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    for offload, sections in [("none", 0), ("optimizer", 1), ("params", 2)]:
        (best, *_) = search(RUN, 256, cluster("h100", 1), Only.parse(f"stage=3,tp=8,offload={offload}"))
        written = planned_ds_config(base, best)["zero_optimization"]
        assert sum(key in written for key in ("offload_optimizer", "offload_param")) == sections
        assert ZeroSettings.from_ds_config({"zero_optimization": written}).offload == best.zero.offload
