"""Examples that no other check runs, in their shortest form."""

import runpy
import sys
from pathlib import Path

from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_longformer_on_a_folder_of_texts(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("One sentence, and more of it. Another! " * 20)
    (tmp_path / "b.md").write_text("A heading\n\nIts text; and then: the end.")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    out = tmp_path / "picture.png"
    flags = ["--text", str(tmp_path), "--window", "8", "--shown", "100", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["longformer.py", *flags])
    runpy.run_path(str(EXAMPLES / "longformer.py"), run_name="__main__")
    said = capsys.readouterr().out
    # 20 x (<s> and 8, <s> and 2), then <s> and 2, <s> and 3, <s> and 3, <s> and 3.
    assert "255 tokens, 44 sentences, window 8 to either side" in said
    for part in ("rows", "bands, edge tiles", "columns", "sliced", "block mask", "times as long"):
        assert part in said
    assert plt.imread(out).shape[1] > 500
