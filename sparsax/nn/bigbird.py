"""BigBird's self-attention: a window, the first and last block, and blocks drawn at random."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float

from sparsax.compound import Band, CompoundPattern
from sparsax.multigrain import compound_attention
from sparsax.nn.projections import attention_projections
from sparsax.patterns.compound import bigbird
from sparsax.typing import Implementation


class BigBirdSelfAttention(nnx.Module):
    """Multi-head self-attention over a window of three blocks, two global and some random blocks.

    The first and the last block see all and are seen by all; every other block of queries also sees
    its neighbours and `random_blocks` of the rest, drawn for each head. As in the public model, a
    sequence of at most `5 + 2 random_blocks` blocks attends densely, and padding is seen by none
    and has zero attention before `out`. A sequence need not be padded to a multiple of the block;
    each pair counts once, where the public code may count a block twice.

    The random blocks follow from `seed` and the length, and are not the public code's: give a
    pattern with other ones to `attend`.

    Args:
        num_heads: heads N.
        in_features: features D of input and output, a multiple of N.
        block: tokens in a block.
        random_blocks: blocks drawn for every block of queries.
        seed: of the draw; layers should differ in it.
        implementation: which implementation runs, see `sparsax.compound_attention`.
        dtype: of the computation; the input's when None.
        rngs: stream of the initial parameters.

    Raises:
        ValueError: heads and features do not divide, or a number of blocks or tokens is too small.

    Source: Zaheer et al., "Big Bird: Transformers for Longer Sequences" (NeurIPS 2020), section 2:
    its internal form, whose global tokens are among the sequence's own.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> from flax import nnx
        >>> layer = sparsax.nn.BigBirdSelfAttention(4, 64, block=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 300, 64))).shape
        (2, 300, 64)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        block: int = 64,
        random_blocks: int = 3,
        seed: int = 0,
        implementation: Implementation | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if block < 1 or random_blocks < 0:
            raise ValueError(
                "block must be at least 1 token and random_blocks at least 0; "
                f"got {block} and {random_blocks}."
            )
        self.query, self.key, self.value, self.out = attention_projections(
            num_heads, in_features, None, None, dtype=dtype, rngs=rngs
        )
        self.num_heads, self.block = num_heads, block
        self.random_blocks, self.seed = random_blocks, seed
        self.implementation: Implementation | None = implementation

    def __call__(
        self, x: Float[Array, "B T D"], *, key_mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attends within `x`; `key_mask` is False where a token is padding."""
        return self.attend(x, self.pattern(x.shape[1], key_mask=key_mask))

    def pattern(
        self, seq_len: int, *, key_mask: Bool[Array, "B T"] | None = None
    ) -> CompoundPattern:
        """The layer's pairs."""
        if seq_len <= (5 + 2 * self.random_blocks) * self.block:
            everything = [Band(seq_len, seq_len)]
            return CompoundPattern.from_parts(seq_len, bands=everything, token_mask=key_mask)
        return bigbird(
            seq_len, block=self.block, global_blocks=(1, 1), random_blocks=self.random_blocks,
            heads=self.num_heads, seed=self.seed, token_mask=key_mask,
        )  # fmt: skip

    def attend(self, x: Float[Array, "B T D"], pattern: CompoundPattern) -> Float[Array, "B T D"]:
        """Attends within `x` over a pattern of `pattern`, or another one."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.out(compound_attention(q, k, v, pattern, implementation=self.implementation))
