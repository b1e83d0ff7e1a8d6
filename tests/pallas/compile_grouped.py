"""Compiles the kernels of grouped products to H200 machine code without a GPU, as ptxas tells it.

    python -m tests.pallas.compile_grouped D F MATRICES

Needs jax's CUDA plugin. MATRICES is 0 for plain products; with 1 there are a second term, bias and
GELU as well, with 2 also a gate.
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

M, G = 1000, 5


def main(features: int, columns: int, matrices: int) -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def step(x, w, b, dy, sizes):
        dx = pallas.gmm(dy, w, sizes, transpose_w=True)
        if not matrices:
            return dx, pallas.gmm(x, w, sizes, transpose_w=False), pallas.tgmm(x, dy, sizes)
        terms = ((x, (w,) * matrices), (x[:, :64], (w[:, :64],) * matrices))
        return dx, pallas.gmm_sum(terms, sizes, (b,) * matrices, activation="gelu")

    with pallas.lowering():
        jax.jit(step).trace(
            of(M, features), of(G, features, columns), of(G, columns), of(M, columns),
            of(G, dtype=jnp.int32),
        ).lower().compile()  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
