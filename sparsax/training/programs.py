"""The jitted functions of a run. Runs of one model, loss and optimizer share them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Int

from sparsax.data import Batches
from sparsax.nn import set_patterns


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a run calls.

    Patterns, batches, learning rate and seed are data: all runs that are dense, and all that are
    sparse with lists of one capacity, are one compiled program.

    Attributes:
        train: `(params, opt_state, rest, patterns, batch, rate, seed, step, phase_step, count)` to
            the next parameters and optimizer state and the mean metrics of `count` steps.
        maps: `(params, rest, patterns, example)` to score maps.
    """

    train: Callable[..., Any]
    maps: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def programs(graphdef: Any, loss: Any, optimizer: Any, probe: Any) -> Programs:
    """The programs of everything that is equal in these four, compiled at most once.

    Functions are equal when they are one object: a loss made anew is compiled anew. The newest
    eight stay in memory, with what their functions close over.
    """

    def train(params, opt_state, rest, patterns, batch, rate, seed, step, phase_step, *, count):
        def one(carry, ahead):
            params, opt_state = carry
            key = jax.random.fold_in(jax.random.key(seed), step + ahead)
            data = batch(step + ahead)
            # The stream is made inside: flax counts its draws at the trace level it was made at.
            objective = lambda p: loss(
                merged(graphdef, p, rest, patterns), data, nnx.Rngs(dropout=key)
            )
            (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            scale = rate(phase_step + ahead)
            updates = jax.tree.map(lambda update: -scale * update, updates)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), {"loss": value, **metrics}

        if count == 1:  # a loop of one step would keep XLA from fusing across its ends
            carry, metrics = one((params, opt_state), 0)
        else:
            carry, each = jax.lax.scan(one, (params, opt_state), jnp.arange(count))
            metrics = jax.tree.map(lambda x: x.mean(0), each)
        return *carry, metrics

    def maps(params, rest, patterns, example):
        return probe(merged(graphdef, params, rest, patterns), example)

    return Programs(jax.jit(train, donate_argnums=(0, 1), static_argnames="count"), jax.jit(maps))


def merged(graphdef: Any, params: Any, rest: Any, patterns: Any) -> nnx.Module:
    """A new module of these parameters; with `patterns` None it keeps those it came with."""
    model = nnx.merge(graphdef, params, rest, copy=True)
    if patterns is not None:
        set_patterns(model, patterns)
    return model


def as_data(function: Callable[..., Any]) -> Partial:
    """The function as a pytree, which a jitted function takes as an argument."""
    return function if isinstance(function, Partial) else Partial(function)


def given(value: Any) -> Partial:
    """A function of the step that always gives this value."""
    return Partial(_first, value)


def _first(value, _step):
    return value


def on_device(batches: Batches, steps: int) -> Partial:
    """The same batches, from data that lies on the device: what `fit(steps_per_call=)` needs.

    Args:
        batches: samples and their order; all of its tokens are copied to the device.
        steps: batches to plan ahead; later steps begin with the first one again.

    Returns:
        A function of the step, traced or not, that gives what `batches.batch(step)` gives.

    Example:
        >>> import numpy as np
        >>> from sparsax.data import Batches
        >>> from sparsax.training import on_device
        >>> batches = Batches(np.arange(10)[:, None], np.arange(10), batch_size=4, seed=0)
        >>> tokens, labels = on_device(batches, steps=20)(5)
        >>> bool((tokens == batches.batch(5)[0]).all())
        True
    """
    places = dataclasses.replace(batches, tokens=np.arange(len(batches.labels))[:, None])
    order = np.stack([places.batch(step)[0][:, 0] for step in range(steps + 1)])
    return Partial(_take, *(jnp.asarray(x) for x in (batches.tokens, batches.labels, order)))


def _take(tokens: Array, labels: Array, order: Int[Array, "M B"], step) -> tuple[Array, Array]:
    rows = order[step % len(order)]
    return tokens[rows].astype(jnp.int32), labels[rows].astype(jnp.int32)
