"""The machines of a plan. Imports neither torch nor deepspeed."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megavit.gpus import Gpu


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs. Bandwidths in GB/s: the network's for a node and direction, the file system's for
    all nodes together."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network_gb_per_s: float = 400.0
    filesystem_gb_per_s: float = 50.0
    host_gib: float = 1024.0
    cores_per_gpu: int = 12

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            if not getattr(self, field.name) > 0:
                raise ValueError(f"--{field.name} must be positive, got {getattr(self, field.name)}")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node
