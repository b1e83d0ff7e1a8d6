"""How evenly blocks are used, and what makes their use even."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Utilisation(typing.NamedTuple):
    """How evenly the blocks of a plan are used.

    Attributes:
        share: of all choices that each block got, `[G]`.
        imbalance: the largest share over the mean one; 1 is even, G is a single block.
        unused: share of the blocks that nobody chose.
        entropy: of the shares, over that of even ones; 1 is even, 0 is a single block.
    """

    share: Float[Array, " G"]
    imbalance: Float[Array, ""]
    unused: Float[Array, ""]
    entropy: Float[Array, ""]


def utilisation(group_sizes: Int[Array, " G"]) -> Utilisation:
    """How evenly blocks are used.

    Args:
        group_sizes: of a `RoutingPlan`, or summed over batches or devices.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> float(sparsax.routing.utilisation(jnp.array([6, 2, 0, 0])).imbalance)
        3.0
    """
    share, count = _share(group_sizes), group_sizes.shape[0]
    entropy = -jax.scipy.special.xlogy(share, share).sum() / jnp.log(max(count, 2))
    return Utilisation(share, share.max() * count, (group_sizes == 0).mean(), entropy)


def balance_loss(
    probabilities: Float[Array, "*B G"],
    group_sizes: Int[Array, " G"],
    *,
    mask: Bool[Array, "*B"] | None = None,
) -> Float[Array, ""]:
    """`G sum_g f_g P_g`: 1 when blocks are used evenly, G when every token wants the same one.

    f_g is the share of all choices that block g got, P_g the mean over tokens of its share of the
    token's probability. Add it to the loss, times about 0.01.

    Args:
        probabilities: of the router, `[*B, G]`; the gradient flows through them alone. They need
            not sum to 1, and their overall size does not matter.
        group_sizes: of the plan.
        mask: False for tokens that do not count, `[*B]`.

    Source: Fedus et al., "Switch Transformers" (arXiv 2101.03961), equations 4-6; shares of
    sigmoids as in DeepSeek-V3 (arXiv 2412.19437), equations 17-20.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> p = jnp.array([[0.6, 0.2], [0.9, 0.3]])  # both tokens want block 0
        >>> plan = sparsax.route_top_k(p, 1)
        >>> float(sparsax.routing.balance_loss(p, plan.group_sizes))
        1.5
    """
    p = probabilities.astype(jnp.float32)
    p = p / jnp.maximum(p.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    weight = jnp.ones(p.shape[:-1]) if mask is None else mask.astype(jnp.float32)
    tokens = tuple(range(p.ndim - 1))
    mean = (p * weight[..., None]).sum(tokens) / jnp.maximum(weight.sum(), 1.0)
    return group_sizes.shape[0] * (_share(group_sizes) * mean).sum()


def update_bias(
    bias: Float[Array, " G"], group_sizes: Int[Array, " G"], rate: float = 1e-3
) -> Float[Array, " G"]:
    """The bias of the choice after a batch: higher for blocks used too little, lower for others.

    Balances without a loss, so without a gradient that disturbs the task's. Call it once a step,
    outside of the gradient, and pass the result to `route_top_k(bias=...)`.

    Args:
        bias: so far; zeros at the start.
        group_sizes: of the batch, summed over devices.
        rate: of change.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts"
    (arXiv 2408.15664), algorithm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> sparsax.routing.update_bias(jnp.zeros(3), jnp.array([4, 2, 0]), rate=0.5).tolist()
        [-0.5, 0.0, 0.5]
    """
    # Whole numbers, so that an even share is exactly even.
    excess = group_sizes * group_sizes.shape[0] - group_sizes.sum()
    return bias - rate * jnp.sign(excess).astype(bias.dtype)


def _share(group_sizes):
    return group_sizes / jnp.maximum(group_sizes.sum(), 1).astype(jnp.float32)
