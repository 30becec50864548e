"""`megavit COMMAND ...`: the commands of an installed package; in a checkout `launch/*.py` are the same."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megavit.fields import nearest

# Command -> what it does; `megavit.launch.COMMAND` has its `main`.
COMMANDS = {
    "train": "train a model, on one rank; on several: deepspeed --module megavit.launch.train ...",
    "shards": "write, index and check WebDataset shards",
    "plan": "find the best layout of a run on a cluster, with its memory and time",
    "export": "write a run's model for one process",
    "predict": "say what photos show",
    "evaluate": "say how good a model is, by its classifier and its frozen features",
    "explain": "say why a model decides so: maps, whether they are right, the way through the blocks",
    "checkpoints": "list, check and compare a run's checkpoints",
    "bench": "measure the model, the input, the trainer and checkpoints against other ways",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words else ""
    if name in COMMANDS:
        sys.argv[0] = f"megavit {name}"  # what a command's usage line begins with
        command = importlib.import_module(f"megavit.launch.{name}")
        return int(command.main(words))
    usage = "\n".join(
        ["usage: megavit COMMAND ... (megavit COMMAND --help explains one)", ""]
        + [f"  {command:<12} {text}" for command, text in COMMANDS.items()]
    )
    if name in ("", "-h", "--help"):
        print(usage)
        return 0
    print(f"error: unknown command {name!r}{nearest(name, COMMANDS)} (see megavit --help)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
