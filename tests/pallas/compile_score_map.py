"""Compiles the kernels of the score map to H200 machine code without a GPU, as ptxas tells it.

    python -m tests.pallas.compile_score_map H L MASKED

Needs jax's CUDA plugin. MASKED is 1 for causal attention with segments, else 0. The full map and
the pooled one, of all heads and per head: two kernels each.
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

from sparsax import pallas, score_map

N = 4


def main(features: int, length: int, masked: bool) -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    q = jax.ShapeDtypeStruct((1, length, N, features), jnp.bfloat16, sharding=sharding)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)

    def maps(q, k, ids):
        options = {"causal": True, "segment_ids": ids} if masked else {}
        full = score_map(q, k, **options, implementation="pallas")
        return full, score_map(q, k, **options, per_head=True, pool=64, implementation="pallas")

    with pallas.lowering():
        jax.jit(maps).trace(q, q, ids).lower().compile()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
