"""Text -> token shards on disk (data.py reads them), and the evaluation sets.

    python prepare_data.py stdlib                                   # the source of this Python: no download
    python prepare_data.py text --input FILE_OR_DIR ... --tokenizer gpt2 --out data/NAME
    python prepare_data.py c4 --shards 48                           # or tinystories, fineweb_edu
    python prepare_data.py icl                                      # the evaluation sets

The split. A document goes to validation where the first 64 bits of its text's SHA-256 lie below
--val_fraction of their range, and so stays there whatever is added later; should that choose none, the
document with the smallest hash goes. A document is a line of .jsonl, a row of .parquet or a whole .py file.
Running text (.txt, .md) is cut at paragraphs into pieces of at most 8 KB, each hashed by itself, so that a
single book has validation text too; neighbours that go the same way stay joined, up to 1 MB. With --val_input
nothing is hashed: that is validation, and all of --input is training.

Killed at any time, the same command goes on and ends with the same bytes, whatever the number of threads.
The documents, in order, are grouped into chunks, and chunks into batches of about --shard_tokens tokens; the
cuts depend on the input alone. A batch becomes one shard of each split, made under another name, synced and
renamed. Then unfinished.json, which is meta.json in the making, says which chunk comes next. What was killed
within a batch makes that batch again.

Downloads come from the Hugging Face Hub: HF_ENDPOINT names a mirror, HF_TOKEN is your token.
"""

import gzip
import hashlib
import importlib
import json
import os
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from checkpoint import sha256, sync_folder, write_json, write_synced
from config import ArgumentParser, cli
from data import EVAL_SETS, broken, get_tokenizer, token_dtype
from model import UserError, check

CHUNK = 1 << 18  # bytes of text that a thread encodes at a time, where documents are smaller
SECTION = 1 << 20  # bytes of running text that are read at a time
PIECE = 1 << 13  # bytes of running text that are hashed, and so split, as one
NO_HASH = 1 << 64  # larger than the first 64 bits of any
MAX_DOCUMENT = 8 << 20  # bytes of a line of .jsonl or a file of code: memory is bounded, so more is Bad
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------- files -> documents

FORMATS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")  # C4's .json.gz has lines


class Bad(NamedTuple):
    """What stands in the place of a document that cannot be used."""

    why: str


class Input(NamedTuple):
    """A file of documents, all for one split, or each for the one that its hash says."""

    path: Path
    size: int  # bytes; of a file that is yet to come, about how many
    split: str = "hash"  # or "train", "val"
    stories: bool = False  # a .txt whose documents lie between lines of <|endoftext|>


def cut(data: bytes, size: int) -> int:
    """Where to cut so that at most size bytes come first: after a paragraph, line, word or character."""
    for mark in (b"\n\n", b"\n", b" "):
        at = data.rfind(mark, size // 2, size)
        if at >= 0:
            return at + len(mark)
    for at in range(size, size - 4, -1):
        if data[at] & 0xC0 != 0x80:  # no byte within a character of UTF-8
            return at
    return size


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


def read_jsonl(file, key: str) -> Iterator[bytes | Bad]:
    number = 0
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        if len(line) > MAX_DOCUMENT:
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK)
            yield Bad(f"line {number} is longer than {MAX_DOCUMENT >> 20} MB")
        elif line.strip():
            try:
                yield json.loads(line)[key].encode()
            except UnicodeError:
                yield Bad(f"line {number} is invalid UTF-8")
            except (ValueError, RecursionError):
                yield Bad(f"line {number} is broken JSON")
            except (LookupError, TypeError, AttributeError):
                yield Bad(f"line {number} has no text under {key!r} (--field names the key)")


