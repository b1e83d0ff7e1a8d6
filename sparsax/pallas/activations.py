"""What kernels apply to a tile of sums before it leaves the registers."""

import math

import jax
import jax.numpy as jnp
from jax import lax

# Without gradients of their own: JAX's `relu` has one, which kernels cannot lower.
ACTIVATIONS = {
    "relu": lambda x: jnp.maximum(x, 0.0),
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}


def value_and_slope(activation: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The activation of float32 x and its derivative, which is 0 where relu has a corner."""
    if activation == "relu":
        return jnp.maximum(x, 0.0), jnp.where(x > 0.0, 1.0, 0.0)
    if activation == "silu":
        share = _sigmoid(x)
        value = x * share
        return value, share + value * (1.0 - share)
    # (1 + tanh u) / 2 is the sigmoid of 2 u, which keeps its digits where tanh u is nearly -1.
    assert activation == "gelu"
    gain, cubic = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
    square = x * x
    share = _sigmoid(x * (gain + gain * cubic * square))
    value = x * share
    return value, share + value * (1.0 - share) * (gain + 3.0 * gain * cubic * square)


def _sigmoid(x):
    """Without a division, of which the hardware would make a dozen instructions."""
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root
