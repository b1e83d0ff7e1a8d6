"""Compiles the kernels of compound attention to H200 machine code without a GPU, as ptxas tells it.

    python -m tests.pallas.compile_compound H PATTERN

Needs jax's CUDA plugin. PATTERN is one of PATTERNS.
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

from sparsax import CompoundPattern, compound_attention, pallas, patterns
from sparsax.patterns import compound

L, N = 4096, 4  # rows long enough to be cut
POSITIONS = np.arange(0, L, 32)[None]
PATTERNS = {
    "longformer": lambda: compound.longformer(L, window=256, positions=POSITIONS),
    "causal": lambda: compound.longformer(
        L, window=256, positions=POSITIONS, causal=True, token_mask=np.ones((1, L), bool)
    ),
    "bigbird": lambda: compound.bigbird(L, block=64),
    "blocks": lambda: CompoundPattern.from_parts(
        L, blocks=patterns.random(L, blocks_per_row=3, block=64), columns=POSITIONS
    ),
}


def main(features: int, name: str) -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    argument = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    q = jax.ShapeDtypeStruct((1, L, N, features), jnp.bfloat16, sharding=sharding)

    def step(q, k, v, pattern):
        attend = lambda q, k, v: compound_attention(q, k, v, pattern, implementation="pallas")
        o, pull = jax.vjp(attend, q, k, v)
        return pull(o)

    with pallas.lowering():
        pattern = jax.tree.map(argument, PATTERNS[name]())
        jax.jit(step).trace(q, q, q, pattern).lower().compile()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
