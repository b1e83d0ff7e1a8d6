"""Where keys and queries of a compound pattern stand, and what the kernels read of them.

Behind the sequence stand packed keys, a copy of those that all queries see, and the global rows'
own keys; and behind the queries the global rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsax.compound import CompoundPattern, slots
from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse.places import NOWHERE, PACKED, STRIDE, TAKEN, Places
from sparsax.pallas.block_sparse.problem import Problem, whole_tiles
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.listed import Listed

FEW = 512  # global rows that are compared with every token
BLOCK = 64  # columns of a list's entries, unless the pattern's blocks say otherwise


def rule_of(pattern: CompoundPattern, own: bool) -> Places | None:
    """Which pairs attend; None where the bits of the lists say so, as in block-sparse attention."""
    packed, masked = pattern.columns.shape[-1] > 0, pattern.token_mask is not None
    if not (pattern.bands or packed or masked or own or pattern.causal):
        return None
    bands = tuple((band.left, band.right) for band in pattern.bands)
    return Places(bands, pattern.causal, packed=packed, blocks=pattern.blocks is not None)


def problem_of(q, k, pattern: CompoundPattern, scale: float, own: bool = False) -> Problem:
    """What the kernels of this pattern are built for; `own`: global rows see keys of their own."""
    (batch, length, heads, features), kv_heads = q.shape, k.shape[2]
    blocks, capacity, rows = pattern.blocks, pattern.columns.shape[-1], pattern.rows.shape[-1]
    rule = rule_of(pattern, own and rows > 0)
    masked = pattern.causal or pattern.token_mask is not None
    return Problem(
        batch, length, length, heads, kv_heads, features,
        1 if blocks is None else blocks.num_heads, q.dtype,
        BLOCK if blocks is None else blocks.block_q, BLOCK if blocks is None else blocks.block_kv,
        scale, None, None, ids=rule is not None, rule=rule,
        samples=pattern.batch, packed=whole_tiles(capacity),
        rows=whole_tiles(rows), own=own and rows > 0,
        whole_rows=not masked and length % ROWS == 0,
    )  # fmt: skip


def mark_invalid(pattern: CompoundPattern, count):
    """Counts `[samples, P, R]`, below 0 where kernels must answer NaN."""
    return jnp.where(pattern.valid()[..., None], count, INVALID)


def poison(x: Problem, pattern: CompoundPattern):
    """NaN where a sample's head is not valid, else 0; `[samples, 1, N, 1]`."""
    good = jnp.repeat(pattern.valid(), x.N // pattern.num_heads, 1)
    return jnp.where(good, 0.0, jnp.nan)[:, None, :, None]


@dataclasses.dataclass(frozen=True)
class Keys:
    """The packed keys and the global rows of every sample."""

    problem: Problem
    pattern: CompoundPattern

    @property
    def listed_columns(self) -> Listed:
        """The keys that are packed."""
        return Listed(self.pattern.columns, self.pattern.num_columns)

    @property
    def listed_rows(self) -> Listed:
        """The global rows."""
        return Listed(self.pattern.rows, self.pattern.num_rows)

    @property
    def slots(self):
        """Where the packed keys stand, `[samples, packed]`, `T` and beyond where unused."""
        return self._slots(self.listed_columns, self.problem.packed)

    @property
    def row_slots(self):
        """Where the global rows stand, `[samples, rows]`, in the same way."""
        return self._slots(self.listed_rows, self.problem.rows)

    def _slots(self, listed: Listed, size: int):
        positions = jnp.pad(listed.positions, ((0, 0), (0, size - listed.positions.shape[-1])))
        return slots(positions, listed.counts, self.problem.T, self.problem.samples)

    @property
    def places(self):
        """What the rule reads of queries and of keys, `[B, 1, ids, positions]` each; or two None.

        Whole row tiles, and of keys one more of such that no query sees.
        """
        x = self.problem
        rule = rule_of(self.pattern, x.own)
        if rule is None:
            return None, None
        # NumPy, so that what is not data is a constant of the program.
        tokens = np.broadcast_to(np.arange(x.T, dtype=np.int32), (x.samples, x.T))
        tail = np.full((x.samples, -x.T % ROWS), NOWHERE, np.int32)
        marks = [tokens, tail]
        if x.packed:
            if self.pattern.blocks is not None:
                marks[0] = jnp.where(self.pattern.is_column(), tokens + TAKEN, tokens)
            marks.append(jnp.where(self.slots < x.T, PACKED + self.slots, NOWHERE))
        if x.own:
            marks += [tokens, tail]
        marks = _joined([*marks, np.full((x.samples, ROWS), NOWHERE, np.int32)])
        if self.pattern.token_mask is not None:
            # A mark's place says which token it is, and NOWHERE's is outside of every sequence.
            marks = jnp.where(self._real(marks & (STRIDE - 1)), marks, NOWHERE)
        read = rule.of_keys(jnp.asarray(marks))
        behind = []
        if x.rows:  # only causality asks where a global row stands
            unasked = np.zeros((x.samples, x.rows), np.int32)
            behind = [self.row_slots if self.pattern.causal else unasked]
        queries = _joined([tokens, tail, *behind])

        def every(y):
            y = y.reshape(len(y), 1, -1, y.shape[-1])  # of all heads
            if isinstance(y, np.ndarray):  # in full, or broadcasting it costs a kernel
                return jnp.asarray(np.repeat(y, x.B // len(y), 0))
            return jnp.broadcast_to(y, (x.B, *y.shape[1:]))

        return every(queries), every(read)

    def _real(self, place):
        """Whether places `[samples, ...]` are within the sequence and no padding."""
        x, mask = self.problem, self.pattern.token_mask
        if mask is None:
            return place < x.T
        real = lambda m, i: m.at[i].get(mode="fill", fill_value=False)
        return jax.vmap(real)(jnp.broadcast_to(mask, (x.samples, x.T)), place)

    @property
    def is_row(self):
        """`pattern.is_row()`; of few rows without a scatter, which costs more kernels."""
        if self.problem.rows > FEW:
            return self.pattern.is_row()
        return (self.row_slots[:, None] == np.arange(self.problem.T)[:, None]).any(-1)

    @property
    def row_is_there(self):
        """False `[samples, rows]` where a global row is unused or padding."""
        return self._real(self.row_slots)

    def unpack(self, x, copies):
        """Gradients `[B, T, K, H]` of keys, which add those of their copies `[B, packed, K, H]`.

        In place, and only where a token has a copy, each once: no atomics.
        """

        def add(x, copies, at):
            own = x.at[at].get(mode="fill", fill_value=0, unique_indices=True)
            total = own.astype(jnp.float32) + copies.astype(jnp.float32)
            return x.at[at].set(total.astype(x.dtype), mode="drop", unique_indices=True)

        at = jnp.broadcast_to(self.slots, (self.problem.B, self.problem.packed))
        return jax.vmap(add)(x, copies, at)


def _joined(parts):
    return joined([(x, x.shape[1]) for x in parts])


def joined(parts):
    """Arrays or numbers, each with its size along the last axis, one behind the other.

    As a sum of padded arrays: XLA makes a kernel of each concatenation, and one of many sums.
    """
    total: Any = 0
    at, size = 0, sum(n for _, n in parts)
    for x, n in parts:
        place = np.arange(size)
        if np.ndim(x):
            xp = np if isinstance(x, np.ndarray) else jnp
            total = total + xp.pad(x, (*((0, 0),) * (x.ndim - 1), (at, size - at - n)))
        else:
            total = total + np.where((place >= at) & (place < at + n), x, 0)
        at += n
    return total
