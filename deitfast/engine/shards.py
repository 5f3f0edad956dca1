"""Which part of the flat buffers each process updates: its shard (ZeRO, stage 1: Rajbhandari et al., arXiv 1910.02054).

A buffer is cut into equal runs, the buckets, and each of them into one share a process, in the order of the ranks. A
process keeps its shares one after the other. So each bucket is summed over the processes by one reduce-scatter while
the backward still computes the others, and made whole again by one all-gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deitfast.distributed import World

BUCKET_BYTES = 32 << 20
"""Of the fp32 gradients that one collective sums: long against a collective's latency, short against a backward."""


@dataclass(frozen=True)
class Shards:
    """The cut of buffers of `size` elements into `buckets` x `world.size` shares of `share` elements.

    share is a multiple of `block`, elements that stay together. A shard has `own_size` elements; with one process it is
    the buffer itself.
    """

    world: World
    buckets: int
    share: int
    block: int

    @classmethod
    def of(cls, elements: int, world: World, block: int) -> Shards:
        """The cut of at least so many elements."""
        buckets = 1 if world.size == 1 else max(1, round(4 * elements / BUCKET_BYTES))
        return cls(world, buckets, -(-elements // (buckets * world.size * block)) * block, block)

    @property
    def size(self) -> int:
        return self.buckets * self.world.size * self.share

    @property
    def own_size(self) -> int:
        return self.buckets * self.share

    @property
    def is_whole(self) -> bool:
        """Whether this process has no other to share with."""
        return self.world.size == 1

    def bounds(self, bucket: int) -> slice:
        """Where a bucket lies in a buffer."""
        length = self.world.size * self.share
        return slice(bucket * length, (bucket + 1) * length)

    def own(self, flat: Tensor) -> Tensor:
        """This process's shard of `flat` (size,): a copy (own_size,), or `flat` itself where there is one process."""
        if self.is_whole:
            return flat
        return flat.view(self.buckets, self.world.size, self.share)[:, self.world.rank].clone().view(-1)

    def own_blocks(self) -> Tensor:
        """Numbers of this process's blocks, int64, in the order of its shard."""
        numbers = torch.arange(self.size // self.block).view(self.buckets, self.world.size, -1)
        return numbers[:, self.world.rank].reshape(-1)

    def sum(self, bucket: int, flat: Tensor, shard: Tensor) -> Any:
        """Begin to sum a bucket of every process's `flat`, each process's share of it into its `shard`; the work."""
        share = shard[bucket * self.share : (bucket + 1) * self.share]
        return self.world.sum_to_shares(flat[self.bounds(bucket)], share)

    def gather(self, shard: Tensor, flat: Tensor) -> None:
        """`flat` (size,) on every process, from the shards of all."""
        for bucket in range(0 if self.is_whole else self.buckets):
            self.world.gather_shares(shard[bucket * self.share : (bucket + 1) * self.share], flat[self.bounds(bucket)])

    def gather_blocks(self, own: Tensor) -> Tensor:
        """(k, blocks of `size`) from every process's (k, own blocks): a number for each block, in the blocks' order."""
        k, world = len(own), self.world
        found = own.new_empty(world.size, k, own.shape[1])
        world.gather_shares(own.contiguous().view(-1), found.view(-1))
        return found.view(world.size, k, self.buckets, -1).permute(1, 2, 0, 3).reshape(k, -1)

    def gather_on_leader(self, shard: Tensor) -> Tensor | None:
        """The whole buffer on the leading process's host, a bucket at a time; None on the others."""
        whole = torch.empty(self.size, dtype=shard.dtype) if self.world.is_main else None
        for bucket in range(self.buckets):
            part = shard.new_empty(self.world.size * self.share) if self.world.is_main else None
            self.world.collect(shard[bucket * self.share : (bucket + 1) * self.share], part)
            if whole is not None and part is not None:
                whole[self.bounds(bucket)].copy_(part)
        return whole
