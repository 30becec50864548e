"""The machines of a plan. Imports neither torch nor deepspeed."""

from __future__ import annotations

from dataclasses import dataclass

from megavit.gpus import Gpu
from megavit.scale.rates import Rates

_POSITIVE = ("nodes", "gpus_per_node", "network_gb_per_s", "filesystem_gb_per_s", "host_gib", "cores_per_gpu")


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs, and what they reach of their nominal rates. Bandwidths in GB/s: the network's for
    a node and direction, the file system's for all nodes together."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network_gb_per_s: float = 400.0
    filesystem_gb_per_s: float = 50.0
    host_gib: float = 1024.0
    cores_per_gpu: int = 12
    rates: Rates = Rates()

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node
