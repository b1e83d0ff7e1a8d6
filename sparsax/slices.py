"""How a compound pattern is sliced: which part is computed how, and what that costs."""

import dataclasses

import numpy as np

from sparsax.compound import CompoundPattern
from sparsax.typing import is_concrete

HOW = {
    "rows": "gathered queries, dense",
    "blocks": "listed blocks",
    "bands, full tiles": "no mask",
    "bands, edge tiles": "masked by index",
    "columns": "gathered keys",
    "elements": "keys gathered for each query tile, bitmap",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One part of a plan; all costs are those of the forward pass of one sample and one head.

    Attributes:
        part: which part.
        tiles: tiles of `block_q x block_kv` pairs, averaged over samples and heads.
        flops: of both matmuls.
        bytes: of keys and values, read once for every tile of queries that meets them.
    """

    part: str
    tiles: float
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class SlicePlan:
    """The slices of a pattern, beside what the alternatives would compute.

    Attributes:
        slices: parts that have tiles.
        dense_tiles: tiles of dense attention.
        block_mask_tiles: tiles that hold a pair: what any block mask of that size must compute.
    """

    slices: tuple[Slice, ...]
    dense_tiles: int
    block_mask_tiles: float

    @property
    def tiles(self) -> float:
        """Tiles of all slices."""
        return sum(part.tiles for part in self.slices)

    def __str__(self) -> str:
        lines = [f"{'part':18s} {'tiles':>9s} {'of dense':>8s} {'MFLOP':>9s} {'MiB':>8s}"]
        for part in self.slices:
            lines.append(
                f"{part.part:18s} {part.tiles:9.1f} {part.tiles / self.dense_tiles:8.3f} "
                f"{part.flops / 1e6:9.1f} {part.bytes / 2**20:8.2f}  {HOW[part.part]}"
            )
        for name, tiles in (("sliced", self.tiles), ("block mask", self.block_mask_tiles)):
            lines.append(f"{name:18s} {tiles:9.1f} {tiles / self.dense_tiles:8.3f}")
        return "\n".join(lines)


def slice_plan(
    pattern: CompoundPattern,
    *,
    head_dim: int = 64,
    block_q: int = 64,
    block_kv: int = 64,
    itemsize: int = 2,
) -> SlicePlan:
    """Which part of a pattern goes where, and its tiles, FLOPs and bytes.

    Tiles are counted as a kernel with tiles of `block_q x block_kv` computes them. A tile that
    several parts touch counts in each: its pairs are masked, not its work.

    Args:
        pattern: a single pattern, with values.
        head_dim: features H of a head.
        block_q: queries of a tile.
        block_kv: keys of a tile.
        itemsize: bytes of a number.

    Raises:
        ValueError: the pattern is traced, stacked or not valid.

    Source: Li et al., "A Slice and Dice Approach to Accelerate Compound Sparse Attention on GPU"
    (IISWC 2022).

    Example:
        >>> import numpy as np
        >>> import sparsax
        >>> starts = np.random.default_rng(0).choice(4096, 64, replace=False)[None]
        >>> pattern = sparsax.patterns.compound.longformer(4096, window=256, positions=starts)
        >>> plan = sparsax.slice_plan(pattern)
        >>> round(plan.tiles / plan.dense_tiles, 3)
        0.167
        >>> plan.block_mask_tiles / plan.dense_tiles > 0.8
        True
    """
    if not is_concrete(pattern.rows) or pattern.num_rows.ndim != 1 or not pattern.valid().all():
        raise ValueError(
            "slice_plan needs a single, valid pattern with values, outside jax.jit; got "
            f"{pattern.rows} of {pattern.num_rows}."
        )
    grid = _Grid(pattern.seq_len, block_q, block_kv)
    full, edge = np.sum([(0, 0), *(_band(pattern, band, grid) for band in pattern.bands)], axis=0)
    counts = {
        "rows": np.ceil(np.asarray(pattern.num_rows) / block_q).mean() * grid.num_kv,
        "blocks": _blocks(pattern, grid).mean(0).sum() if pattern.blocks is not None else 0,
        "bands, full tiles": full,
        "bands, edge tiles": edge,
        "columns": _columns(pattern, grid),
        "elements": _elements(pattern, grid),
    }
    slices = tuple(
        Slice(part, float(tiles), 4.0 * tiles * block_q * block_kv * head_dim,
              2.0 * tiles * block_kv * head_dim * itemsize)
        for part, tiles in counts.items() if tiles
    )  # fmt: skip
    return SlicePlan(slices, grid.num_q * grid.num_kv, float(_touched(pattern, grid)))


class _Grid:
    """Tokens cut into tiles, with the first and last index of each."""

    def __init__(self, length, block_q, block_kv):
        self.block_q, self.block_kv = block_q, block_kv
        self.num_q, self.num_kv = -(-length // block_q), -(-length // block_kv)
        self.first_q = (np.arange(self.num_q) * block_q)[:, None]
        self.last_q = np.minimum(self.first_q + block_q, length) - 1
        self.first_kv = np.arange(self.num_kv) * block_kv
        self.last_kv = np.minimum(self.first_kv + block_kv, length) - 1


def _band(pattern, band, whole):
    """Full and edge tiles of a band, in the order of its residue classes."""
    grid = _Grid(-(-pattern.seq_len // band.dilation), whole.block_q, whole.block_kv)
    low, high = grid.first_kv - grid.last_q, grid.last_kv - grid.first_q  # gaps within a tile
    touched = (high >= -band.left) & (low <= band.right)
    inside = (low >= -band.left) & (high <= band.right)
    inside &= grid.last_kv - grid.first_kv + 1 == grid.block_kv  # the ragged tail is masked
    return band.dilation * inside.sum(), band.dilation * (touched & ~inside).sum()


def _blocks(pattern, grid):
    """Share of every tile that listed blocks fill, `[P, I, J]` in the pattern's own blocks."""
    blocks = pattern.blocks
    mask = np.asarray(blocks.to_block_mask())
    if pattern.causal:
        rows = (np.arange(blocks.num_q_blocks) + 1)[:, None] * blocks.block_q
        mask = mask & (np.arange(blocks.num_kv_blocks) * blocks.block_kv < rows)
    return mask * (blocks.block_q * blocks.block_kv / (grid.block_q * grid.block_kv))


def _columns(pattern, grid):
    """Packed tiles of a sample; causal rows stop at the first tile that starts behind them."""
    columns, counts = np.asarray(pattern.columns), np.asarray(pattern.num_columns)
    starts = np.arange(0, columns.shape[-1], grid.block_kv)
    used = starts < counts[:, None]
    if not pattern.causal:
        return grid.num_q * used.sum(-1).mean()
    seen = columns[:, starts] <= grid.last_q[:, :, None]  # I B tiles
    return (seen & used).sum((0, 2)).mean()


def _elements(pattern, grid):
    if pattern.elements is None:
        return 0
    counts, lists = (
        np.asarray(x) for x in (pattern.elements.kv_num_blocks, pattern.elements.kv_indices)
    )
    used = np.arange(lists.shape[-1]) < counts[..., None]
    tiles = 0
    for head in range(len(lists)):
        for first in grid.first_q[:, 0]:
            lines = slice(first, first + grid.block_q)
            union = np.unique(lists[head, lines][used[head, lines]])
            tiles += -(-len(union) // grid.block_kv)
    return tiles / len(lists)


def _touched(pattern, grid):
    """Tiles that hold a pair, averaged over samples and heads; no `[T, T]` array is made."""
    low, high = grid.first_kv - grid.last_q, grid.last_kv - grid.first_q
    mask = np.zeros((1, 1, grid.num_q, grid.num_kv), bool)
    for band in pattern.bands:
        # A tile's gaps are an interval: does it hold a multiple of the dilation within the band?
        least = np.maximum(-(-low // band.dilation), -band.left)
        mask = mask | (np.minimum(high // band.dilation, band.right) >= least)
    mask = mask | _occupied(pattern.is_column(), grid.block_kv)[:, None, None, :]
    mask = mask | _occupied(pattern.is_row(), grid.block_q)[:, None, :, None]
    for part in (pattern.blocks, pattern.elements):
        mask = mask if part is None else mask | _listed(part, pattern.causal, grid)
    if pattern.causal:
        mask = mask & (low <= 0)
    return mask.sum((-2, -1)).mean()


def _listed(part, causal, grid):
    """Tiles `[P, I, J]` that meet a listed block, whose size need not be theirs."""
    used = np.arange(part.kv_indices.shape[-1]) < np.asarray(part.kv_num_blocks)[..., None]
    head, i, slot = np.nonzero(used)
    j = np.asarray(part.kv_indices)[head, i, slot]
    found = np.zeros((part.num_heads, grid.num_q, grid.num_kv), bool)
    # Steps of at most a tile, and the last token, leave out no tile that a block reaches into.
    for a in {*range(0, part.block_q, grid.block_q), part.block_q - 1}:
        for b in {*range(0, part.block_kv, grid.block_kv), part.block_kv - 1}:
            q = np.minimum((i * part.block_q + a) // grid.block_q, grid.num_q - 1)
            kv = np.minimum((j * part.block_kv + b) // grid.block_kv, grid.num_kv - 1)
            last_q = np.minimum((q + 1) * grid.block_q, (i + 1) * part.block_q) - 1
            first_kv = np.maximum(kv * grid.block_kv, j * part.block_kv)
            seen = first_kv <= last_q if causal else np.full(q.shape, True)
            found[head[seen], q[seen], kv[seen]] = True
    return found


def _occupied(chosen, block):
    chosen = np.asarray(chosen)
    chosen = np.pad(chosen, ((0, 0), (0, -chosen.shape[-1] % block)))
    return chosen.reshape(len(chosen), -1, block).any(-1)
