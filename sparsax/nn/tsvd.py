"""Linear layers whose kernel is factored."""

import math
import typing

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsax.linear import ACTIVATIONS, Activation, tsvd_common_matmul, tsvd_matmul
from sparsax.lowrank import CommonFactors, Side, TiledFactors, tsvd, tsvd_common
from sparsax.nn.dense import Dense, in_one_pass, make_linear, read_linear
from sparsax.typing import Implementation

Mode = typing.Literal["compressed", "residual"]
Gram = Float[Array, "D D"]


class CommonParam(nnx.Param):
    """The factor that the tiles of a matrix share: all that TSVD-common fine-tunes.

    `nnx.Optimizer(model, tx, wrt=CommonParam)` and `nnx.DiffState(0, CommonParam)` select it.
    """


class TSVDLinear(nnx.Module):
    """A linear layer whose kernel is the product of small factors, tile by tile.

    Its parameters are `u`, `v` (see `sparsax.TiledFactors`) and `bias`.

    Args:
        factors: the kernel.
        bias: `[F]`, or None.
        in_shape: axes of the input that make up D, as in `nnx.LinearGeneral`; `(D,)` when None.
        out_shape: axes of the output that make up F; `(F,)` when None.
        activation: applied to the output, see `sparsax.tsvd_matmul`.
        dtype: of the computation; the promotion of input and factors when None.
        implementation: which implementation runs, see `sparsax.tsvd_matmul`.

    Raises:
        ValueError: shapes do not belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparsax.nn import TSVDLinear
        >>> dense = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
        >>> layer = TSVDLinear.from_linear(dense, tile=32, ratio=2)
        >>> layer(jnp.ones((5, 64))).shape, layer.factors.rank
        ((5, 96), 8)
    """

    def __init__(
        self, factors: TiledFactors, bias: Array | None = None, *,
        in_shape: tuple[int, ...] | None = None, out_shape: tuple[int, ...] | None = None,
        activation: Activation | None = None, dtype: typing.Any = None,
        implementation: Implementation | None = None,
    ):  # fmt: skip
        self.u, self.v = nnx.Param(factors.u), nnx.Param(factors.v)
        self.pad_in, self.pad_out = factors.pad_in, factors.pad_out
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.in_shape, self.out_shape = _shapes(factors, bias, in_shape, out_shape)
        self.activation: Activation | None = activation
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    @classmethod
    def from_linear(
        cls, linear: Dense, *, gram: Gram | None = None,
        implementation: Implementation | None = None, **how: typing.Any,
    ) -> "TSVDLinear":  # fmt: skip
        """The compressed form of a dense layer.

        Args:
            linear: an `nnx.Linear`, or an `nnx.LinearGeneral` over the last axes.
            gram: `x.T @ x` of calibration inputs, see `sparsax.tsvd`.
            implementation: see the class; for "pallas" ranks are padded to a multiple of 16.
            **how: `tile` and one of `rank`, `ratio`, `energy`, and more, see `sparsax.tsvd`.
        """
        kernel, bias, rest = read_linear(linear)
        factors = tsvd(kernel, gram=gram, **how)
        if implementation == "pallas":
            factors = factors.pad_rank(16)
        return cls(factors, bias, **rest, implementation=implementation)

    @property
    def factors(self) -> TiledFactors:
        """The kernel's factors."""
        return TiledFactors(self.u[...], self.v[...], pad_in=self.pad_in, pad_out=self.pad_out)

    def to_linear(self) -> Dense:
        """A dense layer with the same kernel (`nnx.LinearGeneral` when it has several axes)."""
        _refuse_activation(self.activation)
        return _dense(self, self.factors.to_dense())

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *in_shape]` to `[..., *out_shape]`."""
        return self._multiply(x, self.activation)

    def activated(self, x: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
        """`activation(self(x))`, in the product's own pass where kernels have it.

        Raises:
            ValueError: there is no such activation, or x is none for this layer.
        """
        if in_one_pass(activation, alone=self.activation is None):
            return self._multiply(x, activation)
        return ACTIVATIONS[activation](self(x))

    def _multiply(self, x, activation: Activation | None):
        x, factors, bias = _promote(self, x, self.factors)
        y = tsvd_matmul(x, factors, bias, activation, implementation=self.implementation)
        return y.reshape(*x.shape[:-1], *self.out_shape)


class TSVDCommonLinear(nnx.Module):
    """A linear layer whose tiles share one factor: the part that is fine-tuned.

    The parameter `common` is a `CommonParam`, the others (`tiles`, `residual`, `bias`) are plain
    ones, to be left out of training.

    Args:
        factors: from `sparsax.tsvd_common`.
        bias: `[F]`, or None.
        residual: `[D, F]` added to the factors' product; None is mode "compressed".
        in_shape: see `TSVDLinear`.
        out_shape: see `TSVDLinear`.
        dtype: see `TSVDLinear`.
        implementation: see `sparsax.tsvd_common_matmul`.

    Raises:
        ValueError: shapes do not belong together.

    Example:
        >>> from flax import nnx
        >>> from sparsax.nn import CommonParam, TSVDCommonLinear
        >>> dense = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
        >>> layer = TSVDCommonLinear.from_linear(dense, tile=16, ratio=2, mode="residual")
        >>> nnx.state(layer, CommonParam)["common"].shape
        (7, 16)
    """

    def __init__(
        self, factors: CommonFactors, bias: Array | None = None, *, residual: Array | None = None,
        in_shape: tuple[int, ...] | None = None, out_shape: tuple[int, ...] | None = None,
        dtype: typing.Any = None, implementation: Implementation | None = None,
    ):  # fmt: skip
        self.tiles, self.common = nnx.Param(factors.tiles), CommonParam(factors.common)
        self.pad = factors.pad
        self.side: Side = factors.side
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.residual = nnx.data(None if residual is None else nnx.Param(residual))
        self.in_shape, self.out_shape = _shapes(factors, bias, in_shape, out_shape)
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    @classmethod
    def from_linear(
        cls, linear: Dense, *, mode: Mode = "compressed", gram: Gram | None = None,
        implementation: Implementation | None = None, **how: typing.Any,
    ) -> "TSVDCommonLinear":  # fmt: skip
        """The form for fine-tuning of a dense layer.

        Args:
            linear: an `nnx.Linear`, or an `nnx.LinearGeneral` over the last axes.
            mode: "compressed" keeps the factors alone, so the layer is smaller from the start;
                "residual" keeps what they miss as well, so its output starts out unchanged.
            gram: see `sparsax.tsvd_common`.
            implementation: see the class; for "pallas" ranks are padded to a multiple of 16.
            **how: `tile`, one of `rank` and `ratio`, and `side`, see `sparsax.tsvd_common`.
        """
        if mode not in typing.get_args(Mode):
            raise ValueError(f"mode must be one of {typing.get_args(Mode)}; got {mode!r}.")
        kernel, bias, rest = read_linear(linear)
        factors = tsvd_common(kernel, gram=gram, **how)
        if implementation == "pallas":
            factors = factors.pad_rank(16)
        residual = None
        if mode == "residual":
            residual = (kernel.astype(jnp.float32) - factors.to_dense()).astype(kernel.dtype)
        return cls(factors, bias, residual=residual, **rest, implementation=implementation)

    @property
    def factors(self) -> CommonFactors:
        """The kernel's factors, without the residual."""
        return CommonFactors(self.tiles[...], self.common[...], pad=self.pad, side=self.side)

    def to_linear(self) -> Dense:
        """A dense layer with the same kernel, residual included: merging."""
        kernel = self.factors.to_dense()
        if self.residual is not None:
            kernel += self.residual[...].astype(jnp.float32)
        return _dense(self, kernel)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *in_shape]` to `[..., *out_shape]`."""
        return self._multiply(x, None)

    def activated(self, x: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
        """`activation(self(x))`, in the product's own pass where kernels have it.

        Raises:
            ValueError: there is no such activation, or x is none for this layer.
        """
        if in_one_pass(activation, alone=self.residual is None):
            return self._multiply(x, activation)
        return ACTIVATIONS[activation](self(x))

    def _multiply(self, x, activation: Activation | None):
        x, factors, bias = _promote(self, x, self.factors)
        y = tsvd_common_matmul(x, factors, bias, activation, implementation=self.implementation)
        if self.residual is not None:
            y += x @ self.residual[...].astype(x.dtype)
        return y.reshape(*x.shape[:-1], *self.out_shape)


def _shapes(factors, bias, in_shape, out_shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes = factors.in_features, factors.out_features
    pair = (in_shape or (sizes[0],), out_shape or (sizes[1],))
    if tuple(map(math.prod, pair)) != sizes or (bias is not None and bias.shape != (sizes[1],)):
        raise ValueError(
            f"in_shape and out_shape must multiply to the factors' {sizes}, and bias have shape "
            f"({sizes[1]},); got {in_shape}, {out_shape} and "
            f"{None if bias is None else tuple(bias.shape)}."
        )
    return pair


def _promote(layer, x, factors):
    """Input `[..., D]`, factors and bias in the dtype of the computation."""
    axes = len(layer.in_shape)
    if x.shape[-axes:] != layer.in_shape:
        raise ValueError(f"x must end in shape {layer.in_shape}; got {tuple(x.shape)}.")
    dtype = layer.dtype
    if dtype is None:
        dtype = jnp.result_type(x, *jax.tree.leaves(factors))
    bias = None if layer.bias is None else layer.bias[...].astype(dtype)
    x = x.reshape(*x.shape[: x.ndim - axes], -1).astype(dtype)
    return x, factors.astype(dtype), bias


def _dense(layer: TSVDLinear | TSVDCommonLinear, kernel: Float[Array, "D F"]) -> Dense:
    bias = None if layer.bias is None else layer.bias[...]
    kernel = kernel.astype(jax.tree.leaves(layer.factors)[0].dtype)
    return make_linear(kernel, bias, layer.in_shape, layer.out_shape, layer.dtype)


def _refuse_activation(activation) -> None:
    if activation is not None:
        raise ValueError(f"a dense linear layer has no activation; this one has {activation!r}.")
