"""Text -> tokenizer -> token shards on disk -> windows for training. One place knows the format.

    python prepare_data.py stdlib                                                 # this Python's own source, no download
    python prepare_data.py text --input FILE_OR_DIR ... --tokenizer gpt2 --out data/NAME
    python prepare_data.py c4 --shards 48                                         # or tinystories, fineweb_edu
    python prepare_data.py icl                                                    # the evaluation sets

data/NAME holds {train,val}_00000.bin, ... (token ids, little-endian uint16, or uint32 where the vocabulary needs it, each
document followed by the tokenizer's end-of-text) and meta.json, written last. Shards hold --shard_tokens tokens each;
a document may run on into the next one.

The split. A document goes to validation where the first 64 bits of the SHA-256 of its text fall below --val_fraction,
so that it stays there whatever is added later; should that choose none, the document with the smallest hash goes.
A document is a line of .jsonl, a row of .parquet or a whole .py file. Running text (.txt, .md) is cut at paragraphs into
pieces of at most 8 KB, each hashed by itself, so that one book has a validation split too; neighbours that go
to the same split stay joined, up to 1 MB. Whatever comes by --val_input is validation, and --input is then all training.

Killed at any time, the same command goes on where it was and ends with the same bytes: input becomes chunks of about
1 MB in a fixed order, threads encode them (tiktoken leaves Python's lock), one writer appends them in that order, and
progress.json says how many chunks of which file are in shards that are safely on disk.
"""

import gzip
import hashlib
import http.client
import json
import os
import ssl
import sys
import sysconfig
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from config import ArgumentParser, cli
from model import UserError

CHUNK = 1 << 20           # bytes of text that one thread encodes at a time
PIECE = 1 << 13           # bytes of running text that are hashed, and so split, as one
MAX_DOCUMENT = 16 << 20   # bytes of a line of .jsonl or a file of code; longer ones are an error, so memory is bounded
JOURNAL_SECONDS = 5.0     # between two notes of progress on disk


# -------------------------------------------------------------------------------------------------------- tokenizers

def get_tokenizer(name: str) -> tiktoken.Encoding:
    """'bytes', a tiktoken encoding ('gpt2', 'cl100k_base', ...) or 'hf:FOLDER_OR_REPO' -> an object with n_vocab, eot_token,
    encode_ordinary(str) -> ids, decode(ids) -> str, decode_bytes(ids) -> bytes, name. Raises UserError."""
    if name == "bytes":  # no merges, so the pattern only sets how much is looked up at a time
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name.startswith("hf:"):
        from llama import HFTokenizer
        return HFTokenizer(name[3:])
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"unknown tokenizer {name!r}\nknown: bytes, {', '.join(tiktoken.list_encoding_names())}, hf:FOLDER")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors, or a wrong hash
        raise UserError(f"tiktoken cannot get the vocabulary of {name} ({type(error).__name__})\n"
                        "set TIKTOKEN_CACHE_DIR to a folder that holds it (tiktoken's cache on a machine with network),\n"
                        "or pass --tokenizer bytes, which needs none") from None


def encode(tokenizer, text: str, dtype) -> np.ndarray:
    """text -> ids (n,) and end-of-text. The array comes straight from tiktoken where it can: a list of Python integers
    would hold Python's lock, and with it the other threads, for a third of the time."""
    if hasattr(tokenizer, "encode_to_numpy"):
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())  # = encode_ordinary
    else:
        ids = tokenizer.encode_ordinary(text)
    return np.append(np.asarray(ids, dtype), np.asarray([tokenizer.eot_token], dtype))


# ----------------------------------------------------------------------------------------------------- files -> text

class Bad(NamedTuple):
    """A document that cannot be used, and why."""
    why: str


