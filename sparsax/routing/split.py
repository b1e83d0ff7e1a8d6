"""A dense feed-forward layer cut into blocks: units that are active together stay together."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsax.routing.weights import FFNBlocks
from sparsax.typing import ArrayLike, known

TINY = 1e-30  # what a length is divided by when it is 0


def split_ffn(
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
    num_blocks: int,
    *,
    b_up: Float[Array, " F"] | None = None,
    b_down: Float[Array, " D"] | None = None,
    w_gate: Float[Array, "D F"] | None = None,
    b_gate: Float[Array, " F"] | None = None,
    assignment: Int[ArrayLike, " F"] | None = None,
) -> FFNBlocks:
    """The layer in blocks; all of them together compute what the dense layer did.

    Args:
        w_up: `[D, F]`.
        w_down: `[F, D]`.
        num_blocks: G, a divisor of F.
        b_up: `[F]`.
        b_down: `[D]`.
        w_gate: `[D, F]`, for gated layers.
        b_gate: `[F]`.
        assignment: block of every hidden unit `[F]`, F / G units for each, e.g. from
            `co_activation`; consecutive units when None. Hidden units are permuted alike in all
            matrices, in order within a block.

    Raises:
        ValueError: shapes do not belong together, or blocks are of different sizes.

    Source: Gui et al. (arXiv 2312.10365), section 4.2, cuts consecutive units; by activation:
    Zhang et al., "MoEfication" (arXiv 2110.01786), section 3.1.

    Example:
        >>> import jax
        >>> import sparsax
        >>> w_up, w_down = jax.random.normal(jax.random.key(0), (2, 12, 12))
        >>> sparsax.split_ffn(w_up, w_down, 4).w_up.shape
        (4, 12, 3)
    """
    features, hidden = w_up.shape if w_up.ndim == 2 else (None, None)
    want = {
        "w_up": (features, hidden), "w_down": (hidden, features), "b_up": (hidden,),
        "b_down": (features,), "w_gate": (features, hidden), "b_gate": (hidden,),
        "assignment": (hidden,),
    }  # fmt: skip
    given = {
        "w_up": w_up, "w_down": w_down, "b_up": b_up, "b_down": b_down, "w_gate": w_gate,
        "b_gate": b_gate, "assignment": assignment,
    }  # fmt: skip
    shapes = {name: tuple(array.shape) for name, array in given.items() if array is not None}
    if hidden is None or any(shapes[name] != want[name] for name in shapes):
        raise ValueError(
            "shapes must be w_up [D, F], w_down [F, D], w_gate [D, F], b_up and b_gate [F], "
            f"b_down [D], assignment [F]; got {shapes}."
        )
    size = block_size(hidden, num_blocks)
    columns = lambda w: w.reshape(*w.shape[:-1], num_blocks, size)
    if assignment is not None:
        even = lambda a: jnp.bincount(a, length=num_blocks) == size
        inside = lambda a: (a >= 0) & (a < num_blocks)
        if known(inside, assignment) is False or known(even, assignment) is False:
            counts = np.unique(np.asarray(assignment), return_counts=True)
            raise ValueError(
                f"assignment must give each of G={num_blocks} blocks {size} of F={hidden} units; "
                f"got {dict(zip(*(x.tolist() for x in counts), strict=True))}."
            )
        order = jnp.argsort(assignment, stable=True)
        w_up, w_down = w_up[:, order], w_down[order]
        b_up, w_gate, b_gate = (
            None if x is None else x[..., order] for x in (b_up, w_gate, b_gate)
        )
    optional = lambda w: None if w is None else columns(w)
    return FFNBlocks(
        w_up=columns(w_up).swapaxes(0, 1),
        w_down=w_down.reshape(num_blocks, size, -1),
        b_up=optional(b_up),
        b_down=b_down,
        w_gate=None if w_gate is None else columns(w_gate).swapaxes(0, 1),
        b_gate=optional(b_gate),
    )


def block_size(hidden: int, num_blocks: int) -> int:
    """Hidden units of a block; ValueError when they do not divide."""
    if num_blocks < 1 or hidden % num_blocks:
        raise ValueError(
            f"the number of blocks must divide the F={hidden} hidden units; got {num_blocks}."
        )
    return hidden // num_blocks


def co_activation(
    hidden: Float[Array, "M F"],
    num_blocks: int,
    *,
    key: Array,
    iterations: int = 20,
    restarts: int = 4,
) -> Int[Array, " F"]:
    """The block of every hidden unit, so that units active for the same tokens share one.

    Balanced k-means: a unit is the vector of its activations' sizes over all tokens, scaled to
    length 1, and belongs near the centre of its block. Two blocks at a time exchange units in the
    best possible way, until the rounds are over. The best of several first centres is kept. The
    same key gives the same blocks.

    Args:
        hidden: activations of calibration tokens, `[M, F]`: what `w_down` is multiplied with.
        num_blocks: G, a divisor of F.
        key: of the first centres.
        iterations: rounds of assigning units and moving centres.
        restarts: first centres tried.

    Returns:
        int32 `[F]`, each of 0 to G - 1 exactly F / G times.

    Raises:
        ValueError: the number of blocks does not divide F.

    Source: Zhang et al., "MoEfication" (arXiv 2110.01786), section 3.1, cluster weights or
    co-activations with balanced k-means.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> hidden = jnp.tile(jnp.eye(2), (3, 4))  # units 0, 2, 4, 6 and units 1, 3, 5, 7
        >>> blocks = sparsax.routing.co_activation(hidden, 2, key=jax.random.key(0))
        >>> bool((blocks == blocks[jnp.arange(8) % 2]).all())
        True
    """
    block_size(hidden.shape[1], num_blocks)
    return _cluster(hidden, key, num_blocks, iterations, restarts)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _cluster(hidden, key, num_blocks, iterations, restarts):
    units = jnp.abs(hidden.astype(jnp.float32)).T
    # A unit that is never active fits anywhere.
    units = units / jnp.maximum(jnp.linalg.norm(units, axis=1, keepdims=True), TINY)

    def attempt(best, key):
        def round_(_, found):
            return exchange(units @ _centres(units, found, num_blocks)[0].T, found)

        found = place(units @ _seeds(units, key, num_blocks).T)
        found = jax.lax.fori_loop(0, iterations, round_, found)
        new = _centres(units, found, num_blocks)[1], found
        return jax.tree.map(lambda a, b: jnp.where(new[0] > best[0], a, b), new, best), None

    contiguous = jnp.arange(units.shape[0], dtype=jnp.int32) // (units.shape[0] // num_blocks)
    first = _centres(units, contiguous, num_blocks)[1], contiguous
    return jax.lax.scan(attempt, first, jax.random.split(key, restarts))[0][1]


def _centres(units, found, num_blocks):
    """Unit vectors along the sum of each block, and the sum of all units' products with theirs."""
    sums = jax.nn.one_hot(found, num_blocks).T @ units
    length = jnp.linalg.norm(sums, axis=1, keepdims=True)
    return sums / jnp.maximum(length, TINY), length.sum()


