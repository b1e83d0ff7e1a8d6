"""Products of rows sorted by group: arguments, which implementation runs, the gradients."""

import typing
from functools import partial

import jax
from jaxtyping import Array, Float, Int

from sparsax import checks, pallas, reference, xla
from sparsax.typing import Implementation


def gmm(
    x: Float[Array, "M _D"],
    w: Float[Array, "G _ _"],
    group_sizes: Int[Array, " G"],
    bias: Float[Array, "G F"] | None = None,
    *,
    transpose_w: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "M F"]:
    """`y[m] = x[m] w[g] + bias[g]` where row m belongs to group g: the product of MoE layers.

    Rows are sorted by group: the first `group_sizes[0]` are of group 0, the next of group 1. Rows
    past the sum of the sizes give 0, whatever they hold, and get no gradient. Sizes are data:
    other sizes need no compilation, and under jit what they list past row M is cut off.
    Differentiable in x, w and bias, to any order; works under jit, vmap, scan and shard_map, where
    rows (each shard with sizes of its own) or output features may be sharded.

    Args:
        x: rows `[M, D]`, float32, bfloat16 or float16; sums are float32.
        w: a matrix for each group, `[G, D, F]`, or `[G, F, D]` with `transpose_w`; x's dtype.
        group_sizes: rows of each group, any of them 0, of sum at most M; int32.
        bias: `[G, F]`.
        transpose_w: multiply with the transposes of the matrices.
        implementation: "reference" (dense, float32), "xla" (any device), "pallas" (Hopper GPUs:
            bfloat16 or float16, D and F in multiples of 64; not yet measured on one, so nothing
            chooses it), or None for "xla". A name runs or raises.

    Returns:
        `[M, F]` in x's dtype.

    Raises:
        ValueError: shapes, dtypes, sizes or a name are wrong.
        NotImplementedError: the named implementation cannot do this.

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts" (MLSys
    2023), which calls this product and `tgmm` by these names.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> x, w = jnp.ones((4, 2)), jnp.arange(3.0)[:, None, None] * jnp.ones((3, 2, 1))
        >>> sparsax.gmm(x, w, jnp.array([1, 0, 2]))[:, 0].tolist()
        [0.0, 4.0, 4.0, 0.0]
    """
    checks.grouped_inputs(x, w, group_sizes, bias, transpose_w)
    call = _call(implementation, x, w.shape[1 if transpose_w else 2], transpose_w)
    if call.implementation == "reference":  # with the gradients that JAX derives
        return reference.gmm(x, w, group_sizes, bias, transpose_w=transpose_w).astype(x.dtype)
    return _gmm(call, *xla.vary_alike((x, w, group_sizes, bias)))


def tgmm(
    x: Float[Array, "M D"],
    dy: Float[Array, "M F"],
    group_sizes: Int[Array, " G"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "G D F"]:
    """`out[g] = x[rows of g].T @ dy[rows of g]`: the gradient of w in `gmm`.

    Rows, sizes, implementations, result dtype and errors are those of `gmm`; a group without rows
    gets zeros. Differentiable in x and dy.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> sparsax.tgmm(jnp.ones((4, 2)), jnp.ones((4, 1)), jnp.array([1, 0, 2]))[:, 0, 0].tolist()
        [1.0, 0.0, 2.0]
    """
    checks.grouped_rows(x, dy, group_sizes)
    call = _call(implementation, x, dy.shape[1], False)
    if call.implementation == "reference":
        return reference.tgmm(x, dy, group_sizes).astype(x.dtype)
    return _tgmm(call, *xla.vary_alike((x, dy, group_sizes)))


class _Call(typing.NamedTuple):
    """The static part of a call."""

    implementation: str
    transpose_w: bool
    interpret: typing.Any


def _call(implementation, x, features_out: int, transpose_w: bool) -> _Call:
    name, interpret = checks.implementation(implementation, "xla"), None
    if name == "pallas":
        checks.kernel_runs(pallas.grouped_refusal(x.dtype, x.shape[1], features_out))
        interpret = pallas.interpret()
    return _Call(name, transpose_w, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gmm(call: _Call, x, w, group_sizes, bias) -> jax.Array:
    if call.implementation == "pallas":
        options = {"transpose_w": call.transpose_w, "interpret": call.interpret}
        y = pallas.gmm(x, w, group_sizes, bias, **options)
        return xla.vary_alike((y,), x)[0]  # a kernel's result varies over no mesh axis
    return xla.gmm(x, w, group_sizes, bias, transpose_w=call.transpose_w)


def _gmm_fwd(call, x, w, group_sizes, bias):
    return _gmm(call, x, w, group_sizes, bias), (x, w, group_sizes, bias)


def _gmm_bwd(call, residuals, dy):
    x, w, group_sizes, bias = residuals
    dx = _gmm(call._replace(transpose_w=not call.transpose_w), dy, w, group_sizes, None)
    pair = (dy, x) if call.transpose_w else (x, dy)
    dw = _tgmm(call, *pair, group_sizes)
    dbias = None if bias is None else xla.group_sums(dy, group_sizes).astype(bias.dtype)
    return dx, dw, None, dbias


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tgmm(call: _Call, x, dy, group_sizes) -> jax.Array:
    if call.implementation == "pallas":
        dw = pallas.tgmm(x, dy, group_sizes, interpret=call.interpret)
        return xla.vary_alike((dw,), x)[0]
    return xla.tgmm(x, dy, group_sizes)


def _tgmm_fwd(call, x, dy, group_sizes):
    return _tgmm(call, x, dy, group_sizes), (x, dy, group_sizes)


def _tgmm_bwd(call, residuals, dw):
    x, dy, group_sizes = residuals
    dx = _gmm(call._replace(transpose_w=True), dy, dw, group_sizes, None)
    ddy = _gmm(call._replace(transpose_w=False), x, dw, group_sizes, None)
    return dx, ddy, None


_tgmm.defvjp(_tgmm_fwd, _tgmm_bwd)
