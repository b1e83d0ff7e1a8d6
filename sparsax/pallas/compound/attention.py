"""Attention over a compound pattern but for its global rows, and what the kernels refuse."""

import jax.numpy as jnp

from sparsax.compound import CompoundPattern
from sparsax.pallas import support
from sparsax.pallas.block_sparse.attention import run_backward, run_forward
from sparsax.pallas.block_sparse.config import Config
from sparsax.pallas.block_sparse.places import STRIDE
from sparsax.pallas.compound.keys import BLOCK, Keys, poison, problem_of
from sparsax.pallas.compound.lists import key_lists, query_lists


def refusal(q, pattern: CompoundPattern) -> str | None:
    """Why the kernels cannot take these queries and this pattern; None if they can."""
    if pattern.elements is not None:
        return "has no kernel of single pairs (the pattern's elements)"
    dilated = [band.dilation for band in pattern.bands if band.dilation > 1]
    if dilated:
        return f"takes bands of dilation 1; got {dilated}"
    if pattern.seq_len >= STRIDE // 2:
        return f"takes lengths below {STRIDE // 2}; got {pattern.seq_len}"
    blocks = pattern.blocks
    sizes = (BLOCK, BLOCK) if blocks is None else (blocks.block_q, blocks.block_kv)
    return support.refusal(q, *sizes)


def forward(
    q, k, v, pattern: CompoundPattern, *, scale: float, config: Config | None = None, interpret=None
):
    """`(o [B, T, N, H], lse [B, N, T])`; padded rows have o = 0 and lse = -inf.

    Global rows get what an ordinary row would, to be replaced by what `rows_forward` computes.
    """
    problem = problem_of(q, k, pattern, scale)
    if _empty(pattern):
        nothing = jnp.full_like(q[..., 0], -jnp.inf, jnp.float32)
        return _zeros(q, poison(problem, pattern)), nothing.swapaxes(1, 2)
    keys = Keys(problem, pattern)
    o, lse = run_forward(
        problem, query_lists(keys), keys.places, keys.pack(k, v), q, k, v, config, interpret
    )
    if pattern.token_mask is not None:  # whole tiles ask nobody
        o = jnp.where(pattern.token_mask[:, :, None, None], o, poison(problem, pattern))
        o = o.astype(q.dtype)
        lse = jnp.where(pattern.token_mask[:, None], lse, -jnp.inf)
    return o, lse


def backward(
    q, k, v, o, lse, do, pattern: CompoundPattern, *, scale: float, config: Config | None = None,
    interpret=None,
):  # fmt: skip
    """`(dq, dk, dv)`; rows with lse = -inf have no part in it."""
    problem = problem_of(q, k, pattern, scale)
    if _empty(pattern):
        # Without blocks all heads are valid, or none is.
        return tuple(_zeros(x, poison(problem, pattern)[:, :, :1]) for x in (q, k, v))
    keys = Keys(problem, pattern)
    dq, dk, dv = run_backward(
        problem, query_lists(keys), key_lists(keys), keys.places, keys.pack(k, v), q, k, v, o, lse,
        do, 0.0, config, interpret,
    )  # fmt: skip
    return dq, keys.unpack(dk), keys.unpack(dv)


def _zeros(like, plus):
    return jnp.broadcast_to(plus, like.shape).astype(like.dtype)


def _empty(pattern: CompoundPattern) -> bool:
    """Whether no pair attends but those of global rows: there is nothing to run."""
    return not (pattern.bands or pattern.columns.shape[-1] or pattern.blocks is not None)
