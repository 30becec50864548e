"""The ViT-22B architecture: parallel block, attention pooling, and closed forms for its parameters and
FLOPs."""
