"""What the routers of a model did, and turning all of them at once."""

import typing

from flax import nnx

from sparsax.nn.ffn import RoutedFFN, RoutingRecord
from sparsax.nn.surgery import named_modules
from sparsax.routing import update_bias


def call_with_routing(
    model: nnx.Module, *args: typing.Any, **kwargs: typing.Any
) -> tuple[typing.Any, dict[str, RoutingRecord]]:
    """`model(*args, **kwargs)`, and what the router of every `RoutedFFN` in it did, by path.

    Works inside jit and inside the function that is differentiated. The model is left as it was.

    Returns:
        `(output, records)`.

    Raises:
        ValueError: the model has no `RoutedFFN`, or did not call one of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparsax.nn import RoutedFFN, call_with_routing
        >>> up, down = nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 8, rngs=nnx.Rngs(1))
        >>> layer = RoutedFFN.from_dense(up, down, num_blocks=4, active=2, rngs=nnx.Rngs(2))
        >>> model = nnx.Sequential(layer, nnx.relu)
        >>> y, records = call_with_routing(model, jnp.ones((5, 8)))
        >>> sorted(records), int(records["layers.0"].plan.group_sizes.sum())
        (['layers.0'], 10)
    """
    layers = _layers(model)
    for layer in layers.values():
        layer.watched = True
    try:
        output = model(*args, **kwargs)
        if silent := [path for path, layer in layers.items() if not hasattr(layer, "routing")]:
            raise ValueError(f"the model must call all of its RoutedFFN; it left out {silent}.")
        return output, {path: layer.routing.get_value() for path, layer in layers.items()}
    finally:
        for layer in layers.values():
            layer.watched = False
            if hasattr(layer, "routing"):
                del layer.routing


def set_active(model: nnx.Module, active: int) -> None:
    """Sets the number of active blocks of every `RoutedFFN` of a model, in place.

    Raises:
        ValueError: the model has none, or one with fewer blocks.
    """
    for path, layer in _layers(model).items():
        if not 1 <= active <= (count := layer.w_up.shape[-3]):
            raise ValueError(f"active must be within [1, {count}], the blocks of {path!r}; "
                             f"got {active}.")  # fmt: skip
    for layer in _layers(model).values():
        layer.active = active


def balance_step(model: nnx.Module, records: dict[str, RoutingRecord], rate: float = 1e-3) -> None:
    """Moves the bias of every layer's choice towards even use, in place: balance without a loss.

    Call it once a step, outside of the gradient, with the records of the batch.
    See `sparsax.routing.update_bias`.
    """
    for path, layer in _layers(model).items():
        sizes = records[path].plan.group_sizes
        layer.choice_bias[...] = update_bias(layer.choice_bias[...], sizes, rate)


def _layers(model: nnx.Module) -> dict[str, RoutedFFN]:
    found = {p: m for p, m in named_modules(model).items() if isinstance(m, RoutedFFN)}
    if not found:
        raise ValueError(
            f"the model has no sparsax.nn.RoutedFFN layer; got {type(model).__name__}."
        )
    return found
