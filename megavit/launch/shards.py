"""WebDataset shards: write them from a data set, index them, check them, and see what a step reads.

    python launch/shards.py digits | cifar10 | cifar100 | imagefolder   [--root R] [--out O]
    python launch/shards.py motorcycle | mosaics | moving_digits   --out O
    python launch/shards.py nyu | kitti | depthfolder | ade20k | voc | segfolder | kinetics   --root R --out O
    python launch/shards.py index 'data/train-{000000..000099}.tar' --out data
    python launch/shards.py verify data/train.manifest.json
    python launch/shards.py stats data/train.manifest.json
    python launch/shards.py which --run_dir runs/x --step 1000

Interrupted runs are continued by running them again; finished shards and indexes are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megavit.cli import Parser
from megavit.recipe import IS_CHECKOUT, PROJECT_ROOT

if TYPE_CHECKING:
    from megavit.data.cache import ShardCache
    from megavit.data.write import DataSet


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_writers(commands)
    _add_tools(commands)
    return parser


def _add_writers(commands: argparse._SubParsersAction[Parser]) -> None:
    def add(
        name: str, help: str, shard_size: int, needs_root: bool, out: str | None
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=write)
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
        _add_workers(command)
        return command

    out = (PROJECT_ROOT if IS_CHECKOUT else Path()) / "data" / "digits"  # where the demo reads them
    digits = add("digits", "scikit-learn's 8x8 digits", 100, False, str(out))
    digits.add_argument(
        "--holdout", type=int, default=0, help="move the last N training images to a split 'val' (0)"
    )
    add("cifar10", "CIFAR-10, python version (cifar-10-batches-py)", 1000, True, None)
    add("cifar100", "CIFAR-100, python version (cifar-100-python), fine labels", 1000, True, None)
    add("imagefolder", "folders of images: ROOT[/train|val|test]/CLASS/*.jpg", 1000, True, None)
    add("motorcycle", "depth: strips of scikit-image's stereo_motorcycle", 100, False, None)
    add("mosaics", "masks: mosaics of scikit-learn's digits", 100, False, None)
    add("moving_digits", "videos: scikit-learn's digits, moving in one of four directions", 100, False, None)
    for name, help in _DENSE.items():
        _add_options(name, add(name, help, 1000 if name != "kinetics" else 200, True, None))


# Those whose samples have a plane beside the picture, or a video in its place.
_DENSE = {
    "nyu": "NYU Depth v2: nyu_depth_v2_labeled.mat and splits.mat, or sync/ and official_splits/test/",
    "kitti": "KITTI depth: raw DATE/DRIVE_sync/image_02/data/*.png and annotated depth",
    "depthfolder": "pictures with depth: ROOT[/train|val|test]/rgb/*.jpg and depth/*.npy or depth/*.png",
    "ade20k": "ADE20K's SceneParse150, ADEChallengeData2016",
    "voc": "Pascal VOC 2012's segmentation, VOCdevkit/VOC2012",
    "segfolder": "pictures with masks: ROOT[/train|val|test]/images/*.jpg and masks/*.png, ROOT/classes.txt",
    "kinetics": "videos in folders of classes: ROOT/{train,val}/CLASS/*.mp4",
}


def _add_options(name: str, command: argparse.ArgumentParser) -> None:
    if name == "kitti":
        command.add_argument(
            "--depth_root",
            type=Path,
            help="folder of the annotated depth's train/ and val/ (ROOT/data_depth_annotated, or ROOT)",
        )
    if name in ("kitti", "nyu"):
        for split in ("train", "test"):
            command.add_argument(
                f"--{split}_list", type=Path, help=f"text file with the pictures of {split}, a line each"
            )
    if name == "depthfolder":
        command.add_argument("--scale", type=float, help="metres of the stored number 1 (npy: 1)")
        command.add_argument("--invalid", type=float, default=0.0, help="stored number of no depth (0)")
        command.add_argument("--max_m", type=float, help="metres up to which depth is measured")


def _add_tools(commands: argparse._SubParsersAction[Parser]) -> None:
    index_command = commands.add_parser(
        "index", help="index shards, with checksums, and write their manifest"
    )
    index_command.add_argument(
        "pattern", help="paths or urls with braces, local ones also with wildcards; quote it"
    )
    index_command.add_argument(
        "--out", type=Path, required=True, help="folder for SHARD.tar.idx and the manifest"
    )
    index_command.add_argument("--name", default="", help="NAME.manifest.json (from the first shard's name)")
    verify_command = commands.add_parser(
        "verify", help="re-read every byte; exit status 1 if anything is damaged"
    )
    stats_command = commands.add_parser("stats", help="counts, classes, image sizes and bytes")
    stats_command.add_argument(
        "--shards", type=int, default=0, help="look at so many shards, spread evenly (all)"
    )
    for command, function in ((index_command, index), (verify_command, verify), (stats_command, stats)):
        command.set_defaults(function=function)
        _add_workers(command)
        command.add_argument(
            "--cache_dir", default="", help="for remote shards (megavit-shards-UID in $TMPDIR)"
        )
        command.add_argument("--cache_gb", type=float, default=100.0, help="size of that folder in GB (100)")
    for command in (verify_command, stats_command):
        command.add_argument(
            "--decode",
            action="store_true",
            help="also decode every image, label, plane and video as training would",
        )
        command.add_argument("shards_spec", metavar="MANIFEST", help="NAME.manifest.json, or a pattern")
        command.add_argument(
            "--allow_pipe", action="store_true", help="run the shell commands (pipe:) that a manifest names"
        )
    which_command = commands.add_parser("which", help="list the samples of a step, without reading the data")
    which_command.add_argument("--run_dir", type=Path, required=True, help="the run's folder")
    which_command.add_argument("--step", type=int, required=True, help="optimizer step as logged, from 1")
    which_command.set_defaults(function=which)


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="shards at a time (all cores)"
    )


def write(arguments: argparse.Namespace) -> int:
    from megavit.data.class_names import write_class_names
    from megavit.data.plane_facts import claim_planes
    from megavit.data.write import write_splits

    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers} must be at least 1")
    found, out = _data_set(arguments), Path(arguments.out)
    for note in found.notes:
        print(note, flush=True)
    if found.planes:
        claim_planes(out, found.planes)
    write_splits(found.splits, out, arguments.shard_size, arguments.workers)
    if found.baselines and not (out / "baselines.json").exists():
        (out / "baselines.json").write_text(json.dumps(found.baselines(), indent=2) + "\n")
    if found.class_names:
        write_class_names(out, found.class_names)
    print(", ".join(f"{split.name}: {split.size} samples" for split in found.splits), f"in {out}")
    return 0


def _data_set(arguments: argparse.Namespace) -> DataSet:
    """The data set of a writer's command."""
    from megavit.data import write, write_demo, write_depth, write_masks
    from megavit.data.index import IMAGE_EXTENSIONS

    root = getattr(arguments, "root", None) or Path()
    match arguments.command:
        case "digits":
            splits = write.digits_splits(arguments.holdout)
            return write.DataSet(splits, list("0123456789"), baselines=write.digits_baselines)
        case "motorcycle":
            return write_demo.motorcycle_set()
        case "mosaics":
            return write_demo.mosaics_set()
        case "moving_digits":
            from megavit.data.write_demo_videos import moving_digits_set

            return moving_digits_set()
        case "imagefolder":
            splits = write.folder_splits(root)
            kinds = f"samples are made of {', '.join(IMAGE_EXTENSIONS)} in class folders"
            notes = [f"{note}; {kinds}" for split in splits if (note := split.note_left_out())]
            return write.DataSet(splits, write.class_names(root), notes=notes)
        case "nyu":
            return write_depth.nyu_set(root, arguments.train_list, arguments.test_list)
        case "kitti":
            return write_depth.kitti_set(
                root, arguments.depth_root, arguments.train_list, arguments.test_list
            )
        case "depthfolder":
            return write_depth.depth_set(root, arguments.scale, arguments.invalid, arguments.max_m)
        case "ade20k":
            return write_masks.ade20k_set(root)
        case "voc":
            return write_masks.voc_set(root)
        case "segfolder":
            return write_masks.mask_set(root, arguments.workers)
        case "kinetics":
            from megavit.data import write_videos  # imports torch, for seconds

            return write_videos.video_set(root, Path(arguments.out), arguments.workers)
    num_classes = int(arguments.command.removeprefix("cifar"))
    return write.DataSet(write.cifar_splits(root, num_classes), write.cifar_class_names(root, num_classes))


