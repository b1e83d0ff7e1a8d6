"""Linear layers with a trainable product of low rank beside a frozen kernel."""

import typing

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsax.nn.dense import Dense, make_linear, read_linear


class LoRALinear(nnx.Module):
    """`x W + b + (alpha / rank) (x A) B`: the layer that fine-tuning replaces a dense one with.

    The product of A and B is never formed. Kernel and bias are plain parameters, A and B are
    `nnx.LoRAParam`s: with `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` and
    `nnx.DiffState(0, nnx.LoRAParam)` they alone are trained, and no other gradient is computed.
    B starts at 0, so the layer starts as the dense one. Unlike `nnx.LoRALinear` it also stands for
    an `nnx.LinearGeneral`, such as the projections of attention, and scales by alpha.

    Args:
        linear: an `nnx.Linear`, or an `nnx.LinearGeneral` over the last axes.
        rank: R, columns of A.
        alpha: the product counts `alpha / rank` times; rank when None.
        rngs: stream of A.

    Raises:
        ValueError: the rank is not between 1 and the features, or the layer is of another kind.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685),
    section 4.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparsax.nn import LoRALinear
        >>> dense = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
        >>> layer = LoRALinear(dense, rank=4, rngs=nnx.Rngs(1))
        >>> x = jnp.ones((5, 64))
        >>> bool((layer(x) == dense(x)).all()), layer.lora_a.shape, layer.lora_b.shape
        (True, (64, 4), (4, 96))
    """

    def __init__(
        self, linear: Dense, *, rank: int = 16, alpha: float | None = None, rngs: nnx.Rngs
    ):  # fmt: skip
        kernel, _, rest = read_linear(linear)
        features_in, features_out = kernel.shape
        if not 1 <= rank <= min(kernel.shape):
            raise ValueError(
                f"rank must be between 1 and the layer's features, {min(kernel.shape)}; got {rank}."
            )
        self.linear = linear
        self.in_shape, self.out_shape = rest["in_shape"], rest["out_shape"]
        start = jax.nn.initializers.he_uniform()
        self.lora_a = nnx.LoRAParam(start(rngs.params(), (features_in, rank), kernel.dtype))
        self.lora_b = nnx.LoRAParam(jnp.zeros((rank, features_out), kernel.dtype))
        self.scale = 1.0 if alpha is None else alpha / rank

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.shape[1]

    def __call__(self, x: Float[Array, "..."], **options: typing.Any) -> Float[Array, "..."]:
        """The layer's output; options are those of the dense layer."""
        y = self.linear(x, **options)
        rows = x.reshape(*x.shape[: x.ndim - len(self.in_shape)], -1).astype(y.dtype)
        a, b = (factor[...].astype(y.dtype) for factor in (self.lora_a, self.lora_b))
        added = (rows @ a) @ b * jnp.asarray(self.scale, y.dtype)
        return y + added.reshape(*added.shape[:-1], *self.out_shape)

    def to_linear(self) -> Dense:
        """The dense layer that computes the same: `W + (alpha / rank) A B`, summed in float32."""
        kernel, bias, rest = read_linear(self.linear)
        a, b = (factor[...].astype(jnp.float32) for factor in (self.lora_a, self.lora_b))
        added = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * self.scale
        merged = (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
        return make_linear(merged, bias, **rest)
