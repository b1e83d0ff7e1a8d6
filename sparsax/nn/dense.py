"""Reading and making the dense layers of flax that a factored layer stands for."""

import math
import typing

import jax
from flax import nnx
from jaxtyping import Array, Float

from sparsax import checks
from sparsax.linear import ACTIVATIONS, Activation
from sparsax.pallas.activations import ACTIVATIONS as IN_KERNELS

Dense = nnx.Linear | nnx.LinearGeneral


def read_linear(linear: Dense) -> tuple[Array, Array | None, dict[str, typing.Any]]:
    """Kernel `[D, F]`, bias `[F]`, and the options that carry over, of a dense layer.

    Raises:
        ValueError: it is no dense layer, one of stacked layers, or does more than its kernel says.
    """
    if not isinstance(linear, Dense):
        raise ValueError(f"linear must be nnx.Linear or nnx.LinearGeneral; got {linear}.")
    kernel = linear.kernel[...]
    in_shape, out_shape = ((x,) if isinstance(x, int) else tuple(x)
                           for x in (linear.in_features, linear.out_features))  # fmt: skip
    if kernel.shape != (*in_shape, *out_shape):
        raise ValueError(
            f"the kernel must be {(*in_shape, *out_shape)}, of one layer; got "
            f"{tuple(kernel.shape)}. Compress the layers one by one, then stack them."
        )
    last = tuple(range(-len(in_shape), 0))
    odd = {"precision": linear.precision, "preferred_element_type": linear.preferred_element_type}
    if linear.dot_general not in (None, jax.lax.dot_general):
        odd["dot_general"] = linear.dot_general
    if isinstance(linear, nnx.LinearGeneral):
        odd |= {"dot_general_cls": linear.dot_general_cls, "batch_axis": linear.batch_axis or None}
        axes = tuple(axis if axis < 0 else None for axis in linear.axis)
        odd["axis"] = None if axes == last else linear.axis
    if odd := {name: value for name, value in odd.items() if value is not None}:
        raise ValueError(
            f"linear must map its last axes with the default product; it has {odd}, which a "
            "factored layer would not keep."
        )
    bias = None if linear.bias is None else linear.bias[...].reshape(-1)
    rest = {"in_shape": in_shape, "out_shape": out_shape, "dtype": linear.dtype}
    return kernel.reshape(math.prod(in_shape), math.prod(out_shape)), bias, rest


def activated(layer, x: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
    """`activation(layer(x))`, in the layer's own pass where it is factored.

    A product that runs through a kernel would be read and written once more for the activation. A
    layer says how by a method `activated(x, activation)` beside its `__call__`: of a subclass that
    overrides the one, the other is not taken.
    """
    checks.one_of("activation", activation, ACTIVATIONS)
    own = next(cls for cls in type(layer).__mro__ if "__call__" in vars(cls))
    if "activated" in vars(own):
        return layer.activated(x, activation)
    return ACTIVATIONS[activation](layer(x))


def in_one_pass(activation: Activation, *, alone: bool) -> bool:
    """Whether a factored product should apply the activation, if it has nothing else to apply.

    Raises:
        ValueError: there is no such activation.
    """
    checks.one_of("activation", activation, ACTIVATIONS)
    return alone and activation in IN_KERNELS


def make_linear(
    kernel: Array, bias: Array | None, in_shape: tuple[int, ...], out_shape: tuple[int, ...],
    dtype: typing.Any,
) -> Dense:  # fmt: skip
    """The dense layer with this kernel `[D, F]` and bias `[F]`."""
    options = {"use_bias": bias is not None, "dtype": dtype, "rngs": nnx.Rngs(0)}
    if len(in_shape) == len(out_shape) == 1:
        dense = nnx.Linear(*in_shape, *out_shape, **options)
    else:
        axis = tuple(range(-len(in_shape), 0))
        dense = nnx.LinearGeneral(in_shape, out_shape, axis=axis, **options)
    dense.kernel = nnx.Param(kernel.reshape(*in_shape, *out_shape))
    if bias is not None:
        dense.bias = nnx.Param(bias.reshape(out_shape))
    return dense
