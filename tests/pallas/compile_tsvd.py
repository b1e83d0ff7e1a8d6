"""Compiles the kernels of tiled factors to H200 machine code without a GPU, as ptxas tells it.

    python -m tests.pallas.compile_tsvd M TILE RANK SCHEDULE [HEIGHT]

Needs jax's CUDA plugin. HEIGHT is that of a single row of tiles. Forward with bias and GELU, and
what the schedule has of the backward pass; "shared" is of a common right factor.
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

NUM_IN, NUM_OUT = 4, 16


def main(rows: int, size: int, rank: int, schedule: str, height: int | None = None) -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def step(x, u, v, bias, dy):
        y = pallas.tsvd_forward(x, u, v, bias, activation="gelu", schedule=schedule)
        return y if schedule != "products" else (y, pallas.tsvd_backward(x, u, v, dy))

    def common(x, tiles, factor, bias):
        return pallas.tsvd.shared.forward(x, tiles, factor, bias, activation="gelu")

    if schedule == "shared":
        arrays = of(rows, height), of(height, NUM_OUT, rank), of(rank, size), of(NUM_OUT * size)
        with pallas.lowering():
            jax.jit(common).trace(*arrays).lower().compile()
        return

    num_in, height = (NUM_IN, size) if height is None else (1, height)
    with pallas.lowering():
        jax.jit(step).trace(
            of(rows, num_in * height), of(num_in, height, NUM_OUT, rank),
            of(NUM_OUT, num_in, rank, size), of(NUM_OUT * size), of(rows, NUM_OUT * size),
        ).lower().compile()  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4], *map(int, sys.argv[5:]))
