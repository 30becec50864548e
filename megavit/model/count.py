"""Parameters and FLOPs in closed form from the configuration: no model, no memory.

FLOPs are two per multiply-accumulate of matmuls only, as torch's FlopCounterMode counts them, attention
unmasked. Model FLOPs utilisation divides three forwards (forward and backward) by time and peak;
recomputation never counts.
"""

from __future__ import annotations

from megavit.model.config import ModelConfig


def block_matrices(config: ModelConfig) -> int:
    """Weight-matrix entries of all blocks: 12 D^2 a block for F = 4D. The 21,743M of ViT-22B's table 1."""
    return config.depth * (4 * config.dim**2 + 2 * config.dim * config.mlp_dim)


def num_params(config: ModelConfig) -> int:
    """All parameters, as `sum(p.numel() for p in MegaVit(...).parameters())` with tp_size 1."""
    dim = config.dim
    embed = dim * (config.channels * config.patch_size**2 + 1 + config.num_patches + config.num_prefix_tokens)
    blocks = block_matrices(config) + config.depth * _block_vectors(config)
    return embed + blocks + _norm(config) + _map_head(config) + config.num_classes * (dim + 1)


def _norm(config: ModelConfig) -> int:
    return config.dim * (2 if config.norm_bias else 1)


def _block_vectors(config: ModelConfig) -> int:
    dim = config.dim
    branches = 1 if config.block == "parallel" else 2  # norms, output biases, layer scales
    qkv = 3 * dim if config.qkv_bias else 0
    qk_scales = 2 * config.head_dim if config.qk_norm else 0
    scales = 0 if config.layer_scale is None else branches * dim
    return branches * (_norm(config) + dim) + config.mlp_dim + qkv + qk_scales + scales


def _map_head(config: ModelConfig) -> int:
    if config.pool != "map":
        return 0
    dim = config.dim
    attention = 4 * dim**2 + dim + (3 * dim if config.qkv_bias else 0)
    mlp = 2 * dim * config.mlp_dim + config.mlp_dim + dim
    return dim + attention + _norm(config) + mlp


def forward_flops(config: ModelConfig) -> int:
    """Matmul FLOPs of one image's forward pass, with pooling and classifier (11.25e12 for ViT-22B with JFT's
    head)."""
    dim, tokens = config.dim, config.num_tokens
    embed = 2 * config.num_patches * dim * config.channels * config.patch_size**2
    per_block = 2 * tokens * block_matrices(config) // config.depth + 4 * tokens**2 * dim
    pool = 0
    if config.pool == "map":
        matrices = 2 * config.num_patches * dim**2 + 2 * dim**2 + 2 * dim * config.mlp_dim  # k v; q out; MLP
        pool = 2 * matrices + 4 * config.num_patches * dim
    return embed + config.depth * per_block + pool + 2 * dim * config.num_classes


def train_flops(config: ModelConfig) -> int:
    """Model FLOPs of one image's training step: three forwards. The numerator of MFU."""
    return 3 * forward_flops(config)


def repeated_flops(config: ModelConfig) -> int:
    """Matmul FLOPs of one image that `--recompute full` computes again: those of the blocks, but for what
    projects back to D without being read by backward (see `recompute`)."""
    dead = 0
    if config.layer_scale is None:  # down; and in a parallel block out, since only down's output follows it
        dead = config.dim * config.mlp_dim + (config.dim**2 if config.block == "parallel" else 0)
    per_block = 2 * (block_matrices(config) // config.depth - dead) + 4 * config.num_tokens * config.dim
    return config.depth * config.num_tokens * per_block


def trunk_flops_per_token(config: ModelConfig) -> int:
    """ViT-22B's own convention, 6 N + 12 L n D with N the block matrices: reproduces its 54.9% MFU at 1,150
    tokens/s."""
    return 6 * block_matrices(config) + 12 * config.depth * config.num_tokens * config.dim
