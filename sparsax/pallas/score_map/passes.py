"""From arrays to the map: prepares what the two kernels read, and pools what they wrote."""

import functools
import math

import jax
import jax.numpy as jnp

from sparsax.layouts import block_sizes
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import multiprocessors
from sparsax.pallas.score_map.lse import lse_kernel
from sparsax.pallas.score_map.mean import mean_kernel
from sparsax.pallas.support import refusal, vary

UNIT = 8  # keys: the least that a matrix in registers can be cut into


@functools.partial(jax.jit, static_argnames=("scale", "causal", "per_head", "pool", "interpret"))
def score_map(q, k, q_ids, kv_ids, *, scale, causal, per_head, pool, interpret=None):
    """Mean softmax probabilities, float32 `[P, T, S]`, or the means of its blocks `[P, I, J]`.

    Beside the result only the log-sum-exp of every row is held; with `pool`, sums over blocks of
    keys for every query, `P T J` numbers. Without, lengths that 8 (T) or 32 (S) do not divide cost
    one more map.
    """
    (batch, q_len, heads, features), (_, kv_len, kv_heads, _) = q.shape, k.shape
    maps = heads if per_head else 1
    problem = lambda tile: Problem(
        batch, q_len, kv_len, heads, kv_heads, features, maps, q.dtype, ROWS, tile, scale, None,
        0 if causal else None, q_ids is not None,
    )  # fmt: skip
    tile = _tile(features, maps, q_len, kv_len)
    operands = [_padded(x, 8, 0) for x in (q, k)]  # tile copies take whole groups of 8 rows
    if q_ids is not None:
        # Lengths that a copy of whole tiles can read; no padded id equals another one.
        operands = [_padded(q_ids, ROWS, -2), _padded(kv_ids, ROWS, -3), *operands]
    (lse,) = lse_kernel(problem(ROWS), interpret)(*operands)
    if pool is None:
        (out,) = mean_kernel(problem(tile), None, interpret)(*operands, lse)
        found = out[:, :q_len, :kv_len]
    else:
        # Rows past the end have no probabilities to add to a block.
        lse = jnp.where(jnp.arange(lse.shape[-1]) < q_len, lse, jnp.inf)
        chunk = math.gcd(pool, tile)
        (out,) = mean_kernel(problem(tile), chunk, interpret)(*operands, lse)
        found = _pooled(out, chunk, pool, q_len, kv_len)
    return vary(found, operands)


def score_map_refusal(q, pool: int | None) -> str | None:
    """Why the kernels cannot make this map; None if they can."""
    if pool is not None and pool % UNIT:
        return f"pools blocks in multiples of {UNIT} tokens; got pool={pool}"
    return refusal(q, ROWS, ROWS)


def _tile(features: int, maps: int, q_len: int, kv_len: int) -> int:
    """Keys of an output tile: 128, but 64 where memory or the number of tiles is short."""
    few = maps * -(-q_len // ROWS) * -(-kv_len // 128) < multiprocessors()
    return 64 if few or features == 256 else 128


def _padded(x, multiple: int, fill: int):
    rest = -x.shape[1] % multiple
    widths = ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=fill) if rest else x


def _pooled(sums, chunk: int, pool: int, q_len: int, kv_len: int):
    """Means of blocks, from sums `[P, C, T']` over `chunk` keys; what is past the ends is 0."""
    rows, cols = -(-q_len // pool), -(-kv_len // pool)
    wide, high = cols * (pool // chunk), rows * pool
    excess = ((0, 0), (0, max(0, wide - sums.shape[1])), (0, max(0, high - sums.shape[2])))
    sums = jnp.pad(sums, excess)[:, :wide, :high]
    sums = sums.reshape(-1, cols, pool // chunk, rows, pool).sum((2, 4)).swapaxes(1, 2)
    return sums / (block_sizes(q_len, pool)[:, None] * block_sizes(kv_len, pool))