def optional(module: str):
    """A module that only some commands need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"this command needs one more package\npip install {package}") from None


def read_parquet(file, column: str) -> Iterator[bytes | Bad]:
    try:
        table = optional("pyarrow.parquet").ParquetFile(file)
        names = table.schema_arrow.names
        if column not in names:
            yield Bad(f"no column {column!r} (--field names it), only {', '.join(names)}")
            return
        for batch in table.iter_batches(batch_size=64, columns=[column], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield text.encode() if isinstance(text, str) else Bad(f"a row has no text under {column!r}")
    except (OSError, ValueError) as error:  # pyarrow's errors are these
        yield Bad(f"broken parquet ({str(error).splitlines()[0]})")


def read(item: Input, file, key: str) -> Iterator[bytes | Bad]:
    """The documents of an open file: valid UTF-8, not empty."""
    name = item.path.name.lower()
    if name.endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)
    if name.endswith(".parquet"):
        found = read_parquet(file, key)
    elif name.endswith((".jsonl", ".gz")):
        found = read_jsonl(file, key)
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
                yield Bad(f"invalid UTF-8, bytes {document[error.start : error.end].hex(' ')}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Bad(f"broken gzip ({error})")
    else:
        if document is None:
            yield Bad("no document in it")


@dataclass
class Chunk:
    """Documents that a thread encodes in one go, each with the file it is from."""

    documents: list[tuple[Input, bytes]] = field(default_factory=list)
    n_bytes: int = 0  # of the documents
    n_bad: int = 0  # documents left out
    n_read: int = 0  # bytes of the files, as they lie on disk


def chunks(inputs: list[Input], key: str, skip_bad: bool) -> Iterator[Chunk]:
    """Documents in order, CHUNK bytes or a little more at a time."""
    chunk, n_warned = Chunk(), 0
    for item in inputs:
        with open(item.path, "rb") as file:
            position = 0
            for document in read(item, file, key):
                if isinstance(document, Bad):
                    problem = f"{item.path}: {document.why}"
                    check(skip_bad, f"{problem}\nmend it, or leave out and count the bad with --skip_bad")
                    if n_warned < 10:
                        tqdm.write(f"left out: {problem}", file=sys.stderr)
                    n_warned, chunk.n_bad = n_warned + 1, chunk.n_bad + 1
                else:
                    chunk.documents.append((item, document))
                    chunk.n_bytes += len(document)
                if chunk.n_bytes >= CHUNK:
                    chunk.n_read += max(0, file.tell() - position)
                    position = max(position, file.tell())
                    yield chunk
                    chunk = Chunk()
            chunk.n_read += item.path.stat().st_size - position
    yield chunk


# -------------------------------------------------------------------------------------- documents -> tokens


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


def encode_chunk(tokenizer, threshold: int, chunk: Chunk):
    """-> [(split, bytes, tokens), ...] in order, and the lowest hash seen. The threads' work."""
    encoded, lowest = [], NO_HASH
    for item, document in chunk.documents:
        running = item.path.suffix.lower() in (".txt", ".md") and not item.stories
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


def in_order(work: Callable, to_come: Iterable[Chunk], workers: int) -> Iterator[tuple]:
    """(chunk, work(chunk)) in order, some chunks ahead but never more than memory allows."""
    pending, n_bytes = deque(), 0
    with ThreadPoolExecutor(workers) as pool:
        for chunk in to_come:
            pending.append((chunk, pool.submit(work, chunk)))
            n_bytes += chunk.n_bytes
            while pending and (len(pending) > 4 * workers or n_bytes > max(MAX_DOCUMENT, workers * SECTION)):
                chunk, result = pending.popleft()
                n_bytes -= chunk.n_bytes
                yield chunk, result.result()
        for chunk, result in pending:
            yield chunk, result.result()


# ------------------------------------------------------------------------------------------------ downloads


