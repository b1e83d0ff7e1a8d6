"""Published models: a folder with `config.json` and `model.safetensors`, by PyTorch's names."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from sparsax.typing import ArrayLike


def read_config(folder: str | os.PathLike, cls: type, kind: Mapping[str, Any]) -> Any:
    """The dataclass `cls` from the fields of `config.json`.

    Args:
        folder: holds the file.
        cls: its fields are those that are read.
        kind: values that the file must have where it names the field, lest it describe a model that
            this module does not compute.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it describes another kind of model.
    """
    fields = json.loads((Path(folder) / "config.json").read_text())
    if odd := {k: fields[k] for k, value in kind.items() if fields.get(k, value) != value}:
        raise ValueError(f"config.json must describe {dict(kind)}; got {odd}.")
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: fields[name] for name in names if name in fields})


def read_model[M: nnx.Module](
    folder: str | os.PathLike,
    make: Callable[[], M],
    name_of: Callable[[tuple[Any, ...]], str],
    *,
    prefix: str,
) -> M:
    """The model with the weights of `model.safetensors`, in the dtypes that `make` gives them.

    Needs the `safetensors` extra.

    Args:
        folder: holds the file.
        make: makes the model; it is made in the abstract: no random numbers for what is read.
        name_of: the weight's name by its path in the model.
        prefix: what names begin with in files of models with a head.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a weight is missing or has another shape.
    """
    from safetensors.numpy import load_file

    model = nnx.eval_shape(make)
    state = nnx.to_flat_state(nnx.state(model))
    weights = load_file(Path(folder) / "model.safetensors")
    read = [
        (path, old.replace(_weight(weights, name_of(path), prefix, path[-1], old)))
        for path, old in state
    ]
    nnx.update(model, nnx.from_flat_state(read))
    return model


def _weight(weights: Mapping[str, ArrayLike], name: str, prefix: str, leaf: Any, old) -> Array:
    found = name if name in weights else prefix + name
    if found not in weights:
        raise ValueError(f"the weights must hold {name!r}; it is missing.")
    weight = weights[found]
    weight = weight.T if leaf == "kernel" else weight  # PyTorch stores [F, D]
    shapes = _joined(old.shape) if leaf in ("kernel", "bias") else [old.shape]
    if weight.shape not in shapes:
        raise ValueError(f"{found!r} must be {shapes[0]} by config.json; got {weight.shape}.")
    return jnp.asarray(weight.reshape(old.shape), old.dtype)


def _joined(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the matrix or vector that heads were split out of; PyTorch knows no heads."""
    if len(shape) == 3:  # D N H, or N H D
        return [(shape[0], math.prod(shape[1:])), (math.prod(shape[:2]), shape[2])]
    return [shape, (math.prod(shape),)]
