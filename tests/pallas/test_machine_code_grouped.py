"""What the assembler makes of the kernels of grouped products, as in `test_machine_code`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas.test_machine_code import SERIALISED, pytestmark  # noqa: F401


@pytest.mark.parametrize("matrices", [0, 1, 2])
@pytest.mark.parametrize(("features", "columns"), [(4096, 8192), (320, 384), (64, 64)])
def test_products_overlap_and_registers_do_not_spill(features, columns, matrices):
    module, root = "tests.pallas.compile_grouped", Path(__file__).parents[2]
    command = [sys.executable, "-m", module, str(features), str(columns), str(matrices)]
    run = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    kernels = re.findall(r"Function properties for (t?gmm)_mosaic", said)
    assert sorted(kernels) == ["gmm", "gmm", *["tgmm"] * (not matrices)]
    assert not SERIALISED.search(said)
    spilled = re.findall(r"(\d+) bytes spill stores", said)
    assert set(spilled) == {"0"}
