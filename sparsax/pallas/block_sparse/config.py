"""Which tiles and how many slots each kernel uses, found by measurement on an H200."""

import dataclasses
from typing import Any

from sparsax.pallas.block_sparse.problem import Problem


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Columns of a tile, slots of the ring that holds tiles, and whether warpgroups take turns."""

    tile: int
    stages: int
    turns: bool = False

    @property
    def keywords(self) -> dict[str, Any]:
        """As a kernel takes them."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Config:
    """One tiling for each kernel."""

    forward: Tiling
    dq: Tiling
    dkv: Tiling

    def with_turns(self, turns: bool) -> "Config":
        """The same tiles with or without turns."""
        change = lambda tiling: dataclasses.replace(tiling, turns=turns)
        return Config(change(self.forward), change(self.dq), change(self.dkv))


# By head dim: what fits in 227 KiB of shared memory and 232 registers a thread without a spill.
# 64 and 128 are the fastest of `benchmarks/tune_attention_gpu.py`. Turns pay in dQ, not forward,
# whose order of products already runs a tile's softmax beside the last one's product.
TABLE = {
    32: Config(Tiling(128, 4), Tiling(128, 4), Tiling(128, 4)),
    64: Config(Tiling(128, 3), Tiling(128, 3, turns=True), Tiling(128, 3)),
    96: Config(Tiling(128, 2), Tiling(64, 4), Tiling(64, 4)),
    128: Config(Tiling(128, 2), Tiling(64, 4, turns=True), Tiling(64, 2, turns=True)),
    256: Config(Tiling(64, 2), Tiling(32, 2), Tiling(32, 1)),
}


def best_config(problem: Problem) -> Config:
    """The configuration for a problem."""
    return TABLE[problem.H]
