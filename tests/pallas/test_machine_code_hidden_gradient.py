"""What the assembler makes of the gradient of hidden units, as in `test_machine_code`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas.test_machine_code import pytestmark  # noqa: F401


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("rows", "unit", "activation"),
    [(16384, 2048, "gelu"), (16384, 2048, "silu"), (1000, 64, "relu")],
)
def test_registers_do_not_spill(rows, unit, activation, parts):
    module, root = "tests.pallas.compile_hidden_gradient", Path(__file__).parents[2]
    command = [sys.executable, "-m", module, str(rows), str(unit), activation, str(parts)]
    run = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    assert len(re.findall(r"Function properties for hidden_gradient_mosaic", said)) == 1
    assert set(re.findall(r"(\d+) bytes spill stores", said)) == {"0"}
