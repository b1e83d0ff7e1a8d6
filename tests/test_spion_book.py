"""What the SPION scripts keep of a comparison, and what they refuse to go on with."""

import json
from types import SimpleNamespace

import pytest
import spion_peers
from spion_compare import Book, compare
from spion_lm_gpu import QUICK

TASK = SimpleNamespace(name="lm256", metric="bits per byte", size=QUICK)
LOSSES = [{"peer": spion_peers.MATERIALISED, "loss": 2.0}, {"peer": "dense", "loss": 2.1}]


def arguments(folder, **changes):
    flags = {"out": folder, "dense": "xla", "methods": [], "minutes": 1.0, "seeds": 0}
    return SimpleNamespace(**(flags | changes))


def test_a_book_is_on_disk_before_its_first_row_and_goes_on(tmp_path):
    facts = Book(TASK, arguments(tmp_path)).rows[0]
    assert json.loads((tmp_path / "spion_lm256.json").read_text())["rows"] == [facts]
    Book(TASK, arguments(tmp_path)).add({"seed": 0, "method": "dense"})
    book = Book(TASK, arguments(tmp_path))
    assert book.rows == [facts, {"seed": 0, "method": "dense"}]
    assert book.methods(0) == {"dense"}


def test_other_facts_are_refused_by_name(tmp_path):
    Book(TASK, arguments(tmp_path))
    with pytest.raises(SystemExit, match=r"other facts: dense xla, now cudnn. Give another"):
        Book(TASK, arguments(tmp_path, dense="cudnn"))
    size = QUICK.quick(learning_rate=0.5)
    with pytest.raises(SystemExit, match=r"other facts: learning_rate 0.001, now 0.5. Give"):
        Book(SimpleNamespace(**(vars(TASK) | {"size": size})), arguments(tmp_path))


def test_only_peers_without_a_row_are_measured():
    rows = [{"task": "lm256"}, {"seed": 0, "method": "random"}, {"peer": "diagonal"}]
    left = ["dense", "random", "window", "bigbird", "longformer"]
    assert spion_peers.missing(rows, "xla") == left
    assert spion_peers.missing(rows, "cudnn") == [*left, spion_peers.MATERIALISED]
    assert spion_peers.missing([{"peer": name} for name in spion_peers.PEERS], "cudnn") == []


def test_dense_attentions_that_train_otherwise_stop_every_start(tmp_path):
    book = Book(TASK, arguments(tmp_path, dense="cudnn"))
    for row in LOSSES:
        book.add(row)
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"must train alike.*are 2.0 and 2.1"):
            compare(TASK, arguments(tmp_path, dense="cudnn"), [])
    spion_peers.compare_losses([LOSSES[0], LOSSES[1] | {"loss": 2.01}])
    spion_peers.compare_losses([LOSSES[0], {"peer": "dense"}])  # not timed
