"""The processes of a run: who am I, which device is mine, and what all ranks agree on.

The loop is written for many ranks and asks this object wherever they would have to talk. One process needs no
communication, so every method here is the identity; several processes are refused until the collectives below exist.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.errors import ConfigError


@dataclass(frozen=True)
class Parallel:
    """Rank, world size and device of this process.

    Args:
        rank: Index of this process among all, from 0.
        world_size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls) -> "Parallel":
        """Reads the launcher's environment (torchrun sets it) and picks the device of this process.

        Raises:
            ConfigError: More than one process was launched, or the environment holds no numbers.
        """
        world_size = _number("WORLD_SIZE", 1)
        if world_size > 1:
            # Here: init_process_group, init_device_mesh with the dimensions dp_replicate, dp_shard and sp, and a gloo
            # group of its own for checkpoints (their collectives run in a thread and must not meet training's).
            raise ConfigError(f"WORLD_SIZE={world_size}: this version trains in one process; start it with python.")
        local_rank = _number("LOCAL_RANK", 0)
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        return cls(rank=0, world_size=1, device=device)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs, reports and the model directory."""
        return self.rank == 0

    @property
    def checkpoint_group(self) -> dist.ProcessGroup | None:
        """The process group on which checkpoints coordinate; None in a single process."""
        return None

    def shard(self, model: nn.Module) -> nn.Module:
        """Moves the model to this rank's device; `fully_shard` over the mesh, block by block, belongs here."""
        return model.to(self.device)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks."""
        return value

    def close(self) -> None:
        """Leaves the process group after a barrier; without one, ranks may abort each other at exit."""


def _number(name: str, default: int) -> int:
    """A variable of the launcher's environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} in the environment is not a number; unset it, or start with torchrun.")
    return int(text)
