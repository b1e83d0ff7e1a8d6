"""How much a model's loss minds what each layer of attention loses."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsax.layouts import BlockPattern
from sparsax.patterns import mass, spion
from sparsax.typing import ArrayLike


def layer_weights(
    loss: Callable[[BlockPattern], Float[ArrayLike, ""]],
    maps: Float[ArrayLike, "L P T T"],
    *,
    block: int = 64,
    band: int = 1,
    causal: bool = False,
    equal_rows: bool = True,
    length: int | None = None,
) -> Float[Array, " L"]:
    """How much a loss rises for what each layer loses, the `weights` of `mass.search`.

    Args:
        loss: of a model under a stacked pattern, e.g. on a few held-out batches after
            `sparsax.nn.set_patterns`; it is called L + 1 times, with one shape of pattern.
        maps: as for `mass.search`.
        block: as for `mass.search`, like all that follow.
        band: of the patterns; the layers in turn keep nothing else.
        causal: whether patterns list no block above the diagonal.
        equal_rows: False where queries are padding in some samples.
        length: T, when the maps are pooled already.

    Returns:
        The rise of the loss when a layer keeps its band alone, over the mean square of the mass
        that its rows lose by it; their mean is 1. A layer that the loss does not miss has 0, and
        when there is no other, all have 1. Look for zeros: such a layer gets the band alone, and
        on classifiers whose loss fell for some layers the search without weights did as well or
        better (docs/spion_findings.md).

    Raises:
        ValueError: the maps are not those of layers `[L, P, T, T]`, or no square ones; the band is
            negative; or a loss is not finite.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 256, 2, 16))
        >>> maps = jax.numpy.stack([sparsax.score_map(x, k, pool=32) for x in (q, 3 * q)])
        >>> loss = lambda pattern: 1 - pattern.density()[0]  # minds the first layer alone
        >>> sparsax.patterns.layer_weights(loss, maps, block=32, length=256).tolist()
        [2.0, 0.0]
    """
    if maps.ndim != 4 or band < 0:
        raise ValueError(
            f"maps must be [L, P, T, T] and band at least 0; got {tuple(maps.shape)} and {band}."
        )
    blocks = spion.check_shape(maps, block, length)
    spion.check_values(maps)
    forced, listable = mass.bands(blocks, band, causal)
    under = lambda mask: float(loss(
        BlockPattern.from_block_mask(mask, q_len=length or maps.shape[-1], block_q=block)
    ))  # fmt: skip
    whole = np.broadcast_to(listable, (*maps.shape[:2], blocks, blocks))
    first = (np.arange(len(maps)) == np.arange(len(maps))[:, None])[:, :, None, None, None]
    best, *others = losses = [under(x) for x in (whole, *np.where(first, forced, whole))]
    if not np.isfinite(losses).all():
        raise ValueError(
            "loss must be finite under all blocks, and with each layer cut to its band; got "
            f"{losses}."
        )
    rises = jnp.maximum(jnp.array(others) - best, 0.0)
    own = mass.block_mass(maps, block=block, length=length)
    if equal_rows:
        own = mass.equal_rows_of(own)
    # As the search counts: a row that is real in a share of the samples loses a share of that.
    share, held = own.sum(-1), jnp.where(forced, own, 0.0).sum(-1)
    each = jnp.square(share - held) / jnp.where(share > 0, share, 1.0)
    lost = each.sum((-2, -1)) / jnp.maximum(share.sum((-2, -1)), 1e-30)
    found = jnp.where(lost > 0, rises / lost, 0.0)
    return jnp.where(found.sum() > 0, found / jnp.maximum(found.mean(), 1e-30), 1.0)