def download(repo: str, file: str, revision: str, folder: Path, expected: str = "") -> Path:
    """A file of a dataset on the Hub -> folder/FILE, whose SHA-256 is what is expected of it, or else what
    the Hub says. huggingface_hub resumes and retries by itself; what it gives up on raises UserError."""
    hub = optional("huggingface_hub")
    try:
        path = Path(hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_dir=folder))
        url = hub.hf_hub_url(repo, file, repo_type="dataset", revision=revision)
        expected = expected or hub.get_hf_file_metadata(url).etag
    except Exception as error:  # whatever the Hub, the network, a proxy or the disk came up with
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{repo}, {file}: {reason}\nnothing is lost: the same command goes on from here\n"
            "HF_ENDPOINT can name a mirror, HF_TOKEN your token"
        ) from None
    if sha256(path) != expected:
        path.unlink()
        raise UserError(
            f"{repo}, {file}: the file arrived corrupted, or is another one (its SHA-256 differs)\n"
            "nothing is lost: the same command fetches it again"
        )
    return path


class Source(NamedTuple):
    """Text on the Hub; what one of its files is expected to be in bytes of download and GPT-2 tokens."""

    repo: str
    revision: str
    file: str  # with {} for its number
    n_files: int
    default: int
    size: float
    tokens: float


C4, STORIES = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "TinyStoriesV2-GPT4-train.txt"
EDU = "sample/10BT/{:03d}_00000.parquet"
SOURCES = {
    "c4": Source("allenai/c4", C4, "en/c4-train.{:05d}-of-01024.json.gz", 1024, 48, 319e6, 152e6),
    "tinystories": Source("roneneldan/TinyStories", "main", STORIES, 1, 1, 2.23e9, 0.54e9),
    "fineweb_edu": Source("HuggingFaceFW/fineweb-edu", "main", EDU, 14, 10, 2.15e9, 0.73e9),
}


# ----------------------------------------------------------------------------------------- tokens -> shards

SPLITS = ("train", "val")


class Stage(NamedTuple):
    """Files read without a pause: all of one's own, or one that is fetched first and deleted after."""

    inputs: list[Input]
    source: Source | None = None  # where to fetch it
    file: str = ""


class Shard:
    """A shard in the making, FILE.tmp. `entry` is its split's part of meta.json."""

    def __init__(self, folder: Path, split: str, entry: dict):
        self.path, self.entry = folder / f"{split}_{len(entry['shards']):05d}.bin", entry
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.n_tokens, self.digest, self.file = 0, hashlib.sha256(), open(self.temporary, "wb")

    def append(self, tokens: np.ndarray, n_bytes: int):
        self.file.write(tokens.data)
        self.digest.update(tokens.data)
        self.n_tokens += len(tokens)
        self.entry["documents"] += 1
        self.entry["tokens"] += len(tokens)
        self.entry["bytes"] += n_bytes

    def finish(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.n_tokens == 0:
            return self.temporary.unlink()
        os.replace(self.temporary, self.path)
        shard = {"file": self.path.name, "tokens": self.n_tokens, "sha256": self.digest.hexdigest()}
        self.entry["shards"].append(shard)


def write_shards(args, stages: list[Stage], meta: dict, tokenizer):
    """Take meta, and unfinished.json batch by batch, from where it stands to the end of the stages."""
    folder, progress, splits = Path(args.out), meta["progress"], meta["splits"]
    work = partial(encode_chunk, tokenizer, progress["threshold"])

    def open_batch() -> dict[str, Shard]:
        return {split: Shard(folder, split, splits[split]) for split in SPLITS}

    def finish_batch():
        for shard in batch.values():
            shard.finish()
        sync_folder(folder)
        write_json(folder / "unfinished.json", meta)

    sizes = [sum(item.size for item in stage.inputs) for stage in stages]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None) as bar:
        bar.update(sum(sizes[: progress["stage"]]))
        for stage in stages[progress["stage"] :]:
            if stage.source:
                download(stage.source.repo, stage.file, stage.source.revision, folder / "download")
            to_come, batch = chunks(stage.inputs, args.field, args.skip_bad), open_batch()
            for chunk in islice(to_come, progress["chunk"]):  # in shards already
                bar.update(chunk.n_read)
            for chunk, (encoded, lowest) in in_order(work, to_come, args.workers):
                for split, n_bytes, tokens in encoded:
                    batch[split].append(tokens, n_bytes)
                meta["skipped"] += chunk.n_bad
                progress["lowest"] = min(progress["lowest"], lowest)
                progress["chunk"] += 1
                if sum(shard.n_tokens for shard in batch.values()) >= args.shard_tokens:
                    finish_batch()
                    batch = open_batch()
                bar.set_postfix_str(f"{splits['train']['tokens'] / 1e6:.1f}M tokens", refresh=False)
                bar.update(chunk.n_read)
            progress["stage"], progress["chunk"] = progress["stage"] + 1, 0
            finish_batch()
            if stage.source:  # the file, and what a killed download may have left
                shutil.rmtree(folder / "download")


