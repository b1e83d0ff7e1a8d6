"""How the kernel for few rows shares its work: rows in slabs, tiles between thread blocks."""

import dataclasses
import math

from sparsax.pallas.exchange import Exchange
from sparsax.pallas.hopper import COMPUTE, SHARED_BYTES, SLAB, WG_ROWS, multiprocessors

ROWS = WG_ROWS  # the most
RANK = 128  # the largest
WIDTHS = (128, 256, 512)  # of a tile; each warpgroup has half of its columns
DEPTH = 64
PIECE = WG_ROWS, SLAB  # columns and rows of y that a warpgroup finishes at once
CLUSTER, INTERPRETED = 8, 2  # thread blocks of one at most; those that interpret mode has room for


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Slots for `DEPTH` rows of u, and for tiles of v; `splits` blocks share a column of tiles."""

    stages: int
    v_stages: int
    splits: int = 1

    @staticmethod
    def of(u, v, rows: int = SLAB, cluster: int = CLUSTER) -> "Tiling | None":
        """The tiling for factors of such shapes and so many rows, or None where there is none.

        With half of a multiprocessor's memory each, two blocks fit beside each other. To itself a
        block need not find a multiprocessor: cuBLAS gives an H100 no more than 15 clusters of eight
        (NVIDIA/cutlass issue 1921), and a column of tiles that waits doubles the time.
        """
        (num_in, size, num_out, rank), width = u.shape, v.shape[3]
        if rank % 16 or rank > RANK or width not in WIDTHS or size % DEPTH:
            return None
        few = slabs(rows)[0] * SLAB
        most = max(1, min(num_in, cluster, multiprocessors() // num_out))
        alone = next(s for s in range(most, 0, -1) if s == 1 or num_out <= _clusters(s))
        limits = [(s, SHARED_BYTES) for s in range(alone, 0, -1)]
        if not large(rank, width, few):
            limits.insert(0, (most, SHARED_BYTES // 2 - 1024))
        tilings = (
            (Tiling(stages, n, splits), limit)
            for splits, limit in limits for least in (4, 2) for n in (2, 1)
            for stages in (8, 6, 4, 3, 2) if stages >= least
        )  # fmt: skip
        return next((t for t, limit in tilings if t.bytes(rank, width, few) <= limit), None)

    def exchange(self, width: int, few: int, interpret: bool = False) -> Exchange:
        """Room for parts of so many rows of a tile."""
        pieces = width // PIECE[0] * few // PIECE[1]
        return Exchange(self.splits, -(-pieces // self.splits), PIECE, interpret)

    def bytes(self, rank: int, width: int, few: int) -> int:
        """What a thread block needs of shared memory for 16-bit arrays, barriers apart."""
        x = ((self.stages - 1) * few + WG_ROWS) * DEPTH
        factors = self.stages * DEPTH * rank + self.v_stages * rank * width
        products = COMPUTE * (WG_ROWS * rank + math.prod(PIECE))
        parts = self.exchange(width, few).bytes if self.splits > 1 else 0
        return 2 * (x + factors + products) + parts


def slabs(rows: int) -> tuple[int, int]:
    """Into how many slabs of 8 rows of shared memory rows go, and how many into each.

    A copy fills what a slab lacks with zeros, and leaves that out of y, but only at the end of an
    array's dimension, so all have equally many; where that is impossible, with rows of zeros.
    """
    high = next(h for h in range(SLAB, 0, -1) if rows % h == 0)
    return (rows // high, high) if rows // high * SLAB <= ROWS else (-(-rows // SLAB), SLAB)


def large(rank: int, width: int, few: int) -> bool:
    """Whether sums take more registers than two blocks beside each other have."""
    return rank > 64 or width // COMPUTE * few > 64 * 64


def _clusters(blocks: int) -> int:
    """How many clusters of so many blocks run at once, each block on a multiprocessor of its own.

    A cluster is within a part of the GPU that has 16 or 18 multiprocessors, 14 at least.
    """
    return multiprocessors() // 16 * (14 // blocks)
