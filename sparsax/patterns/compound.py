"""Published compound patterns: everything here returns a `CompoundPattern`.

All windows are one-sided: `window=w` is w keys before the query and, unless causal, w after it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from sparsax.compound import Band, CompoundPattern
from sparsax.layouts import BlockPattern
from sparsax.patterns import static
from sparsax.typing import ArrayLike, known


def longformer(
    seq_len: int,
    *,
    window: int,
    positions: Int[ArrayLike, "*L B G"] | None = None,
    counts: Int[ArrayLike, "*L B"] | None = None,
    dilation: int = 1,
    causal: bool = False,
    token_mask: Bool[ArrayLike, "*L B T"] | None = None,
) -> CompoundPattern:
    """A sliding window, and global tokens that see all and are seen by all.

    Args:
        seq_len: number of tokens T.
        window: one-sided, in steps of `dilation`: allenai's `attention_window`, and half of Hugging
            Face's.
        positions: the global tokens of every sample, `[B, G]` (B = 1: the same for all).
        counts: how many of them are used, `[B]`; None means all G.
        dilation: distance between the keys of the window.
        causal: whether a token sees only itself and what came before.
        token_mask: False where a token is padding.

    Raises:
        ValueError: the window is negative, or what `CompoundPattern.from_parts` refuses.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer" (arXiv 2004.05150),
    section 3.1.

    Example:
        >>> import numpy as np
        >>> import sparsax
        >>> pattern = sparsax.patterns.compound.longformer(
        ...     4096, window=256, positions=np.array([[0, 1700, 3001]])
        ... )
        >>> pattern.bands, pattern.num_rows.tolist()
        ((Band(left=256, right=256, dilation=1),), [3])
    """
    return CompoundPattern.from_parts(
        seq_len, bands=[_window(window, causal, dilation)], columns=positions, num_columns=counts,
        rows=positions, num_rows=counts, causal=causal, token_mask=token_mask,
    )  # fmt: skip


def qds(
    seq_len: int,
    *,
    window: int,
    query_lens: Int[ArrayLike, " B"],
    max_query_len: int,
    sentence_starts: Int[ArrayLike, "B G"],
    num_sentences: Int[ArrayLike, " B"] | None = None,
    token_mask: Bool[ArrayLike, "B T"] | None = None,
) -> CompoundPattern:
    """A window; the query's tokens and the token before every sentence are global.

    Args:
        seq_len: number of tokens T, the query first.
        window: one-sided.
        query_lens: tokens of each query, with `<s>` and separator, at most `max_query_len`.
        max_query_len: the capacity; static.
        sentence_starts: position of the `<s>` before every sentence of the document, `[B, G]`.
        num_sentences: how many of them are used; None means all G.
        token_mask: False where a token is padding.

    Raises:
        ValueError: a query is longer than `max_query_len`, or what `from_parts` refuses. Under
            `jax.jit` such a sample is marked invalid, and attention answers NaN for it.

    Source: Jiang et al., "Long Document Ranking with Query-Directed Sparse Transformer" (Findings
    of EMNLP 2020), section 3.

    Example:
        >>> import numpy as np
        >>> import sparsax
        >>> pattern = sparsax.patterns.compound.qds(
        ...     32, window=2, query_lens=np.array([3]), max_query_len=4,
        ...     sentence_starts=np.array([[3, 11, 20]]),
        ... )
        >>> pattern.columns[0, :6].tolist()
        [0, 1, 2, 3, 11, 20]
    """
    batch, capacity = sentence_starts.shape
    num_sentences = np.full((batch,), capacity) if num_sentences is None else num_sentences
    fits = jnp.asarray(query_lens) <= max_query_len
    if known(lambda n: n <= max_query_len, query_lens) is False:
        raise ValueError(
            f"max_query_len must hold the longest query, {int(np.max(query_lens))} tokens; "
            f"got {max_query_len}."
        )
    query = jnp.arange(max_query_len)
    # Unused query slots repeat token 0, which a query always has: positions are made distinct.
    query = jnp.where(query < jnp.asarray(query_lens)[:, None], query, 0)
    tokens = jnp.concatenate([query, jnp.asarray(sentence_starts)], axis=1)
    return longformer(
        seq_len, window=window, positions=tokens,
        counts=jnp.where(fits, max_query_len + jnp.asarray(num_sentences), -1),
        token_mask=token_mask,
    )  # fmt: skip


def etc(
    seq_len: int,
    *,
    window: int,
    num_global: int,
    token_mask: Bool[ArrayLike, "*L B T"] | None = None,
) -> CompoundPattern:
    """A window, with the global tokens in front as ETC's global input.

    Source: Ainslie et al., "ETC: Encoding Long and Structured Inputs in Transformers" (EMNLP 2020),
    section 3.1; without its relative positions and its masks between segments.
    """
    first = np.arange(num_global)[None]
    return longformer(seq_len, window=window, positions=first, token_mask=token_mask)


def bigbird(
    seq_len: int,
    *,
    block: int = 64,
    window_blocks: int = 3,
    global_blocks: int | tuple[int, int] = 2,
    random_blocks: int = 3,
    heads: int = 1,
    seed: int = 0,
    token_mask: Bool[ArrayLike, "*L B T"] | None = None,
) -> CompoundPattern:
    """The pairs of `patterns.bigbird`, its global rows apart: every list of blocks stays short.

    Arguments are those of `patterns.bigbird`.

    Source: Zaheer et al., "Big Bird: Transformers for Longer Sequences" (NeurIPS 2020), section 2.
    """
    first, last = (global_blocks, 0) if isinstance(global_blocks, int) else global_blocks
    with jax.ensure_compile_time_eval():  # what is static is drawn while jit traces
        whole = static.bigbird(
            seq_len, block=block, window_blocks=window_blocks, global_blocks=global_blocks,
            random_blocks=random_blocks, heads=heads, seed=seed,
        )  # fmt: skip
        mask = np.array(whole.to_block_mask())
        tail = max(0, whole.num_q_blocks - last)  # the first of the blocks at the end
        mask[:, :first], mask[:, tail:] = False, False
        longest = [max(1, int(mask.sum(axis).max())) for axis in (-1, -2)]
        blocks = BlockPattern.from_block_mask(
            mask, q_len=seq_len, block_q=block, kv_width=longest[0], q_width=longest[1]
        )
    tokens = np.arange(seq_len)
    rows = tokens[(tokens < first * block) | (tokens >= tail * block)][None]
    return CompoundPattern.from_parts(seq_len, blocks=blocks, rows=rows, token_mask=token_mask)


def vertical_slash(
    seq_len: int,
    *,
    columns: Int[ArrayLike, "*L B G"],
    counts: Int[ArrayLike, "*L B"] | None = None,
    offsets: Sequence[int],
    causal: bool = True,
    token_mask: Bool[ArrayLike, "*L B T"] | None = None,
) -> CompoundPattern:
    """Vertical lines at key positions and diagonals at token offsets, to the pair.

    Args:
        seq_len: number of tokens T.
        columns: key positions that every query sees.
        counts: how many of them are used; None means all.
        offsets: distances `query - key` that every query sees; static, neighbours join to a band.
        causal: whether a token sees only itself and what came before.
        token_mask: False where a token is padding.

    Source: Jiang et al., "MInference 1.0" (NeurIPS 2024), section 3.2.

    Example:
        >>> import numpy as np
        >>> import sparsax
        >>> sparsax.patterns.compound.vertical_slash(
        ...     64, columns=np.array([[0, 9]]), offsets=[0, 1, 2, 30]
        ... ).bands
        (Band(left=2, right=0, dilation=1), Band(left=30, right=-30, dilation=1))
    """
    each = np.unique(np.asarray(offsets, int))
    runs = np.split(each, np.flatnonzero(np.diff(each) > 1) + 1)
    bands = [Band(int(run[-1]), -int(run[0])) for run in runs if run.size]
    return CompoundPattern.from_parts(
        seq_len, bands=bands, columns=columns, num_columns=counts, causal=causal,
        token_mask=token_mask,
    )  # fmt: skip


def strided(
    seq_len: int,
    *,
    stride: int,
    causal: bool = True,
    token_mask: Bool[ArrayLike, "*L B T"] | None = None,
) -> CompoundPattern:
    """The nearest `stride` tokens, and every `stride`-th token of all: two bands, one dilated.

    Source: Child et al., "Generating Long Sequences with Sparse Transformers" (arXiv 1904.10509),
    section 4.3.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1 token; got {stride}.")
    bands = [Band(stride, stride), Band(seq_len, seq_len, dilation=stride)]
    return CompoundPattern.from_parts(seq_len, bands=bands, causal=causal, token_mask=token_mask)


