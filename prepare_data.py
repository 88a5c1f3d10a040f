"""Text -> token shards on disk -> windows to train on. One place knows the format.

    python prepare_data.py stdlib                                   # the source of this Python: no download
    python prepare_data.py text --input FILE_OR_DIR ... --tokenizer gpt2 --out data/NAME
    python prepare_data.py c4 --shards 48                           # or tinystories, fineweb_edu
    python prepare_data.py icl                                      # the evaluation sets

data/NAME holds {train,val}_00000.bin, ... (token ids, little-endian uint16, or uint32 where the vocabulary
needs it, an end-of-text token after each document) and meta.json, written last. All shards of a split but the
last hold --shard_tokens tokens; a document may run on into the next shard.

The split. A document goes to validation where the first 64 bits of its text's SHA-256 lie below
--val_fraction of their range, and so stays there whatever is added later; should that choose none, the
document with the smallest hash goes. A document is a line of .jsonl, a row of .parquet or a whole .py file.
Running text (.txt, .md) is cut at paragraphs into pieces of at most 8 KB, each hashed by itself, so that a
single book has validation text too; neighbours that go the same way stay joined, up to 1 MB. With --val_input
nothing is hashed: that is validation, and all of --input is training.

Killed at any time, the same command goes on and ends with the same bytes. Input becomes chunks in a fixed
order, threads encode them (tiktoken leaves Python's lock), one writer appends them in that order, and
progress.json says how many chunks of which file are in shards that are safely on disk.
"""

import gzip
import hashlib
import http.client
import json
import os
import shutil
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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from config import ArgumentParser, cli
from model import UserError, sync_folder, write_synced
from model import sha256 as file_sha256

CHUNK = 1 << 18          # bytes of text that a thread encodes at a time, where documents are smaller
SECTION = 1 << 20        # bytes of running text that are read at a time
PIECE = 1 << 13          # bytes of running text that are hashed, and so split, as one
MAX_DOCUMENT = 8 << 20   # bytes of a line of .jsonl or a file of code: memory is bounded, so more is Bad
JOURNAL_SECONDS = 5.0    # between two notes of progress on disk
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------- tokenizers

def get_tokenizer(name: str) -> tiktoken.Encoding:
    """'bytes', a tiktoken encoding ('gpt2', 'cl100k_base', ...) or 'hf:FOLDER_OR_REPO' -> an object with
    n_vocab, eot_token, encode_ordinary(str) -> ids, decode(ids) -> str, decode_bytes(ids) -> bytes, name."""
    if name == "bytes":  # nothing merges, so the pattern only sets how much text is looked at in one go
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name.startswith("hf:"):
        from llama import HFTokenizer
        return HFTokenizer(name[3:])
    if name not in (known := tiktoken.list_encoding_names()):
        raise UserError(f"unknown tokenizer {name!r}\nknown: bytes, {', '.join(known)}, hf:FOLDER_OR_REPO")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network, a proxy or the cache came up with
        raise UserError(f"tiktoken cannot load the vocabulary of {name} ({type(error).__name__})\n"
                        "set TIKTOKEN_CACHE_DIR to a folder that has it (from a machine with network),\n"
                        "or use --tokenizer bytes, which needs no download") from None


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode(tokenizer, text: str) -> np.ndarray:
    """text -> its n ids and end-of-text, (n + 1,). tiktoken's array spares a list of Python integers, whose
    making holds Python's lock and so keeps the other threads waiting."""
    if hasattr(tokenizer, "encode_to_numpy"):
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())  # the ids of encode_ordinary
    else:
        ids = tokenizer.encode_ordinary(text)
    tokens = np.empty(len(ids) + 1, token_dtype(tokenizer.n_vocab))
    tokens[:-1], tokens[-1] = ids, tokenizer.eot_token
    return tokens


# --------------------------------------------------------------------------------------- files -> documents

class Bad(NamedTuple):
    """What stands in the place of a document that cannot be used."""
    why: str


class Input(NamedTuple):
    """A file of documents. split: 'train', 'val' or 'hash'. With a url: fetched first, deleted after."""
    path: Path
    size: int  # bytes, or what is expected of the url
    split: str = "hash"
    url: str = ""
    stories: bool = False  # a .txt whose documents lie between lines of <|endoftext|>


