"""Attention over compound patterns: what the arguments must be, which implementation runs."""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsax import checks, pallas, reference, xla
from sparsax.compound import CompoundPattern
from sparsax.typing import Implementation, Key, Query, Value


def compound_attention(
    q: Query,
    k: Key,
    v: Value,
    pattern: CompoundPattern,
    *,
    q_global: Float[Array, "B R N H"] | None = None,
    k_global: Float[Array, "B T K H"] | None = None,
    v_global: Float[Array, "B T K H"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Query:
    """Softmax attention over a union of bands, columns, rows, blocks and single pairs.

    One exact softmax over all parts; every (query, key) pair counts once. Work and memory are those
    of the parts: linear in the length for given windows and capacities. Differentiable in reverse
    mode, works under jit, vmap, scan, `jax.checkpoint` and shard_map (batch and heads), and is
    deterministic.

    Args:
        q: queries `[B, T, N, H]`: float32, bfloat16 or float16; softmax runs in float32.
        k: keys `[B, T, K, H]`; K divides N (grouped-query and multi-query attention).
        v: values, shaped as the keys.
        pattern: the pairs. Its positions are data: another document does not recompile.
        q_global: queries of the global rows by a projection of their own, `[B, R, N, H]`, in the
            order of `pattern.rows`: project `pattern.take_rows(x)`. Given together with:
        k_global: keys `[B, T, K, H]` that the global rows see, by a projection of their own.
        v_global: values of the same.
        scale: factor of the logits; `1 / sqrt(H)` when None.
        implementation: "reference" (dense, float32), "xla" (any device), "pallas" (Hopper GPUs:
            bands of dilation 1, columns, rows and blocks), or None for what
            `default_implementation` names. A name runs or raises: nothing falls back.

    Returns:
        `o [B, T, N, H]` in q's dtype. A query that keeps no key, or is padding, has o = 0 and zero
        gradients. Under jit, a sample or head that is not `pattern.valid()` is NaN throughout.

    Raises:
        ValueError: shapes, dtypes, lengths, pattern or a name are wrong.
        NotImplementedError: the named implementation cannot do this.

    Source: Li et al., "A Slice and Dice Approach to Accelerate Compound Sparse Attention on GPU"
    (IISWC 2022); Beltagy et al., "Longformer" (arXiv 2004.05150), section 3.1, for the global rows.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import sparsax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 256, 4, 32))
        >>> pattern = sparsax.patterns.compound.longformer(
        ...     256, window=16, positions=np.array([[0, 70, 201], [0, 0, 0]]),
        ...     counts=np.array([3, 1]),
        ... )
        >>> sparsax.compound_attention(q, k, v, pattern).shape
        (2, 256, 4, 32)
    """
    checks.attention_inputs(q, k, v)
    checks.compound_fits(pattern, q, k)
    projected = q_global, k_global, v_global
    checks.global_projections(projected, pattern, q, k)
    refused = pallas.compound.refusal(q, pattern)
    chosen = checks.implementation(implementation, "xla" if refused else "pallas")
    if chosen == "pallas":
        checks.kernel_runs(refused)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)

    if chosen == "reference":
        slots = jnp.arange(pattern.rows.shape[-1]) < pattern.num_rows[..., None]
        places = slots[..., None] & (pattern.rows[..., None] == jnp.arange(pattern.seq_len))
        o = reference.compound_attention(
            q, k, v, *projected, pattern.to_mask(), places, scale=scale
        )
    else:
        call = _Call(chosen, scale, pallas.interpret() if chosen == "pallas" else None)
        o = _sparse(call, q, k, v, *projected, pattern)
    if chosen == "pallas":
        return o  # kernels answer NaN themselves, sparing the pass over `o`
    # A factor, so that the gradients of what is invalid are NaN as well.
    poison = jnp.where(pattern.valid(), 1.0, jnp.nan).repeat(q.shape[2] // pattern.num_heads, -1)
    return (o * poison[:, None, :, None]).astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call, hashable for `custom_vjp`."""

    implementation: Implementation
    scale: float
    interpret: typing.Any  # of the kernels; None on hardware


@functools.partial(jax.jit, static_argnums=0)  # equal layers share what is traced and lowered
def _sparse(call: _Call, q, k, v, q_global, k_global, v_global, pattern):
    others = jax.tree.leaves(pattern)
    q, k, v = xla.vary_alike((q, k, v), *others)
    if call.implementation == "pallas":
        own = xla.vary_alike((q_global, k_global, v_global), q, *others)
        return _attend_at_once(call, q, k, v, own, pattern)
    o = _attend(call, q, k, v, pattern)
    if not pattern.rows.shape[-1]:
        return o
    if q_global is None:
        q_global, k_global, v_global = pattern.take_rows(q), k, v
    rows = _attend_rows(call, *xla.vary_alike((q_global, k_global, v_global), q, *others), pattern)
    return pattern.put_rows(o, rows)


def _differentiable(forward: Callable, backward: Callable) -> Callable:
    """`f(call, q, k, v, pattern) -> o` of functions of the XLA implementation."""

    def run(call, q, k, v, pattern):
        return run_forward(call, q, k, v, pattern)[0]

    def run_forward(call, q, k, v, pattern):
        o, lse = forward(q, k, v, pattern, scale=call.scale)
        return o, (q, k, v, o, lse, pattern)

    def run_backward(call, residuals, do):
        *arrays, pattern = residuals
        return *backward(*arrays, do, pattern, scale=call.scale), None

    run = jax.custom_vjp(run, nondiff_argnums=(0,))
    run.defvjp(run_forward, run_backward)
    return run


_attend = _differentiable(xla.compound.forward, xla.compound.backward)
_attend_rows = _differentiable(xla.compound.rows_forward, xla.compound.rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_at_once(call: _Call, q, k, v, own, pattern):
    """Global rows and all others in one launch."""
    return _at_once_forward(call, q, k, v, own, pattern)[0]


def _at_once_forward(call, q, k, v, own, pattern):
    o, saved = pallas.compound.forward(
        q, k, v, own, pattern, scale=call.scale, interpret=call.interpret
    )
    return o, (q, k, v, own, o, saved, pattern)


def _at_once_backward(call, residuals, do):
    q, k, v, own, o, saved, pattern = residuals
    gradients = pallas.compound.backward(
        q, k, v, own, o, saved, do, pattern, scale=call.scale, interpret=call.interpret
    )
    return *gradients, None


_attend_at_once.defvjp(_at_once_forward, _at_once_backward)