def nothing_yet(threshold: int) -> dict:
    """What meta.json counts, before the first batch. The next one begins at that chunk of that stage."""
    return {
        "splits": {split: {"documents": 0, "tokens": 0, "bytes": 0, "shards": []} for split in SPLITS},
        "skipped": 0,
        "progress": {"stage": 0, "chunk": 0, "threshold": threshold, "lowest": NO_HASH},
    }


def prepare(args, stages: list[Stage], source: str, identity):
    """Shards and meta.json in args.out. identity: whatever tells this job from others of the same source.
    Goes on where the same job stopped, and leaves it alone once it is done. A folder with other data,
    finished or not, is refused: what took long to make is never deleted."""
    if any(item.path.suffix.lower() == ".parquet" for stage in stages for item in stage.inputs):
        optional("pyarrow.parquet")  # if it is missing, say so before the download
    folder = Path(args.out)
    finished, unfinished = folder / "meta.json", folder / "unfinished.json"
    decides = [source, identity, args.tokenizer, args.val_fraction, args.shard_tokens, args.field]
    job = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    meta = read_json(finished) or read_json(unfinished)
    if meta.get("job") == job:
        for shard in meta["splits"]["train"]["shards"] + meta["splits"]["val"]["shards"]:
            if not (folder / shard["file"]).exists():
                raise broken(folder / shard["file"], "is missing")
        if finished.exists():
            print(f"{folder} is complete\n{describe(meta)}")
            return
        print(f"{folder}: going on after {meta['splits']['train']['tokens']:,} tokens")
    tokenizer = get_tokenizer(args.tokenizer)
    if meta.get("job") != job:
        check(
            not finished.exists() and not any(folder.glob("*.bin")),
            f"{folder} holds other data, or of other settings, files or Python\n"
            f"remove {folder}, or choose another folder with --out",
        )
        meta = {"tokenizer": args.tokenizer, "vocab_size": tokenizer.n_vocab, "source": source, "job": job}
        meta.update(nothing_yet(threshold=int(args.val_fraction * 2**64)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(unfinished, meta)
        write_shards(args, stages, meta, tokenizer)
        lowest = meta["progress"]["lowest"]
        if not meta["splits"]["val"]["documents"] and lowest < NO_HASH:
            # Too little text for chance: all again, and the document with the smallest hash goes.
            useless = meta["splits"]["train"]["shards"]
            meta.update(nothing_yet(threshold=lowest + 1))
            write_json(unfinished, meta)
            for shard in useless:
                (folder / shard["file"]).unlink()
            write_shards(args, stages, meta, tokenizer)
        for split in SPLITS:
            check(
                meta["splits"][split]["documents"] > 0,
                f"{source}: no document is left for the {split} split\n"
                "give more text, or validation text of its own with --val_input",
            )
        shutil.rmtree(folder / "download", ignore_errors=True)  # where it was killed after the last batch
        os.replace(unfinished, finished)
        sync_folder(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}\n"
            "nothing is lost: once that is mended, the same command goes on"
        ) from error
    print(f"{folder} is ready\n{describe(meta)}")


def read_json(path: Path) -> dict:
    """{} where there is none, or none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def describe(meta: dict) -> str:
    lines = [f"{meta['source']}; tokenizer {meta['tokenizer']}; {meta['skipped']} documents left out"]
    for split, entry in meta["splits"].items():
        counts = f"{entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens"
        lines.append(f"{split}: {counts}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ evaluation sets

HELLASWAG_NOTICE = """hellaswag: its WikiHow rows are under a copyright takedown claim of September 2026, for
which GitHub disabled the authors' repository. You fetch them for yourself; do not pass them on."""


def fetch_eval_set(task: str, folder: Path):
    """-> folder/TASK/SPLIT.jsonl, a Hugging Face row a line."""
    known = EVAL_SETS[task]
    path = folder / task / f"{known.split}.jsonl"
    if task == "hellaswag":
        print(HELLASWAG_NOTICE, flush=True)
    if path.exists():
        print(f"{path} is there")
        return
    if known.file.endswith(".parquet"):
        optional("pyarrow.parquet")  # if it is missing, say so before the download
    lines = read_rows(download(known.repo, known.file, known.revision, folder / "download", known.sha256))
    check(
        len(lines) == known.n_rows,
        f"{known.repo}, {known.file} has {len(lines)} rows, not the {known.n_rows} of the task\n"
        "the set may have changed",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, lambda file: file.writelines(lines))
    os.replace(temporary, path)
    shutil.rmtree(folder / "download")
    print(f"{path}: {known.n_rows} rows", flush=True)


def read_rows(path: Path) -> list[bytes]:
    """The rows of a .parquet or .jsonl file, each as a line of JSON."""
    if path.suffix == ".parquet":
        rows = optional("pyarrow.parquet").read_table(path).to_pylist()
        return [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    with open(path, "rb") as file:
        return file.readlines()


# ------------------------------------------------------------------------------------------------- commands


def stdlib_files() -> tuple[list[Path], str]:
    """The library's source without site-packages and test folders, and a SHA-256 over file names and text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    found, digest = {}, hashlib.sha256()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and path.stat().st_size:
                found[path.relative_to(root).as_posix()] = path
    found = dict(sorted(found.items()))
    for name, path in found.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    check(
        bool(found),
        f"this Python has no library source under {root}\n"
        "use text of yours: python prepare_data.py text --input FILE_OR_DIR --out data/NAME",
    )
    return list(found.values()), digest.hexdigest()


def text_inputs(names: list[str], split: str) -> list[Input]:
    """Files, and the files below folders in the order of their names."""
    inputs = []
    for path in map(Path, names):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if file.name.lower().endswith(FORMATS) and file.is_file()]
        verb = "holds" if path.is_dir() else "is"
        check(
            bool(found),
            f"{path} {verb} no file that can be read\nfiles must exist and end in {', '.join(FORMATS)}",
        )
        inputs += [Input(file, file.stat().st_size, split) for file in found]
    return inputs


def web_stages(args) -> list[Stage]:
    """One for each file to fetch, after a word on what that takes."""
    source, folder, n = SOURCES[args.command], Path(args.out), args.shards
    check(1 <= n <= source.n_files, f"--shards {n}: {args.command} has 1 to {source.n_files} files")
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free, size, tokens = shutil.disk_usage(place).free, n * source.size, n * source.tokens
    needed = 2 * tokens + source.size  # two bytes a token, and the file at work
    warning = ", TOO LITTLE" if free < needed else ""
    minutes = size / 20e6 / 60, tokens / 3e6 / args.workers / 60
    print(f"{args.command}: {n} of {source.n_files} files, about {tokens / 1e9:.2f}B GPT-2 tokens")
    print(f"download: {size / 1e9:.1f} GB, at 20 MB/s {minutes[0]:.0f} min")
    print(f"tokenising: about {minutes[1]:.0f} min on {args.workers} cores")
    print(f"disk: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free{warning}", flush=True)
    stages = []
    for number in range(n):
        file = source.file.format(number)
        item = Input(folder / "download" / file, int(source.size), stories=file.endswith(".txt"))
        stages.append(Stage([item], source, file))
    return stages


COMMANDS = {  # default of --tokenizer, of --val_fraction, what it is
    "stdlib": ("bytes", 0.05, "the source of this Python's standard library, as bytes"),
    "text": ("bytes", 0.05, f"your own files ({' '.join(FORMATS)})"),
    "c4": ("gpt2", 0.002, "C4 (English), 1024 files of about 152M tokens"),
    "tinystories": ("gpt2", 0.002, "TinyStories V2 (GPT-4), about 540M tokens"),
    "fineweb_edu": ("gpt2", 0.002, "FineWeb-Edu's sample of 10B tokens, 14 files (needs pyarrow)"),
}


def parse(argv: list[str]):
    parser = ArgumentParser(prog="prepare_data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (tokenizer, fraction, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        flag, out = sub.add_argument, None if name == "text" else f"data/{name}"
        sub.set_defaults(field="text", skip_bad=True)
        if name == "text":
            flag("--input", nargs="+", required=True, metavar="FILE_OR_DIR", help="text")
            flag("--val_input", nargs="+", default=[], metavar="FILE_OR_DIR", help="all for validation")
            flag("--field", default="text", help="key or column of .jsonl and .parquet (text)")
            flag("--skip_bad", action="store_true", default=False, help="leave out and count the bad")
        if name in SOURCES:
            default = SOURCES[name].default
            flag("--shards", type=int, default=default, help=f"files to take ({default})")
        flag("--out", default=out, required=not out, help=f"folder to write ({out})")
        flag("--tokenizer", default=tokenizer, help=f"bytes, gpt2, ..., hf:FOLDER ({tokenizer})")
        flag("--val_fraction", type=float, default=fraction, help=f"for validation ({fraction})")
        flag("--shard_tokens", type=int, default=10**8, help="about, of a batch (100 million)")
        flag("--workers", type=int, default=CORES, help="threads (as many as cores)")
    sub = commands.add_parser("icl", help="the evaluation sets", description="the evaluation sets")
    sub.add_argument("--tasks", default=",".join(EVAL_SETS), help="with commas between them (all)")
    sub.add_argument("--out", default="data/icl", help="folder to write (data/icl)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: list[str]):
    args = parse(argv)
    if args.command == "icl":
        tasks = args.tasks.split(",")
        for task in tasks:
            check(task in EVAL_SETS, f"unknown task: {task}\nknown: {', '.join(EVAL_SETS)}")
        for task in tasks:
            fetch_eval_set(task, Path(args.out))
        return
    check(0 < args.val_fraction < 1, "--val_fraction must lie between 0 and 1")
    check(args.shard_tokens > 0 and args.workers > 0, "--shard_tokens and --workers must be positive")
    if args.command == "stdlib":
        files, digest = stdlib_files()
        stages, identity = [Stage([Input(path, path.stat().st_size) for path in files])], None
        version = ".".join(map(str, sys.version_info[:3]))
        source = f"standard library of Python {version}, {len(files)} files, SHA-256 {digest}"
    elif args.command == "text":
        inputs = text_inputs(args.input, "train" if args.val_input else "hash")
        inputs += text_inputs(args.val_input, "val")
        places, stages, identity = args.input + args.val_input, [Stage(inputs)], []
        for path, size, split, _ in inputs:
            identity.append((str(path.absolute()), split, size, path.stat().st_mtime_ns))
        source = f"{len(inputs)} files of {', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"
    else:
        optional("huggingface_hub")  # if it is missing, say so at once
        stages = web_stages(args)
        source, identity = f"{args.command}, {len(stages)} files", [Path(stage.file).name for stage in stages]
    prepare(args, stages, source, identity)


if __name__ == "__main__":
    cli(main)
