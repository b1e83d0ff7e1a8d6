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
# first tile of the next row; 256 features do not fit in the registers. What is read ahead of the
# next row takes its share: rows that are not dealt out, of FEW heads, have nothing to read ahead.
# Of MANY, the last ones are left to thread blocks that do one each.
FEW, DEALT, MANY = 4, 64, 160
SPILLS = {
    (32, True): {"dq": 232, "dkv": 20},
    (64, False): {"dkv": 56},
    (64, True): {"forward": 40},
    (96, True): {"forward": 40, "dkv": 84},
    (128, False): {"dkv": 96},
    (128, True): {"forward": 72, "dq": 56, "dkv": 248},
    (256, False): {"forward": 80, "dq": 108, "dkv": 88},
    (256, True): {"forward": 208, "dq": 212, "dkv": 164},
}
SERIALISED = re.compile(r"C75(10|11|12|13|14)\b.*")
SPILL = re.compile(r"in function 'block_sparse_(\w+?)_mosaic\w*', (\d+) bytes spill stores")
# Of so few rows that none are dealt out.
OF_FEW_ROWS = {
    (64, False): {"dkv": 52},
    (128, True): {"dkv": 68},
    (256, False): {"dq": 112},
    (256, True): {"forward": 36, "dq": 276, "dkv": 60},
}
# The same of (head dim, block) where blocks are smaller than a row tile, masked by bits.
OF_SMALL_BLOCKS = {
    (64, 32): {"dq": 48},
    (64, 64): {"dq": 104},
    (128, 32): {"dkv": 240},
    (128, 64): {"dkv": 200},
}


@pytest.mark.parametrize("heads", [DEALT, MANY])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("features", [32, 64, 96, 128, 256])
def test_products_overlap_and_registers_do_not_spill(features, masked, heads):
    check(features, 128, masked, SPILLS.get((features, masked), {}), heads)


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("features", [64, 128])
def test_small_blocks_spill_no_more(features, block):
    check(features, block, False, OF_SMALL_BLOCKS.get((features, block), {}), DEALT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("features", [32, 64, 96, 128, 256])
def test_rows_that_are_not_dealt_out_spill_no_more(features, masked):
    check(features, 128, masked, OF_FEW_ROWS.get((features, masked), {}), FEW)


def check(features: int, block: int, masked: bool, allowed: dict[str, int], heads: int) -> None:
    module, root = "tests.pallas.compile_kernels", Path(__file__).parents[2]
    command = [sys.executable, "-m", module, str(features), str(block), str(int(masked))]
    command.append(str(heads))
    run = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    kernels = set(re.findall(r"Function properties for block_sparse_(\w+?)_mosaic", said))
    assert kernels == {"forward", "dq", "dkv"} | ({"deal"} if heads != FEW else set())
    assert not SERIALISED.search(said)
    for kernel, spilled in SPILL.findall(said):
        assert int(spilled) <= allowed.get(kernel, 0), kernel
