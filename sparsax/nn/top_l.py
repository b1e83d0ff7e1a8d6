"""Self-attention over the keys that codes of a product quantizer rate best."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from sparsax.attention import block_sparse_attention
from sparsax.nn.attention import SparseAttention
from sparsax.nn.projections import attention_projections, out_shape
from sparsax.nn.rotary import rotate
from sparsax.patterns import topl
from sparsax.quantise import ProductQuantizer, Score
from sparsax.top_l import top_l_attention, top_l_blocks
from sparsax.typing import Implementation

Select = Literal["tokens", "blocks"]


class Codebooks(nnx.Variable):
    """Holds the centroids of a layer's quantizer. Trained only by who names it in `wrt=`."""


class CodebookWeights(nnx.Variable):
    """Holds the running share of every centroid. Not trained."""


class QuantisationLoss(nnx.Intermediate):
    """Holds the loss that a probed layer recorded."""


class TopLAttention(nnx.Module):
    """Multi-head self-attention over each query's L best keys, or over blocks that hold them.

    The codebooks are state, so `nnx.split`, `nnx.jit` and orbax carry them. They start random: call
    `fit_codebooks` on a first batch. From then on they follow the data in one of two ways: by a
    moving average in every call while `use_running_average` is False (`model.train()`, as for
    `nnx.BatchNorm`), or by the gradient of `sparsax.nn.with_quantisation_loss`.

    Args:
        num_heads: query heads N.
        in_features: features D of input and output.
        keep: L, keys that a query keeps; T when the sequence is shorter.
        select: "tokens", exactly the L best keys (memory and quality), or "blocks", the blocks
            of keys that hold most of them, by vote (speed), see `sparsax.top_l_blocks`.
        score: "adc" or "match", see `ProductQuantizer.codes`; None is "adc", which finds more of
            the mass, to select "tokens", and "match", whose votes have a kernel, for "blocks".
        num_kv_heads: key and value heads K, a divisor of N; N when None.
        head_dim: features H of a head, a multiple of 8; D / N when None.
        block: tokens in a block, for select="blocks".
        voters: queries of a block that vote, see `sparsax.top_l_blocks`, for select="blocks".
        causal: whether a token sees only itself and what came before.
        rotary: base of rotary positions, see `sparsax.nn.rotate`; None is without.
        use_bias: whether the projections have a bias.
        decay: of the codebooks' moving average.
        use_running_average: False while calls move the codebooks.
        implementation: which implementation of attention runs, see `sparsax.top_l_attention` and
            `sparsax.block_sparse_attention`. Votes run in their kernel where it can, unless this is
            "xla" or "reference": they are whole numbers, the same in both.
        dtype: of the computation; the input's when None.
        rngs: stream of the initial parameters.

    Raises:
        ValueError: heads and features do not divide, or a name or number is wrong.

    Source: Gui et al., "SPT" (arXiv 2312.10365), section 4.1.

    Example:
        >>> import jax
        >>> import sparsax
        >>> from flax import nnx
        >>> x = jax.random.normal(jax.random.key(0), (2, 256, 64))
        >>> layer = sparsax.nn.TopLAttention(4, 64, keep=32, causal=True, rngs=nnx.Rngs(0))
        >>> layer.fit_codebooks(x)
        >>> layer(x).shape
        (2, 256, 64)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        keep: int,
        select: Select = "tokens",
        score: Score | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        block: int = 64,
        voters: int | None = None,
        causal: bool = False,
        rotary: float | None = None,
        use_bias: bool = True,
        decay: float = 0.99,
        use_running_average: bool = True,
        implementation: Implementation | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.query, self.key, self.value, self.out = attention_projections(
            num_heads, in_features, num_kv_heads, head_dim, use_bias=use_bias, dtype=dtype,
            rngs=rngs,
        )  # fmt: skip
        num_kv_heads, head_dim = out_shape(self.key)
        score = score or ("match" if select == "blocks" else "adc")
        _check(head_dim, keep, select, score, decay)
        shape = num_kv_heads, head_dim // 8, 16
        self.codebooks = Codebooks(jax.random.normal(rngs.params(), (*shape, 8)))
        self.codebook_weights = CodebookWeights(jnp.full(shape, 1 / 16))
        if select == "blocks":
            topl.voting_stride(block, voters)  # raises
        self.keep, self.causal, self.decay = keep, causal, decay
        self.block, self.voters = block, voters
        self.rotary = rotary
        self.select: Select = select
        self.score: Score = score
        self.use_running_average = use_running_average
        self.implementation: Implementation | None = implementation
        self.probing = False

    @classmethod
    def from_attention(
        cls, attention: Any, *, keep: int, rngs: nnx.Rngs, **options: Any
    ) -> "TopLAttention":
        """Attention with the projections that a dense layer has: the same modules, not copies.

        Args:
            attention: a `SparseAttention` without a pattern; or any module with the projections
                `query`, `key`, `value` and `out`, when options give `causal` and `rotary`.
            keep: L.
            rngs: stream of the codebooks.
            **options: see the class.

        Raises:
            ValueError: the layer has a pattern, which this one would not keep.
        """
        if isinstance(attention, SparseAttention):
            if attention.pattern.get_value() is not None:
                raise ValueError(
                    "attention must be dense; got a layer with a pattern, which top-L attention "
                    "would not keep. Take it away with sparsax.nn.set_patterns(model, None)."
                )
            options = {"causal": attention.causal, "rotary": attention.rotary} | options
        (heads, head_dim), (kv_heads, _) = map(out_shape, (attention.query, attention.key))
        layer = cls(
            heads, 1, num_kv_heads=kv_heads, head_dim=head_dim, keep=keep, rngs=rngs, **options
        )  # projections of one feature, which now give way
        for name in ("query", "key", "value", "out"):
            setattr(layer, name, getattr(attention, name))
        return layer

    @property
    def quantizer(self) -> ProductQuantizer:
        """The quantizer that the layer's codebooks make."""
        return ProductQuantizer(self.codebooks[...], self.codebook_weights[...])

    def fit_codebooks(
        self,
        x: Float[Array, "B T D"],
        *,
        key: Key[Array, ""] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
    ) -> None:
        """Sets the codebooks to the k-means of the layer's keys (for "match" also its queries).

        Args:
            x: what the layer is called with, e.g. the first batch.
            key: of the random start; `jax.random.key(0)` when None.
            key_mask: False where a token is padding, which does not count.
        """
        key = jax.random.key(0) if key is None else key
        q, k, _ = self._projected(x)
        self._set(ProductQuantizer.fit(key, k, queries=self._shared(q), key_mask=key_mask))

    def __call__(
        self, x: Float[Array, "B T D"], *, key_mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attends within `x`; `key_mask` is False where a token is padding."""
        q, k, v = self._projected(x)
        codes = self.quantizer.codes(q, k, score=self.score)
        shared = self._shared(q)
        if self.probing:
            loss = self.quantizer.loss(k, queries=shared, key_mask=key_mask)
            self.quantisation_loss = QuantisationLoss(loss)  # taken away again by who probes
        if not self.use_running_average:
            moved, _ = self.quantizer.update(k, queries=shared, key_mask=key_mask, decay=self.decay)
            self._set(moved)
        keep = min(self.keep, x.shape[1])
        if self.select == "tokens":
            o = top_l_attention(
                q, k, v, codes, keep=keep, causal=self.causal, key_mask=key_mask,
                implementation=self.implementation,
            )  # fmt: skip
        else:
            pattern = top_l_blocks(
                codes, keep=keep, block=self.block, voters=self.voters, causal=self.causal,
                key_mask=key_mask,
                implementation=None if self.implementation == "pallas" else self.implementation,
            )  # fmt: skip
            o = self._over_blocks(q, k, v, pattern, key_mask)
        return self.out(o)

    def _projected(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.rotary is not None:
            q, k = rotate(q, self.rotary), rotate(k, self.rotary)
        return q, k, v

    def _over_blocks(self, q, k, v, pattern, key_mask):
        """Attention of every sample over its own pattern."""
        options = {"causal": self.causal, "implementation": self.implementation}
        if key_mask is None:
            # Heads may have patterns of their own: those of all samples, as if of one.
            (batch, length, *_), tree = q.shape, jax.tree.map
            heads = lambda x: x.swapaxes(0, 1).reshape(1, length, -1, x.shape[-1])
            pattern = tree(lambda x: x.reshape(-1, *x.shape[2:]), pattern)
            o = block_sparse_attention(heads(q), heads(k), heads(v), pattern, **options)
            return o.reshape(length, batch, *q.shape[2:]).swapaxes(0, 1)

        # One after another: under vmap the walk over lists of different lengths would go as far as
        # the longest sample's and copy all results at every step.
        def one(sample):
            q, k, v, pattern, mask = jax.tree.map(lambda x: x[None], sample)
            pattern = jax.tree.map(lambda x: x[0], pattern)
            return block_sparse_attention(q, k, v, pattern, key_mask=mask, **options)[0]

        return jax.lax.map(one, (q, k, v, pattern, key_mask))

    def _shared(self, q):
        """The queries where they share the codebooks of the keys, else None."""
        return q if self.score == "match" else None

    def _set(self, quantizer: ProductQuantizer) -> None:
        self.codebooks.set_value(quantizer.codebooks)
        self.codebook_weights.set_value(quantizer.weights)


def with_quantisation_loss(
    model: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[Any, Float[Array, ""]]:
    """`(model(*args, **kwargs), loss)`, the mean quantisation loss of its `TopLAttention` layers.

    Works inside jit and grad. Add the loss with weight 1e-2 (the paper's) to your own, and train
    the codebooks by `wrt=nnx.Any(nnx.Param, sparsax.nn.Codebooks)`; see `ProductQuantizer.loss`.

    Raises:
        ValueError: the model has no `TopLAttention`.
    """
    layers = [m for _, m in nnx.iter_modules(model) if isinstance(m, TopLAttention)]
    if not layers:
        raise ValueError(
            f"the model has no sparsax.nn.TopLAttention layer; got {type(model).__name__}."
        )
    for layer in layers:
        layer.probing = True
    try:
        out = model(*args, **kwargs)
        losses = [layer.quantisation_loss.get_value() for layer in layers]
        return out, jnp.stack(losses).mean()
    finally:
        for layer in layers:
            layer.probing = False
            if hasattr(layer, "quantisation_loss"):
                del layer.quantisation_loss


def _check(head_dim, keep, select, score, decay) -> None:
    for name, value, names in (("select", select, Select), ("score", score, Score)):
        if value not in get_args(names):
            raise ValueError(f"{name} must be one of {get_args(names)}; got {value!r}.")
    if head_dim % 8 or keep < 1 or not 0 <= decay < 1:
        raise ValueError(
            "head_dim must be a multiple of 8, keep at least 1 and decay within [0, 1); got "
            f"{head_dim}, {keep} and {decay}."
        )
