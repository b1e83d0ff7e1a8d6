"""Which tiling each kernel has, found by measurement on an H200."""

from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.block_sparse.tiling import Config, ForwardTiling, KeyTiling, Tiling

# By head dim: what fits in 227 KiB of shared memory, and takes the least time on an H200, by
# `benchmarks/tune_attention_gpu.py`; `tests/test_tuned.py` holds all but the last to its result.
TABLE = {
    32: Config(
        ForwardTiling(128, 4, row_slots=2),
        Tiling(128, 4, turns=True, row_slots=2),
        KeyTiling(128, 4, row_slots=2),
    ),
    64: Config(
        ForwardTiling(64, 3, row_slots=2, teams=2),
        Tiling(128, 3, row_slots=2),
        KeyTiling(128, 3, row_slots=2),
    ),
    96: Config(
        ForwardTiling(128, 2, turns=True), Tiling(64, 3, row_slots=2), KeyTiling(64, 4, early=2)
    ),
    128: Config(
        ForwardTiling(128, 2, row_slots=2),
        Tiling(64, 3, row_slots=2),
        KeyTiling(64, 4, early=1, spaces=1),
    ),
    256: Config(ForwardTiling(64, 2), Tiling(32, 3), KeyTiling(32, 2, early=2, spaces=1)),
}

# Where tiles may need a mask: it wants registers, and what spills is up to three times as slow.
MASKED = {
    32: Config(ForwardTiling(128, 6), Tiling(128, 4, turns=True), KeyTiling(128, 4, row_slots=2)),
    64: Config(
        ForwardTiling(128, 3, row_slots=2),
        Tiling(64, 6, turns=True, row_slots=2),
        KeyTiling(64, 6, row_slots=2, early=2),
    ),
    96: Config(ForwardTiling(128, 2), Tiling(64, 3, row_slots=2), KeyTiling(64, 4, early=2)),
    128: Config(
        ForwardTiling(128, 2, turns=True, row_slots=2),
        Tiling(64, 3, row_slots=2),
        KeyTiling(64, 2, turns=True, early=1),
    ),
    256: Config(ForwardTiling(64, 2), Tiling(32, 3), KeyTiling(32, 2, spaces=1)),
}

# Where row tiles are of several blocks, and lists alone, but for the ends of sequences, say which
# of their pairs attend. Timed with blocks of 64.
SMALL = {
    32: Config(
        ForwardTiling(128, 4, row_slots=2),
        Tiling(128, 4, turns=True, row_slots=2),
        KeyTiling(128, 4, row_slots=2),
    ),
    64: Config(
        ForwardTiling(128, 3), Tiling(128, 3, turns=True), KeyTiling(64, 6, row_slots=2, early=2)
    ),
    96: Config(ForwardTiling(128, 2), Tiling(64, 4, turns=True), KeyTiling(64, 4, early=2)),
    128: Config(
        ForwardTiling(128, 2, row_slots=2), Tiling(64, 3), KeyTiling(64, 3, early=2, spaces=1)
    ),
    256: Config(ForwardTiling(64, 2), Tiling(32, 3), KeyTiling(32, 2, early=2, spaces=1)),
}

# Where places say which pairs attend, as in compound attention: short lists, most tiles masked.
PLACED = {
    32: Config(
        ForwardTiling(128, 4),
        Tiling(128, 4, turns=True, row_slots=2),
        KeyTiling(64, 6, row_slots=2, early=2),
    ),
    64: Config(
        ForwardTiling(128, 3, row_slots=2),
        Tiling(64, 6, row_slots=2),
        KeyTiling(64, 6, row_slots=2, early=1),
    ),
    96: Config(
        ForwardTiling(64, 4, row_slots=2), Tiling(64, 4, turns=True), KeyTiling(64, 4, early=2)
    ),
    128: Config(
        ForwardTiling(128, 2, turns=True, row_slots=2), Tiling(64, 3), KeyTiling(64, 3, spaces=1)
    ),
    256: Config(ForwardTiling(64, 2), Tiling(32, 3), KeyTiling(32, 2, early=1, spaces=1)),
}

# Where one comparison with places does, and tiles of global rows need none: other masks find no
# registers beside those of another team.
RANGED = {
    32: Config(
        ForwardTiling(128, 4, row_slots=2),
        Tiling(128, 4, turns=True, row_slots=2),
        KeyTiling(64, 6, row_slots=2, early=2),
    ),
    64: Config(
        ForwardTiling(64, 3, row_slots=2, teams=2),
        Tiling(64, 6, row_slots=2),
        KeyTiling(64, 6, row_slots=2, early=2),
    ),
    96: Config(
        ForwardTiling(64, 4, row_slots=2), Tiling(64, 3, row_slots=2), KeyTiling(64, 4, early=1)
    ),
    128: Config(
        ForwardTiling(128, 2, row_slots=2), Tiling(64, 3, row_slots=2), KeyTiling(64, 3, spaces=1)
    ),
    256: Config(ForwardTiling(64, 2), Tiling(32, 3), KeyTiling(32, 2, early=2, spaces=1)),
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
