"""What the assembler makes of top-L attention: no serialised products, no new spills."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas.test_machine_code import SERIALISED, SPILL
from tests.pallas.test_machine_code import pytestmark as pytestmark

# Bytes that the kernels of a head dim may spill, 0 where nothing is said.
SPILLS = {64: {"forward": 4}, 96: {"dkv": 76}, 128: {"dkv": 200, "dq": 104}}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("features", [32, 64, 96, 128])
def test_products_overlap_and_registers_do_not_spill(features, causal):
    module, root = "tests.pallas.compile_top_l", Path(__file__).parents[2]
    command = [sys.executable, "-m", module, str(features), str(int(causal))]
    run = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    kernels = set(re.findall(r"Function properties for (\w+?)_mosaic", said))
    attention = {f"block_sparse_{name}" for name in ("deal", "forward", "dq", "dkv", "combine")}
    assert kernels == attention | {"top_l_select", "top_l_vote"}
    assert not SERIALISED.search(said)
    assert not re.search("in function 'top_l_(select|vote)", said)  # which would be a spill
    for kernel, spilled in SPILL.findall(said):
        assert int(spilled) <= SPILLS.get(features, {}).get(kernel, 0), kernel
