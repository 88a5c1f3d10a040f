"""data.py: tokenizers, and what it promises about shards and the windows that training sees."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from common import refused

from data import Shards, get_tokenizer

SIZES = (5001, 3007, 64, 4000)
TRAIN = [np.random.default_rng(size).integers(0, 256, size) for size in SIZES]


def write_folder(folder: Path, shards: list, vocab_size: int = 257) -> Path:
    """A folder of prepared data, with a key that older ones have besides."""
    entries = []
    for i, shard in enumerate(shards):
        entries.append({"file": f"{i}.bin", "tokens": len(shard)})
        tokens = np.asarray(shard, "<u2" if vocab_size == 257 else "<u4")
        tokens.tofile(folder / f"{i}.bin")
    split = {"tokens": sum(map(len, shards)), "bytes": 9, "shards": entries}
    meta = {"tokenizer": "bytes", "vocab_size": vocab_size, "job": "5e1f"}
    (folder / "meta.json").write_text(json.dumps({**meta, "splits": {"train": split}}))
    return folder


def test_the_bytes_tokenizer_gives_exactly_the_bytes():
    every_character = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token) == ("bytes", 257, 256)
    for text in ("", "\r\n \t\n\n", "<|endoftext|>", "e\u0301中😀" * 99, every_character):
        ids = tokenizer.encode_ordinary(text)
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("vocab_size", [257, 70_001])
def test_every_window_is_served_once_and_y_is_one_token_ahead(tmp_path, vocab_size):
    texts = [tokens + vocab_size - 257 for tokens in TRAIN]
    shards = Shards(write_folder(tmp_path, texts, vocab_size), "train", 100)
    expected = [text[at : at + 101] for text in texts for at in range(0, len(text) - 100, 100)]
    assert shards.n_windows == len(expected) == 50 + 30 + 0 + 39
    x, y = shards.batch(range(shards.n_windows))
    assert torch.equal(torch.cat([x, y[:, -1:]], dim=1), torch.from_numpy(np.stack(expected)))
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(shards.batch([5, 0, 118, 5])[0], x[[5, 0, 118, 5]])
    assert (shards.tokenizer, shards.vocab_size) == ("bytes", vocab_size)
    assert shards.n_tokens == sum(SIZES)


def test_an_epoch_shows_every_window_once_in_an_order_that_seed_and_epoch_decide(tmp_path):
    shards = Shards(write_folder(tmp_path, TRAIN), "train", 64)
    n = shards.n_windows
    run = np.concatenate([shards.windows(3, first, 8) for first in range(0, 4 * n, 8)])[: 4 * n]
    epochs = run.reshape(4, n).tolist()
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    again = Shards(tmp_path, "train", 64)
    assert again.windows(3, n, n).tolist() == epochs[1] != again.windows(4, n, n).tolist()


DAMAGE = [
    (lambda path: os.truncate(path, 4000), "missing or has not 6014 bytes"),
    (lambda path: path.unlink(), "missing or has not 6014 bytes"),
    (lambda path: path.write_bytes(b"\1\2" * 3007), "a token over 256"),
]


@pytest.mark.parametrize("damage, problem", DAMAGE)
def test_damage_is_noticed(tmp_path, damage, problem):
    damage(write_folder(tmp_path, TRAIN) / "1.bin")
    message = f"1.bin .*{problem}[^\n]*\n.*prepare the data again"
    refused(message, lambda: Shards(tmp_path, "train", 64).batch(range(119)))
