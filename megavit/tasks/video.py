"""The class of a video, on a frozen or trained trunk that sees each frame as an image.

Letters: b micro-batch, V views of a video (clips times crops; 1 in training), T frames of a clip, S image
side, C channels, N patches, D width of the trunk, K classes, /tp a rank's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megavit.data.class_names import class_names_of_run, write_class_names
from megavit.data.device import to_model_input
from megavit.data.fields import Field, Labels
from megavit.data.geometry import decide
from megavit.data.video import Video
from megavit.model.config import ModelConfig, Recompute
from megavit.model.video import AttentiveProbe, TemporalTransformer, VideoHead
from megavit.model.vit import MegaVit
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import VideoConfig
from megavit.tasks.dense import DecoderModule, DecoderTask, num_shown, shown_picture
from megavit.tasks.loss import image_losses, local_targets
from megavit.tasks.task import DeviceBatch, Group, Pictures, Sums

_TOP = 5
_HEAD_DIM = 64
_SHOWN_FRAMES = 4  # of a video: pictures stand in rows of four


class Inputs(NamedTuple):
    """One micro-batch on the device, the same on all ranks of a TP group but for the targets. Frames become
    the trunk's input view by view: as float32 all views of an evaluation would be four times as large."""

    videos: Tensor  # uint8 [b, V, T, S, S, C]
    targets: Tensor  # float32 [b, ceil(K/tp)]
    labels: Tensor  # int64 [b], -1 for samples that could not be read
    weights: Tensor  # float32 [b]


