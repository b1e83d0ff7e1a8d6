"""A router for a pre-trained layer, fitted to which blocks its tokens activate."""

import typing
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Method = typing.Literal["logistic", "least_squares"]
METHODS = typing.get_args(Method)
HIGHEST = jax.lax.Precision.HIGHEST


class RouterFit(typing.NamedTuple):
    """A fitted router, and what its choice captures.

    Attributes:
        kernel: `[D, G]`.
        bias: `[G]`.
        captured: share of the squared activation norm within the k blocks that the router chooses.
        oracle: the same for the k blocks of largest norm, the most that k blocks can capture.
        random: the same, expected, for k blocks at random: k / G.
    """

    kernel: Float[Array, "D G"]
    bias: Float[Array, " G"]
    captured: Float[Array, ""]
    oracle: Float[Array, ""]
    random: float


def fit_router(
    x: Float[Array, "M D"],
    norms: Float[Array, "M G"],
    k: int,
    *,
    method: Method = "logistic",
    ridge: float = 1e-3,
    iterations: int = 8,
) -> RouterFit:
    """The router `sigmoid(x kernel + bias)` that predicts which blocks a layer's tokens activate.

    Args:
        x: calibration inputs of the layer, `[M, D]`; many more than D tokens.
        norms: of the activations within each block, `[M, G]`, see `FFNBlocks.norms`.
        k: blocks of a token.
        method: "logistic" predicts whether a block is among the token's k of largest norm (by
            Newton's method, so p is a probability); "least_squares" predicts the norms themselves,
            each token's scaled to mean 0 and all of them to variance 1.
        ridge: penalty of the kernel, relative to the variance of the inputs.
        iterations: of Newton's method.

    Returns:
        The router in float32, with what it captures of these tokens. For an honest figure, ask
        `captured` with other tokens.

    Raises:
        ValueError: shapes, k or the method are wrong.

    Source: predictors fitted to activations as in Zhang et al., "MoEfication" (arXiv 2110.01786),
    section 3.2.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparsax.routing import fit_router
        >>> x = jax.random.normal(jax.random.key(0), (512, 4))
        >>> fit = fit_router(x, jnp.exp(x), 1)  # block g is active where x[g] is large
        >>> bool(fit.captured > 0.99 * fit.oracle)
        True
    """
    if norms.shape[0] != x.shape[0] or not 1 <= k <= norms.shape[1]:
        raise ValueError(
            "x must be [M, D], norms [M, G] of the same tokens, and k within [1, G]; "
            f"got {tuple(x.shape)}, {tuple(norms.shape)} and k={k}."
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}; got {method!r}.")
    x, norms = x.astype(jnp.float32), norms.astype(jnp.float32)
    largest = jax.lax.top_k(norms, k)[1]
    kernel, bias = _fit(x, norms, largest, ridge, None if method != "logistic" else iterations)
    chosen = jax.lax.top_k(jnp.matmul(x, kernel, precision=HIGHEST) + bias, k)[1]
    return RouterFit(
        kernel, bias, captured(norms, chosen), captured(norms, largest), k / norms.shape[1]
    )


def captured(norms: Float[Array, "M G"], blocks: Int[Array, "M k"]) -> Float[Array, ""]:
    """The share of the squared norm of all blocks that the chosen blocks hold, over all tokens.

    Example:
        >>> import jax.numpy as jnp
        >>> from sparsax.routing import captured
        >>> float(captured(jnp.array([[1.0, 1.0, 1.0, 1.0]]), jnp.array([[0, 2]])))
        0.5
    """
    energy = jnp.square(norms.astype(jnp.float32))
    return jnp.take_along_axis(energy, blocks, axis=1).sum() / energy.sum()


@partial(jax.jit, static_argnums=4)
def _fit(x, norms, largest, ridge, iterations):
    """Kernel and bias; of least squares when iterations is None, else of the logistic model."""
    mean, count = x.mean(0), x.shape[0]
    # Centred inputs leave the bias to itself; a last column of ones stands for it.
    inputs = jnp.concatenate([x - mean, jnp.ones((count, 1))], axis=1)
    size = inputs.shape[1]
    penalty = ridge * jnp.square(x - mean).mean() * jnp.ones(size).at[-1].set(0.0)

    def solve(weight, target):  # argmin of the mean of weight * (target - inputs w)^2, + penalty
        gram = jnp.matmul(inputs.T * weight, inputs, precision=HIGHEST) / count
        right = jnp.matmul(inputs.T, weight * target, precision=HIGHEST) / count
        # Weights vanish where the model is certain; the matrix must stay positive definite.
        regular = gram + jnp.diag(penalty + 1e-6 * jnp.diagonal(gram).mean())
        return jax.scipy.linalg.solve(regular, right, assume_a="pos")

    def least_squares(target):
        return solve(jnp.ones(count), target)

    def logistic(target):
        def newton(_, w):
            z = jnp.clip(jnp.matmul(inputs, w, precision=HIGHEST), -8.0, 8.0)
            p = jax.nn.sigmoid(z)
            weight = p * (1.0 - p)
            return solve(weight, z + (target - p) / weight)

        return jax.lax.fori_loop(0, iterations, newton, jnp.zeros(size))

    if iterations is None:
        target = norms - norms.mean(1, keepdims=True)
        target = target / jnp.maximum(target.std(), 1e-30)
    else:
        target = jax.nn.one_hot(largest, norms.shape[1]).sum(1)
    # One block after another: a block's matrix is as large as the square of D.
    w = jax.lax.map(least_squares if iterations is None else logistic, target.T).T
    kernel = w[:-1]
    return kernel, w[-1] - jnp.matmul(mean, kernel, precision=HIGHEST)