def random_elements(
    seq_len: int, *, keys_per_query: int, heads: int = 1, seed: int = 0
) -> BlockPattern:
    """Single pairs: `keys_per_query` distinct keys of every query, drawn uniformly.

    Returns:
        What `CompoundPattern.from_parts` takes as `elements`.

    Raises:
        ValueError: there are fewer keys than asked for.
    """
    if not 1 <= keys_per_query <= seq_len or heads < 1:
        raise ValueError(
            f"keys_per_query must lie within [1, {seq_len}] and heads be at least 1; "
            f"got {keys_per_query} and {heads}."
        )
    rng = np.random.default_rng(seed)
    draw = lambda: rng.choice(seq_len, keys_per_query, replace=False)
    keys = np.array([[draw() for _ in range(seq_len)] for _ in range(heads)])
    return element_lists(keys)


def element_lists(keys: Int[np.ndarray, "P T E"]) -> BlockPattern:
    """Single pairs as a pattern with blocks of one token, from a list of keys for every query.

    Args:
        keys: keys of every query, `[P, T, E]`, in any order; -1 is an unused slot. NumPy: the lists
            of the other direction must know how long they become.

    Returns:
        What `CompoundPattern.from_parts` takes as `elements`, without a `[T, T]` array on the way.

    Raises:
        ValueError: a key is outside the sequence.

    Example:
        >>> import numpy as np
        >>> import sparsax
        >>> lists = sparsax.patterns.compound.element_lists(np.array([[[1, -1], [0, 2], [2, 2]]]))
        >>> lists.kv_num_blocks.tolist(), lists.q_num_blocks.tolist()
        ([[1, 2, 1]], [[1, 1, 2]])
    """
    heads, seq_len, _ = keys.shape
    if keys.size and (keys.min() < -1 or keys.max() >= seq_len):
        raise ValueError(
            f"keys must lie within [0, {seq_len}), or be -1 for an unused slot; "
            f"got {keys.min()} to {keys.max()}."
        )
    head, query, slot = np.nonzero(keys >= 0)
    head, query, key = np.unique(np.stack([head, query, keys[head, query, slot]]), axis=1)
    order = np.lexsort((query, key, head))
    kv = _ragged(head, query, key, heads, seq_len)
    q = _ragged(head[order], key[order], query[order], heads, seq_len)
    arrays = (jnp.asarray(x) for x in (*kv, *q))
    return BlockPattern(*arrays, q_len=seq_len, kv_len=seq_len, block_q=1, block_kv=1)


def _ragged(head, line, entry, heads, seq_len):
    """Counts `[P, T]` and lists `[P, T, width]` of entries sorted by head, line and entry."""
    lines = head * seq_len + line
    counts = np.bincount(lines, minlength=heads * seq_len)
    slot = np.arange(len(lines)) - (np.cumsum(counts) - counts)[lines]
    lists = np.zeros((heads * seq_len, max(1, counts.max())), np.int32)
    lists[lines, slot] = entry
    shape = (heads, seq_len)
    return counts.reshape(shape).astype(np.int32), lists.reshape(*shape, -1)


def _window(window: int, causal: bool, dilation: int) -> Band:
    if window < 0:
        raise ValueError(f"window is one-sided and must be at least 0; got {window}.")
    return Band(window, 0 if causal else window, dilation)
