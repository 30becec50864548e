"""Everything that this project changes in DeepSpeed, for the one version that it was read and tested with.

The trainer also reads attributes of DeepSpeed that are not public (`zero_state.py`, `engine.py`); the engine
checks at each start that what it reads there is what DeepSpeed's public functions say. Import DeepSpeed from
here, so that the changes are in place.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
from pathlib import Path

VERSION = "0.19.8"


def _require_version() -> None:
    found = importlib.metadata.version("deepspeed")
    if found != VERSION:
        raise ImportError(
            f"DeepSpeed {found} is installed, this version of MegaViT works with {VERSION} only: it changes "
            f"and reads parts of it that are not public; pip install deepspeed=={VERSION}"
        )


_require_version()

# DeepSpeed compiles its ops with the first `ninja` in PATH, and another version of it takes finished ops for
# outdated: without this, a start with the environment not activated costs half a minute, and so does the
# next.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# DeepSpeed prints dozens of lines a rank at start.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules  # noqa: E402

__all__ = ["VERSION", "deepspeed", "safe_get_full_fp32_param", "set_z3_leaf_modules"]

# An all-reduce over shared memory, for inference on CPUs only. At each start it would be compiled or looked
# up, and leave 32 MB or more a rank in /dev/shm, for ever.
# (The attribute deepspeed.comm.torch is PyTorch, hence the long way to the module.)
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

# Asked whether the optimizer is its Muon (none is), DeepSpeed imports functions that are compiled when
# imported: with all of inductor, a second of each start.
importlib.import_module("deepspeed.runtime.compiler").compile = lambda: lambda function: function  # type: ignore[attr-defined]
