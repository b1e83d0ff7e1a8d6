"""What the assembler makes of the kernels, without a GPU: no serialised products, no new spills.

An optional group: `uv run --group machine-code pytest -m machine_code`.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.machine_code,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the dependency group machine-code (jax's CUDA plugin)",
    ),
]

# Bytes that the kernels of (head dim, masked) may spill, 0 where nothing is said. The masked loop
# of a kernel spills around the arithmetic of the mask, and where a row's sums are held beside the
# first tile of the next row; 256 features do not fit in the registers.
SPILLS = {
    (128, False): {"dkv": 16},
    (128, True): {"dkv": 168},
    (256, False): {"dq": 140},
    (256, True): {"dq": 196, "dkv": 84},
}
SERIALISED = re.compile(r"C75(10|11|12|13|14)\b.*")
SPILL = re.compile(r"in function 'block_sparse_(\w+?)_mosaic\w*', (\d+) bytes spill stores")


# The same of (head dim, block) where blocks are smaller than a row tile, masked by bits.
OF_SMALL_BLOCKS = {
    (64, 32): {"dq": 4},
    (128, 32): {"dkv": 184},
    (128, 64): {"dkv": 216},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("features", [32, 64, 96, 128, 256])
def test_products_overlap_and_registers_do_not_spill(features, masked):
    check(features, 128, masked, SPILLS.get((features, masked), {}))


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("features", [64, 128])
def test_small_blocks_spill_no_more(features, block):
    check(features, block, False, OF_SMALL_BLOCKS.get((features, block), {}))


def check(features: int, block: int, masked: bool, allowed: dict[str, int]) -> None:
    module, root = "tests.pallas.compile_kernels", Path(__file__).parents[2]
    command = [sys.executable, "-m", module, str(features), str(block), str(int(masked))]
    run = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    kernels = set(re.findall(r"Function properties for block_sparse_(\w+?)_mosaic", said))
    assert kernels == {"deal", "forward", "dq", "dkv"}
    assert not SERIALISED.search(said)
    for kernel, spilled in SPILL.findall(said):
        assert int(spilled) <= allowed.get(kernel, 0), kernel
