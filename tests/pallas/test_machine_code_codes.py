"""What XLA makes of product quantisation for a GPU: no products with centroids in memory."""

import subprocess
import sys
from pathlib import Path

from tests.pallas.test_machine_code import pytestmark as pytestmark


def test_codes_hold_less_than_the_queries():
    command = [sys.executable, "-m", "tests.pallas.compile_codes"]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = [line.split() for line in run.stdout.splitlines()]
    assert [score for score, *_ in found] == ["match", "adc"]
    for _, held, queries in found:  # products would be four times the queries
        assert int(held) < int(queries) / 2