def cut(data: bytes, size: int) -> int:
    """Where to cut data so that the first part has at most size bytes: after a paragraph, else a line, else a word, else
    a character of UTF-8."""
    for mark in (b"\n\n", b"\n", b" "):
        if (at := data.rfind(mark, size // 2, size)) >= 0:
            return at + len(mark)
    while size > 1 and data[size] & 0xC0 == 0x80:
        size -= 1
    return size


def pieces(data: bytes, size: int = PIECE) -> Iterator[bytes]:
    while len(data) > size:
        at = cut(data, size)
        yield data[:at]
        data = data[at:]
    yield data


def read_text(file) -> Iterator[bytes]:
    """Running text in sections of at most 1 MB."""
    data = file.read(CHUNK + 1)
    while len(data) > CHUNK:
        at = cut(data, CHUNK)
        yield data[:at]
        data = data[at:] + file.read(at)
    yield data


def read_whole(file) -> Iterator[bytes | Bad]:
    data = file.read(MAX_DOCUMENT + 1)
    yield data if len(data) <= MAX_DOCUMENT else Bad(f"longer than {MAX_DOCUMENT >> 20} MB")


def read_stories(file) -> Iterator[bytes]:
    """Documents between lines that say <|endoftext|>, as TinyStories has them."""
    story = []
    for line in file:
        if line.strip() == b"<|endoftext|>":
            yield b"".join(story).strip()
            story = []
        else:
            story.append(line)
    if rest := b"".join(story).strip():
        yield rest


def read_jsonl(file, field: str) -> Iterator[bytes | Bad]:
    number = 0
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        if len(line) > MAX_DOCUMENT:
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK)
            yield Bad(f"line {number} is longer than {MAX_DOCUMENT >> 20} MB")
        elif line.strip():
            try:
                text = json.loads(line)[field]
                yield text.encode()
            except (KeyError, TypeError, AttributeError, IndexError):
                yield Bad(f"line {number} has no text under {field!r} (see --field)")
            except (ValueError, RecursionError) as error:
                what = "text that is no Unicode" if isinstance(error, UnicodeEncodeError) else "broken JSON"
                yield Bad(f"line {number} is {what}")


def read_parquet(file, field: str) -> Iterator[bytes | Bad]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet needs pyarrow\npip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise UserError(f"{file.name} has no column {field!r}, but {', '.join(table.schema_arrow.names)}\npass --field")
        for batch in table.iter_batches(batch_size=256, columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield text.encode() if isinstance(text, str) else Bad(f"a row has no text under {field!r}")
    except pyarrow.ArrowException as error:
        yield Bad(f"broken parquet ({str(error).splitlines()[0]})")


SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


class Input(NamedTuple):
    """A file of documents. split is 'train', 'val' or 'hash'; a url says where to get it, its copy being deleted after."""
    path: Path
    split: str = "hash"
    url: str = ""
    stories: bool = False


def read(item: Input, file, field: str) -> Iterator[bytes | Bad]:
    """The documents of an open file, valid UTF-8 and not empty, each at most 16 MB."""
    name = item.path.name.lower()
    if name.endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)
    if name.endswith(".parquet"):
        documents = read_parquet(file, field)
    elif name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        documents = read_jsonl(file, field)
    else:
        documents = read_stories(file) if item.stories else (read_whole if name.endswith(".py") else read_text)(file)
    empty = True
    try:
        for document in documents:
            empty = False
            if isinstance(document, bytes):
                try:
                    document.decode()
                except UnicodeDecodeError as error:
                    document = Bad(f"invalid UTF-8 ({error.reason} {document[error.start:error.end].hex(' ')})")
                else:
                    document = document or Bad("an empty document")
            yield document
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Bad(f"broken gzip ({error})")
    if empty:
        yield Bad("no document in it")


class Chunk(NamedTuple):
    documents: list[bytes]
    bad: int       # left out since the chunk before
    position: int  # bytes of the file, as it lies on disk, that have been read


def chunks(item: Input, field: str, skip_bad: bool) -> Iterator[Chunk]:
    """A file's documents about 1 MB at a time; where the cuts fall depends on the file alone."""
    documents, size, bad = [], 0, 0
    with open(item.path, "rb") as file:
        for document in read(item, file, field):
            if isinstance(document, Bad):
                if not skip_bad:
                    raise UserError(f"{item.path}: {document.why}\nmend it, or pass --skip_bad: such documents are then "
                                    "left out and counted")
                tqdm.write(f"left out: {item.path}: {document.why}", file=sys.stderr)
                bad += 1
            else:
                documents.append(document)
                size += len(document)
            if size >= CHUNK:
                yield Chunk(documents, bad, file.tell())
                documents, size, bad = [], 0, 0
        yield Chunk(documents, bad, file.tell())


# --------------------------------------------------------------------------------------------------- text -> shards

def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path):
    """Make renames in folder durable (Windows has no such call)."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)


def write_json(path: Path, value):
    """All of it or nothing, and on disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class SplitWriter:
    """Appends tokens to shards of one split. `done` is its entry of meta.json; the shard being written is FILE.tmp."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, done: dict):
        self.folder, self.split, self.dtype, self.shard_tokens, self.done = folder, split, dtype, shard_tokens, done
        self.held = done["tokens"] - sum(shard["tokens"] for shard in done["shards"])  # tokens of the open shard
        self.file = None
        if self.held:
            final, temporary = self.paths()
            if not temporary.exists() and final.exists():  # stopped between its completion and the note of it
                os.replace(final, temporary)
            self.file = open(temporary, "r+b")
            self.file.truncate(self.held * dtype.itemsize)
            self.file.seek(0, os.SEEK_END)

    def paths(self) -> tuple[Path, Path]:
        final = self.folder / f"{self.split}_{len(self.done['shards']):05d}.bin"
        return final, final.with_name(final.name + ".tmp")

    def append(self, tokens: np.ndarray):
        self.done["tokens"] += len(tokens)
        while len(tokens):
            if self.file is None:
                self.file = open(self.paths()[1], "wb")
            part, tokens = np.split(tokens, [self.shard_tokens - self.held])
            self.file.write(part.tobytes())
            self.held += len(part)
            if self.held == self.shard_tokens:
                self.finish_shard()

    def sync(self):
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def finish_shard(self):
        if self.file is None:
            return
        self.sync()
        self.file.close()
        final, temporary = self.paths()
        digest = file_sha256(temporary)
        os.replace(temporary, final)
        sync_folder(self.folder)
        self.done["shards"].append({"file": final.name, "tokens": self.held, "sha256": digest})
        self.file, self.held = None, 0


def in_order(pool: ThreadPoolExecutor, work: Callable, chunks: Iterable[Chunk], ahead: int):
    """(chunk, work(chunk)) in order, with at most `ahead` chunks and 64 MB of text under way."""
    pending, size = deque(), 0
    for chunk in chunks:
        pending.append((chunk, pool.submit(work, chunk)))
        size += sum(map(len, chunk.documents))
        while len(pending) > ahead or (size > 64 << 20 and pending):
            chunk, result = pending.popleft()
            size -= sum(map(len, chunk.documents))
            yield chunk, result.result()
    for chunk, result in pending:
        yield chunk, result.result()


def prepare(folder: Path, inputs: list[Input], source: str, identity, *, tokenizer: str, val_fraction: float,
            shard_tokens: int, workers: int, field: str = "text", skip_bad: bool = False, timeout: float = 30.0):
    """Inputs -> shards and meta.json in folder. identity is whatever tells this job from another of the same source;
    a folder that holds another job's data is refused, an interrupted job goes on, a finished one is left alone."""
    if not 0 < val_fraction < 1 or shard_tokens < 2 or workers < 1:
        raise UserError("--val_fraction must lie between 0 and 1, --shard_tokens be at least 2, --workers at least 1")
    meta_path, journal_path = folder / "meta.json", folder / "progress.json"
    job = hashlib.sha256(json.dumps([source, identity, tokenizer, val_fraction, shard_tokens, field]).encode()).hexdigest()
    if meta_path.exists():
        meta = json.loads(meta_path.read_text())
        if meta.get("job") != job:
            raise UserError(f"{folder} holds other data: {meta.get('source')}, tokenizer {meta.get('tokenizer')}\n"
                            "remove that folder, or choose another with --out")
        if all((folder / shard["file"]).exists() for split in meta["splits"].values() for shard in split["shards"]):
            print(f"{folder} is complete: {summary(meta)}")
            return
        meta_path.unlink()  # a shard is gone: make all of them again
    enc = get_tokenizer(tokenizer)
    dtype = token_dtype(enc.n_vocab)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = json.loads(journal_path.read_text()) if journal_path.exists() else None
        if state and state["job"] == job:
            print(f"{folder}: going on at file {state['file'] + 1} of {len(inputs)}")
        else:
            state = new_state(job, val_fraction)
        while True:
            write_shards(folder, inputs, state, enc, dtype, shard_tokens, workers, field, skip_bad, timeout)
            splits = state["splits"]
            if splits["val"]["documents"] or splits["train"]["documents"] < 2:
                break
            state = new_state(job, (state["lowest"] + 1) / 2 ** 64)  # the hash chose none: take the smallest
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}\n"
                        "the same command goes on from here once that is mended") from error
    for split, what in (("train", "to train on"), ("val", "for validation")):
        if not splits[split]["documents"]:
            raise UserError(f"{source}: no document is left {what}\ngive more text, or validation text of its own by --val_input")
    meta = {"tokenizer": tokenizer, "vocab_size": enc.n_vocab, "source": source, "splits": splits,
            "skipped": state["skipped"], "job": job}
    write_json(meta_path, meta)
    journal_path.unlink(missing_ok=True)
    print(f"{folder}: {summary(meta)}")


