"""Compound patterns: bands, single columns and rows, blocks and single pairs, one set of pairs.

A block mask must list every block that holds one pair, so scattered columns make it dense. Here
each grain is stored as what it is, and the positions of columns and rows are data: documents of
one batch have their own, and new ones do not recompile.
"""

import dataclasses
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from sparsax.layouts import INVALID, BlockPattern
from sparsax.typing import ArrayLike, known


@dataclasses.dataclass(frozen=True)
class Band:
    """Diagonals: the keys `i - left * dilation, ..., i + right * dilation` of query i.

    Each side is stated apart and counts steps of `dilation` tokens: `Band(256, 256)` is the window
    that Longformer's code calls 256 and its configuration on Hugging Face calls 512. A negative
    side leaves the query's own index out: `Band(7, -7)` is the one diagonal seven tokens back.
    """

    left: int
    right: int
    dilation: int = 1

    def __post_init__(self):
        if self.left + self.right < 0 or self.dilation < 1:
            raise ValueError(
                f"a band must have left >= -right and dilation >= 1; got left={self.left}, "
                f"right={self.right}, dilation={self.dilation}. Band(o, -o) is one diagonal."
            )

    def holds(self, gap: ArrayLike) -> ArrayLike:
        """True where a pair with `gap` = key index - query index lies in the band."""
        step = gap // self.dilation
        return (gap % self.dilation == 0) & (step >= -self.left) & (step <= self.right)

    def clip(self, seq_len: int, causal: bool) -> "Band | None":
        """The band without the diagonals that no pair of the sequence has; None if none is left."""
        reach = (seq_len - 1) // self.dilation
        left, right = min(self.left, reach), min(self.right, 0 if causal else reach)
        return Band(left, right, self.dilation) if left + right >= 0 else None


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CompoundPattern:
    """Which tokens of a sequence attend to which, as a union of parts of different grain.

    A pair counts once, however many parts hold it and however often a position was given. Build
    one with `from_parts` or a constructor of `sparsax.patterns.compound`. Stacked patterns carry
    leading axes `*L` on every array and go through `jax.lax.scan` and `jax.vmap` as data.

    Attributes:
        columns: keys that all queries see, ascending and distinct, int32 `[*L, B, G]`; past the
            count: unspecified, within the sequence. B may be 1: the same for the whole batch.
        num_columns: used entries of `columns`, int32 `[*L, B]`; negative marks a sample whose
            attention is NaN.
        rows: queries that see all keys (global rows), as `columns`, int32 `[*L, B, R]`.
        num_rows: used entries of `rows`, int32 `[*L, B]`.
        token_mask: False where a token is padding, bool `[*L, B, T]`, or None. Padding is seen by
            no query, and its own rows are zero.
        blocks: blocks whose pairs all attend, or None.
        elements: single pairs, a `BlockPattern` with blocks of one token, or None.
        bands: the diagonals, static.
        seq_len: number of tokens T.
        causal: whether a token sees only itself and what came before, global rows included.

    Example:
        >>> import numpy as np
        >>> import sparsax
        >>> pattern = sparsax.CompoundPattern.from_parts(
        ...     8, bands=[sparsax.Band(1, 0)], columns=np.array([[5, 2, 5]]), causal=True
        ... )
        >>> pattern.columns[:, :2].tolist(), pattern.num_columns.tolist()
        ([[2, 5]], [2])
        >>> pattern.to_mask()[0, 0].sum(-1).tolist()
        [1, 2, 2, 2, 3, 3, 3, 4]
    """

    columns: Int[Array, "*L B G"]
    num_columns: Int[Array, "*L B"]
    rows: Int[Array, "*L B R"]
    num_rows: Int[Array, "*L B"]
    token_mask: Bool[Array, "*L B T"] | None
    blocks: BlockPattern | None
    elements: BlockPattern | None
    bands: tuple[Band, ...] = dataclasses.field(metadata={"static": True})
    seq_len: int = dataclasses.field(metadata={"static": True})
    causal: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_parts(
        cls,
        seq_len: int,
        *,
        bands: Sequence[Band] = (),
        columns: Int[ArrayLike, "*L B G"] | None = None,
        num_columns: Int[ArrayLike, "*L B"] | None = None,
        rows: Int[ArrayLike, "*L B R"] | None = None,
        num_rows: Int[ArrayLike, "*L B"] | None = None,
        blocks: BlockPattern | None = None,
        elements: BlockPattern | None = None,
        token_mask: Bool[ArrayLike, "*L B T"] | None = None,
        causal: bool = False,
    ) -> "CompoundPattern":
        """The pattern that is the union of the given parts.

        Args:
            seq_len: number of tokens T.
            bands: diagonals; what causality or the length leaves empty is dropped.
            columns: keys that all queries see, in any order, `[*L, B, G]`. G is the capacity.
            num_columns: how many entries of each list are used; None means all.
            rows: queries that see all keys, `[*L, B, R]`.
            num_rows: how many entries of each list are used; None means all.
            blocks: blocks whose pairs all attend.
            elements: single pairs (`patterns.compound.element_lists` makes them).
            token_mask: False where a token is padding.
            causal: whether a token sees only itself and what came before.

        Returns:
            The pattern. Under `jax.jit`, positions outside the sequence or counts outside the
            capacity mark their sample invalid, and attention answers NaN for it.

        Raises:
            ValueError: shapes or lengths do not fit, or concrete positions or counts are outside.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1; got {seq_len}.")
        for name, part in (("blocks", blocks), ("elements", elements)):
            if part is not None and (part.q_len, part.kv_len) != (seq_len, seq_len):
                raise ValueError(
                    f"{name} must be for q_len = kv_len = seq_len={seq_len}; "
                    f"got q_len={part.q_len}, kv_len={part.kv_len}."
                )
        if elements is not None and (elements.block_q, elements.block_kv) != (1, 1):
            raise ValueError(
                "elements must have blocks of one token (see patterns.compound.element_lists); "
                f"got {elements.block_q} x {elements.block_kv}."
            )
        if token_mask is not None and (
            token_mask.dtype != bool or token_mask.ndim < 2 or token_mask.shape[-1] != seq_len
        ):
            raise ValueError(
                f"token_mask must be boolean [*L, B, T={seq_len}], False where padding; "
                f"got {token_mask.dtype} {tuple(token_mask.shape)}."
            )
        clipped = (band.clip(seq_len, causal) for band in bands)
        return cls(
            *_distinct("columns", columns, num_columns, seq_len),
            *_distinct("rows", rows, num_rows, seq_len),
            None if token_mask is None else jnp.asarray(token_mask), blocks, elements,
            bands=tuple(dict.fromkeys(band for band in clipped if band is not None)),
            seq_len=seq_len, causal=causal,
        )  # fmt: skip

    @property
    def batch(self) -> int:
        """B: 1 when all samples share the pattern."""
        masked = 1 if self.token_mask is None else self.token_mask.shape[-2]
        return max(self.columns.shape[-2], self.rows.shape[-2], masked)

    @property
    def num_heads(self) -> int:
        """P, of blocks and elements: 1 when all heads share the pattern."""
        return max(1 if p is None else p.num_heads for p in (self.blocks, self.elements))

    def valid(self) -> Bool[Array, "*L B P"]:
        """False where a position or count was outside, or a list overflowed."""
        good = (self.num_columns >= 0) & (self.num_rows >= 0)
        good = good[..., None]
        for part in (self.blocks, self.elements):
            good = good if part is None else good & part.valid()[..., None, :]
        return good

    def is_row(self) -> Bool[Array, "*L B T"]:
        """True for the queries that see all keys."""
        return _members(self.rows, self.num_rows, self.seq_len)

    def is_column(self) -> Bool[Array, "*L B T"]:
        """True for the keys that all queries see."""
        return _members(self.columns, self.num_columns, self.seq_len)

    def take_rows(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B R ..."]:
        """What `x` holds at the global rows, in the order of `rows`; zeros in unused slots.

        `q_global` of `sparsax.compound_attention` is a projection of this.
        """
        take = lambda x, i: x.at[i].get(mode="fill", fill_value=0, unique_indices=True)
        return jax.vmap(take)(x, slots(self.rows, self.num_rows, self.seq_len, len(x)))

    def put_rows(
        self, x: Shaped[Array, "B T ..."], values: Shaped[Array, "B R ..."]
    ) -> Shaped[Array, "B T ..."]:
        """`x` with its global rows replaced by `values [B, R, ...]`, in the order of `rows`."""
        put = lambda x, i, y: x.at[i].set(y, mode="drop", unique_indices=True)
        return jax.vmap(put)(x, slots(self.rows, self.num_rows, self.seq_len, len(x)), values)

    def part_masks(self) -> dict[str, Bool[Array, "..."]]:
        """The element mask `[*L, B or 1, P or 1, T, T]` of every part, in the order of ownership.

        A pair that several parts hold belongs to the first of them: global rows are computed
        apart, blocks own whole tiles, and the finer a part, the cheaper it leaves a pair out.
        Dense: for tests and pictures.
        """
        t = np.arange(self.seq_len)
        gap = t - t[:, None]
        masks = {"rows": self.is_row()[..., None, :, None]}
        if self.blocks is not None:
            masks["blocks"] = self.blocks.to_mask()[..., None, :, :, :]
        if self.bands:
            in_band = np.any([band.holds(gap) for band in self.bands], axis=0)
            masks["bands"] = jnp.asarray(in_band)[None, None]
        masks["columns"] = self.is_column()[..., None, None, :]
        if self.elements is not None:
            masks["elements"] = self.elements.to_mask()[..., None, :, :, :]
        allowed = jnp.asarray(gap <= 0 if self.causal else np.ones_like(gap, bool))
        if self.token_mask is not None:
            real = self.token_mask
            allowed = allowed & (real[..., :, None] & real[..., None, :])[..., None, :, :]
        return {name: mask & allowed for name, mask in masks.items()}

    def to_mask(self) -> Bool[Array, "*L B P T T"]:
        """The element mask, True where a pair attends. Dense: for tests and pictures."""
        total = jnp.zeros((self.batch, self.num_heads, self.seq_len, self.seq_len), bool)
        for mask in self.part_masks().values():
            total = total | mask
        return total


def positions(
    chosen: Bool[ArrayLike, "*L B T"], capacity: int | None = None
) -> tuple[Int[Array, "*L B G"], Int[Array, "*L B"]]:
    """Positions and counts of the True entries: a mask of global tokens as `from_parts` takes it.

    Args:
        chosen: True for the tokens to list.
        capacity: length G of the lists; None means T. Under `jax.jit`, more True entries than the
            capacity leave a count above it, which `from_parts` marks invalid.

    Raises:
        ValueError: concrete entries exceed the capacity.

    Example:
        >>> import numpy as np
        >>> import sparsax
        >>> lists = sparsax.compound.positions(np.array([[False, True, False, True]]), capacity=2)
        >>> [x.tolist() for x in lists]
        [[[1, 3]], [2]]
    """
    capacity = chosen.shape[-1] if capacity is None else capacity
    counts = chosen.sum(-1, dtype=np.int32)
    if known(lambda n: n <= capacity, counts) is False:
        raise ValueError(
            f"capacity must hold the longest list, {int(counts.max())} tokens; got {capacity}."
        )
    order = jnp.argsort(~jnp.asarray(chosen), axis=-1, stable=True)  # True first, ascending
    return order[..., :capacity].astype(jnp.int32), jnp.asarray(counts)


def slots(
    listed: Int[Array, "B G"], counts: Int[Array, " B"], seq_len: int, batch: int
) -> Int[Array, "batch G"]:
    """Where to gather and scatter a list: unused slots lie outside, and no two are the same.

    So they read zeros, write nothing, and a scatter needs no atomics.
    """
    place = jnp.arange(listed.shape[-1])
    found = jnp.where(place < counts[..., None], listed, seq_len + place)
    return jnp.broadcast_to(found, (batch, listed.shape[-1]))


def _distinct(name, listed, counts, seq_len):
    """Ascending distinct positions `[*L, B, G]` and their counts, INVALID where they are wrong."""
    if listed is None:
        return jnp.zeros((1, 0), jnp.int32), jnp.zeros((1,), jnp.int32)
    capacity = listed.shape[-1] if listed.ndim else 0
    counts = np.full(listed.shape[:-1], capacity) if counts is None else counts
    if listed.ndim < 2 or counts.shape != listed.shape[:-1]:
        raise ValueError(
            f"{name} must be [*L, B, G] and num_{name} [*L, B]; "
            f"got {tuple(listed.shape)} and {tuple(counts.shape)}."
        )

    def well_formed(listed, counts):
        inside = (listed >= 0) & (listed < seq_len)
        unused = jnp.arange(capacity) >= counts[..., None]
        return (inside | unused).all(-1) & (counts >= 0) & (counts <= capacity)

    if known(well_formed, listed, counts) is False:
        raise ValueError(
            f"{name} must lie within [0, {seq_len}) and num_{name} within [0, {capacity}]; got "
            f"{np.asarray(listed).tolist()} and {np.asarray(counts).tolist()}."
        )
    good = well_formed(listed, counts)
    used = jnp.arange(capacity) < counts[..., None]
    # Unused entries sort behind every token; a repeated one becomes unused and sorts again.
    tokens = jnp.sort(jnp.where(used, listed, seq_len), axis=-1)
    repeated = jnp.diff(tokens, axis=-1, prepend=-1) == 0
    tokens = jnp.sort(jnp.where(repeated, seq_len, tokens), axis=-1)
    counts = jnp.where(good, (tokens < seq_len).sum(-1), INVALID)
    return jnp.where(tokens < seq_len, tokens, 0).astype(jnp.int32), counts.astype(jnp.int32)


def _members(listed, counts, size) -> Array:
    used = jnp.arange(listed.shape[-1]) < counts[..., None]
    mask = jnp.zeros((*listed.shape[:-1], size + 1), bool)
    spill = jnp.where(used, listed, size)  # unused entries land in one extra column
    return jnp.put_along_axis(mask, spill, True, axis=-1, inplace=False)[..., :size]