def cut(data: bytes, size: int) -> int:
    """Where to cut so that at most size bytes come first: after a paragraph, line, word or character."""
    for mark in (b"\n\n", b"\n", b" "):
        if (at := data.rfind(mark, size // 2, size)) >= 0:
            return at + len(mark)
    return next((at for at in range(size, size - 4, -1) if data[at] & 0xC0 != 0x80), size)


def pieces(data: bytes) -> Iterator[bytes]:
    while len(data) > PIECE:
        at = cut(data, PIECE)
        yield data[:at]
        data = data[at:]
    yield data


def read_running(file) -> Iterator[bytes]:
    data = file.read(SECTION + 1)
    while len(data) > SECTION:
        at = cut(data, SECTION)
        yield data[:at]
        data = data[at:] + file.read(at)
    yield data


def read_whole(file) -> Iterator[bytes | Bad]:
    data = file.read(MAX_DOCUMENT + 1)
    yield data if len(data) <= MAX_DOCUMENT else Bad(f"longer than {MAX_DOCUMENT >> 20} MB")


def read_stories(file) -> Iterator[bytes]:
    story = []
    for line in file:
        if line.strip() != b"<|endoftext|>":
            story.append(line)
        elif story:
            yield b"".join(story).strip()
            story = []
    if story:
        yield b"".join(story).strip()


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
                yield json.loads(line)[field].encode()
            except UnicodeError:
                yield Bad(f"line {number} is invalid UTF-8")
            except (ValueError, RecursionError):
                yield Bad(f"line {number} is broken JSON")
            except (LookupError, TypeError, AttributeError):
                yield Bad(f"line {number} has no text under {field!r} (--field names the key)")


def pyarrow_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet needs pyarrow\npip install pyarrow") from None
    return pyarrow.parquet


def read_parquet(file, field: str) -> Iterator[bytes | Bad]:
    try:
        table = pyarrow_parquet().ParquetFile(file)
        if field not in table.schema_arrow.names:
            yield Bad(f"no column {field!r} (--field names it), only {', '.join(table.schema_arrow.names)}")
            return
        for batch in table.iter_batches(batch_size=64, columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield text.encode() if isinstance(text, str) else Bad(f"a row has no text under {field!r}")
    except (OSError, ValueError) as error:  # pyarrow's errors are these
        yield Bad(f"broken parquet ({str(error).splitlines()[0]})")


FORMATS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")  # C4's .json.gz has lines


def read(item: Input, file, field: str) -> Iterator[bytes | Bad]:
    """The documents of an open file: valid UTF-8, not empty."""
    name = item.path.name.lower()
    if name.endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)
    if name.endswith(".parquet"):
        found = read_parquet(file, field)
    elif name.endswith((".jsonl", ".gz")):
        found = read_jsonl(file, field)
    elif name.endswith(".py"):
        found = read_whole(file)
    else:
        found = read_stories(file) if item.stories else read_running(file)
    document = None
    try:
        for document in found:
            try:
                usable = isinstance(document, Bad) or document.decode()
                yield document if usable else Bad("an empty document")
            except UnicodeDecodeError as error:
                yield Bad(f"invalid UTF-8, bytes {document[error.start:error.end].hex(' ')}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Bad(f"broken gzip ({error})")
    else:
        if document is None:
            yield Bad("no document in it")


class Chunk(NamedTuple):
    item: Input
    documents: list[bytes]
    bad: int       # documents left out since the chunk before
    position: int  # bytes of the file, as it lies on disk, that have been read
    last: bool     # of the file


def chunks(item: Input, field: str, skip_bad: bool) -> Iterator[Chunk]:
    """A file's documents, about CHUNK bytes at a time; where the cuts fall depends on the file alone."""
    documents, size, bad, all_bad = [], 0, 0, 0
    with open(item.path, "rb") as file:
        for document in read(item, file, field):
            if isinstance(document, Bad):
                if not skip_bad:
                    raise UserError(f"{item.path}: {document.why}\n"
                                    "mend it, or use --skip_bad to leave out and count what cannot be read")
                bad, all_bad = bad + 1, all_bad + 1
                if all_bad <= 10:
                    tqdm.write(f"left out: {item.path}: {document.why}", file=sys.stderr)
            else:
                documents.append(document)
                size += len(document)
            if size >= CHUNK:
                yield Chunk(item, documents, bad, file.tell(), last=False)
                documents, size, bad = [], 0, 0
        yield Chunk(item, documents, bad, file.tell(), last=True)


# -------------------------------------------------------------------------------------- documents -> shards

def rename(temporary: Path, final: Path):
    """Give a synced file its final name, so that a power cut keeps it."""
    os.replace(temporary, final)
    sync_folder(final.parent)


def write_json(path: Path, value):
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, lambda file: file.write(json.dumps(value, indent=1).encode()))
    rename(temporary, path)


class SplitWriter:
    """Appends tokens to a split's shards. `entry` is its part of meta.json; the open shard is FILE.tmp."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, entry: dict):
        self.folder, self.split, self.shard_tokens, self.entry = folder, split, shard_tokens, entry
        self.held = entry["tokens"] - sum(shard["tokens"] for shard in entry["shards"])  # in the open shard
        self.file = None
        if self.held:  # go on: what was written after progress.json is cut off
            final, temporary = self.paths()
            if final.exists():  # stopped between a shard's end and the note of it
                os.replace(final, temporary)
            size = self.held * dtype.itemsize
            if not temporary.exists() or temporary.stat().st_size < size:
                raise broken(temporary, "does not hold what progress.json says")
            self.file = open(temporary, "r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def paths(self) -> tuple[Path, Path]:
        final = self.folder / f"{self.split}_{len(self.entry['shards']):05d}.bin"
        return final, final.with_name(final.name + ".tmp")

    def append(self, tokens: np.ndarray, n_bytes: int):
        self.entry["documents"] += 1
        self.entry["bytes"] += n_bytes
        self.entry["tokens"] += len(tokens)
        while len(tokens):
            if self.file is None:
                self.file = open(self.paths()[1], "wb")
            part, tokens = np.split(tokens, [self.shard_tokens - self.held])
            self.file.write(part.tobytes())
            self.held += len(part)
            if self.held == self.shard_tokens:
                self.finish_shard()

    def sync(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def finish_shard(self):
        if self.file:
            self.sync()
            self.file.close()
            final, temporary = self.paths()
            digest = file_sha256(temporary)
            rename(temporary, final)
            self.entry["shards"].append({"file": final.name, "tokens": self.held, "sha256": digest})
            self.file, self.held = None, 0


def encode_chunk(tokenizer, threshold: int, chunk: Chunk):
    """-> [(split, bytes, tokens), ...] in order, and the lowest hash seen. The threads' work."""
    encoded, lowest, item = [], 1 << 64, chunk.item
    running = item.path.suffix.lower() in (".txt", ".md") and not item.stories
    for document in chunk.documents:
        runs = []  # [split, text], neighbours of one split joined
        for piece in pieces(document) if running and item.split == "hash" else [document]:
            split = item.split
            if split == "hash":
                number = int.from_bytes(hashlib.sha256(piece).digest()[:8], "big")
                lowest = min(lowest, number)
                split = "val" if number < threshold else "train"
            if runs and runs[-1][0] == split:
                runs[-1][1] += piece
            else:
                runs.append([split, piece])
        encoded += [(split, len(text), encode(tokenizer, text.decode())) for split, text in runs]
    return encoded, lowest


def in_order(work: Callable, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, Any]]:
    """(chunk, work(chunk)) in order, some chunks ahead but never more than memory allows."""
    pending, size = deque(), 0
    with ThreadPoolExecutor(workers) as pool:
        for chunk in chunks:
            pending.append((chunk, pool.submit(work, chunk)))
            size += sum(map(len, chunk.documents))
            most = 0 if chunk.last and chunk.item.url else 4 * workers  # 0: use up a download before the next
            while pending and (len(pending) > most or size > max(MAX_DOCUMENT, workers * SECTION)):
                chunk, result = pending.popleft()
                size -= sum(map(len, chunk.documents))
                yield chunk, result.result()
        for chunk, result in pending:
            yield chunk, result.result()


class Job(NamedTuple):
    """What to prepare. identity: whatever tells it from other jobs of the same source."""
    folder: Path
    inputs: list[Input]
    source: str
    identity: Any
    tokenizer: str
    val_fraction: float
    shard_tokens: int
    workers: int = CORES
    field: str = "text"
    skip_bad: bool = True
    timeout: float = 30.0

    def digest(self) -> str:
        """Of all that decides the output."""
        decides = [self.source, self.identity, self.tokenizer, self.val_fraction, self.shard_tokens,
                   self.field]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def start(self, threshold: int) -> dict:
        """What progress.json holds: which chunk of which file is next, and what the shards on disk hold."""
        splits = {name: {"documents": 0, "tokens": 0, "bytes": 0, "shards": []} for name in ("train", "val")}
        return {"job": self.digest(), "threshold": threshold, "lowest": 1 << 64, "file": 0, "chunks": 0,
                "skipped": 0, "splits": splits}


def write_shards(job: Job, state: dict, tokenizer):
    """Take state from where it stands to the end of the inputs."""
    dtype, splits = token_dtype(tokenizer.n_vocab), state["splits"]
    writers = {name: SplitWriter(job.folder, name, dtype, job.shard_tokens, splits[name]) for name in splits}

    def left() -> Iterator[Chunk]:
        skip = state["chunks"]
        for item in job.inputs[state["file"]:]:
            if item.url:
                download(item.url, item.path, job.timeout)
            yield from islice(chunks(item, job.field, job.skip_bad), skip, None)
            skip = 0

    def note() -> float:
        for writer in writers.values():
            writer.sync()
        write_json(job.folder / "progress.json", state)
        return time.monotonic()

    def n_tokens() -> int:
        return sum(entry["tokens"] for entry in splits.values())

    started, noted, first, position = time.monotonic(), note(), n_tokens(), 0
    with tqdm(total=sum(item.size for item in job.inputs), unit="B", unit_scale=True, disable=None) as bar:
        bar.update(sum(item.size for item in job.inputs[:state["file"]]))
        work = partial(encode_chunk, tokenizer, state["threshold"])
        for chunk, (encoded, lowest) in in_order(work, left(), job.workers):
            for name, n_bytes, tokens in encoded:
                writers[name].append(tokens, n_bytes)
            state["lowest"] = min(state["lowest"], lowest)
            state["skipped"] += chunk.bad
            state["file"] += chunk.last
            state["chunks"] = 0 if chunk.last else state["chunks"] + 1
            used_up = chunk.last and chunk.item.url
            if used_up or time.monotonic() - noted > JOURNAL_SECONDS:
                noted = note()
            if used_up:
                chunk.item.path.unlink()
            rate = (n_tokens() - first) / (time.monotonic() - started)
            bar.set_postfix_str(f"{n_tokens() / 1e6:.1f}M tokens, {rate / 1e6:.2f}M/s", refresh=False)
            bar.update(max(0, chunk.position - position))
            position = 0 if chunk.last else max(position, chunk.position)
    for writer in writers.values():
        writer.finish_shard()


def prepare(job: Job):
    """Shards and meta.json in job.folder. Goes on where the same job stopped, and leaves it alone once it is
    done. A folder with other data, finished or not, is refused: what took long to make is never deleted."""
    if any(item.path.suffix.lower() == ".parquet" for item in job.inputs):
        pyarrow_parquet()  # if it is missing, say so before the download
    meta_path, journal = job.folder / "meta.json", job.folder / "progress.json"
    state = job.start(int(job.val_fraction * 2 ** 64))
    for path in (meta_path, journal):
        if not path.exists():
            continue
        try:
            earlier = json.loads(path.read_text())
        except ValueError:
            earlier = {}
        if path == journal and earlier and not any(entry["tokens"] for entry in earlier["splits"].values()):
            continue  # it had only just begun
        if earlier.get("job") != state["job"]:
            raise UserError(f"{job.folder} holds other data, or of other settings, files or Python\n"
                            f"remove {job.folder}, or choose another folder with --out")
        if path == journal:
            state = earlier
            print(f"{job.folder}: going on after {state['file']} of {len(job.inputs)} files")
        elif all((job.folder / shard["file"]).exists() for entry in earlier["splits"].values()
                 for shard in entry["shards"]):
            journal.unlink(missing_ok=True)
            print(f"{job.folder} is complete\n{describe(earlier)}")
            return
        else:
            path.unlink()  # a shard is gone: make them all again
    tokenizer = get_tokenizer(job.tokenizer)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_shards(job, state, tokenizer)
        if not state["splits"]["val"]["documents"] and state["lowest"] < 1 << 64:
            state = job.start(state["lowest"] + 1)  # too little text for chance: take the smallest hash
            write_shards(job, state, tokenizer)
        for name, entry in state["splits"].items():
            if not entry["documents"]:
                raise UserError(f"{job.source}: no document is left for the {name} split\n"
                                "give more text, or validation text of its own with --val_input")
        meta = {"tokenizer": job.tokenizer, "vocab_size": tokenizer.n_vocab, "source": job.source,
                "splits": state["splits"], "skipped": state["skipped"], "job": state["job"]}
        write_json(meta_path, meta)
        journal.unlink(missing_ok=True)
        shutil.rmtree(job.folder / "download", ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or job.folder}: {error.strerror or error}\n"
                        "nothing is lost: once that is mended, the same command goes on") from error
    print(f"{job.folder} is ready\n{describe(meta)}")


