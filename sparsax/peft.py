"""Fine-tuning a few parameters: adapters saved alone, and merged."""

import os
import typing
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from sparsax.nn import (
    CommonParam,
    LoRALinear,
    RoutedFFN,
    TSVDCommonLinear,
    TSVDLinear,
    named_modules,
    replace_modules,
)

# A type of variables, or what nnx.Any and its kin make: a predicate of path and variable.
Filter = type[nnx.Variable] | Callable[..., bool]


def adapters(model: nnx.Module, wrt: Filter = CommonParam) -> dict[str, jax.Array]:
    """The arrays that are fine-tuned, by path: e.g. `"blocks.0.up.common"`.

    Args:
        model: any nnx model.
        wrt: type of the variables, or another filter, as the optimizer's `wrt`; for SPT
            `nnx.Any(nnx.LoRAParam, RouterParam)`, and its `Codebooks` where they moved.

    Raises:
        ValueError: the model has none.
    """
    found = nnx.to_flat_state(nnx.state(model, wrt))
    if not found:
        raise ValueError(
            f"the model must have variables of type {getattr(wrt, '__name__', wrt)}; "
            f"{type(model).__name__} has none. Convert it first, e.g. with "
            "sparsax.rules.TSVDCommon."
        )
    return {_name(path): value.get_value() for path, value in found}


def save_adapters(path: str | os.PathLike, model: nnx.Module, wrt: Filter = CommonParam) -> None:
    """Writes a model's adapters, and nothing else, to a safetensors file.

    Needs the `safetensors` extra. Arguments as of `adapters`.

    Example:
        >>> import tempfile
        >>> import sparsax
        >>> from flax import nnx
        >>> from sparsax.nn import Encoder
        >>> path = Path(tempfile.mkdtemp()) / "adapters.safetensors"
        >>> rule = sparsax.rules.TSVDCommon(path=".*up", tile=32, ratio=4)
        >>> model, _ = sparsax.sparsify(Encoder(9, 8, rngs=nnx.Rngs(0)), [rule])
        >>> sparsax.peft.save_adapters(path, model)
        >>> sparsax.peft.load_adapters(path, model)
    """
    from safetensors.flax import save_file

    save_file(adapters(model, wrt), os.fspath(path))


def load_adapters(path: str | os.PathLike, model: nnx.Module, wrt: Filter = CommonParam) -> None:
    """Sets a model's adapters to those of a file, in place.

    Args:
        path: written by `save_adapters`.
        model: converted like the one that was saved.
        wrt: as of `adapters`.

    Raises:
        ValueError: names or shapes differ.
    """
    from safetensors.flax import load_file

    saved, mine = load_file(os.fspath(path)), adapters(model, wrt)
    shapes = lambda arrays: {name: tuple(array.shape) for name, array in arrays.items()}
    if shapes(saved) != shapes(mine):
        differing = set(shapes(saved).items()) ^ set(shapes(mine).items())
        raise ValueError(
            f"{Path(path).name} must hold this model's adapters; these names or shapes are in "
            f"one of the two only: {sorted(differing)}."
        )
    state = nnx.state(model, wrt)
    cast = lambda path, old: jnp.asarray(saved[_name(path)], old.dtype)
    flat = [(path, old.replace(cast(path, old))) for path, old in nnx.to_flat_state(state)]
    nnx.update(model, nnx.from_flat_state(flat))


class Count(typing.NamedTuple):
    """Numbers that are trained, and all parameters of the model."""

    trainable: int
    total: int

    def __repr__(self) -> str:
        return f"(trainable={self.trainable}, total={self.total})"


def count_parameters(model: nnx.Module, wrt: Filter) -> Count:
    """How many numbers fine-tuning trains, and how many parameters there are.

    Arguments and errors as of `adapters`. `rules.LoRA` has an example.
    """
    trainable = sum(array.size for array in adapters(model, wrt).values())
    return Count(trainable, sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))


def trainable_mask(model: nnx.Module, wrt: Filter) -> typing.Any:
    """True where a parameter is fine-tuned: an `nnx.State` like `nnx.state(model, nnx.Param)`.

    For optax without `nnx.Optimizer`, whose `wrt` needs no mask. Errors as of `adapters`.

    Example:
        >>> import optax
        >>> import sparsax
        >>> from flax import nnx
        >>> model = sparsax.nn.Encoder(9, 8, rngs=nnx.Rngs(0))
        >>> tuned, _ = sparsax.sparsify(model, [sparsax.rules.LoRA(path=".*up", rank=4)])
        >>> mask = sparsax.peft.trainable_mask(tuned, nnx.LoRAParam)
        >>> tx = optax.chain(
        ...     optax.masked(optax.adam(1e-3), mask),
        ...     optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, mask)),
        ... )
        >>> state = tx.init(nnx.state(tuned, nnx.Param))
    """
    chosen = adapters(model, wrt)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.from_flat_state(
        [(path, value.replace(_name(path) in chosen)) for path, value in flat]
    )


def merge[M: nnx.Module](model: M) -> M:
    """A copy of a model in which every factored layer, and every one with LoRA, is dense again.

    A routed feed-forward layer stays routed, with LoRA summed into its blocks.

    Raises:
        ValueError: the model has no such layer, or one with an activation of its own.

    Example:
        >>> import sparsax
        >>> from flax import nnx
        >>> model = sparsax.nn.Encoder(9, 8, rngs=nnx.Rngs(0))
        >>> small, _ = sparsax.sparsify(model, [sparsax.rules.TSVD(path=".*up", ratio=2)])
        >>> type(small.blocks[0].up).__name__
        'TSVDLinear'
        >>> type(sparsax.peft.merge(small).blocks[0].up).__name__
        'Linear'
    """
    new = nnx.clone(model)
    modules = named_modules(new)
    dense = {
        path: module.to_linear()
        for path, module in modules.items()
        if path and isinstance(module, TSVDLinear | TSVDCommonLinear | LoRALinear)
    }
    routed = [m for m in modules.values() if isinstance(m, RoutedFFN) and m.lora is not None]
    if not dense and not routed:
        raise ValueError(
            f"the model must have a factored layer or one with LoRA; got {type(model).__name__}."
        )
    replace_modules(new, dense)
    for layer in routed:
        layer.merge_lora()
    return new


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
