"""Video heads: from the patch tokens of a clip's frames to the logits of its class.

A head takes the tokens [B, T, N, D] that the trunk gives for each frame by itself, and returns this rank's
logits [B, ceil(K/tp)], float32. Its attention, blocks and classifier are sharded over the TP group as the
trunk's are.

Letters: B clips, T frames of a clip, N patches of a frame, D width of the trunk, C width of the head, K
classes, /tp a rank's share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from megavit.model.block import Norm, make_block
from megavit.model.config import ModelConfig, Recompute
from megavit.model.head import Classifier, MapHead
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout
from megavit.parallel.linear import Linear

# Of the size of a token behind the trunk's norm. ViT's usual 0.02 is lost among these: on digits that move
# heads then told the axis and not the direction after 200 steps.
_TIME_STD = 0.5


class VideoHead(nn.Module, ABC):
    """What both heads have in common: a projection to their own width, a learned embedding of a frame's place
    in the clip (unless `time_embedding` is false: then a clip is a set of frames), attention pooling, and the
    classifier. `config` is the head's architecture: width, heads, depth, classes."""

    def __init__(
        self, dim: int, frames: int, config: ModelConfig, init: Initializer, *, time_embedding: bool = True
    ):
        super().__init__()
        config.check_tensor_parallel(init.mesh.tp_size)
        self.enter = Linear(dim, config.dim, init.scope("enter"))
        self.time = init.normal("time", Layout((frames, config.dim)), _TIME_STD) if time_embedding else None
        self.pool = MapHead(config, init.scope("pool"))
        self.classifier = Classifier(config, init.scope("classifier"))

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Tokens [B, T, N, C] -> [B, C]."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, N, D] -> this rank's logits [B, ceil(K/tp)], float32."""
        found: Tensor = self.classifier(self.features(self.enter(tokens)))
        return found

    def placed(self, x: Tensor) -> Tensor:
        """[B, T, ..., C], with the embedding of each frame's place."""
        if self.time is None:
            return x
        return x + self.time.view(len(self.time), *[1] * (x.dim() - 3), -1)


class AttentiveProbe(VideoHead):
    """One learned query attends to the tokens of all frames at once, as V-JEPA's probe does (arXiv
    2404.08471); ViT-22B pools an image's tokens in this way. The trunk tells where in its frame a token is,
    but not when: that is what the time embedding is for."""

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.pool(self.placed(x).flatten(1, 2))
        return found


class TemporalTransformer(VideoHead):
    """The factorised encoder (ViViT, arXiv 2103.15691) behind a trunk of images, as in ViT-22B's experiment:
    a learned query pools each frame, transformer blocks join the frames, and a second query pools those."""

    def __init__(
        self,
        dim: int,
        frames: int,
        config: ModelConfig,
        init: Initializer,
        *,
        time_embedding: bool = True,
        recompute: Recompute = "none",
    ):
        super().__init__(dim, frames, config, init, time_embedding=time_embedding)
        self.blocks = nn.ModuleList(
            make_block(config, init.scope("blocks").scope(number), recompute)
            for number in range(config.depth)
        )
        self.norm = Norm(config, init.scope("norm"))
        self.time_pool = MapHead(config, init.scope("time_pool"))

    def features(self, x: Tensor) -> Tensor:
        clips, frames = x.shape[:2]
        pooled = self.pool(x.flatten(0, 1)).to(x.dtype)  # [B * T, C]
        x = self.placed(pooled.unflatten(0, (clips, frames)))  # [B, T, C]
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.time_pool(self.norm(x))
        return found
