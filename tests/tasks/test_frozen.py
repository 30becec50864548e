"""Frozen trunks: without noise, and with their features kept on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megavit.cli import parse_run
from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh
from megavit.tasks.feature_cache import ROWS_FILE, FeatureCache, check_space
from megavit.train.config import RunConfig
from tests.ranks import run_ranks
from tests.tasks.dense_data import write_dense
from tests.tasks.test_dense import HEADS, MODEL, dense_run, losses
from tests.train.runs import ds_config, train_here

SHAPE = (2, 8, 3, 3)
KEY = {"weights": "a", "layers": [1, 3]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"), train=96)


def plain_run(data: Path, folder: Path, cache: Path | None, **changes: Any) -> RunConfig:
    """Six steps, three epochs, of pictures that are not augmented."""
    task = dataclasses.replace(HEADS["dpt"], cache_features=str(cache) if cache else "")
    still = {f"data__{name}": 0.0 for name in ("shift", "rotate_degrees", "zoom")}
    still |= {"data__augment": "none", "data__flip": False, "max_steps": 6, "eval_every": 3}
    return dense_run(data, folder, task, **still | changes)


def cache_of(folder: Path, key: dict[str, Any] = KEY, dtype: torch.dtype = torch.float32) -> FeatureCache:
    return FeatureCache(folder, key, 5, SHAPE, dtype, Mesh.single())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_to_the_bit_and_only_whole_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches rows that are rounded, mixed up, half written or another sample's, and bad samples whose black
    pictures are kept in place of the true ones."""
    cache, usable = cache_of(tmp_path, dtype=dtype), torch.ones(3)
    numbers, maps = torch.tensor([4, 0, 2]), [torch.randn(3, *SHAPE[1:]).to(dtype) for _ in range(2)]
    assert cache.read(numbers, usable) is None
    cache.write(numbers, torch.tensor([1.0, 0.0, 1.0]), maps)
    assert cache.read(numbers, usable) is None
    found = cache_of(tmp_path, dtype=dtype).read(numbers[[2, 1, 0]], torch.tensor([1.0, 0.0, 1.0]))
    assert found is not None
    for mine, theirs in zip(maps, found, strict=True):
        assert torch.equal(theirs[[2, 0]], mine[[0, 2]]) and not theirs[1].any()

    path, stride = tmp_path / ROWS_FILE, cache._stride
    whole = path.read_bytes()
    assert len(whole) == 5 * stride
    flipped, others = bytes([whole[4 * stride + 70] ^ 1]), whole[2 * stride : 3 * stride]
    for at, new in ((4 * stride + 70, flipped), (4 * stride, others)):
        path.write_bytes(whole[:at] + new + whole[at + len(new) :])
        assert cache_of(tmp_path, dtype=dtype).read(numbers[:1], usable[:1]) is None
    path.write_bytes(whole[: 4 * stride + 9])
    assert cache_of(tmp_path, dtype=dtype).read(numbers[:1], usable[:1]) is None
    assert cache_of(tmp_path, dtype=dtype).read(numbers[2:], usable[2:]) is not None


def test_features_of_something_else_are_refused(tmp_path: Path) -> None:
    """Catches features of other weights or blocks that a head is trained on."""
    cache_of(tmp_path)
    for name, other in (("weights", "b"), ("layers", [1, 2])):
        with pytest.raises(ValueError, match=f"features of another {name}; name another folder"):
            cache_of(tmp_path, KEY | {name: other})
    with pytest.raises(ValueError, match="features of another dtype"):
        cache_of(tmp_path, dtype=torch.bfloat16)
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(ValueError, match="features of another data|dtype"):
        cache_of(tmp_path)


