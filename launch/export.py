"""Export a run's newest weights: `python launch/export.py RUN_DIR OUT` writes OUT/model.safetensors and
OUT/config.json.

Needs no GPU, ranks or DeepSpeed, whatever TP size and ZeRO stage the run had.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="run folder, e.g. runs/vit_tiny-20260101-120000")
    parser.add_argument("out", type=Path, help="folder for the exported model")
    arguments = parser.parse_args()
    from megavit.train.checkpoint import export_weights, newest_checkpoint

    try:
        checkpoint = newest_checkpoint(arguments.run_dir)
        export_weights(checkpoint, arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported {checkpoint} to {arguments.out}, for MegaVit.from_pretrained({str(arguments.out)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
