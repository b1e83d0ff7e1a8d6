"""Which tiles and how many slots each kernel uses, found by measurement on an H200."""

import dataclasses
from typing import Any

from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel uses shared memory, and whether its warpgroups take turns.

    `tile` columns of a tile, `stages` slots of the ring that holds them, `row_slots` for what a row
    tile keeps: with two of them, the next row tile arrives beside the work on this one.
    """

    tile: int
    stages: int
    turns: bool = False
    row_slots: int = 1

    @property
    def keywords(self) -> dict[str, Any]:
        """As a kernel takes them."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ForwardTiling(Tiling):
    """The same of the forward kernel; `teams` of two warpgroups do row tiles of their own.

    Two teams hide each other's waits, and have half the registers each.
    """

    teams: int = 1

    def __post_init__(self):
        if self.stages < 2:
            raise ValueError(f"values of two tiles are held at once; got stages={self.stages}")
        if self.turns and self.teams > 1:
            raise ValueError(f"warpgroups take turns in one team; got {self.teams} teams")


@dataclasses.dataclass(frozen=True)
class KeyTiling(Tiling):
    """The same of the kernel of dK and dV.

    `early` is what it reads of a tile's vectors beforehand. 0: nothing before the product is done
    that wants it. 1: lse, while the first product runs. 2: ids, too, and delta before the
    exponentials. What is read early waits in registers. Results leave by way of two `spaces` in
    shared memory, or one after the other by way of one.
    """

    early: int = 0
    spaces: int = 2

    def __post_init__(self):
        if self.early not in (0, 1, 2):
            raise ValueError(f"early must be 0, 1 or 2; got {self.early}")
        if self.spaces not in (1, 2):
            raise ValueError(f"spaces must be 1 or 2; got {self.spaces}")


@dataclasses.dataclass(frozen=True)
class Config:
    """One tiling for each kernel."""

    forward: ForwardTiling
    dq: Tiling
    dkv: KeyTiling


# By head dim: what fits in 227 KiB of shared memory. 64 and 128: by time on an H200, from
# `benchmarks/tune_attention_gpu.py`; `tests/test_tuned.py` says what of them was not timed
# since the kernels changed. The others spill next to nothing, and were not timed.
TABLE = {
    32: Config(ForwardTiling(128, 4), Tiling(128, 4), KeyTiling(128, 4)),
    64: Config(
        ForwardTiling(64, 3, row_slots=2, teams=2),
        Tiling(128, 3, row_slots=2),
        KeyTiling(128, 3, row_slots=2),
    ),
    96: Config(ForwardTiling(128, 2), Tiling(64, 4), KeyTiling(64, 4, early=2)),
    128: Config(
        ForwardTiling(128, 2, row_slots=2),
        Tiling(64, 3, row_slots=2),
        KeyTiling(64, 4, early=1, spaces=1),
    ),
    256: Config(ForwardTiling(64, 2), Tiling(32, 2), KeyTiling(32, 1, spaces=1)),
}

# Where tiles may need a mask: it wants registers, and what spills is up to three times as slow.
MASKED = TABLE | {
    64: Config(
        ForwardTiling(128, 3, row_slots=2),
        Tiling(64, 6, row_slots=2),
        KeyTiling(64, 6, row_slots=2, early=2),
    ),
    128: Config(
        ForwardTiling(128, 2, turns=True, row_slots=2),
        Tiling(64, 3, row_slots=2),
        KeyTiling(64, 2, turns=True, early=1),
    ),
}

# Where row tiles are of several blocks, and lists alone, but for the ends of sequences, say which
# of their pairs attend. Timed with blocks of 64.
SMALL = MASKED | {
    64: Config(ForwardTiling(128, 3), Tiling(128, 3, turns=True), MASKED[64].dkv),
    128: Config(
        ForwardTiling(128, 2, row_slots=2), Tiling(64, 3), KeyTiling(64, 3, early=2, spaces=1)
    ),
}

# Where places say which pairs attend, as in compound attention: short lists, most tiles masked.
PLACED = MASKED | {
    96: Config(ForwardTiling(128, 2), Tiling(64, 4), KeyTiling(64, 4)),
    128: dataclasses.replace(MASKED[128], dkv=KeyTiling(64, 2)),
}

# Where one comparison with places does, and tiles of global rows need none: other masks find no
# registers beside those of another team.
RANGED = PLACED | {
    64: dataclasses.replace(PLACED[64], forward=ForwardTiling(64, 3, row_slots=2, teams=2)),
}

# Where codes say which pairs attend, as in top-L attention: the largest tiles whose masks leave
# registers enough, as the assembler tells it. Not timed.
CODED = {
    32: Config(ForwardTiling(128, 4), Tiling(64, 6), KeyTiling(128, 4)),
    64: Config(
        ForwardTiling(128, 3), Tiling(64, 6, row_slots=2), KeyTiling(64, 6, row_slots=2, early=2)
    ),
    96: Config(ForwardTiling(128, 3), Tiling(64, 4), KeyTiling(64, 4)),
    128: Config(ForwardTiling(64, 4, row_slots=2), Tiling(64, 3), KeyTiling(64, 2)),
}


def best_config(problem: Problem, masked: bool) -> Config:
    """The configuration for a problem."""
    if not masked:
        config = TABLE[problem.H]
        # A tile that gathers blocks masks those that are not there.
        gathers = config.forward.teams > 1 and problem.block_kv < config.forward.tile
        return MASKED[problem.H] if gathers else config
    if problem.rule is None:
        asked = problem.ids or (problem.left, problem.right) != (None, None)
        is_small = min(problem.block_q, problem.block_kv) < ROWS
        return (SMALL if is_small and not asked else MASKED)[problem.H]
    asked = problem.rows_ask and not problem.whole_rows
    return (RANGED if problem.rule.says_all and not asked else PLACED)[problem.H]
