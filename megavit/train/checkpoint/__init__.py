"""The training state on disk: written by every rank, read by any layout."""