def describe(meta: dict) -> str:
    lines = [f"{meta['source']}; tokenizer {meta['tokenizer']}; {meta['skipped']} documents left out"]
    lines += [f"{name}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, "
              f"{entry['tokens']:,} tokens" for name, entry in meta["splits"].items()]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- shards -> windows

def broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} {why}\nremove {path.parent} and prepare the data again")


def read_meta(folder: str | Path) -> dict:
    """meta.json of a folder of shards, or a UserError that names the command which makes them."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name in ("tokenizer", "vocab_size", "splits"):
            meta[name]
        return meta
    except (FileNotFoundError, NotADirectoryError):
        out = "" if folder == Path("data", folder.name) else f" --out {folder}"
        command = folder.name + out if folder.name in DEFAULTS else f"text --input FILE_OR_DIR --out {folder}"
        raise UserError(f"{folder} holds no prepared data, or its preparation was interrupted\n"
                        f"make it: python prepare_data.py {command}") from None
    except (ValueError, KeyError, TypeError):
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
        entry = self.meta["splits"][split]
        self.n_tokens, self.n_bytes = entry["tokens"], entry["bytes"]
        self.paths = [self.folder / shard["file"] for shard in entry["shards"]]
        for path, shard in zip(self.paths, entry["shards"]):
            size = shard["tokens"] * self.dtype.itemsize
            if not path.exists() or path.stat().st_size != size:
                raise broken(path, f"is missing or has not {size} bytes")
        if verify:
            self.verify(entry["shards"])
        windows = [max(0, (shard["tokens"] - 1) // block_size) for shard in entry["shards"]]
        self.first = np.cumsum([0, *windows])  # first[i]: number of the first window of shard i
        self.n_windows = int(self.first[-1])
        if not self.n_windows:
            raise UserError(f"{self.folder}: the {split} split of {self.n_tokens} tokens has no window of "
                            f"{block_size} + 1\nprepare more text, or choose a smaller block_size")

    def verify(self, shards: list[dict]):
        memory = self.folder / "verified.json"
        try:
            known = json.loads(memory.read_text())
        except (OSError, ValueError):
            known = {}
        new = {}
        for path, shard in zip(self.paths, shards):
            stat = path.stat()
            mark = [stat.st_size, stat.st_mtime_ns, shard["sha256"]]
            if known.get(path.name) != mark:
                if file_sha256(path) != shard["sha256"]:
                    raise broken(path, "is not what was prepared (its SHA-256 differs)")
                new[path.name] = mark
        if new:
            try:
                write_json(memory, {**known, **new})
            except OSError:  # a folder that we may only read: the next run checks again
                pass

    def window_order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of range(n_windows), a pure function of (seed, epoch)."""
        return np.random.default_rng([seed, epoch]).permutation(self.n_windows)

    def batch(self, window_indices) -> tuple:
        """n window numbers -> x, y (n, T) int64, y one token ahead of x."""
        import torch
        T, indices = self.block_size, np.asarray(window_indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.n_windows:
            raise IndexError(f"windows are numbered 0 to {self.n_windows - 1}")
        tokens = np.empty((len(indices), T + 1), dtype=np.int64)
        for row, index, shard in zip(tokens, indices, np.searchsorted(self.first, indices, side="right") - 1):
            offset = int(index - self.first[shard]) * T * self.dtype.itemsize
            window = np.fromfile(self.paths[shard], self.dtype, T + 1, offset=offset)
            if len(window) != T + 1 or window.max() >= self.vocab_size:
                raise broken(self.paths[shard], f"is cut short, or has a token over {self.vocab_size - 1}")
            row[:] = window
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def documents(folder: str | Path, split: str) -> Iterator[np.ndarray]:
    """The documents of a split in order, each (n,) int64 without its end-of-text."""
    meta = read_meta(folder)
    dtype, eot = token_dtype(meta["vocab_size"]), get_tokenizer(meta["tokenizer"]).eot_token
    begun = []
    for shard in meta["splits"][split]["shards"]:
        for start in range(0, shard["tokens"], 1 << 20):
            block = np.fromfile(Path(folder) / shard["file"], dtype, 1 << 20, offset=start * dtype.itemsize)
            *ended, rest = np.split(block.astype(np.int64), np.flatnonzero(block == eot) + 1)
            for part in ended:
                yield np.concatenate([*begun, part[:-1]])
                begun = []
            begun.append(rest)


# -------------------------------------------------------------------------------------------------- network

TRIES, PAUSE = 6, 1.0  # failures in a row without progress that end it; seconds after the first, then doubled
NETWORK = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, ssl.SSLError)


