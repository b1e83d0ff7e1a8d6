import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import Band, BlockPattern, CompoundPattern, compound, patterns
from sparsax.patterns.compound import element_lists, random_elements

T = 24
from_parts = CompoundPattern.from_parts


def pairs(holds, seq_len=T):
    """The mask of a condition on (query, key), one pair at a time."""
    return np.array([[bool(holds(i, j)) for j in range(seq_len)] for i in range(seq_len)])


@pytest.mark.parametrize(
    ("band", "held"),
    [
        (Band(2, 1), lambda i, j: -2 <= j - i <= 1),
        (Band(0, 0), lambda i, j: i == j),
        (Band(5, -5), lambda i, j: j == i - 5),
        (Band(-3, 4), lambda i, j: 3 <= j - i <= 4),
        (Band(2, 2, 3), lambda i, j: j - i in (-6, -3, 0, 3, 6)),
        (Band(100, 0), lambda i, j: j <= i),
        (Band(100, 100, 7), lambda i, j: (j - i) % 7 == 0),
    ],
)
def test_a_band_is_its_diagonals(band, held):
    np.testing.assert_array_equal(from_parts(T, bands=[band]).to_mask()[0, 0], pairs(held))
    causal = from_parts(T, bands=[band], causal=True).to_mask()[0, 0]
    np.testing.assert_array_equal(causal, pairs(lambda i, j: held(i, j) and j <= i))


def test_bands_that_no_pair_of_the_sequence_has_are_dropped():
    pattern = from_parts(
        T, bands=[Band(40, -30), Band(-2, 5), Band(50, 0), Band(T, 0)], causal=True
    )
    assert pattern.bands == (Band(T - 1, 0),)


def test_the_union_of_all_parts_for_every_sample_and_head():
    blocks = patterns.random(T, blocks_per_row=1, heads=2, block=8)
    elements = random_elements(T, keys_per_query=2, seed=1)
    columns, counts = np.array([[9, 3, 9], [1, 22, 5]]), np.array([3, 2])
    rows, num_rows = np.array([[7, 7]]), np.array([1])
    real = np.arange(T) < np.array([[T], [20]])
    pattern = from_parts(
        T, bands=[Band(1, 1)], columns=columns, num_columns=counts, rows=rows, num_rows=num_rows,
        blocks=blocks, elements=elements, token_mask=real, causal=True,
    )  # fmt: skip
    assert (pattern.batch, pattern.num_heads) == (2, 2)
    mask = np.asarray(pattern.to_mask())
    assert mask.shape == (2, 2, T, T)
    listed, single = np.asarray(blocks.to_mask()), np.asarray(elements.to_mask())[0]
    for b, p in np.ndindex(2, 2):
        selected = columns[b, : counts[b]]
        want = pairs(
            lambda i, j, b=b, p=p, selected=selected: (
                (abs(i - j) <= 1 or j in selected or i == 7 or listed[p, i, j] or single[i, j])
                and j <= i and real[b, i] and real[b, j]
            )
        )  # fmt: skip
        np.testing.assert_array_equal(mask[b, p], want)


def test_repeated_positions_are_made_distinct():
    pattern = from_parts(T, columns=np.array([[9, 3, 9, 3]]), num_columns=np.array([3]))
    assert pattern.columns[0, :2].tolist() == [3, 9]
    assert pattern.num_columns.tolist() == [2]


def test_positions_of_a_mask_and_back():
    chosen = np.random.default_rng(0).random((3, T)) < 0.2
    columns, counts = compound.positions(chosen, capacity=12)
    assert columns.shape == (3, 12)
    pattern = from_parts(T, columns=columns, num_columns=counts)
    np.testing.assert_array_equal(pattern.is_column(), chosen)
    assert not bool(pattern.is_row().any())


