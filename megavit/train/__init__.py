"""Training: the DeepSpeed engine, optimizer groups, schedule, losses, the loop, and what it writes."""
