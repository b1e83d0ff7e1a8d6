"""Patterns that follow from lengths alone.

All take the lengths in tokens and `block`, one int or `(block_q, block_kv)`, and list every block
that holds at least one pair of the pattern they name. Combine them with `|` and `&`.
"""

from collections.abc import Sequence

import numpy as np

from sparsax.layouts import BlockPattern, check_blocks

Block = int | tuple[int, int]


def full(q_len: int, kv_len: int | None = None, *, block: Block = 64) -> BlockPattern:
    """Every block: dense attention through the sparse path."""
    grid = _Grid(q_len, kv_len, block)
    return grid.pattern(np.ones((grid.num_q, grid.num_kv), bool))


def causal(q_len: int, kv_len: int | None = None, *, block: Block = 64) -> BlockPattern:
    """Blocks that hold a key of the query's own index or below.

    `block_sparse_attention(..., causal=True)` masks the pairs within the blocks on the diagonal.
    """
    return sliding_window(q_len, kv_len, left=None, right=0, block=block)


def diagonal(q_len: int, kv_len: int | None = None, *, block: Block = 64) -> BlockPattern:
    """Blocks that hold a query's own index."""
    return sliding_window(q_len, kv_len, left=0, right=0, block=block)


def sliding_window(
    q_len: int,
    kv_len: int | None = None,
    *,
    left: int | None,
    right: int | None,
    block: Block = 64,
) -> BlockPattern:
    """Blocks that hold a key from `left` tokens before to `right` tokens after the query.

    Each side is stated apart: `left=w, right=0` is one-sided, `left=w, right=w` two-sided with
    `2 w + 1` keys. None sets no limit. Pass `window=(left, right)` to the attention as well for
    exactly these keys; without it, whole blocks attend.

    Raises:
        ValueError: a side is negative, or block and lengths do not fit.

    Example:
        >>> from sparsax import patterns
        >>> patterns.sliding_window(256, left=64, right=0, block=64).kv_num_blocks.tolist()
        [[1, 2, 2, 2]]
    """
    for name, side in (("left", left), ("right", right)):
        if side is not None and side < 0:
            raise ValueError(f"{name} must be None or at least 0 tokens; got {side}.")
    grid = _Grid(q_len, kv_len, block)
    mask = np.ones((grid.num_q, grid.num_kv), bool)
    if left is not None:
        mask &= grid.last_key >= grid.first_query - left
    if right is not None:
        mask &= grid.first_key <= grid.last_query + right
    return grid.pattern(mask)


def dilated(
    q_len: int, kv_len: int | None = None, *, window: int, dilation: int, block: int = 64
) -> BlockPattern:
    """Every `dilation`-th block within `window` blocks of the diagonal, on both sides.

    Dilation counts blocks, not tokens: a gap smaller than a block would leave every block listed.

    Args:
        q_len: number of queries.
        kv_len: number of keys; `q_len` when None.
        window: listed blocks on each side of the diagonal.
        dilation: distance between listed blocks, 1 for an ordinary window.
        block: tokens in a block, for queries and keys alike.
    """
    if window < 0 or dilation < 1:
        raise ValueError(
            f"window must be at least 0 and dilation at least 1 block; got {window} and {dilation}."
        )
    grid = _Grid(q_len, kv_len, block)
    gap = np.arange(grid.num_kv) - np.arange(grid.num_q)[:, None]
    return grid.pattern((gap % dilation == 0) & (abs(gap) <= window * dilation))


