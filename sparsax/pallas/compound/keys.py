"""The keys of a compound pattern: which are packed behind the sequence, and the mark of each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparsax.compound import CompoundPattern, slots
from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse.places import NOWHERE, PACKED, STRIDE, TAKEN, Rule
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS

BLOCK = 64  # columns of a list's entries, unless the pattern's blocks say otherwise


def rule_of(pattern: CompoundPattern) -> Rule:
    """Which pairs attend."""
    bands = tuple((band.left, band.right) for band in pattern.bands)
    packed = pattern.columns.shape[-1] > 0
    return Rule(bands, pattern.causal, packed=packed, blocks=pattern.blocks is not None)


def problem_of(q, k, pattern: CompoundPattern, scale: float) -> Problem:
    """What the kernels of this pattern are built for."""
    (batch, length, heads, features), kv_heads = q.shape, k.shape[2]
    blocks, capacity = pattern.blocks, pattern.columns.shape[-1]
    return Problem(
        batch, length, length, heads, kv_heads, features,
        1 if blocks is None else blocks.num_heads, q.dtype,
        BLOCK if blocks is None else blocks.block_q, BLOCK if blocks is None else blocks.block_kv,
        scale, None, None, ids=True,
        rule=rule_of(pattern),
        samples=pattern.batch, packed=-(-capacity // ROWS) * ROWS,
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
    """The packed keys of every sample: `slots [B, packed]`, `T` and beyond where unused."""

    problem: Problem
    pattern: CompoundPattern

    @property
    def slots(self):
        """Where in the sequence the packed keys stand, `[samples, packed]`."""
        x, columns = self.problem, self.pattern.columns
        columns = jnp.pad(columns, ((0, 0), (0, x.packed - columns.shape[-1])))
        return slots(columns, self.pattern.num_columns, x.T, x.samples)

    @property
    def places(self):
        """What the rule reads: places of queries `[B, T]` and marks of keys `[B, kv_rows]`."""
        x = self.problem
        # NumPy, so that what is not data is a constant of the program.
        tokens = np.broadcast_to(np.arange(x.T, dtype=np.int32), (x.B, x.T))
        marks = tokens[: x.samples]
        if x.packed:
            if self.pattern.blocks is not None:
                marks = jnp.where(self.pattern.is_column(), marks + TAKEN, marks)
            tail = np.full((x.samples, x.packed_from - x.T), NOWHERE, np.int32)
            packed = jnp.where(self.slots < x.T, PACKED + self.slots, NOWHERE)
            marks = jnp.concatenate([marks, tail, packed], 1)
        if self.pattern.token_mask is not None:
            # A mark's place says which token it is, and NOWHERE's is outside of every sequence.
            real = lambda i, m: m.at[i & (STRIDE - 1)].get(mode="fill", fill_value=False)
            mask = jnp.broadcast_to(self.pattern.token_mask, (x.samples, x.T))
            marks = jnp.where(jax.vmap(real)(marks, mask), marks, NOWHERE)
        return jnp.asarray(tokens), jnp.broadcast_to(marks, (x.B, marks.shape[-1]))

    def pack(self, *arrays):
        """What the arrays `[B, T, K, H]` hold at the packed keys, zeros where there is none."""
        if not self.problem.packed:
            return ()
        take = lambda x, i: x.at[i].get(mode="fill", fill_value=0)
        at = jnp.broadcast_to(self.slots, (self.problem.B, self.problem.packed))
        return tuple(jax.vmap(take)(x, at) for x in arrays)

    def unpack(self, x):
        """Gradients `[B, kv_rows, K, H]` as `[B, T, K, H]`: each token adds that of its copy.

        Only the few rows that have a copy are written again, each once: no atomics.
        """
        own, copies = x[:, : self.problem.T], x[:, self.problem.packed_from :]
        if not self.problem.packed:
            return own
        at = jnp.broadcast_to(self.slots, (self.problem.B, self.problem.packed))

        def add(own, copies, at):
            theirs = own.at[at].get(mode="fill", fill_value=0, unique_indices=True)
            total = theirs.astype(jnp.float32) + copies.astype(jnp.float32)
            return own.at[at].set(total.astype(x.dtype), mode="drop", unique_indices=True)

        return jax.vmap(add)(own, copies[:, : self.problem.packed], at)