class VideoTask(DecoderTask):
    """Trains a head for the class of a video. The unit is a video: evaluations give `top1` and `top5` of the
    probabilities averaged over its views, and the `loss`, their negative logarithm, without smoothing."""

    Config = VideoConfig
    config: VideoConfig
    metric = "top1"
    _names: Sequence[str] = ()  # on the main rank, if they are known

    def open(self, run_dir: Path, class_names: Sequence[str] | None = None) -> None:
        super().open(run_dir, class_names)
        data, count = self.data, self.config.classes
        self._names = class_names or class_names_of_run(run_dir, data.shards, data.class_names, count)

    def keep(self, folder: Path) -> None:
        super().keep(folder)
        if self._names:
            write_class_names(folder, self._names)

    def fields(self) -> Sequence[Field]:
        return self._fields(1, 1)

    def eval_fields(self) -> Sequence[Field]:
        return self._fields(*self.config.clips_and_crops())

    def _fields(self, clips: int, crops: int) -> Sequence[Field]:
        labels = Labels(num_classes=self.config.classes, max_labels=1, allow_none=False)
        return [self._video(clips, crops), labels]

    def _video(self, clips: int, crops: int) -> Video:
        config, model, data = self.config, self.model, self.data
        return Video(
            size=model.image_size,
            channels=model.channels,
            antialias=data.antialias,
            max_pixels=data.max_pixels,
            frames=config.frames,
            stride=config.stride,
            interval_s=config.interval_s,
            clips=clips,
            crops=crops,
        )

    def read(self, data: bytes, extension: str = "mp4") -> Tensor:
        """The views of one video file, as evaluations see it: uint8 [1, V, T, S, S, C]. ValueError, saying
        why, if it cannot be decoded."""
        clips, crops = self.config.clips_and_crops()
        video = self._video(clips, crops)
        out = np.zeros(video.shape, np.uint8)
        video.decode_first(data, extension, partial(decide, config=self.data, u=None), out)
        return _views(torch.from_numpy(out)[None], self.config.frames)

    def build(self, init: Initializer, recompute: Recompute) -> nn.Module:
        config, model, scope = self.config, self.model, init.scope("decoder")
        size, time = (model.dim, config.frames, self._head()), config.time_embedding
        decoder: VideoHead
        if config.head == "attentive":
            decoder = AttentiveProbe(*size, scope, time_embedding=time)
        else:
            decoder = TemporalTransformer(*size, scope, time_embedding=time)
        layers = config.taps(model.depth)
        return VideoModule(self.trunk(init, recompute), decoder, layers, config)

    def _head(self) -> ModelConfig:
        """The head's architecture: ViT-22B's blocks and pooling, of the trunk's width unless it is given."""
        width = self.config.head_width or self.model.dim
        own_heads = width != self.model.dim and width % _HEAD_DIM == 0
        return ModelConfig(
            name="custom",
            num_classes=self.config.classes,
            dim=width,
            depth=self.config.head_layers,
            num_heads=width // _HEAD_DIM if own_heads else self.model.num_heads,
            mlp_dim=4 * width,
        )

    def inputs(self, samples: DeviceBatch, mesh: Mesh, *, training: bool) -> Inputs:
        config, labels = self.config, samples.fields["label"]
        smoothing = config.label_smoothing if training else 0.0
        targets = local_targets("softmax", labels, config.classes, mesh, smoothing)
        videos = _views(samples.fields["video"], config.frames)
        return Inputs(videos, targets, labels[:, 0].long(), samples.weights)

    def group(self, name: str, shape: tuple[int, ...], weight_decay: float) -> Group:
        if name == "decoder.time":  # an embedding
            return Group("no_decay", 0.0)
        return super().group(name, shape, weight_decay)

    def pictures(
        self, samples: DeviceBatch, inputs: Inputs, count: int, module: nn.Module | None = None
    ) -> Pictures:
        """Frames of the middle view of `count` / 2 videos, those of one side by side."""
        count = num_shown(inputs.weights, count // 2)
        videos, labels = inputs.videos[:count], inputs.labels[:count]
        captions = [
            f"label: {self._name(label)}" if label >= 0 else "not usable" for label in labels.tolist()
        ]
        if isinstance(module, VideoModule):
            best = module.probabilities(videos).max(1)
            captions = [
                f"{self._name(number)} {share:.0%}\n{caption}"
                for number, share, caption in zip(
                    best.indices.tolist(), best.values.tolist(), captions, strict=True
                )
            ]
        _, views, frames = videos.shape[:3]
        chosen = torch.linspace(0, frames - 1, min(_SHOWN_FRAMES, frames)).round().long().tolist()
        shown: list[Tensor] = []
        texts: list[str] = []
        for video, caption in zip(videos[:, views // 2], captions, strict=True):
            shown += [shown_picture(image) for image in to_model_input(video[chosen], video.device)]
            texts += [caption, *(f"frame {number}" for number in chosen[1:])]
        return Pictures(torch.stack([picture.cpu() for picture in shown]), texts)

    def _name(self, number: int) -> str:
        return self._names[number] if self._names else str(number)


def _views(videos: Tensor, frames: int) -> Tensor:
    """[b, T, S, S, C], of one view, or [b, V, T, S, S, C] -> [b, V, T, S, S, C]."""
    return videos.reshape(len(videos), -1, frames, *videos.shape[-3:])


class VideoModule(DecoderModule):
    """The trunk, a video head, and the loss of its classes."""

    decoder: VideoHead

    def __init__(self, trunk: MegaVit, decoder: VideoHead, layers: Sequence[int], config: VideoConfig):
        super().__init__(trunk, decoder, layers, config.norm_taps)
        self.num_classes = config.classes

    def logits(self, clips: Tensor) -> Tensor:
        """Clips uint8 [b, T, S, S, C] -> this rank's logits [b, ceil(K/tp)], float32. The trunk sees the
        frames of all clips as one batch of images."""
        images = to_model_input(clips.flatten(0, 1), clips.device)
        (tokens,) = self.taps(self.run_trunk(images, "NLC"))  # [b * T, N, D]
        found: Tensor = self.decoder(tokens.unflatten(0, clips.shape[:2]))
        return found

    def probabilities(self, videos: Tensor) -> Tensor:
        """Videos uint8 [b, V, T, S, S, C] -> the mean over their views of the probabilities of all classes,
        float32 [b, K], on every TP rank. One pass a view."""
        head = self.decoder.classifier
        found = [head.gather_logits(self.logits(clips)).softmax(1) for clips in videos.unbind(1)]
        return torch.stack(found).mean(0)

    def forward(self, inputs: Inputs) -> Sums:
        if not self.training:
            return self._evaluated(inputs)
        logits = self.logits(inputs.videos[:, 0])
        losses = image_losses("softmax", logits, inputs.targets, self.num_classes, self.trunk.mesh)
        return Sums((losses * inputs.weights).sum(), {})

    def _evaluated(self, inputs: Inputs) -> Sums:
        shares, weights = self.probabilities(inputs.videos), inputs.weights
        labels = inputs.labels.clamp(min=0)[:, None]  # those of unusable samples have weight 0
        least = torch.finfo(shares.dtype).tiny  # of 0 the loss would be infinite, and nan times weight 0
        losses = -shares.gather(1, labels)[:, 0].clamp(min=least).log()
        right = (shares.topk(min(_TOP, self.num_classes), 1).indices == labels).float()
        counts = {"top1": (right[:, 0] * weights).sum()}
        if self.num_classes > _TOP:
            counts[f"top{_TOP}"] = (right.sum(1) * weights).sum()
        return Sums(losses @ weights, counts)
