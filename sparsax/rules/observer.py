"""What rules see of a module's inputs on calibration data."""

import typing
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


class InputObserver(nnx.Module):
    """A module that also keeps the first inputs that come in, up to a number.

    Args:
        module: what is observed.
        wanted: rows `[D]` to keep; or whole sequences, with `axes=2`.
        axes: last axes of an input that belong together.
    """

    def __init__(self, module: nnx.Module, wanted: int, *, axes: int = 1):
        self.module, self.wanted, self.axes = module, wanted, axes
        self.seen: nnx.Variable[Array | None] = nnx.Variable(None)

    def __call__(self, x, **options: typing.Any):
        """The module's own output."""
        rows, before = x.reshape(-1, *x.shape[-self.axes :]), self.seen.get_value()
        rows = rows if before is None else jnp.concatenate([before, rows])
        self.seen.set_value(rows[: self.wanted])
        module: typing.Any = self.module
        return module(x, **options)


def seen_inputs(path: str, observers: Mapping[str, nnx.Module]) -> Array | None:
    """What the module's `InputObserver` kept; None without calibration.

    Raises:
        ValueError: calibration did not reach the module, or not as finite numbers.
    """
    if path not in observers:
        return None
    observer = observers[path]
    assert isinstance(observer, InputObserver)
    seen = observer.seen.get_value()
    if seen is None:
        raise ValueError(f"calibrate must run every matched layer; {path!r} was never called.")
    if not bool(jnp.isfinite(seen).all()):
        raise ValueError(
            f"calibration must reach {path!r} as finite numbers; some of its {seen.shape[0]} "
            "inputs are NaN or infinite. Are all token ids within the vocabulary?"
        )
    return seen
