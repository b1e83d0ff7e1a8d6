"""Compiles the gradient of hidden units to H200 machine code without a GPU, as ptxas tells it.

    python -m tests.pallas.compile_hidden_gradient M E ACTIVATION PARTS

Needs jax's CUDA plugin. PARTS is 1, or 2 with a gate.
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
from sparsax.pallas.hidden_gradient import hidden_gradient


def main(rows: int, unit: int, activation: str, parts: int) -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    step = lambda zs, dh, c: hidden_gradient(zs, dh, c, activation=activation)
    z = of(rows, unit)
    with pallas.lowering():
        traced = jax.jit(step).trace([z] * parts, z, of(rows, 1, dtype=jnp.float32))
        traced.lower().compile()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
