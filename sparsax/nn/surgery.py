"""Finding modules of a model by path, and putting others in their place."""

from collections.abc import Iterator, Mapping

from flax import nnx


def named_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every module of a model by its path, e.g. `"encoder.blocks.0.up"`; shared ones once.

    Example:
        >>> from flax import nnx
        >>> from sparsax.nn import named_modules
        >>> linear = lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        >>> list(named_modules(nnx.Sequential(linear(), nnx.relu, linear())))
        ['', 'layers', 'layers.0', 'layers.2']
    """
    paths = dict(nnx.iter_modules(model))
    # Numbers before names, so that layer 10 comes after layer 9.
    order = sorted(paths, key=lambda path: [(isinstance(k, str), k) for k in path])
    return {".".join(map(str, path)): paths[path] for path in order}


def replace_modules(model: nnx.Module, new: Mapping[str, nnx.Module]) -> None:
    """Puts modules in the place of those at the given paths, wherever the model refers to them.

    Changes the model: give it a copy, as from `nnx.clone`.

    Raises:
        ValueError: a path names no module, or the model itself, which has no place.
    """
    found = named_modules(model)
    if missing := [path for path in new if not path or path not in found]:
        raise ValueError(f"paths must name modules within the model; got {missing}.")
    by_identity = {id(found[path]): module for path, module in new.items()}
    for parent in found.values():
        for name, child in list(_children(parent)):
            if id(child) in by_identity:
                setattr(parent, name, by_identity[id(child)])


def _children(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    for name, value in vars(module).items():
        if isinstance(value, nnx.Module):
            yield name, value
