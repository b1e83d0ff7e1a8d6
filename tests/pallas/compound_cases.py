"""Cases of compound attention in shapes that the Hopper kernels take."""

import dataclasses

import numpy as np

from sparsax import Band, BlockPattern, CompoundPattern, patterns
from sparsax.patterns import compound
from tests.compound_cases import Case, lengths, parts

POSITIONS = np.array([[0, 271, 64, 63, 18, 330], [200, 7, 40, 0, 0, 0]])
COUNTS = np.array([6, 3])


def longformer(window=40, positions=POSITIONS, counts=COUNTS, kept=None, **kwargs):
    return lambda c: compound.longformer(
        c.T, window=window, positions=positions, counts=counts,
        token_mask=None if kept is None else lengths(c, *kept), **kwargs,
    )  # fmt: skip


def everything(c, heads, block_q, block_kv, causal):
    blocks = patterns.random(c.T, blocks_per_row=2, heads=heads, block=32, seed=2).to_block_mask()
    shape = -(-c.T // block_q), -(-c.T // block_kv)
    return CompoundPattern.from_parts(
        c.T, bands=[Band(50, 30), Band(170, -160)], columns=POSITIONS, num_columns=COUNTS,
        rows=POSITIONS[:1, 1:3], causal=causal, token_mask=lengths(c, c.T, 200),
        blocks=BlockPattern.from_block_mask(
            np.asarray(blocks)[:, : shape[0], : shape[1]], q_len=c.T, block_q=block_q,
            block_kv=block_kv,
        ),
    )  # fmt: skip


def blocks_and_columns(c):
    blocks = patterns.random(c.T, blocks_per_row=2, block=64, seed=1)
    return CompoundPattern.from_parts(c.T, blocks=blocks, columns=POSITIONS, num_columns=COUNTS)


def blocks_and_rows(c):
    return CompoundPattern.from_parts(
        c.T, blocks=patterns.random(c.T, blocks_per_row=2, block=32, seed=3),
        rows=np.array([[3, 150], [64, 0]]), num_rows=np.array([2, 1]),
    )  # fmt: skip


def bigbird(heads, kept=None, block=64, ends=2):
    return lambda c: compound.bigbird(
        c.T, block=block, random_blocks=1, heads=heads, global_blocks=ends,
        token_mask=None if kept is None else lengths(c, *kept),
    )  # fmt: skip


def many_columns(c):
    tokens = np.random.default_rng(0).choice(c.T, 150, replace=False)[None]
    return compound.longformer(c.T, window=20, positions=tokens, causal=c.name.endswith("causal"))


ALL = lambda c: compound.longformer(c.T, window=2, positions=np.arange(c.T)[None])
QDS = lambda c: compound.qds(
    c.T, window=64, query_lens=np.array([9, 17]), max_query_len=20,
    sentence_starts=np.array([[9, 40, 77, 140, 300], [17, 55, 101, 0, 0]]),
    num_sentences=np.array([5, 3]), token_mask=lengths(c, c.T, 290),
)  # fmt: skip

CASES = tuple(
    dataclasses.replace(c, dtype="bfloat16" if c.dtype == "float32" else c.dtype)
    for c in (
        Case(name="window", T=331, H=64, make=parts(bands=[Band(70, 33)])),
        Case(name="window_whole_tiles", T=512, H=32, B=1, make=parts(bands=[Band(300, 280)])),
        Case(name="window_larger_than_the_sequence", T=200, H=64,
             make=parts(bands=[Band(500, 377)])),
        Case(name="window_causal", T=331, H=64, make=parts(bands=[Band(90, 90)], causal=True)),
        Case(name="one_token", T=1, H=64, make=parts(bands=[Band(3, 3)])),
        Case(name="bands_that_overlap", T=331, H=32,
             make=parts(bands=[Band(50, 3), Band(60, -30), Band(200, -190)])),
        Case(name="vertical_slash", T=331, H=64, make=lambda c: compound.vertical_slash(
            c.T, columns=POSITIONS, counts=COUNTS, offsets=[0, 1, 2, 130])),
        Case(name="columns", T=331, H=64, make=parts(columns=POSITIONS, num_columns=COUNTS)),
        Case(name="columns_shared_causal", T=331, H=64,
             make=parts(columns=POSITIONS[:1], causal=True)),
        Case(name="many_columns", T=384, H=64, B=1, make=many_columns),
        Case(name="many_columns_causal", T=384, H=64, B=1, make=many_columns),
        Case(name="rows", T=331, H=64, make=parts(rows=POSITIONS, num_rows=COUNTS)),
        Case(name="rows_whole_tiles", T=256, H=64, make=lambda c: CompoundPattern.from_parts(
            c.T, rows=np.array([[3, 150], [64, 0]]), num_rows=np.array([2, 1]))),
        Case(name="rows_causal", T=331, H=64, own=True,
             make=parts(rows=POSITIONS, num_rows=COUNTS, causal=True)),
        Case(name="longformer", T=331, H=64, make=longformer()),
        Case(name="longformer_own", T=331, H=64, make=longformer(), own=True),
        Case(name="longformer_whole_tiles", T=384, H=64, N=2, K=1, make=longformer()),
        Case(name="longformer_2048", T=2048, H=64, B=2, own=True, N=1, K=1,
             make=longformer(window=256)),
        Case(name="rows_own_padded", T=384, H=32, own=True, N=2, K=1,
             make=lambda c: CompoundPattern.from_parts(
                 c.T, rows=POSITIONS, num_rows=COUNTS, token_mask=lengths(c, c.T, 130))),
        Case(name="rows_own_causal_padded", T=384, H=32, B=1, N=1, K=1,
             make=lambda c: CompoundPattern.from_parts(
                 c.T, rows=POSITIONS[:1], token_mask=lengths(c, 300), causal=True)),
        Case(name="longformer_padded_own", T=331, H=64, N=4, own=True,
             make=longformer(kept=(331, 190))),
        Case(name="longformer_padding_all", T=331, H=32, own=True,
             make=longformer(kept=(130, 0))),
        Case(name="longformer_causal", T=331, H=96, own=True, make=longformer(causal=True)),
        Case(name="selected_within_the_window", T=331, H=64, make=longformer(window=320)),
        Case(name="all_selected", T=150, H=64, own=True, make=ALL),
        Case(name="none_selected", T=331, H=64, own=True,
             make=longformer(counts=np.array([0, 0]))),
        Case(name="none_selected_at_all", T=331, H=64,
             make=longformer(positions=None, counts=None)),
        Case(name="repeated", T=331, H=64, own=True,
             make=longformer(positions=np.full((2, 5), 77), counts=np.array([5, 3]))),
        Case(name="no_part", T=331, H=64, make=parts()),
        Case(name="qds", T=331, H=64, make=QDS),
        Case(name="etc", T=331, H=64, make=lambda c: compound.etc(c.T, window=60, num_global=70)),
        Case(name="bigbird", T=512, H=64, make=bigbird(1)),
        Case(name="bigbird_per_head", T=700, H=64, N=4, K=2, make=bigbird(4, (700, 450))),
        Case(name="bigbird_128", T=700, H=128, make=bigbird(1, (700, 450), 128)),
        Case(name="bigbird_both_ends", T=700, H=64, make=bigbird(2, (700, 450), ends=(1, 1))),
        Case(name="blocks_and_columns", T=331, H=64, make=blocks_and_columns),
        Case(name="blocks_and_rows", T=200, H=32, N=2, K=1, make=blocks_and_rows),
        Case(name="everything", T=331, H=64, own=True,
             make=lambda c: everything(c, 1, 64, 64, True)),
        Case(name="everything_per_kv_head", T=331, H=32, N=4, own=True,
             make=lambda c: everything(c, 2, 32, 128, False)),
        Case(name="everything_per_head", T=331, H=128, N=4, own=True,
             make=lambda c: everything(c, 4, 128, 32, True)),
        Case(name="mqa", T=331, H=64, N=4, K=1, own=True, scale=0.7, make=longformer()),
        Case(name="negative_scale", T=331, H=64, scale=-0.2, make=longformer()),
        Case(name="f16", T=331, H=64, N=4, dtype="float16",
             make=longformer(window=90, causal=True)),
        Case(name="h96", T=331, H=96, make=longformer(window=90)),
        Case(name="h256", T=331, H=256, B=1, K=1, own=True,
             make=longformer(positions=POSITIONS[:1], counts=COUNTS[:1])),
        Case(name="h128", T=331, H=128, N=4, make=longformer(kept=(331, 250))),
    )
)  # fmt: skip


def case(name: str) -> Case:
    """The case of that name."""
    return next(c for c in CASES if c.name == name)
