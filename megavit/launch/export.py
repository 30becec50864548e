"""Export a run's weights: `python launch/export.py RUN_DIR OUT` writes OUT/model.safetensors and
OUT/config.json.

Needs no GPU, ranks or DeepSpeed, whatever layout the run had, and memory for one tensor at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megavit.cli import Parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="run folder, e.g. runs/vit_tiny-20260101-120000")
    parser.add_argument("out", type=Path, help="folder for the exported model")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (the newest)")
    arguments = parser.parse_args(argv)
    from megavit.train.checkpoint.export import export_weights
    from megavit.train.checkpoint.folder import open_step

    try:
        checkpoint = open_step(arguments.run_dir, arguments.step)
        export_weights(checkpoint, arguments.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported {checkpoint.folder}, for MegaVit.from_pretrained({str(arguments.out)!r})")
    return 0
