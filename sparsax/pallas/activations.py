"""What kernels apply to a tile of sums before it leaves the registers."""

import jax
import jax.numpy as jnp

# Without gradients of their own: JAX's `relu` has one, which kernels cannot lower.
ACTIVATIONS = {
    "relu": lambda x: jnp.maximum(x, 0.0),
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}
