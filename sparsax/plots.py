"""Figures from plain arrays (needs the `plots` extra)."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sparsax.compound import CompoundPattern
from sparsax.layouts import BlockPattern
from sparsax.patterns import spion
from sparsax.typing import ArrayLike, ScoreMap


def spion_figure(
    maps: ScoreMap, patterns: dict[str, BlockPattern], *, block: int, head: int = 0
) -> Figure:
    """A row for every layer: score map, convolved map, pooled map, and the block masks.

    Args:
        maps: score maps `[L, P, T, T]`.
        patterns: stacked patterns `[L, P, ...]` by the name to print above them.
        block: tokens in a block.
        head: pattern head to show.

    Returns:
        The figure; save it with `figure.savefig(path)`.
    """
    convolved = np.stack([spion.diagonal_convolution(each[head]) for each in maps])
    shown = {
        "score map": np.asarray(maps[:, head]),
        "diagonal convolution": convolved,
        "average pool": np.stack([spion.average_pool(each, block) for each in convolved]),
    }
    masks = {name: np.asarray(pattern.to_block_mask()) for name, pattern in patterns.items()}
    # A pattern that the heads share serves them all.
    chosen = {name: mask[:, min(head, mask.shape[1] - 1)] for name, mask in masks.items()}
    return pattern_figure(shown, chosen)


def pattern_figure(
    maps: Mapping[str, Float[ArrayLike, "L _ _"]],
    masks: Mapping[str, Bool[ArrayLike, "L n n"] | Float[ArrayLike, "L n n"]],
) -> Figure:
    """A row for every layer: maps, pooled or not, and block masks.

    Args:
        maps: score maps by the name to print above them.
        masks: block masks likewise, or the shares of coarser blocks that are listed.

    Returns:
        The figure; save it with `figure.savefig(path)`.
    """
    layers, columns = len(next(iter({**maps, **masks}.values()))), [*maps, *masks]
    figure = Figure(figsize=(2 * len(columns), 2.2 * layers), layout="constrained")
    axes = figure.subplots(layers, len(columns), squeeze=False)
    for layer, row in enumerate(axes):
        row[0].set_ylabel(f"layer {layer}", fontsize=8)
        for axis, name in zip(row, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            if layer == 0:
                axis.set_title(name, fontsize=8)
            if name in maps:
                image = np.asarray(maps[name][layer])
                # A few huge entries would leave the rest black.
                axis.imshow(image, cmap="magma", vmax=float(np.quantile(image, 0.99)))
            else:
                mask = np.asarray(masks[name][layer])
                axis.imshow(mask, cmap="Greys", vmin=0, vmax=1)
                axis.set_xlabel(f"density {mask.mean():.3f}", fontsize=7)
    return figure


def curve_figure(
    panels: dict[str, dict[str, tuple[Sequence[int], Sequence[float]]]],
) -> Figure:
    """A panel for every name, with a line for every method: `{panel: {method: (steps, values)}}`.

    The legend is that of the first panel.

    Returns:
        The figure; save it with `figure.savefig(path)`.
    """
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for number, (name, (steps, values)) in enumerate(lines.items()):
            style = ("-", "--", ":")[number // 10 % 3]
            axis.plot(steps, values, style, color=f"C{number % 10}", lw=1, label=name)
        axis.set(title=title, xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def slice_figure(pattern: CompoundPattern, *, sample: int = 0, head: int = 0) -> Figure:
    """The pairs of a compound pattern, coloured by the part that computes them.

    Args:
        pattern: a single pattern; dense arrays of `[T, T]` are made.
        sample: sample to show.
        head: pattern head to show.

    Returns:
        The figure; save it with `figure.savefig(path)`.
    """
    owner = np.zeros((pattern.seq_len, pattern.seq_len), int)
    masks = pattern.part_masks()
    for number, mask in reversed(list(enumerate(masks.values(), start=1))):
        samples, heads = mask.shape[:2]  # 1 where all share it
        owner[np.asarray(mask[min(sample, samples - 1), min(head, heads - 1)])] = number
    colors = ["white", *colormaps["tab10"].colors[: len(masks)]]  # pyright: ignore
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    bounds = BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors))
    axis.imshow(owner, cmap=ListedColormap(colors), norm=bounds, interpolation="nearest")
    axis.set(xlabel="key", ylabel="query")
    shares = [f"{name} {(owner == i).mean():.3f}" for i, name in enumerate(masks, start=1)]
    handles = [Patch(color=color) for color in colors[1:]]
    figure.legend(handles, shares, loc="outside right upper", fontsize=8)
    return figure
