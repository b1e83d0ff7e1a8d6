"""What the assembler makes of compound attention: no serialised products, no new spills."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas.test_machine_code import SERIALISED, SPILL
from tests.pallas.test_machine_code import pytestmark as pytestmark

# Bytes that the kernels of a head dim may spill, 0 where nothing is said. Beside the arithmetic of
# the mask, ids of keys, the code that cuts long rows, and a row's sums beside the first tile of the
# next row want registers.
SPILLS = {
    32: {"dq": 76, "dkv": 56},
    64: {"forward": 92},
    96: {"forward": 72, "dkv": 108},
    128: {"forward": 96, "dq": 60, "dkv": 244},
}
# Without a rule.
OF_BITS = {
    32: {"dq": 20, "dkv": 20},
    64: {"dq": 76},
    96: {"forward": 4, "dkv": 64},
    128: {"forward": 4, "dq": 24, "dkv": 244},
}


@pytest.mark.parametrize("pattern", ["longformer", "causal", "blocks", "bigbird"])
@pytest.mark.parametrize("features", [32, 64, 96, 128])
def test_products_overlap_and_registers_do_not_spill(features, pattern):
    module, root = "tests.pallas.compile_compound", Path(__file__).parents[2]
    command = [sys.executable, "-m", module, str(features), pattern]
    run = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    kernels = set(re.findall(r"Function properties for block_sparse_(\w+?)_mosaic", said))
    assert kernels == {"deal", "forward", "dq", "dkv", "combine"}
    assert not SERIALISED.search(said)
    most = OF_BITS if pattern == "bigbird" else SPILLS
    for kernel, spilled in SPILL.findall(said):
        assert int(spilled) <= most.get(features, {}).get(kernel, 0), kernel
