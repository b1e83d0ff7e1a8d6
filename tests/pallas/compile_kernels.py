"""Compiles the attention kernels to H200 machine code without a GPU, and prints what ptxas says.

    python -m tests.pallas.compile_kernels H BLOCK MASKED HEADS

Needs jax's CUDA plugin. MASKED is 1 for causal attention with segments, else 0. Of few
HEADS rows are not dealt out.
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
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import sparsax
from sparsax import pallas

L = 1024


def main(features: int, block: int, masked: bool, heads: int) -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    argument = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    pattern = sparsax.BlockPattern.from_block_mask(
        np.ones((heads, L // block, L // block), bool), q_len=L, block_q=block
    )
    q = jax.ShapeDtypeStruct((1, L, heads, features), jnp.bfloat16, sharding=sharding)
    ids = jax.ShapeDtypeStruct((1, L), jnp.int32, sharding=sharding)

    def step(q, k, v, pattern, ids):
        options = {"causal": masked, "segment_ids": ids if masked else None}
        attend = lambda q, k, v: sparsax.block_sparse_attention(
            q, k, v, pattern, **options, implementation="pallas"
        )
        o, pull = jax.vjp(attend, q, k, v)
        return pull(o)

    with pallas.lowering():
        jax.jit(step).trace(q, q, q, jax.tree.map(argument, pattern), ids).lower().compile()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))
