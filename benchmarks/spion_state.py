"""What a SPION script goes on from, as small as it gets: it is copied from machine to machine."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where every method goes on: the end of the dense phase.

    Attributes:
        step: its steps.
        state: parameters and optimizer state.
        step_seconds: of a dense step, None when none was timed.
    """

    step: int
    state: dict[str, Any]
    step_seconds: float | None


def save_start(path: Path, start: Start) -> None:
    """Writes it, all or nothing."""
    leaves = {f"leaf {i}": x for i, x in enumerate(jax.tree.leaves(start.state))}
    seconds = np.nan if start.step_seconds is None else start.step_seconds
    save_arrays(path, step=start.step, step_seconds=seconds, **leaves)


def read_start(path: Path, like: dict[str, Any]) -> Start:
    """Reads it; `like` is a state of the same structure."""
    kept = np.load(path)
    leaves = [jnp.asarray(kept[f"leaf {i}"]) for i in range(len(jax.tree.leaves(like)))]
    seconds = float(kept["step_seconds"])
    return Start(
        step=int(kept["step"]), state=jax.tree.unflatten(jax.tree.structure(like), leaves),
        step_seconds=None if np.isnan(seconds) else seconds,
    )  # fmt: skip


def save_arrays(path: Path, **arrays: Any) -> None:
    """An npz file that is whole, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **{name: np.asarray(x) for name, x in arrays.items()})
    os.replace(partial, path)  # noqa: PTH105 (atomic by name)


def mebibytes(folder: Path) -> float:
    """Of all files in a folder."""
    return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file()) / 2**20
