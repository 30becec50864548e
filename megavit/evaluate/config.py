"""The settings of an evaluation: typed, frozen, validated on construction. Imports the standard
library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megavit.fields import require_positive
from megavit.tasks.config import InferenceConfig


@dataclass(frozen=True)
class EvaluateConfig(InferenceConfig):
    """What is measured, on which data, and how features are computed.

    Args:
        tasks: what to measure, separated by commas: a protocol on the data of --data (knn), a data set below
            --data_root by its usual protocol (imagenet-a), or PROTOCOL:SET (knn:imagenet); see
            launch/evaluate.py ls.
        data: data set of your own: a folder with train and test (or val) shards or manifests, or
            train|test|val/CLASS/*.jpg; for depth and segment with planes, or test|val/rgb and depth, or
            images and masks.
        data_root: folder with the public data sets in the form in which they are downloaded.
        ood: data that the model should not know, for the task ood: shards, a folder of images, a set below
            --data_root, or sklearn-photos (patches of two photos that scikit-learn comes with).
        out: folder for results.json, the tables and the plots; empty takes MODEL/evaluation, or ./evaluation
            for a timm model.
        cache_dir: folder of the feature cache, which all ranks must see; empty takes
            ~/.cache/megavit/features.
        cache_dtype: in which features are kept: float32, or float16, which is half the size and not as exact.
        layers: features for the probes, separated by commas: pooled (what the classifier reads), patches
            (mean of the last patch tokens), block.K (mean of the patch tokens after block K, counted from 0,
            or from the end if negative), all (every block and pooled: accuracy against depth).
        limit: look at so many images of each set only, spread evenly over it, for a trial; results say so. 0
            looks at all.
        batch_size: images that go through the model together, on each rank or TP group; for depth and
            segment it is one.
        workers: decoding processes a rank. Not given, there is one for each core of the rank, at most 4, and
            none for a small set.
        dtype: of the weights in the forward pass: float32 or bfloat16.
        tensor_parallel_size: ranks that share one copy of the model; must divide heads, mlp_dim and ranks.
        seed: fixes held-out images, few-shot images, corruptions and bootstraps.
        strict: exit with status 3 if a task was skipped for want of data.
        crop_area: smallest and largest share of an image that the random crops of linear-sgd keep.
        flip: whether linear-sgd mirrors half of the images.
        attribute: the attribute that the task celeba predicts.
        human: file or folder with the decisions of people (model-vs-human's csv) for the task shape-bias.
        crop: the part of the picture that depth is measured on: usual is Eigen's for nyu, Garg's for kitti
            and else all of it; none, eigen and garg choose it.
        align: what predicted depth is brought to the truth with, picture by picture: none, median (a factor),
            or least_squares (a factor and a shift).
        kitti_list: the test pictures of kitti, a line each, such as Eigen's list; empty takes the val part of
            the annotated depth.
        quiet: print results and errors only.
    """

    tasks: str = ""
    data: str = ""
    data_root: str = ""
    ood: str = ""
    out: str = ""
    cache_dir: str = ""
    cache_dtype: Literal["float32", "float16"] = "float32"
    layers: str = "pooled"
    limit: int = 0
    batch_size: int = 64
    workers: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    tensor_parallel_size: int = 1
    seed: int = 0
    strict: bool = False
    crop_area: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    attribute: Literal["Smiling", "Attractive"] = "Smiling"
    human: str = ""
    crop: Literal["usual", "none", "eigen", "garg"] = "usual"
    align: Literal["none", "median", "least_squares"] = "none"
    kitti_list: str = ""
    quiet: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "batch_size", "tensor_parallel_size")
        if self.limit < 0 or self.seed < 0:
            raise ValueError(f"--limit and --seed cannot be negative, got {self.limit} and {self.seed}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers cannot be negative, got {self.workers}")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"--crop_area must be two rising shares in (0, 1], got {list(self.crop_area)}")
        if not self.tasks.strip(", "):
            raise ValueError(
                "--tasks names nothing to measure, e.g. --tasks knn,linear; see launch/evaluate.py ls"
            )
