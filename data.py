"""Token shards on disk -> windows to train on; tokenizers.

    data/NAME/{train,val}_00000.bin, ...    token ids, little-endian uint16, or uint32 where the vocabulary
                                            needs it, an end-of-text token after each document
    data/NAME/meta.json                     tokenizer, vocab_size, source, and what each split holds
    data/NAME/tokenizer.json, ...           a copy of the tokenizer, where it came from a folder ("hf:...")

A window is T + 1 consecutive tokens: T inputs, and one token ahead their T targets. Windows begin at every
T-th token of a shard; what is left at a shard's end is dropped. prepare_data.py makes the shards.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

from checkpoint import read_json
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
            "set TIKTOKEN_CACHE_DIR to a folder that has it, from a machine with network\n"
            "(what prepare_data.py makes with --tokenizer bytes needs no download)"
        ) from None


def tokenizer_in(folder: str | Path, name: str):
    """The tokenizer that a checkpoint or a folder of shards holds (its origin, "hf:...", may move),
    or else the one of this name."""
    return get_tokenizer(f"hf:{folder}" if Path(folder, "tokenizer.json").exists() else name)


def tokenizer_of(model):
    """The tokenizer of a loaded model."""
    return tokenizer_in(model.meta["ckpt"], model.meta["tokenizer"])


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ---------------------------------------------------------------------------------------- shards -> windows

CORPORA = ("stdlib", "c4", "tinystories", "fineweb_edu")  # `prepare_data.py NAME` makes data/NAME


def broken(path: Path, problem: str) -> UserError:
    return UserError(f"{path} {problem}\nremove {path.parent} and prepare the data again")


def command_for(folder: Path) -> str:
    """The command that makes data that is missing."""
    if folder.name == "chains":
        return "python -m experiments.chains"
    if folder.name in CORPORA:
        return f"python prepare_data.py {folder.name} --out {folder}"
    made = any(folder.glob("*.bin")) or (folder / "unfinished.json").exists()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not made):
        return f"python prepare_data.py text --input {folder} --out data/{folder.stem}"  # it is the text
    return f"python prepare_data.py text --input FILE_OR_DIR --out {folder}"


def read_meta(folder: str | Path) -> dict:
    """meta.json of a folder of shards, or a UserError that names the command which makes them."""
    path = Path(folder, "meta.json")
    if not path.is_file():
        raise UserError(
            f"{folder} holds no prepared data, or its preparation was interrupted\n"
            f"make it: {command_for(path.parent)}\n"
            "if it has moved, name its folder: --data of train.py, --ppl of eval_icl.py"
        )
    return read_json(path, f"remove {folder} and prepare the data again")


@lru_cache(maxsize=1)  # an order is as long as the data: that of one epoch at a time
def window_order(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n_windows), a pure function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n_windows)


class Shards:
    """A split of a folder of shards as windows of block_size + 1 tokens, at stride block_size in each shard.

    .meta, .tokenizer (name), .vocab_size, .n_windows, .n_tokens, .n_bytes (of the text: for bits per byte).
    Windows are read at their positions and nothing is mapped, so that memory does not grow with the data.
    Raises UserError where files are missing or differ from meta.json, or where no window fits."""

    def __init__(self, folder: str | Path, split: str, block_size: int):
        self.folder, self.block_size, self.meta = Path(folder), block_size, read_meta(folder)
        try:
            self.tokenizer, self.vocab_size = str(self.meta["tokenizer"]), int(self.meta["vocab_size"])
            entry = self.meta["splits"][split]
            self.n_tokens, self.n_bytes = int(entry["tokens"]), int(entry["bytes"])
            self.paths = [self.folder / shard["file"] for shard in entry["shards"]]
            self.sizes = [int(shard["tokens"]) for shard in entry["shards"]]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            problem = f"describes no {split} split ({type(error).__name__}: {error})"
            raise broken(self.folder / "meta.json", problem) from None
        self.dtype = token_dtype(self.vocab_size)
        for path, size in zip(self.paths, self.sizes):
            n_bytes = size * self.dtype.itemsize
            if not path.is_file() or path.stat().st_size != n_bytes:
                raise broken(path, f"is missing or has not {n_bytes} bytes")
        n_windows = [max(0, (size - 1) // block_size) for size in self.sizes]
        self.first = np.cumsum([0, *n_windows])  # first[i]: number of the first window of shard i
        self.n_windows = int(self.first[-1])
        check(
            self.n_windows > 0,
            f"{self.folder}: the {split} split of {self.n_tokens} tokens has no window of {block_size} + 1\n"
            "prepare more text, or choose a smaller block_size",
        )

    def read(self, shard: int, start: int, n: int) -> np.ndarray:
        """n tokens of a shard from its token `start` on -> (n,) int64."""
        tokens = np.fromfile(self.paths[shard], self.dtype, n, offset=start * self.dtype.itemsize)
        if len(tokens) != n or tokens.max() >= self.vocab_size:
            raise broken(self.paths[shard], f"is cut short, or has a token over {self.vocab_size - 1}")
        return tokens.astype(np.int64)

    def digest(self) -> str:
        """What makes the data of two runs the same, wherever it lies."""
        return hashlib.sha256(json.dumps(self.meta["splits"], sort_keys=True).encode()).hexdigest()

    def windows(self, seed: int, first: int, count: int) -> np.ndarray:
        """The windows of sequences first ... first + count - 1 of a run: every epoch shows each window once,
        in an order of its own."""
        epochs, places = np.divmod(np.arange(first, first + count), self.n_windows)
        orders = {epoch: window_order(self.n_windows, seed, epoch) for epoch in np.unique(epochs).tolist()}
        return np.concatenate([order[places[epochs == epoch]] for epoch, order in orders.items()])

    def batch(self, windows) -> tuple[Tensor, Tensor]:
        """Numbers of B windows -> x, y (B, T) int64, y one token ahead of x."""
        T, rows = self.block_size, []
        for window in windows:
            shard = int(np.searchsorted(self.first, window, side="right")) - 1
            rows.append(self.read(shard, int(window - self.first[shard]) * T, T + 1))
        tokens = torch.from_numpy(np.stack(rows))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
