"""Data sets: one file a family, each a function that finds the set below a folder and returns an ImageSet."""
