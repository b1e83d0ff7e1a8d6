"""Compiles the kernels of top-L attention to H200 machine code without a GPU, as ptxas tells it.

    python -m tests.pallas.compile_top_l H CAUSAL

Needs jax's CUDA plugin. CAUSAL is 1 or 0. Attention forward and backward, the choice of keys,
and votes for blocks of them.
"""

import os
import sys
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from sparsax import pallas
from sparsax.pallas import top_l
from sparsax.quantise import Codes

L, N = 4096, 4  # rows long enough to be cut


def main(features: int, causal: bool) -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    shaped = lambda dtype, *x: jax.ShapeDtypeStruct((1, L, *x), dtype, sharding=sharding)
    q = shaped(jnp.bfloat16, N, features)
    words = shaped(jnp.uint32, N, -(-features // 64))
    codes, integer = Codes(words, words, num_codes=features // 8), shaped(jnp.int32, N)

    def attend(q, k, v, codes, tau, first):
        options = {"num_codes": codes.num_codes, "scale": 0.1, "causal": causal}
        choice = codes.queries, codes.keys, tau, first, None
        o, saved = top_l.forward(q, k, v, *choice, **options)
        return o, *top_l.backward(q, k, v, o, saved, o, *choice, **options)

    choose = lambda codes: top_l.select(codes, None, keep=L // 8, causal=causal)
    vote = lambda codes: top_l.votes(codes, None, keep=L // 8, block=64, stride=8, causal=causal)
    with pallas.lowering():
        jax.jit(attend).trace(q, q, q, codes, integer, integer).lower().compile()
        jax.jit(choose).trace(codes).lower().compile()
        jax.jit(vote).trace(codes).lower().compile()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1")
