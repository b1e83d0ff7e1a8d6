"""Arrays that stand one behind the other along a kernel's positions, each in memory of its own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class Segments:
    """References, and the position at which each of them begins; the first one at 0."""

    refs: tuple[Any, ...]
    starts: tuple[int, ...]

    def at(self, position, run: Callable[[Any, Any], None]) -> None:
        """`run(reference, place in it)` for what holds a position, a scalar of the kernel."""
        ends = *self.starts[1:], None
        for ref, start, end in zip(self.refs, self.starts, ends, strict=True):
            go = lambda ref=ref, start=start: run(ref, position - start if start else position)
            conditions = [position >= start] if start else []
            conditions += [] if end is None else [position < end]
            if conditions:
                pl.when(functools.reduce(jnp.logical_and, conditions))(go)
            else:
                go()


def split(refs: list[Any], *starts: tuple[int, ...]) -> tuple[Any, ...]:
    """Segments of leading references for each of `starts`, and a list of what follows."""
    found = []
    for of_one in starts:
        found.append(Segments(tuple(refs[: len(of_one)]), of_one))
        refs = refs[len(of_one) :]
    return *found, refs