def index(arguments: argparse.Namespace) -> int:
    from megavit.data.manifest import MANIFEST_SUFFIX, index_pattern

    if arguments.name != Path(arguments.name).name:
        raise ValueError(f"--name {arguments.name} must be a name without folders; --out names the folder")
    if arguments.pattern.endswith(MANIFEST_SUFFIX):
        raise ValueError(f"{arguments.pattern} is a manifest already; name the shards: paths or urls")
    manifest = index_pattern(arguments.pattern, arguments.out, arguments.workers, _cache(arguments))
    first = Path(manifest.urls[0]).name.partition(".")[0]
    name = arguments.name or first.rstrip("0123456789").rstrip("-_") or first
    path = arguments.out / f"{name}{MANIFEST_SUFFIX}"
    manifest.save(path)
    print(
        f"{path}: {len(manifest):,} shards, {manifest.num_samples:,} samples, "
        f"{manifest.shard_bytes.sum():,} bytes"
    )
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from megavit.data.audit import verify
    from megavit.data.manifest import open_shards
    from megavit.data.plane_facts import planes_beside

    cache = _cache(arguments)
    manifest = open_shards(arguments.shards_spec, cache, progress=True, allow_pipe=arguments.allow_pipe)
    problems = 0
    planes = planes_beside(arguments.shards_spec)
    for line in verify(manifest, cache, arguments.workers, decode=arguments.decode, planes=planes):
        problems += 1
        print(line, flush=True)
    unchecked = any(isinstance(index, bytes) for index in manifest.indexes)
    note = " (headers only: these shards have no index with checksums)" if unchecked else ""
    print(f"{len(manifest):,} shards, {manifest.num_samples:,} samples: {problems or 'no'} problems{note}")
    return 1 if problems else 0


