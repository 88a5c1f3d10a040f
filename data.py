"""Token shards on disk -> windows to train on; tokenizers.

    data/NAME/{train,val}_00000.bin, ...    token ids, little-endian uint16, or uint32 where the vocabulary
                                            needs it, an end-of-text token after each document
    data/NAME/meta.json                     tokenizer, vocab_size, source, and what each split holds

A window is T + 1 consecutive tokens: T inputs, and one token ahead their T targets. Windows begin at every
T-th token of a shard; what is left at a shard's end is dropped. prepare_data.py makes the shards.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

from checkpoint import sha256, write_json
from model import UserError, check

# ------------------------------------------------------------------------------------------------- tokenizers


def get_tokenizer(name: str):
    """'bytes', a tiktoken encoding ('gpt2', 'cl100k_base', ...) or 'hf:FOLDER_OR_REPO' -> an object with
    n_vocab, eot_token, encode_ordinary(str) -> ids, decode(ids) -> str, decode_bytes(ids) -> bytes."""
    if name == "bytes":  # nothing merges, so the pattern only sets how much text is looked at in one go
        ranks, pattern = {bytes([i]): i for i in range(256)}, r"(?s:.{1,64})"
        special = {"<|endoftext|>": 256}
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    if name.startswith("hf:"):
        from hf.llama import HFTokenizer

        return HFTokenizer(name[3:])
    known = tiktoken.list_encoding_names()
    check(name in known, f"unknown tokenizer {name!r}\nknown: bytes, {', '.join(known)}, hf:FOLDER_OR_REPO")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network, a proxy or the cache came up with
        raise UserError(
            f"tiktoken cannot load the vocabulary of {name} ({type(error).__name__})\n"
            "set TIKTOKEN_CACHE_DIR to a folder that has it (from a machine with network),\n"
            "or use --tokenizer bytes, which needs no download"
        ) from None


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ---------------------------------------------------------------------------------------- shards -> windows

CORPORA = ("stdlib", "c4", "tinystories", "fineweb_edu")  # `prepare_data.py NAME` makes data/NAME


def broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} {why}\nremove {path.parent} and prepare the data again")


def json_or_empty(path: Path) -> dict:
    """{} where there is none, or none that can be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def read_meta(folder: str | Path) -> dict:
    """meta.json of a folder of shards, or a UserError that names the command which makes them."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        [meta[name] for name in ("tokenizer", "vocab_size")]  # a KeyError for what is missing
        for split in meta["splits"].values():
            [split[name] for name in ("tokens", "bytes")]
            [shard[name] for shard in split["shards"] for name in ("file", "tokens", "sha256")]
        return meta
    except (FileNotFoundError, NotADirectoryError):
        command = folder.name if folder.name in CORPORA else "text --input FILE_OR_DIR"
        raise UserError(
            f"{folder} holds no prepared data, or its preparation was interrupted\n"
            f"make it: python prepare_data.py {command} --out {folder}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise broken(folder / "meta.json", "does not describe token shards") from None


class Shards:
    """A split of a folder of shards as windows of block_size + 1 tokens, at stride block_size in each shard.

    .meta, .tokenizer (name), .vocab_size, .n_windows, .n_tokens, .n_bytes (of the text: for bits per byte).
    Windows are read at their positions and nothing is mapped, so that memory does not grow with the data.
    With verify, each shard's SHA-256 is checked once and remembered beside it by size and time. Raises
    UserError where files are missing or differ from meta.json, or where no window fits."""

    def __init__(self, folder: str | Path, split: str, block_size: int, verify: bool = True):
        self.folder, self.block_size, self.meta = Path(folder), block_size, read_meta(folder)
        self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
        self.dtype = token_dtype(self.vocab_size)
        entry = self.meta["splits"].get(split)
        check(bool(entry), f"{folder}/meta.json tells of no {split} split\nprepare the data again")
        self.n_tokens, self.n_bytes = entry["tokens"], entry["bytes"]
        self.paths = [self.folder / shard["file"] for shard in entry["shards"]]
        for path, shard in zip(self.paths, entry["shards"]):
            size = shard["tokens"] * self.dtype.itemsize
            if not path.exists() or path.stat().st_size != size:
                raise broken(path, f"is missing or has not {size} bytes")
        if verify:
            self.verify(entry["shards"])
        n_windows = [max(0, (shard["tokens"] - 1) // block_size) for shard in entry["shards"]]
        self.first = np.cumsum([0, *n_windows])  # first[i]: number of the first window of shard i
        self.n_windows = int(self.first[-1])
        check(
            self.n_windows > 0,
            f"{self.folder}: the {split} split of {self.n_tokens} tokens has no window of {block_size} + 1\n"
            "prepare more text, or choose a smaller block_size",
        )

    def verify(self, shards: list[dict]):
        """Check each shard's SHA-256, unless verified.json knows the file by its size and time."""
        memory = self.folder / "verified.json"
        known = json_or_empty(memory)
        marks = {}
        for path, shard in zip(self.paths, shards):
            stat = path.stat()
            marks[path.name] = [stat.st_size, stat.st_mtime_ns, shard["sha256"]]
            if known.get(path.name) != marks[path.name] and sha256(path) != shard["sha256"]:
                raise broken(path, "is not what was prepared (its SHA-256 differs)")
        if not marks.items() <= known.items():
            try:
                write_json(memory, {**known, **marks})
            except OSError:  # a folder that we may only read: the next run checks again
                pass

    def window_order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of range(n_windows), a pure function of (seed, epoch)."""
        return np.random.default_rng([seed, epoch]).permutation(self.n_windows)

    def batch(self, windows) -> tuple[Tensor, Tensor]:
        """Numbers of B windows -> x, y (B, T) int64, y one token ahead of x."""
        T, windows = self.block_size, np.asarray(windows, dtype=np.int64)
        if windows.size and not 0 <= windows.min() <= windows.max() < self.n_windows:
            raise IndexError(f"windows are numbered 0 to {self.n_windows - 1}")
        tokens = torch.empty(len(windows), T + 1, dtype=torch.int64)
        shards = np.searchsorted(self.first, windows, side="right") - 1
        for row, window, shard in zip(tokens.numpy(), windows, shards):
            start = int(window - self.first[shard]) * T * self.dtype.itemsize
            read = np.fromfile(self.paths[shard], self.dtype, T + 1, offset=start)
            if len(read) != T + 1 or read.max() >= self.vocab_size:
                raise broken(self.paths[shard], f"is cut short, or has a token over {self.vocab_size - 1}")
            row[:] = read
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def documents(folder: str | Path, split: str) -> Iterator[np.ndarray]:
    """The documents of a split in order, each (n,) int64 without its end-of-text."""
    meta = read_meta(folder)
    dtype, eot = token_dtype(meta["vocab_size"]), get_tokenizer(meta["tokenizer"]).eot_token
    begun = []  # what has been read of a document whose end has not
    for shard in meta["splits"][split]["shards"]:
        for start in range(0, shard["tokens"], 1 << 20):
            block = np.fromfile(Path(folder) / shard["file"], dtype, 1 << 20, offset=start * dtype.itemsize)
            *ended, rest = np.split(block.astype(np.int64), np.flatnonzero(block == eot) + 1)
            for part in ended:
                yield np.concatenate([*begun, part[:-1]])
                begun = []
            begun.append(rest)
