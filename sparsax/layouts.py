"""How a choice is stored: block lists that every implementation of an operation reads.

A layout is a frozen pytree of integer arrays with *static capacity*: its shapes follow from
lengths and blocks alone, so that a new pattern is new data and never a new compilation.
"""

import dataclasses
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsax.typing import ArrayLike, known

# The count of a row that must not be used (its list was too short, or its source was NaN).
# Attention answers NaN for every row of such a pattern head: loud, and never merely wrong.
INVALID = -1


def _static() -> typing.Any:
    return dataclasses.field(metadata={"static": True})


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which blocks of keys every block of queries attends to, listed in both directions.

    The forward pass and dQ walk `kv_indices`, dK and dV walk `q_indices`; the two always describe
    the same set of blocks. Build one with `from_block_mask`, `from_mask`, `from_indices` or a
    constructor of `sparsax.patterns`, not by hand. Stacked patterns (one per layer) carry leading
    axes and can be passed through `jax.lax.scan`, `jax.vmap` and `jax.jit` as data.

    Attributes:
        kv_num_blocks: listed key blocks of each query block, int32 `[*L, P, I]`. A count below 0
            or above the capacity W marks a head whose attention is NaN.
        kv_indices: their indices, int32 `[*L, P, I, W]`, strictly ascending (attention relies on
            it); past the count: unspecified.
        q_num_blocks: listed query blocks of each key block, int32 `[*L, P, J]`.
        q_indices: their indices, int32 `[*L, P, J, V]`, strictly ascending; past the count:
            unspecified.
        q_len: number of queries T; the last block may be ragged.
        kv_len: number of keys S; the last block may be ragged.
        block_q: queries in a block.
        block_kv: keys in a block.

    Example:
        >>> import numpy as np
        >>> import sparsax
        >>> mask = np.tri(4, dtype=bool)
        >>> pattern = sparsax.BlockPattern.from_block_mask(mask, q_len=256, block_q=64)
        >>> pattern.kv_num_blocks.tolist()
        [[1, 2, 3, 4]]
        >>> float(pattern.density())
        0.625
    """

    kv_num_blocks: Int[Array, "*L P I"]
    kv_indices: Int[Array, "*L P I W"]
    q_num_blocks: Int[Array, "*L P J"]
    q_indices: Int[Array, "*L P J V"]
    q_len: int = _static()
    kv_len: int = _static()
    block_q: int = _static()
    block_kv: int = _static()

    @classmethod
    def from_block_mask(
        cls,
        mask: Bool[ArrayLike, "*L I J"],
        *,
        q_len: int,
        block_q: int,
        kv_len: int | None = None,
        block_kv: int | None = None,
        kv_width: int | None = None,
        q_width: int | None = None,
    ) -> "BlockPattern":
        """The pattern whose blocks are the True entries of a block mask.

        Args:
            mask: `[I, J]` shared by all heads, `[P, I, J]` per head, `[*L, P, I, J]` stacked.
                A NumPy mask is turned into lists at once, a JAX mask may be traced.
            q_len: number of queries T, with I = ceil(T / block_q).
            block_q: queries in a block.
            kv_len: number of keys S; `q_len` when None.
            block_kv: keys in a block; `block_q` when None.
            kv_width: capacity W of the key-block lists. None means J: nothing can overflow.
            q_width: capacity V of the query-block lists. None means I.

        Returns:
            The pattern. Under `jax.jit`, a list that overflows its capacity leaves a count above
            the capacity: `valid()` is False there and attention answers NaN for that head.

        Raises:
            ValueError: the mask's shape does not fit the lengths, or concrete lists overflow.
        """
        kv_len = q_len if kv_len is None else kv_len
        block_kv = block_q if block_kv is None else block_kv
        num_q, num_kv = check_blocks(q_len, kv_len, block_q, block_kv)
        if mask.ndim < 2 or mask.shape[-2:] != (num_q, num_kv):
            raise ValueError(
                f"a block mask for q_len={q_len}, kv_len={kv_len} in blocks of {block_q} x "
                f"{block_kv} must end in shape ({num_q}, {num_kv}); got {tuple(mask.shape)}."
            )
        if mask.dtype != bool:
            raise ValueError(f"a block mask must be boolean; got {mask.dtype}.")
        mask = mask[None] if mask.ndim == 2 else mask
        kv_num_blocks, kv_indices = _lists(mask, num_kv if kv_width is None else kv_width)
        q_num_blocks, q_indices = _lists(
            mask.swapaxes(-1, -2), num_q if q_width is None else q_width
        )
        pattern = cls(
            *(jnp.asarray(x) for x in (kv_num_blocks, kv_indices, q_num_blocks, q_indices)),
            q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv,
        )  # fmt: skip
        _refuse_overflow(pattern)
        return pattern

    @classmethod
    def from_mask(
        cls, mask: Bool[ArrayLike, "*L T S"], *, block_q: int, block_kv: int | None = None,
        kv_width: int | None = None, q_width: int | None = None,
    ) -> "BlockPattern":  # fmt: skip
        """The smallest pattern that covers an element mask `[*L, T, S]`: any True lists its block.

        Within a listed block every pair attends, also those that the mask leaves out.
        """
        q_len, kv_len = mask.shape[-2:]
        block_kv = block_q if block_kv is None else block_kv
        num_q, num_kv = check_blocks(q_len, kv_len, block_q, block_kv)
        xp = np if isinstance(mask, np.ndarray) else jnp
        ragged = [(0, num_q * block_q - q_len), (0, num_kv * block_kv - kv_len)]
        mask = xp.pad(mask, [(0, 0)] * (mask.ndim - 2) + ragged)
        blocks = mask.reshape(*mask.shape[:-2], num_q, block_q, num_kv, block_kv).any((-3, -1))
        return cls.from_block_mask(
            blocks, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv,
            kv_width=kv_width, q_width=q_width,
        )  # fmt: skip

    @classmethod
    def from_indices(
        cls, kv_num_blocks: Int[ArrayLike, "*L P I"], kv_indices: Int[ArrayLike, "*L P I W"], *,
        q_len: int, block_q: int, kv_len: int | None = None, block_kv: int | None = None,
        q_width: int | None = None,
    ) -> "BlockPattern":  # fmt: skip
        """The pattern of given key-block lists; the transposed lists are built from them.

        Args:
            kv_num_blocks: entries used of each list, `[*L, P, I]`.
            kv_indices: strictly ascending key-block indices, `[*L, P, I, W]`.
            q_len: number of queries T.
            block_q: queries in a block.
            kv_len: number of keys S; `q_len` when None.
            block_kv: keys in a block; `block_q` when None.
            q_width: capacity V of the transposed lists; None means I.

        Raises:
            ValueError: counts, order or range are wrong on concrete data. Under `jax.jit` such a
                row is marked invalid, and attention answers NaN for its head.
        """
        kv_len = q_len if kv_len is None else kv_len
        block_kv = block_q if block_kv is None else block_kv
        num_q, num_kv = check_blocks(q_len, kv_len, block_q, block_kv)
        width = kv_indices.shape[-1]
        if kv_num_blocks.shape[-1] != num_q or kv_indices.shape[:-1] != kv_num_blocks.shape:
            raise ValueError(
                f"kv_num_blocks must be [*L, P, {num_q}] and kv_indices [*L, P, {num_q}, W]; "
                f"got {tuple(kv_num_blocks.shape)} and {tuple(kv_indices.shape)}."
            )

        def well_formed(counts, indices):
            used = jnp.arange(width) < counts[..., None]
            ascending = (jnp.diff(indices, axis=-1) > 0) | ~used[..., 1:]
            inside = ((indices >= 0) & (indices < num_kv)) | ~used
            return ascending.all(-1) & inside.all(-1) & (counts >= 0) & (counts <= width)

        if known(well_formed, kv_num_blocks, kv_indices) is False:
            raise ValueError(
                f"key-block lists must be strictly ascending within [0, {num_kv}) and hold at "
                f"most W={width} entries; got counts {np.asarray(kv_num_blocks).tolist()} and "
                f"indices {np.asarray(kv_indices).tolist()}."
            )
        good = well_formed(kv_num_blocks, kv_indices)
        mask = _scatter(kv_indices, jnp.where(good, kv_num_blocks, 0), num_kv)
        pattern = cls.from_block_mask(
            mask, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv,
            kv_width=min(width, num_kv), q_width=q_width,
        )  # fmt: skip
        return pattern.invalidate(~good.all(-1))

    @property
    def num_heads(self) -> int:
        """P: 1 when all heads share the pattern."""
        return self.kv_num_blocks.shape[-2]

    @property
    def num_q_blocks(self) -> int:
        """I, the number of query blocks."""
        return self.kv_num_blocks.shape[-1]

    @property
    def num_kv_blocks(self) -> int:
        """J, the number of key blocks."""
        return self.q_num_blocks.shape[-1]

    def valid(self) -> Bool[Array, "*L P"]:
        """False for heads whose lists overflowed their capacity or were marked invalid."""
        kv = (self.kv_num_blocks >= 0) & (self.kv_num_blocks <= self.kv_indices.shape[-1])
        q = (self.q_num_blocks >= 0) & (self.q_num_blocks <= self.q_indices.shape[-1])
        # As one reduction, one kernel on a GPU: of a concatenation XLA makes two.
        longer = max(kv.shape[-1], q.shape[-1])
        widths = lambda x: [(0, 0)] * (x.ndim - 1) + [(0, longer - x.shape[-1])]
        kv, q = (jnp.pad(x, widths(x), constant_values=True) for x in (kv, q))
        return (kv & q).all(-1)

    def invalidate(self, where: Bool[ArrayLike, "*#L #P"]) -> "BlockPattern":
        """The pattern with the chosen heads marked invalid: their attention is NaN."""
        mark = lambda counts: jnp.where(where[..., None], INVALID, counts)
        return dataclasses.replace(
            self, kv_num_blocks=mark(self.kv_num_blocks), q_num_blocks=mark(self.q_num_blocks)
        )

    def density(self) -> Float[Array, "*L"]:
        """Listed blocks over all blocks, averaged over the pattern's heads; one number a layer."""
        listed = self.kv_num_blocks.sum((-2, -1), dtype=jnp.float32)
        return listed / (self.num_heads * self.num_q_blocks * self.num_kv_blocks)

    def to_block_mask(self) -> Bool[Array, "*L P I J"]:
        """The block mask, True where a block is listed."""
        return _scatter(self.kv_indices, self.kv_num_blocks, self.num_kv_blocks)

    def to_mask(self) -> Bool[Array, "*L P T S"]:
        """The element mask, True where a pair's block is listed. Dense: for tests and pictures."""
        mask = jnp.repeat(self.to_block_mask(), self.block_q, axis=-2)
        mask = jnp.repeat(mask, self.block_kv, axis=-1)
        return mask[..., : self.q_len, : self.kv_len]

    def __and__(self, other: "BlockPattern") -> "BlockPattern":
        """The blocks that both patterns list."""
        return self._combine(other, jnp.logical_and)

    def __or__(self, other: "BlockPattern") -> "BlockPattern":
        """The blocks that either pattern lists."""
        return self._combine(other, jnp.logical_or)

    def _combine(self, other: "BlockPattern", join) -> "BlockPattern":
        mine, theirs = self.geometry, other.geometry
        if mine != theirs:
            raise ValueError(f"patterns must agree in lengths and blocks; got {mine} and {theirs}.")
        joined = join(self.to_block_mask(), other.to_block_mask())
        pattern = self.from_block_mask(joined, **mine)
        return pattern.invalidate(~(self.valid() & other.valid()))

    @property
    def geometry(self) -> dict[str, int]:
        """The static part: `q_len, kv_len, block_q, block_kv`."""
        names = ("q_len", "kv_len", "block_q", "block_kv")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def stack(patterns: Sequence["BlockPattern"]) -> "BlockPattern":
        """One stacked pattern `[layers, ...]` from patterns of equal geometry and capacity."""
        if not patterns:
            raise ValueError("stack needs at least one pattern; got none.")
        shapes = [(p.geometry, p.kv_indices.shape, p.q_indices.shape) for p in patterns]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"stacked patterns must agree in lengths, blocks, heads and widths; got {shapes}."
            )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *patterns)

    def unstack(self) -> list["BlockPattern"]:
        """The patterns of a stacked one, a list of one for every layer."""
        if self.kv_num_blocks.ndim < 3:
            raise ValueError("unstack needs a stacked pattern [layers, P, I]; this one is single.")
        layer = lambda i: jax.tree.map(lambda leaf: leaf[i], self)
        return [layer(i) for i in range(self.kv_num_blocks.shape[0])]