class Redirect(urllib.request.HTTPRedirectHandler):
    """Keeps the headers of the answers that redirect: Hugging Face states a large file's SHA-256 there."""

    def __init__(self):
        self.headers = {}

    def redirect_request(self, request, fp, code, msg, headers, newurl):
        self.headers.update(headers.items())
        return super().redirect_request(request, fp, code, msg, headers, newurl)


def open_url(url: str, timeout: float, start: int = 0):
    """-> the response from byte `start` on, and the SHA-256 that the server states for the file, or ''."""
    redirect = Redirect()
    request = urllib.request.Request(url, headers={"User-Agent": "prepare_data.py"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    response = urllib.request.build_opener(redirect).open(request, timeout=timeout)
    headers = {name.lower(): value for name, value in [*redirect.headers.items(), *response.headers.items()]}
    stated = headers.get("x-linked-etag", "").strip('"')
    return response, stated if len(stated) == 64 else ""


def retrying(url: str, attempt: Callable, progress: Callable[[], int] = lambda: 0):
    """attempt() until it succeeds, waiting longer each time, or as long as the server asks. Raises UserError
    for an answer that will not change, and after TRIES failures without progress (twice as many of 429)."""
    failures, best = 0, progress()
    while True:
        try:
            return attempt()
        except NETWORK as error:
            problem, asked, tries = getattr(error, "reason", None) or error or type(error).__name__, "", TRIES
            if isinstance(error, urllib.error.HTTPError):
                problem = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 416, 425, 429):
                    raise UserError(f"{url}: {problem}\nif it has moved, --base_url may help") from None
                asked, tries = error.headers.get("Retry-After", ""), TRIES * (2 if error.code == 429 else 1)
        failures, best = (1, progress()) if progress() > best else (failures + 1, best)
        if failures >= tries:
            raise UserError(f"{url}: {problem}, {failures} times in a row\n"
                            "nothing is lost: the same command goes on from here")
        wait = min(float(asked), 300) if asked.isdigit() else min(PAUSE * 2 ** (failures - 1), 60)
        tqdm.write(f"{url}: {problem}; again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def download(url: str, path: Path, timeout: float, sha256: str = ""):
    """url -> path, which exists only once size and SHA-256 are what the server or the caller says they are.
    FILE.part goes on by an HTTP Range. Where a .gz has no stated hash, its own checksums are read instead."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)

    def have() -> int:
        return part.stat().st_size if part.exists() else 0

    def attempt():
        start = have()
        try:
            response, stated = open_url(url, timeout, start)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing follows, yet it was not found right: afresh
                part.unlink()
            raise
        with response, open(part, "ab" if response.status == 206 else "wb") as file:  # 200: from 0
            start = file.tell()
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None, leave=False,
                      desc=path.name) as bar:
                while block := response.read1(1 << 18):  # what has come, so that a stall loses nothing
                    file.write(block)
                    bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        if total and have() < total:
            raise ConnectionError(f"cut off after {have()} of {total} bytes")
        expected = sha256 or stated
        if file_sha256(part) != expected if expected else path.suffix == ".gz" and not sound_gzip(part):
            part.unlink()
            raise ConnectionError("the file arrived corrupted")

    if not path.exists():
        retrying(url, attempt, have)
        rename(part, path)


def sound_gzip(path: Path) -> bool:
    try:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
        return True
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return False


class Source(NamedTuple):
    """Text on Hugging Face; what one of its files is expected to be in bytes of download and GPT-2 tokens."""
    repo: str
    revision: str
    name: str  # with {} for the file's number
    files: int
    default: int
    size: float
    tokens: float


SOURCES = {
    "c4": Source("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
                 "en/c4-train.{:05d}-of-01024.json.gz", 1024, 48, 319e6, 152e6),
    "tinystories": Source("roneneldan/TinyStories", "main", "TinyStoriesV2-GPT4-train.txt",
                          1, 1, 2.23e9, 0.54e9),
    "fineweb_edu": Source("HuggingFaceFW/fineweb-edu", "main", "sample/10BT/{:03d}_00000.parquet",
                          14, 10, 2.15e9, 0.73e9),
}


def web_inputs(command: str, shards: int, folder: Path, base_url: str, workers: int) -> list[Input]:
    """The files to fetch, after a word on what that takes."""
    source = SOURCES[command]
    if not 1 <= shards <= source.files:
        raise UserError(f"--shards {shards}: {command} has 1 to {source.files} files")
    size, tokens = shards * source.size, shards * source.tokens
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    print(f"{command}: {shards} of {source.files} files, about {size / 1e9:.1f} GB to download, "
          f"{tokens / 1e9:.2f}B GPT-2 tokens\n"
          f"disk: {2 * tokens / 1e9:.1f} GB of shards, {source.size / 1e9:.1f} GB for the file at work; "
          f"{free / 1e9:.1f} GB are free{'' if free > 2 * tokens + source.size else ', TOO LITTLE'}\n"
          f"time: about {tokens / 3e6 / workers / 60:.0f} min of tokenising on {workers} cores, and "
          f"{size / 20e6 / 60:.0f} min of download at 20 MB/s", flush=True)
    base = f"{base_url or 'https://huggingface.co'}/datasets/{source.repo}/resolve/{source.revision}/"
    names = [source.name.format(number) for number in range(shards)]
    return [Input(folder / "download" / Path(name).name, int(source.size), url=base + name,
                  stories=name.endswith(".txt")) for name in names]


ICL = {  # task: dataset, configuration ('': its only one), split, rows
    "hellaswag": ("Rowan/hellaswag", "default", "validation", 10042),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test", 5153),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", 2376),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", 1172),
    "commonsense_qa": ("tau/commonsense_qa", "default", "validation", 1221),
    "piqa": ("baber/piqa", "", "validation", 1838),
    "openbookqa": ("allenai/openbookqa", "main", "test", 500),
    "sciq": ("allenai/sciq", "default", "test", 1000),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", 1267),
}
LAMBADA_SHA256 = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"
HELLASWAG_NOTICE = """hellaswag: its WikiHow rows are under a copyright takedown claim of September 2026, for
which GitHub disabled the authors' repository. You fetch them for yourself; do not pass them on."""


def fetch_icl(folder: Path, tasks: list[str], base_url: str, timeout: float):
    """Evaluation sets -> folder/TASK/SPLIT.jsonl, a Hugging Face row a line."""
    if unknown := [task for task in tasks if task not in ICL]:
        raise UserError(f"unknown tasks: {', '.join(unknown)}\nknown: {', '.join(ICL)}")
    for task in tasks:
        dataset, config, split, n_rows = ICL[task]
        path = folder / task / f"{split}.jsonl"
        if task == "hellaswag":
            print(HELLASWAG_NOTICE, flush=True)
        if path.exists():
            print(f"{path} is there")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if task == "lambada_openai":
            base = base_url or "https://openaipublic.blob.core.windows.net"
            download(f"{base}/gpt-2/data/lambada_test.jsonl", path, timeout, LAMBADA_SHA256)
        else:
            base = base_url or "https://datasets-server.huggingface.co"
            fetch_rows(base, dataset, config, split, n_rows, path, timeout)
        print(f"{path}: {n_rows} rows", flush=True)


def fetch_rows(api: str, dataset: str, config: str, split: str, n_rows: int, path: Path, timeout: float):
    """A split by the JSON rows API, 100 rows a call; FILE.part goes on after its last whole line."""
    def get(route: str, **query) -> dict:
        url = f"{api}/{route}?{urllib.parse.urlencode(dict(dataset=dataset, **query))}"

        def attempt():
            with open_url(url, timeout)[0] as response:
                try:
                    return json.loads(response.read())
                except ValueError:
                    raise ConnectionError("the answer is not JSON") from None
        return retrying(url, attempt)

    config = config or (get("splits").get("splits") or [{}])[0].get("config", "default")
    part = path.with_name(path.name + ".part")
    with open(part, "a+b") as file, tqdm(total=n_rows, unit="row", disable=None, leave=False) as bar:
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        done = whole.count(b"\n")
        while done < n_rows:
            bar.update(done - bar.n)
            page = get("rows", config=config, split=split, offset=done, length=100)
            rows, total = page.get("rows", []), page.get("num_rows_total")
            in_turn = [row["row_idx"] for row in rows] == list(range(done, done + len(rows)))
            if not rows or not in_turn or total != n_rows or any(row.get("truncated_cells") for row in rows):
                raise UserError(f"{api}: {dataset} does not give the {n_rows} whole rows of the task, but "
                                f"{total}\nthe set may have changed")
            file.write("".join(json.dumps(row["row"], ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            done += len(rows)
        os.fsync(file.fileno())
    rename(part, path)


# ------------------------------------------------------------------------------------------------- commands

def stdlib_files() -> tuple[list[Path], str]:
    """The library's source without site-packages and test folders, and a SHA-256 over file names and text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    found, digest = {}, hashlib.sha256()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        found.update({path.relative_to(root).as_posix(): path for path in paths if path.stat().st_size})
    found = dict(sorted(found.items()))
    for name, path in found.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    if not found:
        raise UserError(f"this Python has no library source under {root}\n"
                        "use text of yours: python prepare_data.py text --input FILE_OR_DIR --out data/NAME")
    return list(found.values()), digest.hexdigest()


def text_inputs(names: list[str], split: str) -> list[Input]:
    """Files, and the files below folders in the order of their names."""
    inputs = []
    for path in map(Path, names):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if file.name.lower().endswith(FORMATS) and file.is_file()]
        if not found:
            raise UserError(f"{path} {'holds' if path.is_dir() else 'is'} no file that can be read\n"
                            f"files must exist and end in {', '.join(FORMATS)}")
        inputs += [Input(file, file.stat().st_size, split) for file in found]
    return inputs


DEFAULTS = {  # command: tokenizer, part of the documents that validation gets, what it is
    "stdlib": ("bytes", 0.05, "the source of this Python's standard library, as bytes"),
    "text": ("bytes", 0.05, f"your own files ({' '.join(FORMATS)})"),
    "c4": ("gpt2", 0.002, "C4 (English), 1024 files of about 152M tokens"),
    "tinystories": ("gpt2", 0.002, "TinyStories V2 (GPT-4), about 540M tokens"),
    "fineweb_edu": ("gpt2", 0.002, "FineWeb-Edu's sample of 10B tokens, 14 files (needs pyarrow)"),
}


def main(argv: list[str]):
    parser = ArgumentParser(prog="prepare_data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (tokenizer, fraction, help) in DEFAULTS.items():
        sub = commands.add_parser(name, help=help, description=help)
        if name == "text":
            sub.add_argument("--input", nargs="+", required=True, metavar="FILE_OR_DIR")
            sub.add_argument("--val_input", nargs="+", default=[], metavar="FILE_OR_DIR",
                             help="validation text; --input is then all for training")
            sub.add_argument("--field", default="text", help="key or column of .jsonl and .parquet (text)")
            sub.add_argument("--skip_bad", action="store_true", help="leave out, count what cannot be read")
        if name in SOURCES:
            default = SOURCES[name].default
            sub.add_argument("--shards", type=int, default=default, help=f"files to take ({default})")
        out = None if name == "text" else f"data/{name}"
        sub.add_argument("--out", default=out, required=not out, help=f"folder to write ({out})")
        sub.add_argument("--tokenizer", default=tokenizer, help=f"bytes, gpt2, ..., hf:FOLDER ({tokenizer})")
        sub.add_argument("--val_fraction", type=float, default=fraction, help=f"for validation ({fraction})")
        sub.add_argument("--shard_tokens", type=int, default=10 ** 8, help="tokens of a shard (100 million)")
        sub.add_argument("--workers", type=int, default=CORES, help="threads (as many as cores)")
    sub = commands.add_parser("icl", help="the evaluation sets", description="the evaluation sets")
    sub.add_argument("--tasks", default=",".join(ICL), help="with commas between them (all)")
    sub.add_argument("--out", default="data/icl", help="folder to write (data/icl)")
    for name in (*SOURCES, "icl"):
        sub = commands.choices[name]
        sub.add_argument("--base_url", default="", help="a mirror: another server, the same paths")
        sub.add_argument("--timeout", type=float, default=30, help="seconds of silence before a retry (30)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")

    folder, extra = Path(args.out), {}
    base_url = getattr(args, "base_url", "").rstrip("/")
    if args.command == "icl":
        return fetch_icl(folder, args.tasks.split(","), base_url, args.timeout)
    if not 0 < args.val_fraction < 1 or args.shard_tokens < 2 or args.workers < 1:
        raise UserError("--val_fraction must lie between 0 and 1, --shard_tokens be at least 2, --workers 1")
    if args.command == "stdlib":
        files, digest = stdlib_files()
        inputs, identity = [Input(path, path.stat().st_size) for path in files], None
        version = ".".join(map(str, sys.version_info[:3]))
        source = f"standard library of Python {version}, {len(files)} files, SHA-256 {digest}"
    elif args.command == "text":
        inputs = text_inputs(args.input, "train" if args.val_input else "hash")
        inputs += text_inputs(args.val_input, "val")
        identity = [(str(item.path.absolute()), item.split, item.size, item.path.stat().st_mtime_ns)
                    for item in inputs]
        places = args.input + args.val_input
        source = f"{len(inputs)} files of {', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"
        extra = {"field": args.field, "skip_bad": args.skip_bad}
    else:
        inputs = web_inputs(args.command, args.shards, folder, base_url, args.workers)
        identity = [item.path.name for item in inputs]
        source, extra = f"{args.command}, {len(inputs)} files", {"timeout": args.timeout}
    prepare(Job(folder, inputs, source, identity, args.tokenizer, args.val_fraction, args.shard_tokens,
                args.workers, **extra))


if __name__ == "__main__":
    cli(main)
