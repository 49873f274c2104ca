"""The workers of a run as one of them sees it: a rank, a device, and what all must agree on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class World:
    """One worker among `size`; alone where no process group was made."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls, device: torch.device) -> World:
        """This process's place in the process group that its launcher made."""
        if not dist.is_initialized():
            return cls(device=device)
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device)

    @property
    def leads(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def shared(self, module: nn.Module, blocks: Sequence[nn.Module], how: Parallel) -> nn.Module:
        """The module as all workers train it: copies (`ddp`) or shards (`fsdp`, FSDP2).

        Every worker has built it with the same weights. Shards are made of each block, and of the
        rest; frozen weights are sharded, too.
        """
        if how == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            return fully_shard(module, mesh=mesh)
        if self.size == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            init_sync=False,
        )

    @contextlib.contextmanager
    def synchronised(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are averaged over workers in the `last` micro-batch of a step only."""
        if isinstance(module, DistributedDataParallel):
            with contextlib.nullcontext() if last else module.no_sync():
                yield
            return
        if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
            module.set_requires_gradient_sync(last)
        yield

    def total(self, values: Tensor) -> Tensor:
        """The sum over workers, in double precision."""
        summed = values.detach().double()
        if self.size > 1:
            dist.all_reduce(summed)
        return summed

    def wait(self) -> None:
        """Until all workers are here."""
        if self.size > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            dist.barrier(device_ids=device_ids)


def local(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