def check_blocks(q_len: int, kv_len: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """The number of query and key blocks (I, J); ValueError when blocks and lengths don't fit."""
    for name, length, block in (("q", q_len, block_q), ("kv", kv_len, block_kv)):
        if block < 1 or length < block:
            raise ValueError(
                f"{name}_len must be at least one block: 1 <= block_{name} <= {name}_len; "
                f"got block_{name}={block} and {name}_len={length}."
            )
    return -(-q_len // block_q), -(-kv_len // block_kv)


def block_sizes(length: int, block: int) -> np.ndarray:
    """Tokens of every block, float32; a ragged last one has fewer."""
    return np.minimum(block, length - np.arange(0, length, block)).astype(np.float32)


def _lists(mask: ArrayLike, width: int) -> tuple[ArrayLike, ArrayLike]:
    """Counts and ascending indices of the True entries of every row."""
    xp = np if isinstance(mask, np.ndarray) else jnp
    if not 1 <= width <= mask.shape[-1]:
        raise ValueError(f"a list's width must be within [1, {mask.shape[-1]}]; got {width}.")
    # A stable sort of "not listed" puts the listed entries first and keeps them ascending.
    indices = xp.argsort(~mask, axis=-1, stable=True)[..., :width]
    return mask.sum(-1, dtype=np.int32), indices.astype(np.int32)


def _scatter(indices: ArrayLike, counts: ArrayLike, size: int) -> Array:
    """The mask `[..., size]` that lists describe; the inverse of `_lists`."""
    used = jnp.arange(indices.shape[-1]) < counts[..., None]
    spill = jnp.where(used, indices, size)  # unused entries land in one extra column
    mask = jnp.zeros((*indices.shape[:-1], size + 1), bool)
    return jnp.put_along_axis(mask, spill, True, axis=-1, inplace=False)[..., :size]


def _refuse_overflow(pattern: BlockPattern) -> None:
    if known(lambda *_: pattern.valid(), *jax.tree.leaves(pattern)) is not False:
        return
    most_kv, most_q = (int(np.max(x)) for x in (pattern.kv_num_blocks, pattern.q_num_blocks))
    raise ValueError(
        f"the lists overflow their capacity: kv_width={pattern.kv_indices.shape[-1]} and "
        f"q_width={pattern.q_indices.shape[-1]}, but the longest lists have {most_kv} and "
        f"{most_q} blocks. Pass kv_width={most_kv}, q_width={most_q} or more (None: no limit)."
    )
