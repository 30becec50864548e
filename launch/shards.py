"""Write WebDataset shards: `python launch/shards.py {digits,cifar10,cifar100,imagefolder} [--root R] [--out
O]`.

Interrupted runs are continued by running them again; finished shards are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, help: str, shard_size: int, needs_root: bool, out: str | None
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        if needs_root:
            command.add_argument(
                "--root", type=Path, required=True, help="folder with the data set in its own format"
            )
        command.add_argument(
            "--out", type=Path, required=out is None, default=out, help=f"folder for the shards ({out})"
        )
        command.add_argument(
            "--shard_size", type=int, default=shard_size, help=f"samples a shard ({shard_size})"
        )
        command.add_argument(
            "--workers", type=int, default=os.cpu_count() or 1, help="shards written at a time"
        )
        return command

    digits = add("digits", "scikit-learn's 8x8 digits", 100, False, str(PROJECT_ROOT / "data" / "digits"))
    digits.add_argument(
        "--holdout", type=int, default=0, help="move the last N training images to a split 'val' (0)"
    )
    add("cifar10", "CIFAR-10, python version (cifar-10-batches-py)", 1000, True, None)
    add("cifar100", "CIFAR-100, python version (cifar-100-python), fine labels", 1000, True, None)
    add("imagefolder", "folders of images: ROOT[/train|val|test]/CLASS/*.jpg", 1000, True, None)
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    from megavit.data import write

    try:
        if arguments.command == "digits":
            splits = write.digits_splits(arguments.holdout)
        elif arguments.command == "imagefolder":
            splits = write.imagefolder_splits(arguments.root)
        else:
            splits = write.cifar_splits(arguments.root, int(arguments.command.removeprefix("cifar")))
        write.write_splits(splits, arguments.out, arguments.shard_size, arguments.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = Path(arguments.out)
    if arguments.command == "digits" and not (out / "baselines.json").exists():
        (out / "baselines.json").write_text(
            json.dumps({"split": "test", "results": write.digits_baselines()}, indent=2) + "\n"
        )
    if arguments.command == "imagefolder":
        (out / "classes.txt").write_text("\n".join(write.class_names(arguments.root)) + "\n")
    print(", ".join(f"{split.name}: {split.size} samples" for split in splits), f"in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
