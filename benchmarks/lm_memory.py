"""Memory of a training step of the sparse language model by length, without a GPU.

    python benchmarks/lm_memory.py --data FOLDER     # needs jax's CUDA plugin, no card

XLA compiles the program of `spion_lm_gpu.py` for an H200; bytes are those that it reserves beside
parameters and data, as in the rows of that script's peers. A pattern's lists have their whole
capacity, so that all patterns of a length take as much.
"""

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import spion_lm_gpu
from gpu import leave_products_to_cublas
from harness import save
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from spion_methods import FINDERS
from spion_peers import arguments
from spion_runs import Runs

from sparsax import pallas

TARGET = Path(__file__).parents[1] / "tests" / "pallas" / "h200.txtpb"


def step_bytes(data: Path, length: int) -> int:
    """Bytes of a step with a pattern."""
    size = spion_lm_gpu.full(length)
    args = argparse.Namespace(out=Path(), dense="xla", no_bar=True, beside=False)
    runs = Runs(spion_lm_gpu.language(data, size), 0, args, lambda: False)
    run = runs.run("drop", "xla", FINDERS["diagonal"](runs.setting, None))
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    given = jax.tree.map(
        lambda x: shaped(x) if hasattr(x, "shape") else x, arguments(run, runs.batch)
    )
    with pallas.lowering():
        compiled = run.programs.train.trace(*given, count=size.steps_per_call).lower().compile()
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the files")
    args = parser.parse_args()
    spion_lm_gpu.dtype = lambda: jnp.bfloat16  # as on the GPU that it compiles for
    leave_products_to_cublas()
    rows = []
    for length in spion_lm_gpu.DENSITY:
        rows.append({"length": length, "sparse_bytes": step_bytes(args.data, length)})
        print(rows[-1], flush=True)
        save("lm_memory", rows)


if __name__ == "__main__":
    main()