def _seeds(units, key, num_blocks):
    """First centres far from each other: k-means++ (Arthur and Vassilvitskii, SODA 2007)."""

    def pick(distance, key):
        chosen = units[jax.random.categorical(key, jnp.log(distance))]
        return jnp.minimum(distance, jnp.clip(1.0 - units @ chosen, 1e-12)), chosen

    return jax.lax.scan(pick, jnp.ones(units.shape[0]), jax.random.split(key, num_blocks))[1]


def place(scores: Float[Array, "F G"]) -> Int[Array, " F"]:
    """A block for every unit, F / G units each: first come, first served.

    Units choose in the order of what they lose by the second-best block, each the best block that
    has room left.
    """
    count, num_blocks = scores.shape
    top = jax.lax.top_k(scores, min(2, num_blocks))[0]
    order = jnp.argsort(top[:, -1] - top[:, 0], stable=True)

    def choose(room, unit):
        block = jnp.argmax(jnp.where(room > 0, scores[unit], -jnp.inf))
        return room.at[block].add(-1), block.astype(jnp.int32)

    room = jnp.full(num_blocks, count // num_blocks)
    chosen = jax.lax.scan(choose, room, order)[1]
    return jnp.zeros(count, jnp.int32).at[order].set(chosen, unique_indices=True)


def exchange(scores: Float[Array, "F G"], found: Int[Array, " F"]) -> Int[Array, " F"]:
    """The assignment after every two blocks have divided their units anew, the best way for them.

    The total score never falls. For two blocks of one size the best division is a sort by the
    difference of a unit's two scores.
    """
    count, num_blocks = scores.shape
    if num_blocks == 1:
        return found

    def divide(found, pair):
        a, b = pair
        theirs = (found == a) | (found == b)
        loss = jnp.where(theirs, scores[:, a] - scores[:, b], jnp.inf)  # by moving to b
        rank = (
            jnp.zeros_like(found)
            .at[jnp.argsort(loss, stable=True)]
            .set(jnp.arange(count, dtype=found.dtype), unique_indices=True)
        )
        return jnp.where(theirs, jnp.where(rank < count // num_blocks, b, a), found), None

    pairs = jnp.stack(jnp.triu_indices(num_blocks, 1), axis=1).astype(found.dtype)
    return jax.lax.scan(divide, found, pairs)[0]
