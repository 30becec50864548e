"""Train: `deepspeed launch/train.py --deepspeed_config ds_configs/zero3.json [flags]`; see --help."""

from __future__ import annotations

import sys

from megavit.cli import parse_run
from megavit.train.ds_config import load_ds_config


def main() -> int:
    run, ds_path = parse_run()
    try:
        ds_config = load_ds_config(ds_path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    # Heavy imports come after everything that a typing mistake can break.
    import torch.distributed as dist

    from megavit.parallel.mesh import Mesh
    from megavit.train.engine import NonFiniteError
    from megavit.train.loop import train

    try:
        mesh = Mesh.from_environment(run.tensor_parallel_size)
        train(run, ds_config, mesh)
    except (ValueError, NonFiniteError) as error:
        rank = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
        print(f"error{rank}: {error}", file=sys.stderr, flush=True)
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
