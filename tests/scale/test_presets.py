"""Every size of the family trains."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from megavit.model.config import PRESETS, model_preset
from megavit.parallel.mesh import Mesh
from megavit.tasks.classify import Inputs
from megavit.tasks.config import ClassifyConfig
from megavit.train.config import RunConfig
from megavit.train.ds_config import resolve_ds_config
from tests.ranks import run_ranks

DS_CONFIG = {
    "train_batch_size": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3},
}


def before_and_after() -> dict[str, list[float]]:
    """Losses of one batch before and after a step, for each preset: one block of its true width, images of 16
    patches of its true size."""
    from megavit.train.engine import Engine

    mesh, losses = Mesh.from_environment(), {}
    for name in PRESETS:
        if name == "vit_22b":  # one block, pooling and classifier are 22 GB with Adam; see launch/plan.py
            continue
        size = 4 * model_preset(name).patch_size
        model = model_preset(name, depth=1, image_size=size)
        run = RunConfig(model=model, task=ClassifyConfig(loss="sigmoid"))
        engine = Engine(run, resolve_ds_config(DS_CONFIG, 1, "cpu"), mesh)
        torch.manual_seed(0)
        images = torch.rand(2, model.channels, model.image_size, model.image_size) * 2 - 1
        targets = torch.nn.functional.one_hot(torch.tensor([1, 2]), model.num_classes).float()
        inputs = Inputs(images, targets, torch.tensor([[1], [2]]), torch.ones(2))
        before = engine.train_step([inputs], torch.tensor(2.0), 1e-3).loss
        losses[name] = [before, float(engine.evaluate(inputs).loss) / 2]
        del engine
        gc.collect()
    return losses


@pytest.mark.slow
def test_every_preset_trains() -> None:
    """Catches a shape that cannot be built, or whose first update goes nowhere."""
    (losses,) = run_ranks(1, before_and_after, fresh=True)  # their memory is gone afterwards
    assert len(losses) == len(PRESETS) - 1
    for name, (first, second) in losses.items():
        assert math.isfinite(first) and second < first, (name, first, second)