def new_state(job: str, val_fraction: float) -> dict:
    """What progress.json holds: the next chunk of input, and what the shards on disk hold so far."""
    return {"job": job, "threshold": int(val_fraction * 2 ** 64), "lowest": 2 ** 64, "file": 0, "chunks": 0, "skipped": 0,
            "splits": {split: {"documents": 0, "tokens": 0, "bytes": 0, "shards": []} for split in ("train", "val")}}


def summary(meta: dict) -> str:
    text = ", ".join(f"{s['documents']:,} documents = {s['tokens']:,} tokens ({split})" for split, s in meta["splits"].items())
    return f"{text}, {meta['skipped']} left out; {meta['source']}"


def encode_chunk(enc, dtype, item: Input, threshold: int, chunk: Chunk):
    """-> (split, documents, bytes, tokens) in order, and the lowest hash seen. Runs in a thread."""
    result, lowest = [], 2 ** 64
    running = item.path.suffix.lower() in (".txt", ".md") and not item.stories
    for document in chunk.documents:
        runs = [(item.split, [document])]
        if item.split == "hash":
            runs = []
            for piece in pieces(document) if running else [document]:
                number = int.from_bytes(hashlib.sha256(piece).digest()[:8], "big")
                lowest = min(lowest, number)
                split = "val" if number < threshold else "train"
                if runs and runs[-1][0] == split:
                    runs[-1][1].append(piece)
                else:
                    runs.append((split, [piece]))
        for split, parts in runs:
            data = b"".join(parts)
            result.append((split, len(data), encode(enc, data.decode(), dtype)))
    return result, lowest