def stats(arguments: argparse.Namespace) -> int:
    from megavit.data.audit import statistics
    from megavit.data.manifest import open_shards
    from megavit.data.plane_facts import planes_beside

    if arguments.shards < 0:
        raise ValueError(f"--shards {arguments.shards} cannot be negative; 0 looks at all")
    cache = _cache(arguments)
    manifest = open_shards(arguments.shards_spec, cache, progress=True, allow_pipe=arguments.allow_pipe)
    planes = planes_beside(arguments.shards_spec)
    found = statistics(
        manifest, cache, arguments.workers, arguments.shards, decode=arguments.decode, planes=planes
    )
    print("\n".join(found.lines(manifest, planes)))
    return 0


def which(arguments: argparse.Namespace) -> int:
    from megavit.data.audit import order_of_run, samples_of_step

    if arguments.step < 1:
        raise ValueError(f"--step counts from 1, got {arguments.step}")
    for sample in samples_of_step(*order_of_run(arguments.run_dir), arguments.step - 1):
        print(json.dumps(sample))
    return 0


def _cache(arguments: argparse.Namespace) -> ShardCache:
    from megavit.data.cache import ShardCache

    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers} must be at least 1")
    if not 0 < arguments.cache_gb < float("inf"):
        raise ValueError(f"--cache_gb {arguments.cache_gb} must be a positive number")
    return ShardCache(arguments.cache_dir, int(arguments.cache_gb * 1e9))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        return int(arguments.function(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130
