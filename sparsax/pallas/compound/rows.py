"""Global rows: dense attention of a few gathered queries, its keys cut into chunks.

A row tile of queries over all keys would occupy one multiprocessor per head. So chunks of the
sequence stand as samples of their own, which is a reshape, and their softmaxes are joined exactly:
o = sum of exp(lse_s - lse) o_s.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparsax.compound import CompoundPattern, slots
from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse.attention import run_backward, run_forward
from sparsax.pallas.block_sparse.places import NOWHERE, Rule
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS, TileLists
from sparsax.pallas.compound.keys import BLOCK, poison
from sparsax.pallas.hopper import multiprocessors

SHORTEST = 512  # keys of a chunk, so that starting one is worth it


def rows_forward(q, k, v, pattern: CompoundPattern, *, scale: float, interpret=None):
    """`(o [B, R, N, H], lse [B, N, R])` of queries gathered at the pattern's global rows."""
    rows = _Rows(q, k, pattern, scale)
    o, lse = run_forward(
        rows.problem, rows.query_lists, rows.places, (), rows.repeat(q), rows.cut(k), rows.cut(v),
        None, interpret,
    )  # fmt: skip
    o, lse = (x.reshape(len(q), rows.chunks, *x.shape[1:]) for x in (o, lse))
    joint = jax.nn.logsumexp(lse, axis=1)
    weights = jnp.exp(lse - jnp.where(joint == -jnp.inf, 0.0, joint)[:, None])
    o = (weights.swapaxes(2, 3)[..., None] * o).sum(1)
    real = rows.real
    o = jnp.where(real[:, :, None, None], o, poison(rows.problem, pattern)).astype(q.dtype)
    return o, jnp.where(real[:, None], joint, -jnp.inf)


def rows_backward(q, k, v, o, lse, do, pattern: CompoundPattern, *, scale: float, interpret=None):
    """`(dq, dk, dv)`, dq of the gathered queries."""
    rows = _Rows(q, k, pattern, scale)
    q, o, lse, do = (rows.repeat(x) for x in (q, o, lse, do))
    dq, dk, dv = run_backward(
        rows.problem, rows.query_lists, rows.key_lists, rows.places, (), q, rows.cut(k),
        rows.cut(v), o, lse, do, 0.0, None, interpret,
    )  # fmt: skip
    dq = dq.reshape(-1, rows.chunks, *dq.shape[1:]).sum(1, dtype=jnp.float32)
    return dq.astype(q.dtype), dk.reshape(k.shape), dv.reshape(v.shape)


