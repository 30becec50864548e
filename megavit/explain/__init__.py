"""Why a model decides as it does: maps over the patches of an image, and whether they are right."""
