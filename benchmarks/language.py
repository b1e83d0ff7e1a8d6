"""What pre-training and fine-tuning share: text as token ids, the model and its file.

`prepare` needs the package `tokenizers` and runs anywhere; what it writes is all that a GPU needs.
"""

import dataclasses
import json
import lzma
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsax import data
from sparsax.nn import DecoderConfig, LanguageModel, SparseAttention
from sparsax.peft import load_adapters, save_adapters

PAD, END, TO = range(3)  # END closes a review or a sentence, TO stands between meaning and sentence
SPECIAL = ["<pad>", "<end>", "<to>"]
STYLES = {"opt": DecoderConfig.opt, "llama": DecoderConfig.llama}


@dataclasses.dataclass(frozen=True)
class Text:
    """The reviews as one stream of ids, and the bytes that the validation stream stands for."""

    train: np.ndarray
    valid: np.ndarray
    valid_bytes: int


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Meaning, TO, sentence and END, padded: ids `[n, L]`; index of TO and number of ids, `[n]`."""

    tokens: np.ndarray
    to: np.ndarray
    count: np.ndarray


def prepare(folder: Path, out: Path, vocabulary: int, held_out: int, most: int | None) -> None:
    """Trains a byte-level BPE on reviews and E2E sentences, and writes everything as ids.

    The reviews are those of IMDB's train and test file without their labels, but for the last
    `held_out` of the train file, which validate. `most` reviews a file, all when None.
    """
    reviews = {name: read_reviews(folder / f"imdb_{name}.jsonl.xz") for name in ("train", "test")}
    train, valid = reviews["train"][:-held_out], reviews["train"][-held_out:]
    train = train[:most] + reviews["test"][:most]
    e2e = data.read_e2e(folder)
    lines = [text for m in e2e.train for text in (m.representation, *m.references)]
    tokenizer = train_bpe(train + lines, vocabulary)
    encode = lambda texts: [x.ids for x in tokenizer.encode_batch(texts)]
    stream = lambda texts: np.concatenate([[*ids, END] for ids in encode(texts)]).astype(np.uint16)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    (out / "pieces.json").write_text(json.dumps([to_bytes(x).decode("latin-1") for x in pieces]))
    size = sum(len(text.encode()) for text in valid)
    np.savez_compressed(out / "text.npz", train=stream(train), valid=stream(valid), bytes=size)
    arrays = {}
    for split in ("train", "valid", "test"):
        pairs = [(m.representation, text) for m in getattr(e2e, split) for text in m.references]
        if split == "test":  # one prompt for every meaning
            pairs = [(m.representation, "") for m in e2e.test]
        packed = pack_pairs(*(encode([pair[i] for pair in pairs]) for i in (0, 1)))
        arrays |= {f"{split}_{x.name}": getattr(packed, x.name) for x in dataclasses.fields(Pairs)}
    np.savez_compressed(out / "e2e.npz", **arrays)


def read_reviews(path: Path) -> list[str]:
    """The texts of a file, line breaks as such."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [re.sub(r"(<br />)+", "\n", json.loads(line)["text"]) for line in file]


def train_bpe(texts: list[str], vocabulary: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def to_bytes(piece: str) -> bytes:
    """The bytes of a piece of a byte-level BPE, which writes unprintable ones as other letters."""
    if piece in SPECIAL:
        return b""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(byte_of[letter] for letter in piece)


def pack_pairs(meanings: list[list[int]], sentences: list[list[int]]) -> Pairs:
    rows = [[*m, TO, *s, END] for m, s in zip(meanings, sentences, strict=True)]
    count, to = np.array([len(row) for row in rows]), np.array([len(m) for m in meanings])
    tokens = np.full((len(rows), count.max()), PAD, np.uint16)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return Pairs(tokens, to, count)


def read_text(folder: Path) -> Text:
    with np.load(folder / "text.npz") as file:
        return Text(file["train"], file["valid"], int(file["bytes"]))


def read_pairs(folder: Path, split: str) -> Pairs:
    with np.load(folder / "e2e.npz") as file:
        return Pairs(*(file[f"{split}_{x.name}"] for x in dataclasses.fields(Pairs)))


class Words:
    """From ids to text, without a package."""

    def __init__(self, folder: Path):
        pieces = json.loads((folder / "pieces.json").read_text())
        self.pieces = [piece.encode("latin-1") for piece in pieces]

    def __len__(self) -> int:
        return len(self.pieces)

    def text(self, ids: np.ndarray) -> str:
        """The text of the ids up to END, on one line."""
        end = [*ids, END].index(END)
        found = b"".join(self.pieces[i] for i in ids[:end]).decode("utf-8", "replace")
        return " ".join(found.split())


def use_flash(model: nnx.Module, implementation: str) -> None:
    """Sets `SparseAttention.dense` of every layer of a model: "cudnn" is flash attention."""
    model.set_attributes(SparseAttention, dense=implementation, raise_if_not_found=False)


def halve(model: nnx.Module, kinds=nnx.Param) -> None:
    """Casts such variables of a model to bfloat16, in place."""
    half = lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf
    nnx.update(model, jax.tree.map(half, nnx.state(model, kinds)))


def save_model(model: LanguageModel, folder: Path) -> None:
    """Writes `model.safetensors` and `config.json`."""
    save_adapters(folder / "model.safetensors", model, wrt=nnx.Param)
    config = dataclasses.asdict(model.config) | {"dtype": None}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_model(folder: Path, dtype) -> LanguageModel:
    """The model that `save_model` wrote, to compute in a dtype."""
    config = DecoderConfig(**json.loads((folder / "config.json").read_text()) | {"dtype": dtype})
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    load_adapters(folder / "model.safetensors", model, wrt=nnx.Param)
    return model
