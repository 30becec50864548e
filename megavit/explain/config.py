"""The settings of the command: typed, frozen, validated on construction. Imports the standard library
only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megavit.fields import check_types, require_positive


@dataclass(frozen=True)
class ExplainConfig:
    """What is explained, how, and where it is written.

    Args:
        target: name or number of the class to explain; empty takes the likeliest one of each image.
        against: class to hold it against: why the one rather than the other.
        methods: maps, separated by commas: located, frozen, relevance, occlusion, occlusion_3x3,
            integrated_gradients, gradient; rollout and raw_attention, which are the same for every class;
            all.
        out: folder for the page, the pictures and the records; empty takes MODEL/explanation.
        data: images of a data set: a folder or a manifest as launch/evaluate.py takes them (its test images),
            or a pattern of shards.
        num: of --data, so many images spread evenly over it (8).
        train: folder with the training images, as launch/evaluate.py takes it: of each image those that are
            like it, and those that pushed its score up and down (through the classifier alone).
        faithfulness: measure for every image whether its maps are right, at the price of some 50 forward
            passes for each map and 250 for what they are held against.
        batch_size: images that go through the model together. Memory depends on it, and not on the number of
            images; occlusion takes eight times as many.
        dtype: of the weights: float32 or bfloat16.
        tensor_parallel_size: ranks that share one copy of the model; must divide heads, mlp_dim and ranks.
        seed: of the random maps that maps are held against.
        quiet: print errors and the place of the page only.
    """

    target: str = ""
    against: str = ""
    methods: str = "located"
    out: str = ""
    data: str = ""
    num: int | None = None
    train: str = ""
    faithfulness: bool = True
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    tensor_parallel_size: int = 1
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        require_positive("--", self, "batch_size", "tensor_parallel_size")
        if self.seed < 0:
            raise ValueError(f"--seed cannot be negative, got {self.seed}")
        if self.num is not None and self.num < 1:
            raise ValueError(f"--num must be at least 1, got {self.num}")
        if self.num is not None and not self.data:
            raise ValueError("--num says how many images of --data are explained; name these with --data")
        if self.target and self.target == self.against:
            raise ValueError(
                f"--target and --against are both {self.target!r}; name two classes, or leave one out"
            )


@dataclass(frozen=True)
class InfluenceConfig:
    """Which training images are listed as likely label errors.

    Args:
        train: folder with the training images, as launch/evaluate.py takes it.
        data: validation images whose labels are trusted: a folder, a manifest or a pattern of shards; empty
            takes the test images of --train.
        num: training images in each list.
        out: folder for the page and the record; empty takes MODEL/influence.
        batch_size: images that go through the model together.
        dtype: of the weights: float32 or bfloat16.
        tensor_parallel_size: ranks that share one copy of the model; must divide heads, mlp_dim and ranks.
        quiet: print errors and the place of the page only.
    """

    train: str = ""
    data: str = ""
    num: int = 20
    out: str = ""
    batch_size: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    tensor_parallel_size: int = 1
    quiet: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        require_positive("--", self, "num", "batch_size", "tensor_parallel_size")
        if not self.train:
            raise ValueError("--train DIR must name the training images among which to look for label errors")