def test_what_is_wrong_under_jit_is_marked_and_the_rest_is_not():
    make = jax.jit(lambda x, n: from_parts(T, columns=x, num_columns=n))
    lists, counts = jnp.array([[0, T], [0, T], [-1, 0], [2, 3]]), jnp.array([2, 1, 1, 3])
    assert make(lists, counts).valid().tolist() == [[False], [True], [False], [False]]
    tight = jax.jit(lambda m: from_parts(T, columns=(p := compound.positions(m, 2))[0],
                                         num_columns=p[1]))  # fmt: skip
    assert tight(jnp.ones((1, T), bool)).valid().tolist() == [[False]]


def test_stacked_patterns_have_stacked_masks():
    each = [from_parts(T, bands=[Band(1, 1)], rows=np.array([[i]])) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    masks = jax.vmap(lambda p: p.to_mask())(stacked)
    np.testing.assert_array_equal(masks, np.stack([p.to_mask() for p in each]))
    assert stacked.valid().shape == (3, 1, 1)


def test_element_lists_describe_the_same_pairs_in_both_directions():
    keys = np.random.default_rng(0).integers(-1, T, (2, T, 5))
    lists = element_lists(keys)
    want = np.zeros((2, T, T), bool)
    for p, i, e in np.ndindex(keys.shape):
        if keys[p, i, e] >= 0:
            want[p, i, keys[p, i, e]] = True
    np.testing.assert_array_equal(lists.to_mask(), want)
    turned = BlockPattern.from_mask(want, block_q=1)
    np.testing.assert_array_equal(lists.q_num_blocks, turned.q_num_blocks)
    for p, j in np.ndindex(2, T):
        n = lists.q_num_blocks[p, j]
        np.testing.assert_array_equal(lists.q_indices[p, j, :n], turned.q_indices[p, j, :n])


REFUSED = {
    "seq_len": (lambda: from_parts(0), "seq_len must be at least 1; got 0"),
    "band": (lambda: Band(1, -2), "left >= -right.*left=1, right=-2"),
    "dilation": (lambda: Band(1, 1, 0), "dilation >= 1.*dilation=0"),
    "outside": (lambda: from_parts(T, columns=np.array([[T]])), r"columns must lie within \[0, 24"),
    "negative": (lambda: from_parts(T, rows=np.array([[-1]])), r"rows must lie within \[0, 24\)"),
    "count": (
        lambda: from_parts(T, rows=np.array([[1]]), num_rows=np.array([2])),
        r"num_rows within \[0, 1\].*\[2\]",
    ),
    "no_batch": (lambda: from_parts(T, columns=np.array([1])), r"columns must be \[\*L, B, G\]"),
    "counts_shape": (
        lambda: from_parts(T, columns=np.array([[1]]), num_columns=np.array([1, 1])),
        r"num_columns \[\*L, B\]; got \(1, 1\) and \(2,\)",
    ),
    "blocks_len": (
        lambda: from_parts(T, blocks=patterns.full(32, block=16)),
        "blocks must be for q_len = kv_len = seq_len=24; got q_len=32",
    ),
    "elements_blocks": (
        lambda: from_parts(T, elements=patterns.full(T, block=8)),
        "elements must have blocks of one token.*got 8 x 8",
    ),
    "mask_dtype": (
        lambda: from_parts(T, token_mask=np.ones((1, T), int)), r"boolean \[\*L, B, T=24\].*int64",
    ),
    "mask_shape": (
        lambda: from_parts(T, token_mask=np.ones((1, 9), bool)), r"token_mask.*got bool \(1, 9\)",
    ),
    "capacity": (
        lambda: compound.positions(np.ones((1, T), bool), 3), "capacity must hold.*24.*got 3",
    ),
    "element": (lambda: element_lists(np.full((1, 4, 1), 4)), r"keys must lie within \[0, 4\)"),
    "keys_per_query": (
        lambda: random_elements(4, keys_per_query=5), r"keys_per_query must lie within \[1, 4\]",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
