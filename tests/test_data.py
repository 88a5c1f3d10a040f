"""data.py: tokenizers, and what it promises about shards and the windows that training sees."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from common import refused

from data import Shards, documents, get_tokenizer


def write_folder(folder: Path, shards: dict[str, list], vocab_size: int = 257) -> Path:
    """A folder of prepared data, with the keys and the file that older ones have besides."""
    folder.mkdir()
    meta = {"tokenizer": "bytes", "vocab_size": vocab_size, "source": "made here", "splits": {}}
    meta |= {"job": "5e1f", "skipped": 0, "progress": {"stage": 1, "chunk": 0}}
    (folder / "verified.json").write_text("{}")
    for split, arrays in shards.items():
        entries = []
        for number, tokens in enumerate(arrays):
            raw = np.asarray(tokens, "<u2" if vocab_size <= 65536 else "<u4").tobytes()
            name = f"{split}_{number:05d}.bin"
            (folder / name).write_bytes(raw)
            entries.append({"file": name, "tokens": len(tokens), "sha256": "of its bytes"})
        count = sum(map(len, arrays))
        meta["splits"][split] = {"documents": 1, "tokens": count, "bytes": count - 1, "shards": entries}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


TRAIN = [np.random.default_rng(i).integers(0, 256, n) for i, n in enumerate((5001, 3007, 64, 4000))]


@pytest.fixture
def prepared(tmp_path) -> Path:
    return write_folder(tmp_path / "prepared", {"train": TRAIN, "val": [TRAIN[0][:500]]})


ALL = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
TRICKY = ["", "a", "\r\n \t\n\n", "<|endoftext|>", "\0\x7f\x80\ufeff\U0010ffff", "e\u0301中😀" * 99, ALL]


@pytest.mark.parametrize("text", TRICKY)
def test_the_bytes_tokenizer_gives_exactly_the_bytes(text):
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token) == ("bytes", 257, 256)
    ids = tokenizer.encode_ordinary(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()


def test_every_window_is_served_once_and_y_is_one_token_ahead(prepared):
    T, shards = 100, Shards(prepared, "train", 100)
    expected = [tokens[at : at + T + 1] for tokens in TRAIN for at in range(0, len(tokens) - T, T)]
    assert shards.n_windows == len(expected) == 50 + 30 + 0 + 39
    x, y = shards.batch(range(shards.n_windows))
    assert x.shape == y.shape == (len(expected), T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(torch.cat([x, y[:, -1:]], dim=1), torch.from_numpy(np.stack(expected)))
    shuffled = [5, 0, shards.n_windows - 1, 5]
    assert torch.equal(shards.batch(shuffled)[0], x[shuffled])
    assert (shards.tokenizer, shards.vocab_size) == ("bytes", 257)
    assert shards.n_tokens == sum(map(len, TRAIN))


def test_an_epoch_shows_every_window_once_in_an_order_that_seed_and_epoch_decide(prepared):
    shards = Shards(prepared, "train", 64)
    n = shards.n_windows
    run = np.concatenate([shards.windows(3, first, 8) for first in range(0, 4 * n, 8)])[: 4 * n]
    epochs = run.reshape(4, n).tolist()
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    again = Shards(prepared, "train", 64)
    assert again.windows(3, n, n).tolist() == epochs[1] != again.windows(4, n, n).tolist()


def test_large_vocabularies_are_read_as_uint32(tmp_path):
    folder = write_folder(tmp_path / "wide", {"train": [np.arange(69000, 70000)]}, vocab_size=70001)
    assert Shards(folder, "train", 999).batch([0])[1].tolist() == [list(range(69001, 70000))]


def test_documents_may_run_across_shards(tmp_path):
    shards = [[1, 2, 256, 3], [4, 4], [], [5, 256, 256, 6, 256]]
    folder = write_folder(tmp_path / "old", {"train": shards})
    assert [tokens.tolist() for tokens in documents(folder, "train")] == [[1, 2], [3, 4, 4, 5], [], [6]]


DAMAGE = [
    (lambda path: os.truncate(path, 4000), "missing or has not 6014 bytes"),
    (lambda path: path.unlink(), "missing or has not 6014 bytes"),
    (lambda path: path.write_bytes(b"\1\2" * 3007), "a token over 256"),
]


@pytest.mark.parametrize("damage, said", DAMAGE)
def test_damage_is_noticed(prepared, damage, said):
    damage(prepared / "train_00001.bin")
    message = f"train_00001.bin .*{said}[^\n]*\n.*prepare the data again"
    refused(message, lambda: Shards(prepared, "train", 64).batch(range(119)))
    refused(message, list, documents(prepared, "train"))
