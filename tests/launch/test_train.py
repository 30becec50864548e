"""The command on the digits: through the real launcher where that matters, else its `main` in ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import webdataset as wds
from safetensors.torch import load_file

from launch import export, shards
from megavit import MegaVit
from megavit.data.device import to_model_input
from megavit.data.lanes import Lanes, Order
from megavit.data.loader import EvalLoader
from megavit.data.manifest import open_shards
from megavit.recipe import read_recipe
from megavit.tasks.task import make_task
from tests.launch.commands import DEMO, ROOT, Run, launch, train

STEPS = 12
SHORT = ["--max_steps", str(STEPS), "--log_every", "1", "--schedule.warmup_steps", "4"]


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(tmp_path_factory.mktemp("runs") / "one", digits, *SHORT)
    assert run.code == 0, run.output
    return run


@pytest.mark.dist
@pytest.mark.slow
def test_run_folder_keeps_its_contract(reference: Run) -> None:
    """Catches a file, key or tag that tools around a run rely on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = "step loss lr grad_norm images_per_s tokens_per_s mfu step_time_s data_time_s memory_gib epoch"
    keys += " bad_samples skipped_updates max_logit"
    assert [row["step"] for row in reference.steps] == list(range(1, STEPS + 1))
    assert all(list(row) == keys.split() for row in reference.steps)
    assert reference.evaluations[-1]["eval/val/samples"] == 360
    for name in (
        "config.yaml",
        "ds_config.json",
        "environment.json",
        "data.json",
        f"checkpoints/step_{STEPS:08}/manifest.json",
    ):
        assert (reference.folder / name).is_file(), name
    board = EventAccumulator(str(reference.folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = board.Tags()
    wanted = "loss/train optim/lr optim/grad_norm speed/images_per_s memory/peak_gib".split()
    wanted += ["attention/max_logit", "eval/val/top1", "eval/val/loss"]
    assert set(wanted) <= set(tags["scalars"])
    assert len(board.Scalars("loss/train")) == STEPS
    assert set(tags["images"]) == {"pictures/train", "pictures/val"}
    texts = ["config/deepspeed/text_summary", "config/run/text_summary", "custom_scalars__config__"]
    assert sorted(tags["tensors"]) == texts
    assert not [path for path in (reference.folder / "tensorboard").iterdir() if path.is_dir()]
    started = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"schedule.warmup_steps" in started and b"ds.optimizer.params.lr" in started
    metrics = board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert all(tag in metrics for tag in (b"loss/train", b"eval/val/top1", b"eval/val/loss"))
    assert b"eval/val/samples" not in metrics
    assert "final top1" in reference.output and "this run" in reference.output


@pytest.mark.dist
@pytest.mark.slow
def test_same_seed_twice_is_bitwise_equal_and_another_seed_is_not(
    reference: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches any source of randomness that the seed does not fix, and threads that spin while they wait."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "true")
    again = launch(reference.folder.with_name("again"), digits, *SHORT, ranks=None)
    other = train(reference.folder.with_name("other"), digits, *SHORT, "--seed", "1", "--stop_at_step", "2")
    assert again.code == other.code == 0, again.output
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in again.output  # as OpenMP has read it
    assert [row["loss"] for row in again.steps] == [row["loss"] for row in reference.steps]
    assert all(torch.equal(again.weights[name], w) for name, w in reference.weights.items())
    assert other.steps[1]["loss"] != reference.steps[1]["loss"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "tp", "flags"),
    [
        (2, 1, []),
        (2, 2, ["--data.workers", "1", "--data.tp", "replicate", "--data.check_every", "5"]),
        (4, 2, ["--recompute", "selective"]),
        (4, 4, ["--recompute", "full"]),
        (1, 1, ["--compile", "--recompute", "selective"]),
    ],
)
def test_every_layout_gives_the_same_run(
    reference: Run, digits: Path, ranks: int, tp: int, flags: list[str]
) -> None:
    """Catches anything that depends on ranks: data order, dropout seeds, averaging, evaluation, export. One
    layout goes through the launcher, with data workers."""
    folder = reference.folder.with_name(f"ranks{ranks}tp{tp}")
    flags = [*SHORT, "--tensor_parallel_size", str(tp), *flags]
    if "--data.workers" in flags:
        run = launch(folder, digits, *flags, ranks=ranks)
    else:
        run = train(folder, digits, *flags, ranks=ranks, fresh="--compile" in flags)
    assert run.code == 0, run.output
    for mine, expected in zip(run.steps, reference.steps, strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for name, expected in reference.weights.items():
        assert (run.weights[name] - expected).abs().max() < 1e-4, name
    check_export(run, digits)


def check_export(run: Run, digits: Path) -> None:
    """The exported model, in this one process, classifies the test set as the run's last evaluation did."""
    demo = read_recipe(DEMO)
    fields = make_task(demo.task, demo.model, demo.data).fields()
    loader = EvalLoader(open_shards(f"{digits}/test-*.tar"), fields, demo.data, batch=360)
    (batch,) = list(loader)
    with torch.no_grad():
        predicted = MegaVit.from_pretrained(run.folder / "export")(
            to_model_input(batch.fields["image"], torch.device("cpu"))
        ).argmax(1)
    assert (predicted == batch.fields["label"][:, 0]).float().mean().item() == pytest.approx(
        run.evaluations[-1]["eval/val/top1"]
    )


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "json_file", ["zero2.json", "zero3_fp32.json", "zero3_offload.json", "zero3_bf16.json"]
)
def test_shipped_json_files_train(reference: Run, digits: Path, json_file: str) -> None:
    """Catches a shipped file that DeepSpeed refuses, or that does not learn."""
    flags = [*SHORT, "--stop_at_step", "8"]
    run = train(reference.folder.with_name(json_file), digits, *flags, json_file=json_file)
    assert run.code == 0, run.output
    losses = [row["loss"] for row in run.steps]
    assert losses[-1] < 0.99 * losses[0]  # batches differ by a thousandth
    if json_file == "zero3_fp32.json":
        assert losses == [row["loss"] for row in reference.steps[:8]]


@pytest.mark.slow
def test_export_command_repeats_the_export(
    reference: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an export at the end of a run that differs from the offline one."""
    assert export.main([str(reference.folder), str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], w) for name, w in reference.weights.items())
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "holds no committed checkpoint" in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_bad_samples_are_left_out_alike_in_every_layout(tmp_path: Path) -> None:
    """Catches bad data that end a run, change the batch, are averaged in, or are counted twice by TP
    ranks."""
    bad_shards(tmp_path)
    flags = [*SHORT, "--max_steps", "4", "--model.num_classes", "3", "--data.max_bad_fraction", "0.1"]
    one = train(tmp_path / "one", tmp_path, *flags)
    four = train(tmp_path / "four", tmp_path, *flags, "--tensor_parallel_size", "2", ranks=4)
    assert one.code == four.code == 0, one.output + four.output
    for run in (one, four):
        rows = [json.loads(line) for line in (run.folder / "bad_samples.jsonl").read_text().splitlines()]
        assert {(row["key"], Path(row["url"]).name) for row in rows} == {("299", "train-0.tar")}
        assert "label 7 is outside 0..2" in rows[0]["reason"]
        assert run.steps[-1]["bad_samples"] == len(rows) > 1 and "bad  " in run.output
    for mine, expected in zip(four.steps, one.steps, strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert mine["bad_samples"] == expected["bad_samples"]


@pytest.mark.dist
@pytest.mark.slow
def test_too_much_bad_data_ends_all_ranks_at_one_step(tmp_path: Path) -> None:
    """Catches ranks left hanging when one of them meets bad data, and a run that loses its weights by it."""
    bad_shards(tmp_path)
    flags = [*SHORT, "--model.num_classes", "3", "--data.max_bad_fraction", "0"]
    run = train(tmp_path / "run", tmp_path, *flags, ranks=2)
    assert run.code == 1 and "Traceback" not in run.output, run.output
    assert (
        "unusable, more than --data.max_bad_fraction 0" in run.output
        and "train-0.tar (1 samples)" in run.output
    )
    assert list((run.folder / "checkpoints").glob("step_*/manifest.json"))


@pytest.mark.slow
def test_which_lists_what_a_step_read(
    reference: Run, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a list that is not what the run read: its samples of step 3 must be those of the order."""
    assert shards.main(["which", "--run_dir", str(reference.folder), "--step", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    lanes = Lanes(open_shards(f"{digits}/train-*.tar").samples, 256, seed=0)
    slots = Order(lanes, 256).slots(2, 0, 256)
    found = [(int(Path(row["url"]).stem[-6:]), int(row["key"][-9:]) % 100) for row in rows]
    assert found == list(zip(slots.shard.tolist(), slots.index.tolist(), strict=True))


def bad_shards(folder: Path) -> None:
    """300 samples of 3 classes with one label 7 among them, and a test shard of two."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (8, 8), 100).save(buffer, "PNG")
    for name, labels in {"train-0.tar": [i % 3 for i in range(299)] + [7], "test-0.tar": [0, 1]}.items():
        with wds.TarWriter(str(folder / name), encoder=False, mtime=0) as tar:
            for i, label in enumerate(labels):
                tar.write({"__key__": f"{i:03}", "png": buffer.getvalue(), "cls": str(label).encode()})


@pytest.mark.dist
@pytest.mark.slow
def test_mistakes_before_the_first_step(reference: Run, digits: Path, tmp_path: Path) -> None:
    """Catches errors that come late, as tracebacks, or at the cost of an earlier run's results."""
    missing = train(tmp_path / "a", digits, "--data.shards", f"{digits}/train-{{000000..000020}}.tar")
    assert missing.code == 1 and "train-000015.tar does not exist" in missing.output
    bad_shards(tmp_path)
    data = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(data[:30_000])
    corrupt = train(tmp_path / "b", tmp_path)
    assert corrupt.code == 1 and "train-0.tar is truncated" in corrupt.output
    small = train(tmp_path / "c", tmp_path, "--data.shards", f"{tmp_path}/test-0.tar")
    assert small.code == 1 and "2 samples, too few for a global batch of 256" in small.output
    log = (reference.folder / "log.jsonl").read_bytes()
    taken = train(reference.folder, digits, "--model.depth", "2", "--seed", "1")
    assert taken.code == 1 and "another seed is 1, was 0; model.depth is 2, was 3" in taken.output
    assert (reference.folder / "log.jsonl").read_bytes() == log
    typo = tmp_path / "typo.json"
    typo.write_text(
        (ROOT / "ds_configs" / "zero3.json").read_text().replace("gradient_clipping", "gradient_cliping")
    )
    refused = train(tmp_path / "d", digits, json_file=str(typo))
    assert refused.code == 2 and "did you mean 'gradient_clipping'" in refused.output
    for run in (missing, corrupt, small, taken, refused):
        assert "Traceback" not in run.output, run.output
