"""Published models: a folder with `config.json` and `model.safetensors`, by PyTorch's names."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx


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
    folder: str | os.PathLike, make: Callable[[], M], *, prefix: str
) -> M:
    """The model with the weights of `model.safetensors`, in the dtypes that `make` gives them.

    Needs the `safetensors` extra.

    Args:
        folder: holds the file.
        make: makes the model; it is made in the abstract: no random numbers for what is read.
        prefix: what names begin with in files of models with a head.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a weight is missing or has another shape.
    """
    from safetensors.numpy import load_file

    model = nnx.eval_shape(make)
    modules = dict(nnx.iter_modules(model))
    weights = load_file(Path(folder) / "model.safetensors")
    read = []
    for path, old in nnx.to_flat_state(nnx.state(model)):
        shape = _shape_in_file(modules[path[:-1]], path[-1], old.shape)
        weight = _weight(weights, _name_of(path), prefix, shape)
        weight = weight.T if path[-1] == "kernel" else weight
        read.append((path, old.replace(jnp.asarray(weight.reshape(old.shape), old.dtype))))
    nnx.update(model, nnx.from_flat_state(read))
    return model


# Where the weights of a module of that name stand in a file.
_PLACES = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "query_global": "attention.self.query_global",
    "key_global": "attention.self.key_global",
    "value_global": "attention.self.value_global",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
    "pooler": "pooler.dense",
}


def _name_of(path: tuple[Any, ...]) -> str:
    layer = f"encoder.layer.{path[1]}." if path[0] == "layers" else ""
    return f"{layer}{_PLACES[path[-2]]}.{'bias' if path[-1] == 'bias' else 'weight'}"


def _shape_in_file(module: Any, leaf: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of a leaf: kernels are [F, D], and heads are not split from features."""
    if leaf == "kernel":
        return int(np.prod(module.out_features)), int(np.prod(module.in_features))
    return shape if leaf == "embedding" else (math.prod(shape),)


def _weight(
    weights: Mapping[str, np.ndarray], name: str, prefix: str, shape: tuple[int, ...]
) -> np.ndarray:
    found = name if name in weights else prefix + name
    if found not in weights:
        raise ValueError(f"the weights must hold {name!r}; it is missing.")
    weight = weights[found]
    if weight.shape != shape:
        raise ValueError(f"{found!r} must be {shape} by config.json; got {weight.shape}.")
    return weight
