"""Dense layers with factored matrices: arguments, which implementation runs, the gradient."""

import typing
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from sparsax import checks, pallas, reference, xla
from sparsax.lowrank import CommonFactors, TiledFactors
from sparsax.pallas.tsvd import FEW
from sparsax.typing import Implementation

Activation = typing.Literal["relu", "silu", "gelu", "gelu_exact"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,  # the tanh form, as `jax.nn.gelu` and `flax.nnx.gelu`
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
}


def tsvd_matmul(
    x: Float[Array, "*B D"],
    factors: TiledFactors,
    bias: Float[Array, " F"] | None = None,
    activation: Activation | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*B F"]:
    """`activation(x w + bias)` where w is given by the factors of its tiles.

    Work and weight traffic are those of the factors. The backward pass computes the product
    `x u` again instead of storing it, so what is kept for it is x (and the values before an
    activation). Differentiable in x, the factors and the bias; works under jit, vmap, scan and
    shard_map, where rows, columns of tiles (J) or rows of tiles (I, then sum y) may be sharded.

    Args:
        x: inputs `[*B, D]`, float32, bfloat16 or float16; sums are float32.
        factors: from `sparsax.tsvd`, in x's dtype (see `TiledFactors.astype`).
        bias: `[F]`.
        activation: "relu", "silu", "gelu" (tanh), "gelu_exact", or None.
        implementation: "reference" (dense, float32), "xla" (any device), "pallas" (Hopper GPUs:
            batched matmuls that transpose nothing in between, or one fused kernel that stores no
            `x u` where that reads less, or one for few rows; bfloat16 or float16, tiles in
            multiples of 64, ranks in multiples of 16, see `TiledFactors.pad_rank`). None is
            "pallas" where the kernels can run, are not differentiated, and were measured to be
            faster (docs/tsvd.md): from 4,096 rows on, or 512 with large matrices, and with up to
            64 rows that `jax.vmap` does not batch, but for small matrices; else "xla": with
            gradients neither is always the faster one, and values of both differ by rounding.
            Kernels are not partitioned by themselves: where rows are sharded over devices, call
            this inside `jax.shard_map`, or name "xla". A name runs or raises.

    Returns:
        `[*B, F]` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or a name are wrong.
        NotImplementedError: the named implementation cannot do this.

    Source: Li et al., "A Hardware-Friendly Tiled Singular-Value Decomposition-Based Matrix
    Multiplication for Transformer-Based Models" (IEEE CAL 22(2), 2023).

    Example:
        >>> import jax
        >>> import sparsax
        >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> factors = sparsax.tsvd(w, tile=32, rank=32)
        >>> bool(abs(sparsax.tsvd_matmul(x, factors) - x @ w).max() < 1e-3)
        True
    """
    checks.linear_inputs(x, factors, TiledFactors, bias)
    return _apply(x, factors, bias, activation, implementation)


def tsvd_common_matmul(
    x: Float[Array, "*B D"],
    factors: CommonFactors,
    bias: Float[Array, " F"] | None = None,
    activation: Activation | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*B F"]:
    """`activation(x w + bias)` where the tiles of w share one factor.

    One dense matmul and one with a tiny matrix. Arguments, result and errors are those of
    `tsvd_matmul`. "pallas" runs one kernel that keeps a right factor in shared memory where its
    tiles fill the GPU, else the kernels of `tsvd_matmul` on one row or column of tiles (the
    features that are not cut must be a multiple of 64 as well). None does so from 4,096 rows on,
    where nothing is differentiated and it was measured to be faster. Gradients are dense matmuls,
    and XLA's. Take the gradient of `factors.common` alone to fine-tune: the larger gradient of the
    tiles is then not computed.

    Example:
        >>> import jax
        >>> import sparsax
        >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> factors = sparsax.tsvd_common(w, tile=16, rank=8)
        >>> sparsax.tsvd_common_matmul(x, factors, activation="relu").shape
        (64, 64)
    """
    checks.linear_inputs(x, factors, CommonFactors, bias)
    return _apply(x, factors, bias, activation, implementation)


class _Call(typing.NamedTuple):
    """The static part of a call; `side` is None for tiles with factors of their own."""

    side: str | None
    activation: str | None
    kernel: bool
    kernel_alone: bool  # where no gradient is asked for
    interpret: typing.Any


def _apply(x, factors, bias, activation, implementation):
    checks.one_of("activation", activation, (None, *ACTIVATIONS))
    checks.one_of("implementation", implementation, (None, *checks.IMPLEMENTATIONS))
    if isinstance(factors, TiledFactors):
        first, second, side = factors.u, factors.v, None
        pad_in, pad_out = factors.pad_in, factors.pad_out
    else:
        first, second, side = factors.tiles, factors.common, factors.side
        pad_in, pad_out = (0, factors.pad) if side == "right" else (factors.pad, 0)
    if implementation == "pallas":
        u, v = (first, second) if side is None else pallas.shapes_as_tiles(first, second, side)
        checks.kernel_runs(pallas.tsvd_refusal(x, u, v, activation))
    alone = implementation is None and (
        pallas.tsvd_is_faster(x, first, second, activation)
        if side is None
        else pallas.tsvd_common_is_faster(x, first, second, side, activation)
    )
    rows = jnp.pad(x.reshape(-1, x.shape[-1]), ((0, 0), (0, pad_in)))
    bias = None if bias is None else jnp.pad(bias, (0, pad_out))
    if implementation == "reference":
        options: dict[str, typing.Any] = {"activation": ACTIVATIONS.get(activation)}
        if side is None:
            y = reference.tsvd_matmul(rows, first, second, bias, **options)
        else:
            y = reference.tsvd_common_matmul(rows, first, second, bias, side=side, **options)
    else:
        kernel = implementation == "pallas"
        call = _Call(side, activation, kernel, kernel or alone, pallas.interpret())
        arrays = xla.vary_alike((rows, first, second, bias))
        y = typing.cast(jax.Array, _linear(call, *arrays))
    y = y.astype(x.dtype)
    out = factors.out_features  # what pads the product's columns is cut off
    return y[:, :out].reshape(*x.shape[:-1], out)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(call: _Call, x, first, second, bias):
    arrays = x, first, second, bias
    if call.kernel_alone and not call.kernel and len(x) <= FEW:
        return _few(call, *arrays)
    return _forward(call._replace(kernel=call.kernel_alone), *arrays)[0]


def _few(call: _Call, *arrays):
    """Few rows through the kernel, unless a batch of them makes many: XLA takes those as one.

    The kernel would read the factors again for each of the batch.
    """
    run = custom_vmap(lambda *a: _forward(call._replace(kernel=True), *a)[0])

    @run.def_vmap
    def _batched(size, mapped, *arrays):
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
        portable = lambda *a: _forward(call._replace(kernel=False), *a)[0]
        return jax.vmap(portable, axes, axis_size=size)(*arrays), True

    return run(*arrays)


def _forward(call, x, first, second, bias):
    if call.kernel:
        named = {"activation": call.activation, "interpret": call.interpret}
        if call.side is None:
            return pallas.tsvd_forward(x, first, second, bias, **named), None
        return pallas.tsvd_common_forward(x, first, second, bias, side=call.side, **named), None
    options: dict[str, typing.Any] = {"activation": ACTIVATIONS.get(call.activation)}
    if call.side is None:
        return xla.tsvd_forward(x, first, second, bias, **options), None
    return xla.tsvd_common_forward(x, first, second, bias, side=call.side, **options)


def _linear_fwd(call, x, first, second, bias):
    # The gradient of an activation needs the values before it, so it runs apart here.
    z, p = _forward(call._replace(activation=None), x, first, second, bias)
    y, kept = z, None
    if call.activation is not None:
        y, kept = ACTIVATIONS[call.activation](z.astype(jnp.float32)).astype(z.dtype), z
    return y, (x, first, second, bias, kept, p)


def _linear_bwd(call, residuals, dy):
    x, first, second, bias, z, p = residuals
    if z is not None:
        _, pull = jax.vjp(ACTIVATIONS[call.activation], z.astype(jnp.float32))
        dy = pull(dy.astype(jnp.float32))[0].astype(x.dtype)
    if call.side is None:
        options = {"interpret": call.interpret} if call.kernel else {}
        backward = pallas.tsvd_backward if call.kernel else xla.tsvd_backward
        dx, dfirst, dsecond = backward(x, first, second, dy, **options)
    else:
        if p is None:
            p = xla.tsvd_common_hidden(x, first, second, side=call.side)
        dx, dfirst, dsecond = xla.tsvd_common_backward(x, p, first, second, dy, side=call.side)
    dbias = None if bias is None else dy.sum(0, dtype=jnp.float32).astype(bias.dtype)
    return dx, dfirst, dsecond, dbias


_linear.defvjp(_linear_fwd, _linear_bwd)
