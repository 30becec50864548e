"""Export a run's model: `python launch/export.py RUN_DIR OUT` writes OUT/model.safetensors, OUT/config.json,
OUT/preprocessing.json and, if the run knows the names of the classes, OUT/classes.txt.

`megavit.load(OUT)` and launch/predict.py use them. Needs no GPU, ranks or DeepSpeed, whatever layout the run
had, and memory for one tensor at a time.
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
    parser.add_argument(
        "--class_names", type=Path, help="text file, one class name a line (those that the run folder keeps)"
    )
    parser.add_argument(
        "--init_from",
        default="",
        help="the export that the run's frozen weights came from, if it was moved",
    )
    arguments = parser.parse_args(argv)
    from megavit.data.class_names import read_class_names
    from megavit.train.checkpoint.export import export_weights
    from megavit.train.checkpoint.folder import open_step

    try:
        checkpoint = open_step(arguments.run_dir, arguments.step)
        names = read_class_names(arguments.class_names) if arguments.class_names else None
        export_weights(checkpoint, arguments.out, class_names=names, init_from=arguments.init_from)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported {checkpoint.folder}, for megavit.load({str(arguments.out)!r})")
    return 0
