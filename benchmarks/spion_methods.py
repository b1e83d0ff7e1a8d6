"""Patterns of every method of the SPION comparison, from the maps of one dense model.

Methods that name a density list as many blocks in every layer, or together: the budget of
`Setting.density`, a forced band among them. "-paper" is SPION as published: its own quantile or
density, and nothing forced but the diagonal.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsax import BlockPattern
from sparsax.patterns import mass, spion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the patterns of a task have in common."""

    length: int
    block: int
    layers: int
    causal: bool
    density: float  # listed blocks over those that may be listed
    band: int
    equal_rows: bool  # of the search by mass
    quantile: float  # of the paper, CF and F
    paper_density: float  # of the paper, C
    cover: float
    seed: int

    @classmethod
    def of(cls, size: Any, **others: Any) -> "Setting":
        """That of a task's `spion_task.Size`, with what it does not say."""
        names = [f.name for f in dataclasses.fields(cls) if f.name not in others]
        return cls(**{name: getattr(size, name) for name in names}, **others)

    @property
    def blocks(self) -> int:
        """Rows of blocks."""
        return -(-self.length // self.block)

    @property
    def count(self) -> int:
        """Blocks of a layer."""
        return round(self.density * int(mass.bands(self.blocks, 0, self.causal)[1].sum()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps:
    """What there is to search in.

    Attributes:
        whole: `[L, 1, T, T]` at the transition, or None where that is too large.
        pooled: the same as means over blocks, `[L, 1, n, n]`.
        heads: one for every head, `[L, N, n, n]`.
        final: `pooled` of the dense model when it was trained to the end, or None.
        weights: how much the loss minds what each layer loses, `[L]`, or None where no method asks.
    """

    whole: Any
    pooled: Any
    heads: Any
    final: Any
    weights: Any = None


def by_mass(setting: Setting, maps, **changes) -> BlockPattern:
    """The search by mass, of pooled maps; of whole ones with `length=None`."""
    options: dict[str, Any] = {
        "density": setting.density, "band": setting.band, "length": setting.length,
        "objective": "mass",
    } | changes  # fmt: skip
    return mass.search(
        maps, block=setting.block, causal=setting.causal, equal_rows=setting.equal_rows, **options
    )


@functools.partial(jax.jit, static_argnames=("block", "variant", "pool"))
def pictures(maps, *, block: int, variant: str, pool: bool):
    """What SPION's variants choose blocks by, `[L, n, n]`: -inf where they would not list one."""

    def one(score_map):
        if "C" in variant:
            score_map = spion.diagonal_convolution(score_map)
        pooled = spion.average_pool(score_map, block) if pool else score_map
        if variant == "C":
            return pooled
        stepped = spion.flood_fill(pooled, -jnp.inf)  # a higher threshold marks the largest of them
        return jnp.where(stepped, pooled, -jnp.inf)

    return jax.lax.map(one, maps[:, 0])


def largest(setting: Setting, scores: np.ndarray, *, band: int | None = None) -> BlockPattern:
    """The band, and the blocks of the largest scores `[L, n, n]`, as many in every layer."""
    forced, listable = mass.bands(
        setting.blocks, setting.band if band is None else band, setting.causal
    )
    scores = np.where(forced, np.inf, np.where(listable, scores, -np.inf))
    flat = scores.reshape(setting.layers, -1)
    order = np.argsort(-flat, axis=-1, kind="stable")[:, : setting.count]
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return patterned(setting, (mask & (flat > -np.inf)).reshape(scores.shape))


def patterned(setting: Setting, mask: np.ndarray) -> BlockPattern:
    """The stacked pattern of block masks `[L, n, n]`."""
    return BlockPattern.from_block_mask(mask[:, None], q_len=setting.length, block_q=setting.block)


def matched(setting: Setting, maps: Maps, variant: str) -> BlockPattern:
    """SPION's variant with the forced band and as many blocks as every other method."""
    whole = maps.whole is not None
    found = pictures(
        maps.whole if whole else maps.pooled, block=setting.block, variant=variant, pool=whole
    )
    return largest(setting, np.asarray(found))


def published(setting: Setting, maps: Maps, variant: str) -> BlockPattern:
    """SPION's variant as it stands in the paper."""
    options = {"quantile": setting.quantile, "density": setting.paper_density}
    if maps.whole is None:
        return spion.search(
            maps.pooled, block=setting.block, variant=variant, length=setting.length, **options
        )
    return spion.search(maps.whole, block=setting.block, variant=variant, **options)


def control(setting: Setting, kind: str) -> BlockPattern:
    """A pattern that looked at no map."""
    rng = np.random.default_rng([setting.seed, len(kind)])
    i = np.arange(setting.blocks)
    gap = np.broadcast_to(abs(i - i[:, None]), (setting.layers, *[setting.blocks] * 2))
    drawn = rng.random(gap.shape)
    if kind == "diagonal":
        return patterned(setting, gap == 0)
    if kind == "random":
        return largest(setting, drawn)
    if kind == "window":
        return largest(setting, drawn - gap, band=0)
    edge = (i == 0) | ((i == 0)[:, None] & (not setting.causal))  # the first block, both ways
    if kind == "bigbird":
        return largest(setting, drawn + edge + (gap <= 1), band=0)
    return largest(setting, drawn - gap + 2 * setting.blocks * edge, band=0)  # longformer


def _oracle(setting: Setting, maps: Maps) -> BlockPattern:
    if maps.final is None:
        raise ValueError("the oracle reads the final maps of dense: name it after dense.")
    return by_mass(setting, maps.final)


Find = Callable[[Setting, Maps], BlockPattern]
FINDERS: dict[str, Find] = {
    "budget": lambda s, m: by_mass(s, m.pooled),
    "layer": lambda s, m: by_mass(s, m.pooled, spread="layer"),
    "heads": lambda s, m: by_mass(s, m.heads),
    "square": lambda s, m: by_mass(s, m.pooled, objective="square"),
    "square-layer": lambda s, m: by_mass(s, m.pooled, objective="square", spread="layer"),
    "weighted": lambda s, m: by_mass(s, m.pooled, objective="square", weights=m.weights),
    "weighted-heads": lambda s, m: by_mass(s, m.heads, objective="square", weights=m.weights),
    "cover": lambda s, m: by_mass(s, m.pooled, density=None, cover=s.cover),
    "again": lambda s, m: by_mass(s, m.pooled),  # and once more in the middle of the sparse phase
    "oracle": _oracle,
}
for _variant in ("CF", "F", "C"):
    FINDERS[_variant] = functools.partial(matched, variant=_variant)
    FINDERS[f"{_variant}-paper"] = functools.partial(published, variant=_variant)
CONTROLS = ("diagonal", "random", "window", "bigbird", "longformer")
for _kind in CONTROLS:
    FINDERS[_kind] = lambda s, _, kind=_kind: control(s, kind)

NEEDS_WHOLE = ("CF", "C", "CF-paper", "C-paper")  # the convolution comes before the pooling
METHODS = ("dense", *FINDERS)


def split_name(name: str) -> tuple[str, str]:
    """The method and what pruned keys count: "budget:zero" is ("budget", "zero")."""
    method, _, pruned = name.partition(":")
    if method not in METHODS or pruned not in ("", "drop", "zero"):
        raise SystemExit(f"a method is one of {', '.join(METHODS)}, or that and :zero; got {name}")
    return method, pruned or "drop"


def kind_of(name: str) -> str:
    """Methods of one kind are one compiled program."""
    method, pruned = split_name(name)
    if method == "dense":
        return "dense"
    return f"{'heads' if method.endswith('heads') else 'shared'} {pruned}"


def search_of(name: str) -> str | None:
    """Methods of one search are one compiled search; None where there is none."""
    method = split_name(name)[0]
    if method == "dense" or method in CONTROLS:
        return None
    return f"search of {'budget' if method == 'oracle' else method}"