def write_shards(folder, inputs, state, enc, dtype, shard_tokens, workers, field, skip_bad, timeout):
    """Take state from where it stands to the end of the inputs."""
    writers = {split: SplitWriter(folder, split, dtype, shard_tokens, done) for split, done in state["splits"].items()}

    def note():
        for writer in writers.values():
            writer.sync()
        write_json(folder / "progress.json", state)
        return time.monotonic()

    noted, first, started = time.monotonic(), sum(w.done["tokens"] for w in writers.values()), time.monotonic()
    total = sum(item.path.stat().st_size for item in inputs if not item.url) or None
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as fetcher, \
            tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="reading") as bar:
        fetched = {}
        for index in range(len(inputs)):
            item, position = inputs[index], 0
            if index < state["file"]:
                bar.update(0 if item.url else item.path.stat().st_size)
                continue
            if item.url:  # this file, and the next one while this one is encoded
                for ahead in (index, index + 1):
                    if ahead < len(inputs) and ahead not in fetched:
                        fetched[ahead] = fetcher.submit(download, inputs[ahead].url, inputs[ahead].path, timeout=timeout)
                fetched[index].result()
            left = islice(chunks(item, field, skip_bad), state["chunks"], None)
            threshold = state["threshold"]
            for chunk, (encoded, lowest) in in_order(
                    pool, lambda chunk: encode_chunk(enc, dtype, item, threshold, chunk), left, 2 * workers):
                for split, size, tokens in encoded:
                    writers[split].append(tokens)
                    writers[split].done["documents"] += 1
                    writers[split].done["bytes"] += size
                state["lowest"] = min(state["lowest"], lowest)
                state["skipped"] += chunk.bad
                state["chunks"] += 1
                bar.update(max(0, chunk.position - position))
                position = max(position, chunk.position)
                tokens = sum(w.done["tokens"] for w in writers.values())
                bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens, "
                                    f"{(tokens - first) / (time.monotonic() - started) / 1e6:.2f}M/s", refresh=False)
                if time.monotonic() - noted > JOURNAL_SECONDS:
                    noted = note()
            state["file"], state["chunks"] = index + 1, 0
            if item.url:
                noted = note()
                item.path.unlink()
    for writer in writers.values():
        writer.finish_shard()


# ------------------------------------------------------------------------------------------------- shards -> windows

