"""What of a kernel may be chosen: its tiles, its slots, and what its warpgroups do in turn."""

import dataclasses
from typing import Any


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