def test_space_is_looked_at_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fills a disk after hours, and the sizes of a report that nobody can check."""
    shape = (4, 6144, 16, 16)
    with pytest.raises(ValueError, match=r"needs 254 GB for 20,210 samples \(4 maps .* --task.cache_gb 100"):
        check_space(tmp_path, 20_210, shape, torch.bfloat16, 100 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10**9}))
    with pytest.raises(ValueError, match="needs 254 GB .* has 1 GB left"):
        check_space(tmp_path, 20_210, shape, torch.bfloat16, 10**12)
    check_space(tmp_path, 70, shape, torch.bfloat16, 10**12)


def train_counting(run: RunConfig, raw: dict[str, Any]) -> tuple[str, int]:
    """In a rank: the run, and how many times its trunk has run in training."""
    plain, passes = MegaVit.forward_intermediates, []

    def counted(self: MegaVit, *arguments: Any, **options: Any) -> Any:
        import inspect

        names = {frame.function for frame in inspect.stack()}
        passes.append("start_step" in names)
        return plain(self, *arguments, **options)

    MegaVit.forward_intermediates = counted  # type: ignore[method-assign]
    try:
        return train_here(run, raw), sum(passes)
    finally:
        MegaVit.forward_intermediates = plain  # type: ignore[method-assign]


@pytest.mark.dist
@pytest.mark.slow
def test_a_cached_run_is_the_same_and_skips_the_trunk(data: Path, tmp_path: Path) -> None:
    """Catches features of other pictures than those of the step, a trunk that runs in spite of the cache, and
    ranks of which one skips the trunk and the other waits for it; also after a stop, in another layout, with
    rows that were lost."""
    assert run_ranks(1, train_here, plain_run(data, tmp_path / "plain", None), ds_config(3)) == [""]
    cache = tmp_path / "cache"
    run = plain_run(data, tmp_path / "run", cache, stop_at_step=4)
    assert run_ranks(1, train_counting, run, ds_config(3)) == [("", 2)]
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "plain")
    assert found == expected[:4]

    rows = bytearray((cache / ROWS_FILE).read_bytes())
    rows[: 4096 * 10] = bytes(4096 * 10)
    (cache / ROWS_FILE).write_bytes(rows)
    resumed = dataclasses.replace(run, stop_at_step=0, tensor_parallel_size=2)
    done = run_ranks(4, train_counting, resumed, ds_config(3, micro_batch=24))
    assert [error for error, _ in done] == [""] * 4
    assert len({count for _, count in done}) == 1 and 1 <= done[0][1] <= 2
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)  # of another layout
    other = dataclasses.replace(plain_run(data, tmp_path / "other", cache), seed=1)
    (error,) = run_ranks(1, train_here, other, ds_config(3))
    assert "features of another weights" in error


def noisy_steps(data: Path, folder: Path) -> list[bool]:
    """In a rank: whether dropout changes the loss of a frozen trunk, and of a trained one."""
    from megavit.tasks.task import blank_samples
    from megavit.train.ds_config import resolve_ds_config
    from megavit.train.engine import Engine

    mesh, found = Mesh.from_environment(), []
    for freeze in ("trunk", ""):
        run = dense_run(data, folder, HEADS["linear"], freeze=freeze)
        run = dataclasses.replace(run, model=dataclasses.replace(MODEL, dropout=0.5, emb_dropout=0.5))
        engine = Engine(run, resolve_ds_config(ds_config(0), 1, "cpu"), mesh)
        samples = blank_samples(engine.task, engine.micro_batch, mesh.device)
        samples.fields["mask"].zero_()
        samples.fields["image"].random_(0, 256, generator=torch.Generator().manual_seed(0))
        inputs, weight = engine.task.inputs(samples, mesh, training=True), engine.task.weight(samples)
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(engine.train_step([inputs], weight, 0.0).loss)
        found.append(results[0] != results[1])
        assert engine.module.decoder.training
    return found


@pytest.mark.dist
def test_a_frozen_trunk_has_no_dropout(data: Path, tmp_path: Path) -> None:
    """Catches a trunk that is not trained, but whose features are noisy as if it were."""
    assert run_ranks(1, noisy_steps, data, tmp_path / "run") == [[False, True]]


START = ["--deepspeed_config", "ds_configs/zero3_fp32.json", "--model.name", "vit_tiny", "--task", "depth"]
START += ["--data.shards", "x.tar", "--max_steps", "3", "--task.cache_features", "cache"]


def test_augmented_pictures_are_not_cached(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches epochs that all see the crops of the first one, and features of a trunk that moves on."""
    still = ["--data.augment", "none", "--data.flip", "false"]
    assert parse_run([*START, *still, "--freeze", "trunk"]).run.task.name == "depth"
    mistakes = {
        (): "without data.augment, data.flip",
        (*still[:2], "--data.flip", "false", "--data.hue", "0.1"): "without data.hue",
        tuple(still): "give --freeze trunk",
    }
    for words, reason in mistakes.items():
        with pytest.raises(SystemExit):
            parse_run([*START, *words])
        assert reason in capsys.readouterr().err