def read_meta(folder: str | Path) -> dict:
    """meta.json of a folder of shards; a UserError that names the command which makes them."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        meta["splits"]["train"]["shards"], meta["splits"]["val"]["shards"], meta["tokenizer"], meta["vocab_size"]
        return meta
    except FileNotFoundError:
        where = "" if folder.parts[-2:] == ("data", folder.name) else f" --out {folder}"
        command = f"{folder.name}{where}" if folder.name in COMMANDS else f"text --input FILE_OR_DIR --out {folder}"
        raise UserError(f"{folder} holds no prepared data (or its preparation was interrupted)\n"
                        f"python prepare_data.py {command}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'meta.json'} is broken\nremove the folder and prepare the data again") from None


class Shards:
    """One split of a folder of shards, in windows of block_size + 1 tokens at stride block_size.

    .meta, .tokenizer (name), .vocab_size, .n_windows, .n_tokens, .n_bytes (of text, for bits per byte).
    Reads at positions and maps nothing, so that memory stays small over any amount of data. With verify, each shard's
    SHA-256 is checked once and remembered beside the data. Raises UserError where files are missing or differ from
    meta.json, or where no window fits."""

    def __init__(self, folder: str | Path, split: str, block_size: int, verify: bool = True):
        self.folder, self.split, self.block_size = Path(folder), split, block_size
        self.meta = read_meta(folder)
        self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
        self.dtype = token_dtype(self.vocab_size)
        entry = self.meta["splits"][split]
        self.n_tokens, self.n_bytes = entry["tokens"], entry["bytes"]
        self.paths = [self.folder / shard["file"] for shard in entry["shards"]]
        for path, shard in zip(self.paths, entry["shards"]):
            size = path.stat().st_size if path.exists() else 0
            if size != shard["tokens"] * self.dtype.itemsize:
                raise UserError(f"{path} has {size} bytes, not {shard['tokens'] * self.dtype.itemsize}\n"
                                "remove the folder and prepare the data again")
        if verify:
            self.verify(entry["shards"])
        # first[i] is the number of the first window of shard i
        windows = [max(0, (shard["tokens"] - 1) // block_size) for shard in entry["shards"]]
        self.first = np.concatenate([[0], np.cumsum(windows)]).astype(np.int64)
        self.n_windows = int(self.first[-1])
        if not self.n_windows:
            raise UserError(f"{self.folder}: no window of {block_size} + 1 tokens in the {split} split of {self.n_tokens} "
                            "tokens\nprepare more text or choose a smaller block_size")

    def verify(self, shards: list[dict]):
        memory = self.folder / "verified.json"
        try:
            known = json.loads(memory.read_text())
        except (OSError, ValueError):
            known = {}
        before = dict(known)
        for path, shard in zip(self.paths, shards):
            stat = path.stat()
            entry = [stat.st_size, stat.st_mtime_ns, shard["sha256"]]
            if known.get(path.name) != entry:
                if file_sha256(path) != shard["sha256"]:
                    raise UserError(f"{path} differs from what was prepared (SHA-256)\n"
                                    "remove the folder and prepare the data again")
                known[path.name] = entry
        if known != before:
            try:
                write_json(memory, known)
            except OSError:  # a folder that we may only read: check again next time
                pass

    def window_order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of range(n_windows), a pure function of (seed, epoch)."""
        return np.random.default_rng([seed, epoch]).permutation(self.n_windows)

    def batch(self, window_indices):
        """n window numbers -> x, y (n, T) int64, y being x shifted by one token."""
        import torch
        T = self.block_size
        indices = np.asarray(window_indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.n_windows:
            raise IndexError(f"windows are 0 to {self.n_windows - 1}")
        tokens = np.empty((len(indices), T + 1), dtype=np.int64)
        shards = np.searchsorted(self.first, indices, side="right") - 1
        for row, (index, shard) in enumerate(zip(indices, shards)):
            offset = int(index - self.first[shard]) * T * self.dtype.itemsize
            window = np.fromfile(self.paths[shard], self.dtype, T + 1, offset=offset)
            if len(window) != T + 1:
                raise UserError(f"{self.paths[shard]} has become shorter\nremove the folder and prepare the data again")
            tokens[row] = window
        if len(indices) and tokens.max() >= self.vocab_size:
            raise UserError(f"{self.folder} holds token {tokens.max()}, but its vocabulary ends at {self.vocab_size - 1}\n"
                            "remove the folder and prepare the data again")
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def documents(folder: str | Path, split: str) -> Iterator[np.ndarray]:
    """The documents of a split, each (n,) int64 without its end-of-text."""
    meta = read_meta(folder)
    dtype, eot = token_dtype(meta["vocab_size"]), get_tokenizer(meta["tokenizer"]).eot_token
    begun = []
    for shard in meta["splits"][split]["shards"]:
        for start in range(0, shard["tokens"], 1 << 20):
            block = np.fromfile(Path(folder) / shard["file"], dtype, 1 << 20, offset=start * dtype.itemsize)
            parts = np.split(block.astype(np.int64), np.flatnonzero(block == eot) + 1)
            for part in parts[:-1]:
                yield np.concatenate([*begun, part[:-1]])
                begun = []
            begun.append(parts[-1])


# ------------------------------------------------------------------------------------------------------------ download

def download(url: str, path: Path, timeout: float):
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------ commands

def stdlib_files() -> tuple[list[Path], str]:
    """The library's source without site-packages and test folders, and its SHA-256 over names and contents."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    found, digest = [], hashlib.sha256()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in leave]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    found = sorted((path for path in found if path.stat().st_size), key=lambda path: path.relative_to(root).as_posix())
    for path in found:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode() + data)
    if not found:
        raise UserError(f"this Python has no library source under {root}\n"
                        "use your own text: python prepare_data.py text --input FILE_OR_DIR --out data/NAME")
    return found, digest.hexdigest()


def find_inputs(names: list[str], split: str) -> list[Input]:
    """Files, and those below folders, sorted by name."""
    inputs = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES) and file.is_file())
            if not found:
                raise UserError(f"no file in {path} ends in {', '.join(SUFFIXES)}\ngive --input another file or folder")
            inputs += [Input(file, split) for file in found]
        elif not path.exists():
            raise UserError(f"{path} is neither a file nor a folder\ngive --input text that exists")
        elif not name.lower().endswith(SUFFIXES):
            raise UserError(f"{path}: cannot tell what kind of file that is\nknown endings: {', '.join(SUFFIXES)}")
        else:
            inputs.append(Input(path, split))
    return inputs


COMMANDS = ("stdlib", "c4", "tinystories", "fineweb_edu")


def main(argv: list[str]):
    parser = ArgumentParser(prog="prepare_data.py", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, tokenizer, val_fraction, out, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--out", default=out, required=out is None, help=f"folder to write (default {out})")
        sub.add_argument("--tokenizer", default=tokenizer, help=f"bytes, gpt2, ..., hf:FOLDER (default {tokenizer})")
        sub.add_argument("--val_fraction", type=float, default=val_fraction, help=f"default {val_fraction}")
        sub.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens of a shard (default 100 million)")
        sub.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one for each core)")
        return sub

    command("stdlib", "bytes", 0.05, "data/stdlib", "the source of this Python's standard library")
    text = command("text", "bytes", 0.05, None, f"your own files ({' '.join(SUFFIXES)})")
    text.add_argument("--input", nargs="+", required=True, metavar="FILE_OR_DIR")
    text.add_argument("--val_input", nargs="+", default=[], metavar="FILE_OR_DIR",
                      help="validation text; all of --input is then for training")
    text.add_argument("--field", default="text", help="key or column of .jsonl and .parquet (default text)")
    text.add_argument("--skip_bad", action="store_true", help="leave out and count what cannot be read")
    args = parser.parse_args(argv)

    common = {name: getattr(args, name) for name in ("tokenizer", "val_fraction", "shard_tokens", "workers")}
    if args.command == "stdlib":
        found, digest = stdlib_files()
        version = ".".join(map(str, sys.version_info[:3]))
        source = f"standard library of Python {version}, {len(found)} files, sha256 {digest}"
        prepare(Path(args.out), [Input(path) for path in found], source, None, skip_bad=True, **common)
    elif args.command == "text":
        inputs = find_inputs(args.input, "train" if args.val_input else "hash") + find_inputs(args.val_input, "val")
        identity = [(str(item.path), item.split, item.path.stat().st_size, item.path.stat().st_mtime_ns) for item in inputs]
        source = f"{len(inputs)} files from {' '.join(args.input + args.val_input)}"
        prepare(Path(args.out), inputs, source, identity, field=args.field, skip_bad=args.skip_bad, **common)


if __name__ == "__main__":
    cli(main)