def global_tokens(
    q_len: int,
    kv_len: int | None = None,
    *,
    positions: Sequence[int],
    rows: bool = True,
    columns: bool = True,
    block: Block = 64,
) -> BlockPattern:
    """Blocks of tokens that attend to every token (`rows`) and that every token sees (`columns`).

    Raises:
        ValueError: a position is outside the lengths, or neither rows nor columns are asked for.
    """
    grid = _Grid(q_len, kv_len, block)
    most = min(grid.q_len if rows else grid.kv_len, grid.kv_len if columns else grid.q_len)
    if not (rows or columns) or any(not 0 <= p < most for p in positions):
        raise ValueError(
            f"positions must lie within [0, {most}) and rows or columns be True; "
            f"got {list(positions)}, rows={rows}, columns={columns}."
        )
    mask = np.zeros((grid.num_q, grid.num_kv), bool)
    tokens = np.asarray(positions, int)
    if rows:
        mask[tokens // grid.block_q] = True
    if columns:
        mask[:, tokens // grid.block_kv] = True
    return grid.pattern(mask)


def random(
    q_len: int,
    kv_len: int | None = None,
    *,
    blocks_per_row: int,
    heads: int = 1,
    within: BlockPattern | None = None,
    seed: int = 0,
    block: Block = 64,
) -> BlockPattern:
    """`blocks_per_row` distinct blocks of every query block, drawn uniformly.

    Args:
        q_len: number of queries.
        kv_len: number of keys; `q_len` when None.
        blocks_per_row: blocks drawn in each row; a row of `within` with fewer keeps them all.
        heads: pattern heads P, each with its own draw.
        within: draw among the blocks of this pattern only, e.g. `causal(...)`.
        seed: of the draw; equal seeds give equal patterns.
        block: tokens in a block.
    """
    grid = _Grid(q_len, kv_len, block)
    if not 1 <= blocks_per_row <= grid.num_kv or heads < 1:
        raise ValueError(
            f"blocks_per_row must lie within [1, {grid.num_kv}] and heads be at least 1; "
            f"got {blocks_per_row} and {heads}."
        )
    draw = np.random.default_rng(seed).random((heads, grid.num_q, grid.num_kv))
    if within is not None:
        draw = np.where(np.asarray(within.to_block_mask()), draw, -1.0)
    # The largest draws of a row are a uniform sample without repetition.
    rank = np.argsort(np.argsort(-draw, axis=-1, stable=True), axis=-1, stable=True)
    return grid.pattern((rank < blocks_per_row) & (draw >= 0))


def bigbird(
    q_len: int,
    kv_len: int | None = None,
    *,
    window_blocks: int = 3,
    global_blocks: int | tuple[int, int] = 2,
    random_blocks: int = 3,
    heads: int = 1,
    seed: int = 0,
    block: Block = 64,
) -> BlockPattern:
    """Window, global and random blocks together.

    Args:
        q_len: number of queries.
        kv_len: number of keys; `q_len` when None.
        window_blocks: blocks of the window centred on the diagonal, an odd number.
        global_blocks: blocks at the start that see, and are seen by, all; or the pair of how many
            at the start and how many at the end.
        random_blocks: further blocks of every row, drawn among the others.
        heads: pattern heads P, each with its own random blocks.
        seed: of the draw.
        block: tokens in a block.

    Source: Zaheer et al., "Big Bird: Transformers for Longer Sequences" (NeurIPS 2020), section 2.
    """
    grid = _Grid(q_len, kv_len, block)
    first, last = (global_blocks, 0) if isinstance(global_blocks, int) else global_blocks
    if window_blocks < 1 or window_blocks % 2 == 0 or min(first, last, random_blocks) < 0:
        raise ValueError(
            "window_blocks must be odd and positive, global_blocks and random_blocks at least 0; "
            f"got {window_blocks}, {global_blocks}, {random_blocks}."
        )
    rows, cols = np.arange(grid.num_q)[:, None], np.arange(grid.num_kv)
    mask = abs(cols - rows) <= window_blocks // 2
    mask |= (rows < first) | (cols < first)
    mask |= (rows >= grid.num_q - last) | (cols >= grid.num_kv - last)
    pattern = grid.pattern(np.broadcast_to(mask, (heads, *mask.shape)))
    if random_blocks == 0:
        return pattern
    blocks = min(random_blocks, grid.num_kv)
    others = grid.pattern(~mask)
    return pattern | random(
        q_len, kv_len, blocks_per_row=blocks, heads=heads, within=others, seed=seed, block=block
    )


def vertical_slash(
    q_len: int,
    kv_len: int | None = None,
    *,
    columns: Sequence[int],
    offsets: Sequence[int],
    block: Block = 64,
) -> BlockPattern:
    """Blocks on vertical lines at key positions and on diagonals at token offsets.

    Args:
        q_len: number of queries.
        kv_len: number of keys; `q_len` when None.
        columns: key positions that every query sees.
        offsets: distances `query - key`, in tokens, that every query sees; 0 is the diagonal.
        block: tokens in a block.

    Source: Jiang et al., "MInference 1.0" (NeurIPS 2024), section 3.2.
    """
    grid = _Grid(q_len, kv_len, block)
    if any(not 0 <= c < grid.kv_len for c in columns):
        raise ValueError(f"columns must lie within [0, {grid.kv_len}); got {list(columns)}.")
    mask = np.zeros((grid.num_q, grid.num_kv), bool)
    mask[:, np.asarray(columns, int) // grid.block_kv] = True
    for offset in offsets:
        mask |= (grid.last_key >= grid.first_query - offset) & (
            grid.first_key <= grid.last_query - offset
        )
    return grid.pattern(mask)


class _Grid:
    """Lengths cut into blocks, with the token indices at which blocks start and end."""

    def __init__(self, q_len: int, kv_len: int | None, block: Block):
        self.q_len, self.kv_len = q_len, q_len if kv_len is None else kv_len
        self.block_q, self.block_kv = (block, block) if isinstance(block, int) else block
        sizes = self.q_len, self.kv_len, self.block_q, self.block_kv
        self.num_q, self.num_kv = check_blocks(*sizes)
        self.first_query = (np.arange(self.num_q) * self.block_q)[:, None]
        self.last_query = np.minimum(self.first_query + self.block_q, self.q_len) - 1
        self.first_key = np.arange(self.num_kv) * self.block_kv
        self.last_key = np.minimum(self.first_key + self.block_kv, self.kv_len) - 1

    def pattern(self, mask: np.ndarray) -> BlockPattern:
        return BlockPattern.from_block_mask(
            mask, q_len=self.q_len, kv_len=self.kv_len, block_q=self.block_q,
            block_kv=self.block_kv,
        )  # fmt: skip
