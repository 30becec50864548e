"""Mistakes in the command line of `launch/plan.py`: each ends with exit status 2 and one line that names the
flag, the value found, and the fix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megavit.launch.plan import main

MODEL = ["--model.name", "vit_22b"]

# Flags, what the line must hold.
ROWS: list[tuple[str, list[str]]] = [
    # the kind of GPU
    ("--gpu h1000", ["unknown GPU 'h1000'", "did you mean 'h100'", "rtx_4090", "NAME:GiB:TFLOPs:GBps"]),
    ("--gpu 4080", ["unknown GPU '4080'", "'rtx_4090'"]),
    ("--gpu a100", ["--gpu a100", "say a100_40 or a100_80"]),
    ("--gpu v100", ["--gpu v100", "no bfloat16"]),
    ("--gpu T4", ["--gpu T4", "no bfloat16"]),
    ("--gpu mine:80:400", ["--gpu mine:80:400", "NAME:GiB:TFLOPs:GBps[:linkGBps]"]),
    ("--gpu mine:80:400:fast", ["'fast' is no positive number"]),
    ("--gpu mine:80:0:2000", ["'0' is no positive number"]),
    ("--gpu", ["--gpu", "expected one argument"]),
    # the cluster
    ("--nodes 0", ["--nodes must be positive, got 0"]),
    ("--nodes 2.5", ["--nodes must be a whole number, got '2.5'"]),
    ("--gpus_per_node -8", ["--gpus_per_node must be positive, got -8"]),
    ("--gpu_per_node 8", ["unrecognized", "did you mean '--gpus_per_node'"]),
    ("--network_gb_per_s 0", ["--network_gb_per_s must be positive, got 0"]),
    ("--network_gb_per_s inf", ["--network_gb_per_s must be a finite number, got 'inf'"]),
    ("--filesystem_gb_per_s -1", ["--filesystem_gb_per_s must be positive, got -1"]),
    ("--host_gib none", ["--host_gib must be a finite number, got 'none'"]),
    ("--cores_per_gpu 0", ["--cores_per_gpu must be positive, got 0"]),
    # the batch and the length of the run
    ("--global_batch -1", ["--global_batch cannot be negative, got -1"]),
    ("--global_batch 65536.0", ["--global_batch must be a whole number, got '65536.0'"]),
    (
        "--global_batch 100 --nodes 16",
        ["no layout is possible", "global batch of 100", "--global_batch 128 would do"],
    ),
    ("--global_batch 3 --nodes 2", ["no layout is possible", "global batch of 3", "--global_batch 16"]),
    ("--epochs 3", ["--epochs 3 needs --dataset_size"]),
    ("--dataset_size 1000", ["--dataset_size 1000 needs --epochs"]),
    ("--epochs -1 --dataset_size 5", ["epochs cannot be negative, got -1"]),
    ("--epochs 1 --dataset_size 1e6", ["--dataset_size must be a whole number, got '1e6'"]),
    ("--epoch 3", ["unrecognized", "did you mean '--epochs'"]),
    # what the search is restricted to
    ("--only tp=5", ["tp=5", "48 heads", "say one of 1, 2, 4, 8"]),
    ("--only tp=16", ["tp=16", "8 GPUs of a node"]),
    ("--only tp", ["--only: tp has no value", "tp=8"]),
    ("--only tp=two", ["--only: tp must be a whole number of at least 1, got 'two'"]),
    ("--only tp=8,tp=4", ["--only: tp is given twice"]),
    ("--only stages=3", ["--only: unknown 'stages'", "did you mean 'stage'", "micro_batch"]),
    ("--only stage=1", ["--only: stage must be 2 or 3, got '1'"]),
    ("--only recompute=some", ["--only: recompute must be none or selective or full, got 'some'"]),
    ("--only offload=cpu", ["--only: offload must be none or optimizer or params", "got 'cpu'"]),
    ("--only offload=params,stage=2", ["stage=2 cannot offload weights", "say stage=3"]),
    ("--only micro_batch=0", ["--only: micro_batch must be a whole number of at least 1, got '0'"]),
    ("--only micro_batch=7", ["micro_batch=7", "divide", "65536"]),
    (
        "--model.block sequential --only recompute=selective",
        ["recompute=selective", "--model.block parallel", "say recompute=none or recompute=full"],
    ),
    # what is printed and written
    ("--rows -1", ["--rows cannot be negative, got -1"]),
    ("--out launch/plan.py", ["--out launch/plan.py is a file; name a folder"]),
    ("--json launch", ["--json launch is a folder; name a file"]),
    ("--plot launch", ["--plot launch is a folder; name a file"]),
    ("--rehearse many", ["--rehearse must be a whole number, got 'many'"]),
    ("--rehearse_gib 0", ["--rehearse_gib must be positive, got 0"]),
    # the model and the files that the plan starts from
    ("--model.name vit_22c", ["unknown model preset 'vit_22c'", "did you mean 'vit_22b'"]),
    ("--model.num_heads 7", ["7", "6144"]),
    ("--config none.yaml", ["none.yaml", "No such file"]),
    ("--deepspeed_config none.json", ["none.json", "No such file"]),
    ("--deepspeed_config ds_configs/zero3_fp32.json", ["zero3_fp32.json", "bf16.enabled"]),
    ("--deepspeed_config README.md", ["README.md is not valid JSON"]),
]


@pytest.mark.parametrize(("flags", "words"), ROWS, ids=[flags[:40] for flags, _ in ROWS])
def test_mistakes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: str, words: list[str]
) -> None:
    """Catches tracebacks, plans for something else than was asked for, and lines that tell nobody the fix."""
    monkeypatch.chdir(Path(__file__).parents[2])
    try:
        status = main([*MODEL, *flags.split()])
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert status == 2 and not printed.out, printed
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and len(printed.err) < 600
    assert all(word in printed.err for word in words), printed.err


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan for a model that nobody named."""
    with pytest.raises(SystemExit):
        main(["--nodes", "2"])
    assert "--model.name is required" in capsys.readouterr().err


def test_a_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches a long search whose plot cannot be drawn."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*MODEL, "--plot", str(tmp_path / "plan.png")]) == 2
    assert "--plot needs matplotlib: pip install 'megavit[plot]'" in capsys.readouterr().err
