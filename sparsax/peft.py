"""Fine-tuning a few parameters: adapters saved alone, and merged."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from sparsax.nn import (
    CommonParam,
    TSVDCommonLinear,
    TSVDLinear,
    named_modules,
    replace_modules,
)


def adapters(model: nnx.Module, wrt: type[nnx.Variable] = CommonParam) -> dict[str, jax.Array]:
    """The arrays that are fine-tuned, by path: e.g. `"blocks.0.up.common"`.

    Args:
        model: any nnx model.
        wrt: type of the variables, as the optimizer's `wrt`.

    Raises:
        ValueError: the model has none.
    """
    found = nnx.to_flat_state(nnx.state(model, wrt))
    if not found:
        raise ValueError(
            f"the model must have variables of type {wrt.__name__}; {type(model).__name__} has "
            "none. Convert it first, e.g. with sparsax.rules.TSVDCommon."
        )
    return {_name(path): value.get_value() for path, value in found}


def save_adapters(
    path: str | os.PathLike, model: nnx.Module, wrt: type[nnx.Variable] = CommonParam
) -> None:
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


def load_adapters(
    path: str | os.PathLike, model: nnx.Module, wrt: type[nnx.Variable] = CommonParam
) -> None:
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


def merge[M: nnx.Module](model: M) -> M:
    """A copy of a model in which every factored layer is a dense layer again.

    Raises:
        ValueError: the model has no factored layer, or one with an activation of its own.

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
    dense = {
        path: module.to_linear()
        for path, module in named_modules(new).items()
        if path and isinstance(module, TSVDLinear | TSVDCommonLinear)
    }
    if not dense:
        raise ValueError(f"the model has no factored layer; got {type(model).__name__}.")
    replace_modules(new, dense)
    return new


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
