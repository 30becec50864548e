"""The README's own code and commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.exports import write_export

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = {
    f"{path} {number}": snippet
    for path in ("README.md", "megavit/model/README.md")
    for number, snippet in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches documentation that no longer works."""
    snippet = SNIPPETS[name]
    write_export(tmp_path / "exported")
    for photo in ("photo.jpg", "other.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / photo)
    monkeypatch.chdir(tmp_path)
    if "Engine" in snippet:  # a process of its own, since an engine is never freed
        done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    else:
        exec(snippet, {"__name__": "__main__"})
    printed = capsys.readouterr().out
    if "megavit.load" in snippet:
        assert printed.startswith("[[('")
    if "# 22385134489" in snippet:
        assert printed.strip() == "22385134489"


@pytest.mark.slow
def test_the_original_projects_examples_run_with_the_import_changed() -> None:
    """Catches arguments of the original MegaViT that are no longer taken."""
    original = """
import torch
from megavit import MegaVit as ViT
with torch.device("meta"):
    v = ViT(image_size=256, patch_size=32, num_classes=1000, dim=6144, depth=48, heads=48, mlp_dim=2048,
            dropout=0.1, emb_dropout=0.1)
    assert v(torch.randn(1, 3, 256, 256)).shape == (1, 1000)
"""
    done = subprocess.run([sys.executable, "-c", original], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_files_that_the_readme_names_exist() -> None:
    """Catches links and commands that point nowhere."""
    named = re.findall(r"(?:launch|ds_configs|megavit)/[\w/.]+\.(?:py|json|yaml|md|png)", README)
    assert len(named) > 8
    missing = [name for name in set(named) if not (ROOT / name).exists()]
    assert not missing
