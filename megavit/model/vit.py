"""MegaVit: patch embedding, blocks, pooling, classifier; its constructors, features, and loading weights.

Letters: B batch, C channels, P patch side, N tokens, H heads, D width. The model never sees DeepSpeed:
`train.engine` builds it inside `deepspeed.zero.Init` and hands in the mesh.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from megavit.model.block import OBSERVED, Norm, Observe, make_block
from megavit.model.config import ModelConfig, Recompute, model_config, model_preset
from megavit.model.embed import POSITION, PatchEmbedding, resize_position
from megavit.model.frozen import Frozen
from megavit.model.head import Classifier, MapHead, wide
from megavit.model.observe import Observers, require_grad
from megavit.parallel.collectives import dropout
from megavit.parallel.init import Initializer, initialise
from megavit.parallel.layout import Layout, layout_of
from megavit.parallel.mesh import Mesh

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class MegaVit(nn.Module):
    """The vision transformer of "Scaling Vision Transformers to 22 Billion Parameters" (arXiv 2302.05442).

    `MegaVit(image_size=..., patch_size=..., ...)` builds any shape, `from_preset` the paper's,
    `from_pretrained` loads an export. `options` are the further fields of `ModelConfig` (pool, num_registers,
    qk_norm, ...). With a `mesh` of tp_size > 1 it holds this rank's shard; the weights depend on `seed` and
    the logical shape only. `deferred_init` leaves them unfilled, see `parallel.init`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        channels: int = 3,
        mesh: Mesh | None = None,
        seed: int = 0,
        recompute: Recompute = "none",
        deferred_init: bool = False,
        **options: Any,
    ):
        super().__init__()
        sizes = {"image_size": image_size, "patch_size": patch_size, "num_classes": num_classes, "dim": dim}
        sizes |= {"depth": depth, "num_heads": heads, "mlp_dim": mlp_dim, "channels": channels}
        rates = {"dropout": dropout, "emb_dropout": emb_dropout}
        self.config = config = model_config({"name": "custom"} | sizes | rates | options)
        self.mesh = mesh = mesh or Mesh.single()
        self._observers = Observers()
        self._frozen: list[Frozen] = []  # the contexts' that are open, innermost last
        config.check_tensor_parallel(mesh.tp_size)
        init = Initializer(seed, mesh, deferred=deferred_init)
        self.embed = PatchEmbedding(config, init.scope("embed"))
        self.prefix = (
            init.normal("prefix", Layout((config.num_prefix_tokens, config.dim)), 1e-6)
            if config.num_prefix_tokens
            else None
        )
        # The first and the last block and the head lose most by 8 bits, and are a small part of the work.
        plain = dataclasses.replace(config, matmul="default")
        self.blocks = nn.ModuleList(
            make_block(
                config if 0 < i < config.depth - 1 else plain, init.scope("blocks").scope(i), recompute
            )
            for i in range(config.depth)
        )
        self.norm = Norm(config, init.scope("norm"))
        self.pool = MapHead(plain, init.scope("pool")) if config.pool == "map" else None
        self.head = Classifier(config, init.scope("head")) if config.num_classes else None

    @classmethod
    def from_config(cls, config: ModelConfig, **arguments: Any) -> MegaVit:
        """Build from a `ModelConfig`; `arguments` are `mesh`, `seed`, `recompute` and `deferred_init`."""
        fields = dataclasses.asdict(config)
        return cls(heads=fields.pop("num_heads"), **fields, **arguments)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        mesh: Mesh | None = None,
        seed: int = 0,
        recompute: Recompute = "none",
        **overrides: Any,
    ) -> MegaVit:
        """The paper family's model `name` (see `megavit.PRESETS`), e.g. `from_preset("vit_22b")`, 22.4e9
        parameters.

        `overrides` replace fields of its `ModelConfig`. Use `with torch.device("meta")` to build without
        memory.
        """
        return cls.from_config(model_preset(name, **overrides), mesh=mesh, seed=seed, recompute=recompute)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        mesh: Mesh | None = None,
        recompute: Recompute = "none",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> MegaVit:
        """Load an export (`config.json` and `model.safetensors`), or that of a run folder, in evaluation
        mode, on one process, or this rank's shard of it on a mesh.

        `overrides` replace fields of the saved configuration. With another `image_size` the position
        embedding is resized; `num_classes=0` leaves the classifier out, and another number makes a new one
        and warns of it. Weights come one tensor at a time, in `dtype` (default: torch's) and on `device`
        (default: the mesh's, or torch's), so that no second copy of the model is held.

        Raises ValueError, naming the file, for a folder that is no export or a damaged one, and, before any
        memory is allocated, for weights that do not match the configuration.
        """
        from megavit.model.exported import HEAD, open_export, stored_shapes

        with open_export(Path(folder), **overrides) as (config, weights):
            device = device or (mesh.device if mesh else torch.get_default_device())
            with default_dtype(dtype), torch.device(device):
                model = cls.from_config(config, mesh=mesh, recompute=recompute, deferred_init=True)
            stored, parameters = stored_shapes(weights), dict(model.named_parameters())
            fresh = [
                name
                for name in HEAD
                if name in parameters and layout_of(parameters[name]).shape != stored.get(name)
            ]
            model.load_logical(weights.get_tensor, leave=fresh)
        if fresh:
            warnings.warn(
                f"{' and '.join(fresh)} are newly initialised for {config.num_classes} classes: in {folder} "
                f"head.weight is {stored.get(HEAD[0], 'missing')}. Train them before you use the logits.",
                stacklevel=2,
            )
        return model.eval()

    @torch.no_grad()
    def load_logical(self, get: Callable[[str], Tensor], leave: Sequence[str] = ()) -> None:
        """Copy logical tensors, fetched one at a time with `get(name)`, into this rank's shards. Those called
        `leave` get their initial values instead.

        Raises ValueError when shapes do not match; the position embedding alone is resized to fit.
        """
        for name, parameter in self.named_parameters():
            if name in leave:
                initialise(parameter, self.mesh)
                continue
            layout, logical = layout_of(parameter), get(name)
            if name == POSITION:
                logical = resize_position(logical, (self.config.grid_size, self.config.grid_size))
            if tuple(logical.shape) != layout.shape:
                raise ValueError(f"{name} has shape {tuple(logical.shape)}, the model needs {layout.shape}")
            parameter.copy_(layout.take(logical, self.mesh.tp_rank, self.mesh.tp_size))

    def forward(self, img: Tensor, *, local_logits: bool = False) -> Tensor:
        """Logits [B, num_classes], float32, of images [B, C, height, width] in [-1, 1]; pooled features
        [B, D] if num_classes is 0.

        The sides may be any multiples of the patch size. `local_logits` leaves the classes sharded: [B,
        ceil(num_classes/tp)]. Raises ValueError for another image shape.
        """
        out = self.forward_head(self.forward_features(img), pre_logits=True)
        return out if self.head is None else self._logits(self.head, out, local=local_logits)

    def forward_features(self, img: Tensor) -> Tensor:
        """Normalised tokens [B, N, D] after the last block, prefix tokens (registers, class token) first,
        then patches row by row."""
        return self.norm(self._run_blocks(img), self._innermost_frozen)

    def forward_intermediates(
        self,
        img: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """(`forward_features(img)`, intermediates): the patch tokens after several blocks, in block order.

        Each is [B, D, rows, columns], or [B, N, D] with output_fmt="NLC"; with `return_prefix_tokens`, if the
        model has any, it is a pair with [B, num_prefix_tokens, D]. Raises ValueError for blocks that the
        model does not have.

        Args:
            indices: the last n blocks if it is a number, those blocks (negative ones count from the end) if a
                list, all if None.
            norm: apply the final norm to the intermediates.
            intermediates_only: return the list alone, and run no block after the last one of them.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted = _block_numbers(indices, self.config.depth)
        kept: list[Tensor] = []

        def keep(layer: int, x: Tensor) -> None:
            if layer in wanted:
                kept.append(self.norm(x, self._innermost_frozen) if norm else x)

        x = self._run_blocks(img, keep, max(wanted) + 1 if intermediates_only else None)
        prefix = self.config.num_prefix_tokens
        found: list[Any] = [tokens[:, prefix:] for tokens in kept]
        if output_fmt == "NCHW":
            rows, _ = self.embed.grid(img)
            found = [rearrange(t, "b (h w) d -> b d h w", h=rows).contiguous() for t in found]
        if return_prefix_tokens and prefix:
            found = [(patches, tokens[:, :prefix]) for patches, tokens in zip(found, kept, strict=True)]
        return found if intermediates_only else (self.norm(x, self._innermost_frozen), found)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of `forward_features`' tokens [B, N, D]; with `pre_logits`, or if
        num_classes is 0, the pooled features [B, D] that the classifier reads. float32. Registers do not take
        part."""
        patches = tokens[:, self.config.num_prefix_tokens :]
        if self.pool is not None:
            pooled = self.pool(patches, self._observers.listener("pool"), self._innermost_frozen)
        elif self.config.pool == "mean":
            pooled = patches.mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        else:
            pooled = wide(tokens[:, self.config.num_registers])
        return pooled if pre_logits or self.head is None else self._logits(self.head, pooled, local=False)

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits [B, num_classes], float32, of pooled features [B, D]. ValueError without a classifier."""
        if self.head is None:
            raise ValueError("this model has no classifier: its num_classes is 0")
        return self._logits(self.head, pooled, local=False)

    def read_out(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes], float32, of a token state [B, N, D] as `observe` tells it: through the
        final norm, the pooling and the classifier. After an earlier block than the last, what the model
        would say then (the "logit lens")."""
        return self.forward_head(self.norm(x, self._innermost_frozen))

    def observe(self, observer: Any) -> AbstractContextManager[Any]:
        """A context in which `observer` is told what the model does, block by block. The model keeps nothing.

        Of these methods the observer may have any:

            queries_keys(layer, q, k)   the queries and keys [B, H/tp, N, K] of this rank's heads, normalised
            attention(layer, weights)   the softmax weights [B, H/tp, N, N] of this rank's heads, float32
            writes(layer, attention, mlp)  what the block's attention and its MLP each add to the token state,
                                        [B, N, D], summed over the ranks, without dropout; the output bias of
                                        a parallel block is among the MLP's
            tokens(layer, x)            the token state [B, N, D] after block `layer`, from -1 on, the input
            pool(weights)               the MAP head's weights [B, H/tp, num_patches] of this rank's heads

        Each is called once a layer and forward pass, never by recomputation, and outside of what is
        recomputed. If gradients are recorded, the tensors are part of the graph of the logits, even if all
        weights are frozen: hooks on them run once in a backward pass, under every recompute policy. An
        observer that does not keep the tensors costs memory for one block (backward keeps more, unless blocks
        are recomputed). With `attention`, blocks compute the explicit matrix instead of calling the fused
        kernel; with `writes`, parallel blocks add their two terms after the reduce, which costs them a second
        one. Compiled blocks run uncompiled. Contexts may be nested: all observers are told.
        """
        return self._observers.joined_by(observer)

    @contextmanager
    def frozen_statistics(self, *, halve_attention: bool = False) -> Iterator[None]:
        """A context in which the statistics of the model's norms are constants for the gradient, and so are
        the gates of its GELUs.

        x / rms(x) has the gradient of x times a constant (block norms, QK norms, the final norm, the MAP
        head's; a LayerNorm that of the centred x), and GELU(x) = x (1 + tanh z) / 2 that of x times the gate.
        All values are what they are without it, to the bit, and everything else has its ordinary gradient.
        The gradient of a score with respect to the image, times the image's difference from a baseline, is
        then its evidence for and against the score, see `megavit.explain.gradient.frozen`. With
        `halve_attention` a block's attention weights and its values each have half their gradient, which
        locates somewhat better (the rule of arXiv 2402.05602 for a product of two factors).

        Holds for the passes that begin inside; their backward pass may come later. Works with every kernel,
        recompute policy and TP size, and adds no collective; compiled blocks run uncompiled. Of nested
        contexts the inner one holds.
        """
        self._frozen.append(Frozen(halve_attention))
        try:
            yield
        finally:
            self._frozen.pop()

    @property
    def _innermost_frozen(self) -> Frozen | None:
        return self._frozen[-1] if self._frozen else None

    def _run_blocks(
        self, img: Tensor, keep: Callable[[int, Tensor], None] | None = None, depth: int | None = None
    ) -> Tensor:
        """The token state [B, N, D] after the first `depth` blocks, not normalised. `keep` is called with
        each block's number and output."""
        self.embed.check(img)
        x = self.embed(img)
        x = dropout(self.mesh, x, self.config.emb_dropout, self.training, sharded=False)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        if self._observers:
            x = require_grad(x)
            self._observers.tell("tokens", -1, x)
        for layer, block in enumerate(self.blocks):
            if layer == depth:
                break
            observe = self._observers.listeners(OBSERVED, layer)
            x = block(x, observe, self._innermost_frozen)
            self._observers.tell("tokens", layer, x)
            if keep is not None:
                keep(layer, x)
        return x

    def _logits(self, head: Classifier, features: Tensor, *, local: bool) -> Tensor:
        logits = head(features)
        return logits if local else head.gather_logits(logits)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the images that `forward` takes."""
        return self.embed.weight.dtype

    def compile_blocks(self) -> None:
        """torch.compile each block's forward, inside ZeRO's hooks; blocks share one compiled graph."""
        for block in self.blocks:
            block.forward = _unless_looked_into(torch.compile(block.forward), block.forward)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """torch.set_default_dtype for a while, if there is one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _block_numbers(indices: int | Sequence[int] | None, depth: int) -> set[int]:
    """The blocks that timm's `indices` stand for: all, the last n, or those given."""
    if indices is None:
        return set(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(
                f"indices={indices} asks for the last {indices} of {depth} blocks; use 1 to {depth}"
            )
        return set(range(depth - indices, depth))
    if not indices or not all(-depth <= i < depth for i in indices):
        raise ValueError(
            f"indices={list(indices)} are not blocks of this model, which has {depth}; "
            f"use one or more of 0 to {depth - 1}, or -{depth} to -1 from the end"
        )
    return {i % depth for i in indices}


def _unless_looked_into(
    compiled: Callable[[Tensor], Tensor], plain: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A block's forward: compiled, but for an observer, whose code is not to be traced, and for frozen
    statistics, which would compile it once more."""

    def forward(
        x: Tensor, observe: Mapping[str, Observe] | None = None, frozen: Frozen | None = None
    ) -> Tensor:
        return compiled(x) if observe is None and frozen is None else plain(x, observe, frozen)

    return forward
