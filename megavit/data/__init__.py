"""Input: WebDataset tar shards read by offset, in an order that is a pure function of (seed, step, global
batch)."""
