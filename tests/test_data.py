"""data.py: tokenizers, and what it promises about shards and the windows that training sees."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import Shards, documents, get_tokenizer
from model import UserError


def write_folder(folder: Path, shards: dict[str, list], vocab_size: int = 257) -> Path:
    """A folder of prepared data, written here by what the README says of its format."""
    folder.mkdir()
    meta = {"tokenizer": "bytes", "vocab_size": vocab_size, "source": "made here", "splits": {}}
    for split, arrays in shards.items():
        entries = []
        for number, tokens in enumerate(arrays):
            raw = np.asarray(tokens, "<u2" if vocab_size <= 65536 else "<u4").tobytes()
            name = f"{split}_{number:05d}.bin"
            (folder / name).write_bytes(raw)
            entries.append({"file": name, "tokens": len(tokens), "sha256": hashlib.sha256(raw).hexdigest()})
        count = sum(map(len, arrays))
        meta["splits"][split] = {"documents": 1, "tokens": count, "bytes": count - 1, "shards": entries}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


TRAIN = [np.random.default_rng(i).integers(0, 256, n) for i, n in enumerate((5001, 3007, 64, 4000))]


@pytest.fixture
def prepared(tmp_path) -> Path:
    return write_folder(tmp_path / "prepared", {"train": TRAIN, "val": [TRAIN[0][:500]]})


# ------------------------------------------------------------------------------------------------- tokenizers

ALL = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
TRICKY = ["", "a", "\r\n \t\n\n", "<|endoftext|>", "\0\x7f\x80\ufeff\U0010ffff", "e\u0301中😀" * 99, ALL]


@pytest.mark.parametrize("text", TRICKY)
def test_the_bytes_tokenizer_gives_exactly_the_bytes(text):
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token) == ("bytes", 257, 256)
    ids = tokenizer.encode_ordinary(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()


def test_an_unknown_tokenizer_names_the_known_ones():
    with pytest.raises(UserError, match="unknown tokenizer 'gpt3'\nknown: bytes, .*gpt2"):
        get_tokenizer("gpt3")


# ---------------------------------------------------------------------------------------------------- windows


def test_every_window_is_served_once_and_y_is_one_token_ahead(prepared):
    T, shards = 100, Shards(prepared, "train", 100)
    expected = [tokens[at : at + T + 1] for tokens in TRAIN for at in range(0, len(tokens) - T, T)]
    assert shards.n_windows == len(expected) == 50 + 30 + 0 + 39
    x, y = shards.batch(range(shards.n_windows))
    assert x.shape == y.shape == (len(expected), T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(torch.cat([x, y[:, -1:]], dim=1), torch.from_numpy(np.stack(expected)))
    shuffled = [5, 0, shards.n_windows - 1, 5]
    assert torch.equal(shards.batch(shuffled)[0], x[shuffled])
    assert (shards.tokenizer, shards.vocab_size, shards.n_tokens) == ("bytes", 257, sum(map(len, TRAIN)))


def test_window_order_is_a_permutation_and_a_pure_function_of_seed_and_epoch(prepared):
    shards, again = Shards(prepared, "train", 64), Shards(prepared, "train", 64)
    order = shards.window_order(3, 1).tolist()
    assert sorted(order) == list(range(shards.n_windows))
    assert order == again.window_order(3, 1).tolist()
    for seed, epoch in ((3, 2), (4, 1)):
        assert order != shards.window_order(seed, epoch).tolist()


def test_large_vocabularies_are_read_as_uint32(tmp_path):
    folder = write_folder(tmp_path / "wide", {"train": [np.arange(69000, 70000)]}, vocab_size=70001)
    assert Shards(folder, "train", 999).batch([0])[1].tolist() == [list(range(69001, 70000))]


def test_documents_may_run_across_shards_as_they_did_in_data_of_before(tmp_path):
    shards = [[1, 2, 256, 3], [4, 4], [5, 256, 256, 6, 256]]
    folder = write_folder(tmp_path / "old", {"train": shards})
    assert [tokens.tolist() for tokens in documents(folder, "train")] == [[1, 2], [3, 4, 4, 5], [], [6]]


# ----------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name, command", [("c4", "c4"), ("mine", "text --input FILE_OR_DIR")])
def test_missing_data_names_the_command_that_makes_it(name, command, tmp_path):
    with pytest.raises(UserError) as error:
        Shards(tmp_path / name, "train", 64)
    assert f"make it: python prepare_data.py {command} --out {tmp_path / name}" in str(error.value)


def flip_a_bit(shard):
    raw = bytearray(shard.read_bytes())
    raw[1000] ^= 1
    shard.write_bytes(raw)


def lower_the_vocabulary(shard):
    meta = shard.parent / "meta.json"
    meta.write_text(meta.read_text().replace("257", "200"))


def forget_the_bytes(shard):
    meta = shard.parent / "meta.json"
    meta.write_text(meta.read_text().replace('"bytes": ', '"lines": '))


@pytest.mark.parametrize(
    "damage, said",
    [
        (forget_the_bytes, "meta.json does not describe token shards"),
        (flip_a_bit, "train_00001.bin is not what was prepared"),
        (lambda shard: os.truncate(shard, 4000), "missing or has not 6014 bytes"),
        (lower_the_vocabulary, "a token over 199"),
    ],
)
def test_damage_is_noticed(prepared, damage, said):
    damage(prepared / "train_00001.bin")
    with pytest.raises(UserError, match=f"{said}[^\n]*\n.*prepare the data again"):
        shards = Shards(prepared, "train", 64)
        shards.batch(range(shards.n_windows))


def test_a_split_without_a_window_says_so(prepared):
    with pytest.raises(UserError, match="no window of 1000000 . 1"):
        Shards(prepared, "val", 1_000_000)


def test_hashes_are_checked_once_and_remembered(prepared, monkeypatch):
    hashed, real = [], data.sha256
    monkeypatch.setattr(data, "sha256", lambda path: hashed.append(path.name) or real(path))
    train = [f"train_{number:05d}.bin" for number in range(4)]

    def hashed_by(split):
        hashed.clear()
        Shards(prepared, split, 64)
        return hashed

    assert hashed_by("train") == train and hashed_by("train") == []
    assert hashed_by("val") == ["val_00000.bin"]
    os.utime(prepared / train[1], (0, 0))
    assert hashed_by("train") == [train[1]]
    (prepared / "verified.json").unlink()
    (prepared / "verified.json").mkdir()  # it cannot be written, as in a read-only folder
    assert hashed_by("train") == train and hashed_by("train") == train
