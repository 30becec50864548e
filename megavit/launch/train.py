"""Train: `deepspeed launch/train.py --deepspeed_config ds_configs/zero3.json [flags]`; see --help."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megavit.parallel.rendezvous import wait_asleep
from megavit.train.preempt import StopRequest

# How the user may have set up PyTorch's allocator of GPU memory.
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


def main(argv: Sequence[str] | None = None) -> int:
    stop = StopRequest().install()  # before the slow imports: a notice may come at any time
    if not _ALLOCATOR & os.environ.keys():  # torch reads it when it is imported
        # Weights that ZeRO-3 gathers and activations of many sizes leave gaps between fixed segments.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    wait_asleep()

    from megavit.cli import parse_run
    from megavit.data.worker import start_forkserver
    from megavit.train.ds_config import load_ds_config

    command = parse_run(argv)
    run = command.run
    try:
        ds_config = load_ds_config(command.deepspeed_config, command.ds_overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    # Heavy imports come after everything that a typing mistake can break.
    if run.data.workers != 0:
        start_forkserver()  # its imports go on beside the ones here
    import torch.distributed as dist

    from megavit.parallel.mesh import Mesh
    from megavit.train.guard import TooManySkipped
    from megavit.train.logging.monitor import say
    from megavit.train.loop import OutOfMemory, SaveError, UselessRun, train
    from megavit.train.preempt import stop_signals_blocked

    try:
        with stop_signals_blocked():
            # The watchdog ends a rank that hangs, with a report; this limit is for when it cannot.
            mesh = Mesh.from_environment(run.tensor_parallel_size, run.timeout_s + 60)
        for note in command.notes:
            say(mesh, note)
        train(run, ds_config, mesh, stop, command.ds_overrides)
    except (ValueError, OSError, TooManySkipped, SaveError, UselessRun, OutOfMemory) as error:
        rank = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
        print(f"error{rank}: {error}", file=sys.stderr, flush=True)
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