def _chunks(batch: int, rows: int, heads: int, length: int) -> int:
    """Chunks of a sequence that fill the GPU: equal, whole groups of 8 keys."""
    wanted, chunks = 2 * multiprocessors(), 1
    busy = batch * heads * -(-rows // ROWS)
    while chunks * busy < wanted and length % (16 * chunks) == 0:
        if length // (2 * chunks) < SHORTEST:
            break
        chunks *= 2
    return chunks


class _Rows:
    """The global rows over chunks of the sequence, `[B * chunks, ...]`, and their lists."""

    def __init__(self, q, k, pattern: CompoundPattern, scale: float):
        (self.batch, count, heads, features), length = q.shape, k.shape[1]
        self.pattern, self.chunks = pattern, _chunks(self.batch, count, heads, length)
        samples, size = self.batch * self.chunks, int(length) // self.chunks
        sides = length, 0 if pattern.causal else length
        masked = pattern.token_mask is not None  # every chunk then has counts of its own
        self.problem = Problem(
            samples, count, size, heads, k.shape[2], features, pattern.num_heads, q.dtype, BLOCK,
            BLOCK, scale, None, None, ids=True,
            rule=Rule((sides,), pattern.causal, packed=False, blocks=False),
            samples=samples if masked or pattern.batch > 1 else 1,
        )  # fmt: skip

    def cut(self, x):
        """Keys or values, a chunk a sample."""
        return x.reshape(self.batch * self.chunks, -1, *x.shape[2:])

    def repeat(self, x):
        """What belongs to the rows, for every chunk."""
        return jnp.repeat(x, self.chunks, axis=0)

    @property
    def slots(self):
        """Where the rows stand, `[B, R]`; past the sequence where unused."""
        pattern = self.pattern
        return slots(pattern.rows, pattern.num_rows, pattern.seq_len, self.batch)

    @property
    def real(self):
        """False `[B, R]` where a row is padding."""
        if self.pattern.token_mask is None:
            return jnp.ones((1, 1), bool)
        mask = jnp.broadcast_to(self.pattern.token_mask, (self.batch, self.pattern.seq_len))
        return jax.vmap(lambda m, i: m.at[i].get(mode="fill", fill_value=False))(mask, self.slots)

    @property
    def keys(self):
        """False `[B * chunks, T / chunks]` where a key is padding; None without padding."""
        if self.pattern.token_mask is None:
            return None
        shape = self.batch, self.pattern.seq_len
        return self.cut(jnp.broadcast_to(self.pattern.token_mask, shape))

    @property
    def places(self):
        """What the rule reads, places of queries and marks of keys."""
        x, shape = self.problem, (self.batch, self.pattern.seq_len)
        marks = jnp.asarray(self.cut(np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)))
        marks = marks if self.keys is None else jnp.where(self.keys, marks, NOWHERE)
        return self.repeat(self.slots), x.rule.of_keys(marks)

    @property
    def query_lists(self) -> TileLists:
        """Row tiles of the queries over all blocks of a chunk's keys."""
        x = self.problem
        last = np.minimum(np.arange(BLOCK, x.S + BLOCK, BLOCK), x.S)
        whole = (last % BLOCK == 0)[None]
        count = jnp.full((1, 1), len(last))
        if self.keys is not None:
            whole = whole & _blocks(self.keys, BLOCK).all(-1)
            some = _blocks(self.keys, BLOCK).any(-1)
            count = jnp.where(some, np.arange(len(last)) + 1, 0).max(-1)[:, None]
        full = 0 * count if self.pattern.causal else jnp.cumprod(whole, -1).sum(-1)[:, None]
        first = np.arange(0, x.T, ROWS)
        return self._lists(full, jnp.where(first < self._used, count, 0), len(last))

    @property
    def key_lists(self) -> TileLists:
        """Row tiles of a chunk's keys over all blocks of queries in use."""
        x = self.problem
        tiles = -(-x.S // ROWS)
        count = -(-self._used // BLOCK)
        whole = jnp.ones((1, tiles), bool)
        if self.keys is not None:
            whole = _blocks(self.keys, ROWS).all(-1)
            count = jnp.where(_blocks(self.keys, ROWS).any(-1), count, 0)
        full = jnp.where(whole, 0 if self.pattern.causal else count, 0)
        return self._lists(full, jnp.broadcast_to(count, (x.samples, tiles)), -(-x.T // BLOCK))

    @property
    def _used(self):
        """Rows in use `[samples, 1]`."""
        return jnp.maximum(self._of_samples(self.pattern.num_rows), 0)[:, None]

    def _of_samples(self, x):
        """What the pattern says of its samples, for every one of the problem's."""
        if self.problem.samples == 1:
            return x
        return self.repeat(jnp.broadcast_to(x, (self.batch, *x.shape[1:])))

    def _lists(self, full, count, blocks: int) -> TileLists:
        x, tiles = self.problem, count.shape[-1]
        cols = np.broadcast_to(np.arange(blocks, dtype=np.int32), (x.P, tiles, blocks))
        valid = self._of_samples(self.pattern.valid())[..., None]  # samples, P, 1
        count = jnp.where(valid, count[:, None], INVALID)
        full = jnp.broadcast_to(jnp.asarray(full)[:, None], count.shape)
        flat = lambda y: y.astype(jnp.int32).reshape(x.owners, tiles)
        return TileLists(flat(full), flat(count), jnp.asarray(cols), None)


def _blocks(mask, size: int):
    """A mask of keys in blocks, `[samples, blocks, size]`; the last one's tail is False."""
    mask = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % size)))
    return mask.reshape(len(mask), -1, size)
