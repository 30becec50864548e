"""Tensor parallelism: the rank grid, collectives with gradients, sharded linears, and weights that ignore the
sharding."""
