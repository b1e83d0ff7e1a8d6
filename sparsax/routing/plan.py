"""Token choice: every token picks its blocks, and the choices are sorted by block."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsax.typing import ArrayLike

Coefficient = typing.Literal["gain", "straight_through", "spt"]
CHUNK, MOST_CHUNKS = 128, 256  # of what is sorted: numbers of one at least, and how many
FEW = 16  # blocks
Scaled = typing.Literal["output", "products"]


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Which k of G blocks every token goes through. A frozen pytree of static shapes.

    No token is dropped and no block has a capacity: M = tokens * k choices, sorted by block.
    `route_top_k` makes it, `sparsax.routed_ffn` runs it. For coefficients of your own, use
    `dataclasses.replace(plan, coefficients=...)`.

    Attributes:
        blocks: chosen blocks of each token, ascending, int32 `[*B, k]`; G for a masked token.
        coefficients: of each choice, float32 `[*B, k]`, differentiable; 0 for a masked token.
        order: the choices (token * k + slot) sorted by block, int32 `[M]`; stable, so tokens stay
            in order within a block, and masked ones come last.
        position: where each choice stands in `order`, int32 `[M]`.
        group_sizes: choices of each block, int32 `[G]`; masked tokens count nowhere.
        scaled: what a coefficient multiplies: the "output" of a block, or the "products" with both
            of its matrices, LoRA left out (`coefficient="spt"`).
        masked: whether there may be tokens that go through no block; static, for where there are
            none nothing need be masked.

    Source: Gui et al., "SPT: Fine-Tuning Transformer-based Language Models Efficiently with
    Sparsification" (arXiv 2312.10365), section 4.2.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> p = jnp.array([[0.9, 0.1, 0.6], [0.2, 0.7, 0.3]])
        >>> plan = sparsax.route_top_k(p, 2)
        >>> plan.blocks.tolist(), plan.order.tolist(), plan.group_sizes.tolist()
        ([[0, 2], [1, 2]], [0, 2, 1, 3], [1, 1, 2])
    """

    blocks: Int[Array, "*B k"]
    coefficients: Float[Array, "*B k"]
    order: Int[Array, " M"]
    position: Int[Array, " M"]
    group_sizes: Int[Array, " G"]
    scaled: Scaled = dataclasses.field(default="output", metadata={"static": True})
    masked: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def active(self) -> int:
        """k, the blocks of a token."""
        return self.blocks.shape[-1]

    @property
    def num_blocks(self) -> int:
        """G, all blocks."""
        return self.group_sizes.shape[-1]

    @property
    def tokens(self) -> Int[Array, " M"]:
        """The token of each sorted choice."""
        return self.order // self.active

    def mask(self) -> Bool[Array, "*B"]:
        """False for tokens that go through no block."""
        return self.blocks[..., 0] < self.num_blocks

    def zeroed(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """With zeros for those tokens: what they hold reaches nothing, not even as 0 * NaN."""
        return jnp.where(self.mask()[..., None], x, 0) if self.masked else x


def route_top_k(
    probabilities: Float[Array, "*B G"],
    k: int,
    *,
    mask: Bool[ArrayLike, "*B"] | None = None,
    bias: Float[Array, " G"] | None = None,
    coefficient: Coefficient = "straight_through",
    gain: Float[Array, " G"] | None = None,
) -> RoutingPlan:
    """Every token through the k blocks that its router finds most probable.

    Args:
        probabilities: `sigmoid(x w + b)` of the router, `[*B, G]` with any leading axes.
        k: blocks of a token, 1 to G.
        mask: False for padded tokens `[*B]`: they go through no block and count nowhere.
        bias: added to the probabilities for the choice alone, see `update_bias`.
        coefficient: "gain" is `1 + gain p`, 1 for a gain of zeros, so that a pre-trained layer
            starts out as it was. "straight_through" is `p / stop_gradient(p)`: 1 in value at all
            times, with the gradient of log p, which is that of no function: it reaches the router's
            input, too, and unsettles what is trained below. "spt" is what the released code of SPT
            computes: 2 p, on the products with both matrices of a block.
        gain: of each block, for coefficient="gain"; trained, it decides how much p counts.

    Returns:
        The plan. Ties go to the block of the lower index.

    Raises:
        ValueError: k, shapes or the name of the coefficient are wrong.

    Source: Gui et al. (arXiv 2312.10365), section 4.2; see `RoutingPlan`.

    Example:
        >>> import jax
        >>> import sparsax
        >>> p = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (2, 5, 4)))
        >>> plan = sparsax.route_top_k(p, 2)
        >>> plan.blocks.shape, int(plan.group_sizes.sum())
        ((2, 5, 2), 20)
    """
    num_blocks, shape = _checked(probabilities, k, mask, bias, coefficient, gain)
    scores = probabilities if bias is None else probabilities + bias
    blocks = _best(jax.lax.stop_gradient(scores), k)
    p = jnp.take_along_axis(probabilities.astype(jnp.float32), blocks, axis=-1)
    if coefficient == "spt":
        coefficients = 2.0 * p
    elif gain is not None:
        # By a product, whose gradient is one, too: indices would add it up in no fixed order.
        chosen = jax.nn.one_hot(blocks, num_blocks)
        coefficients = 1.0 + jnp.matmul(chosen, gain.astype(jnp.float32), precision="highest") * p
    else:
        # p / stop_gradient(p), and exactly 1 also where a probability has underflowed to 0.
        fixed = jax.lax.stop_gradient(p)
        coefficients = 1.0 + (p - fixed) / jnp.maximum(fixed, jnp.finfo(jnp.float32).tiny)
    if mask is not None:
        blocks = jnp.where(mask[..., None], blocks, num_blocks)
        coefficients = jnp.where(mask[..., None], coefficients, 0.0)
    by = lambda sort: functools.partial(sort, num_groups=num_blocks + 1)
    position, sizes = jax.lax.platform_dependent(
        blocks.reshape(-1), cuda=by(_by_counts), default=by(_by_sorting)
    )
    order = (
        jnp.zeros_like(position)
        .at[position]
        .set(jnp.arange(position.size, dtype=jnp.int32), unique_indices=True)
    )
    return RoutingPlan(
        blocks.reshape(*shape, k), coefficients, order, position, sizes[:num_blocks],
        scaled="products" if coefficient == "spt" else "output", masked=mask is not None,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=1)
def _best(scores: Float[Array, "*B G"], k: int) -> Int[Array, "*B k"]:
    """The k best of each row, ascending; of equal scores those of lower index."""
    num_blocks = scores.shape[-1]
    if num_blocks > FEW:
        return jnp.sort(jax.lax.top_k(scores, k)[1].astype(jnp.int32))
    # Compared one by one, which is one kernel where sorting takes three.
    score = [scores[..., g] for g in range(num_blocks)]
    found, slot = [jnp.zeros(scores.shape[:-1], jnp.int32)] * k, jnp.int32(0)
    for g in range(num_blocks):
        better = [a >= score[g] for a in score[:g]] + [a > score[g] for a in score[g + 1 :]]
        chosen = sum((x.astype(jnp.int32) for x in better), jnp.int32(0)) < k
        found = [jnp.where(chosen & (slot == j), g, x) for j, x in enumerate(found)]
        slot += chosen.astype(jnp.int32)
    return jnp.stack(found, -1)


def _by_sorting(groups: Int[Array, " M"], num_groups: int) -> tuple[Array, Array]:
    """Where each number stands when they are sorted, equal ones in order; how many are equal."""
    order = jnp.argsort(groups, stable=True)
    each = jnp.arange(groups.size, dtype=jnp.int32)
    position = jnp.zeros_like(groups).at[order].set(each, unique_indices=True)
    return position, (groups[:, None] == jnp.arange(num_groups)).sum(0, dtype=jnp.int32)


def _by_counts(groups: Int[Array, " M"], num_groups: int) -> tuple[Array, Array]:
    """The same by counts of chunks: a GPU would sort in many passes, and there are few groups."""
    length = max(CHUNK, 1 << (groups.size // MOST_CHUNKS).bit_length())
    chunks = jnp.pad(groups, (0, -groups.size % length), constant_values=num_groups)
    chunks = chunks.reshape(-1, length)
    each = jnp.arange(num_groups)
    counts = (chunks[:, :, None] == each).sum(1, dtype=jnp.int32)  # of chunks and groups
    sizes = counts.sum(0)
    earlier = np.tri(len(chunks), k=-1, dtype=np.int32)  # chunks before each
    lower = np.tri(num_groups, k=-1, dtype=np.int32)
    begin = (lower * sizes).sum(1) + (earlier[:, :, None] * counts).sum(1)
    before = np.tri(length, k=-1, dtype=bool)
    rank = ((chunks[:, :, None] == chunks[:, None]) & before).sum(2, dtype=jnp.int32)
    position = rank + jnp.take_along_axis(begin, jnp.minimum(chunks, num_groups - 1), 1)
    return position.reshape(-1)[: groups.size], sizes


def _checked(probabilities, k, mask, bias, coefficient, gain) -> tuple[int, tuple[int, ...]]:
    if probabilities.ndim < 1 or not jnp.issubdtype(probabilities.dtype, jnp.floating):
        raise ValueError(
            "probabilities must be real, [*B, G]; "
            f"got {probabilities.dtype} {tuple(probabilities.shape)}."
        )
    *shape, num_blocks = probabilities.shape
    if not 1 <= k <= num_blocks:
        raise ValueError(f"k must be within [1, G={num_blocks}]; got {k}.")
    if mask is not None and (mask.shape != tuple(shape) or mask.dtype != bool):
        raise ValueError(
            f"mask must be boolean {tuple(shape)}, False where padding; "
            f"got {mask.dtype} {tuple(mask.shape)}."
        )
    if bias is not None and bias.shape != (num_blocks,):
        raise ValueError(f"bias must be [G={num_blocks}]; got {tuple(bias.shape)}.")
    if coefficient not in typing.get_args(Coefficient):
        raise ValueError(
            f"coefficient must be one of {typing.get_args(Coefficient)}; got {coefficient!r}."
        )
    if (gain is not None) != (coefficient == "gain"):
        raise ValueError(
            f"coefficient='gain' and gain= go together; got {coefficient!r} and "
            f"{'no gain' if gain is None else 'a gain'}."
        )
    if gain is not None and gain.shape != (num_blocks,):
        raise ValueError(f"gain must be [G={num_blocks}]; got {tuple(gain.shape)}.")
    return num_blocks, tuple(shape)
