"""Why a model decides as it does: maps over the patches of an image, and whether they are right.

`megavit.explain(model, image)` gives the record of one decision: see `explainer.explain`.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """The package itself, which can be called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from megavit.explain.explainer import explain

        return explain(*arguments, **options)


sys.modules[__name__].__class__ = _Room
