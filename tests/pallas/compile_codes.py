"""Compiles `ProductQuantizer.codes` for an H200 without a GPU: bytes beside arguments and results.

    python -m tests.pallas.compile_codes

Needs jax's CUDA plugin. Prints for each score its name, these bytes, and those of the queries.
"""

import os
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from sparsax import ProductQuantizer

B, L, N, H = 8, 1024, 16, 64


def main() -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    shaped = lambda dtype, *x: jax.ShapeDtypeStruct(x, dtype, sharding=sharding)
    q, books = shaped(jnp.bfloat16, B, L, N, H), shaped(jnp.float32, N, H // 8, 16, 8)
    for score in ("match", "adc"):
        codes = lambda q, k, books, score=score: ProductQuantizer(
            books, jnp.ones(books.shape[:3])
        ).codes(q, k, score=score)
        memory = jax.jit(codes).trace(q, q, books).lower().compile().memory_analysis()
        print(score, memory.temp_size_in_bytes, 2 * q.size)


if __name__ == "__main__":
    main()
