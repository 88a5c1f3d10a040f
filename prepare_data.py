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
The documents, in order, are grouped into chunks, and chunks into batches of about --shard_tokens tokens,
which are held in memory; the cuts depend on the input alone. A batch becomes one shard of each split, renamed
once it is on disk. Then unfinished.json, which is meta.json in the making, says which chunk comes next.

Downloads come from the Hugging Face Hub: HF_ENDPOINT names a mirror, HF_TOKEN is your token.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from checkpoint import sha256, sync_folder, write_json, write_whole
from config import ArgumentParser, cli, optional
from data import get_tokenizer, json_or_empty, token_dtype
from model import UserError, check
from tasks import DOWNLOADED, TASKS

CHUNK = 1 << 18  # bytes of text that a thread encodes at a time, or one document that is larger
SECTION = 1 << 20  # bytes of running text that are read at a time
PIECE = 1 << 13  # bytes of running text that are hashed, and so split, as one
DOWNLOADS = ".download"  # in the folder that is made: what has been fetched and not yet read
NO_HASH = 1 << 64  # larger than the first 64 bits of any
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------- files -> documents

FORMATS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")  # C4's .json.gz has lines


class Bad(str):
    """What is wrong with a document that cannot be used, in its place."""


class Input(NamedTuple):
    """A file of documents, all for one split, or each for the one that its hash says."""

    path: Path
    split: str = "hash"  # or "train", "val"
    stories: bool = False  # a .txt whose documents lie between lines of <|endoftext|>

    @property
    def running(self) -> bool:
        return self.path.suffix.lower() in (".txt", ".md") and not self.stories


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


def sections(file, size: int) -> Iterator[bytes]:
    """Running text, cut into parts of at most so many bytes."""
    data = file.read(size + 1)
    while len(data) > size:
        at = cut(data, size)
        yield data[:at]
        data = data[at:] + file.read(at)
    yield data


def read_stories(file) -> Iterator[bytes]:
    for separates, lines in groupby(file, lambda line: line.strip() == b"<|endoftext|>"):
        if not separates:
            yield b"".join(lines).strip()


def read_rows(rows: Iterable, parse: Callable, key: str) -> Iterator[bytes | Bad]:
    """The texts of rows that parse() makes into dictionaries."""
    for number, row in enumerate(rows, 1):
        try:
            yield parse(row)[key].encode()
        except (ValueError, RecursionError):
            yield Bad(f"row {number} is no JSON in UTF-8")
        except (LookupError, TypeError, AttributeError):
            yield Bad(f"row {number} has no text under {key!r} (--field names the key)")


def parquet_rows(parquet, file, column: str) -> Iterator[dict]:
    table = parquet.ParquetFile(file)
    for batch in table.iter_batches(batch_size=64, columns=[column], use_threads=False):
        yield from batch.to_pylist()


def records(item: Input, file, key: str) -> Iterable[bytes | Bad]:
    """Whatever a file holds as documents."""
    name = item.path.name.lower()
    if name.endswith(".parquet"):
        return read_rows(parquet_rows(optional("pyarrow.parquet"), file, key), dict, key)
    if name.endswith((".jsonl", ".gz")):
        lines = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
        return read_rows(filter(bytes.strip, lines), json.loads, key)
    if item.running:
        return sections(file, SECTION)
    return read_stories(file) if item.stories else [file.read()]


def read(item: Input, key: str) -> Iterator[bytes | Bad]:
    """The documents of a file: valid UTF-8, not empty."""
    with open(item.path, "rb") as file:
        found = records(item, file, key)
        try:
            for number, document in enumerate(found, 1):
                try:
                    usable = isinstance(document, Bad) or document.decode()
                    yield document if usable else Bad(f"document {number} is empty")
                except UnicodeDecodeError as error:
                    wrong = document[error.start : error.end].hex(" ")
                    where = f"byte {error.start} of " + ("section" if item.running else "document")
                    yield Bad(f"invalid UTF-8, {wrong} at {where} {number}")
        except (EOFError, zlib.error, OSError, ValueError) as error:  # of gzip, of pyarrow
            yield Bad(f"broken file ({str(error).splitlines()[0]})")


def chunks(inputs: list[Input], key: str, skip_bad: bool) -> Iterator[list[tuple[Input, bytes | Bad]]]:
    """Documents in order, each with the file it is from, CHUNK bytes or a little more at a time."""
    chunk, n_bytes = [], 0
    for item in inputs:
        for document in read(item, key):
            if isinstance(document, Bad):
                problem = f"{item.path}: {document}"
                check(skip_bad, f"{problem}\nmend it, or leave out and count the bad with --skip_bad")
                tqdm.write(f"left out: {problem}", file=sys.stderr)
            else:
                n_bytes += len(document)
            chunk.append((item, document))
            if n_bytes >= CHUNK:
                yield chunk
                chunk, n_bytes = [], 0
    yield chunk


# -------------------------------------------------------------------------------------- documents -> tokens


def encode(tokenizer, text: str) -> np.ndarray:
    """text -> its n ids and end-of-text, (n + 1,). tiktoken's array spares a list of Python integers, whose
    making holds Python's lock and so keeps the other threads waiting."""
    if hasattr(tokenizer, "encode_to_numpy"):
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())  # the ids of encode_ordinary
    else:
        ids = tokenizer.encode_ordinary(text)
    return np.append(ids, tokenizer.eot_token).astype(token_dtype(tokenizer.n_vocab))


def encode_chunk(tokenizer, threshold: int, chunk: list):
    """-> [(split, bytes, tokens), ...] in order, the lowest hash seen, and the number of Bad documents. The
    threads' work."""
    encoded, lowest, n_bad = [], NO_HASH, 0

    def split_of(piece: bytes) -> str:
        nonlocal lowest
        number = int.from_bytes(hashlib.sha256(piece).digest()[:8], "big")
        lowest = min(lowest, number)
        return "val" if number < threshold else "train"

    for item, document in chunk:
        if isinstance(document, Bad):
            n_bad += 1
            continue
        if item.split != "hash":
            runs = [(item.split, [document])]
        elif item.running:
            runs = groupby(sections(io.BytesIO(document), PIECE), split_of)
        else:
            runs = [(split_of(document), [document])]
        for split, pieces in runs:
            text = b"".join(pieces)
            try:
                encoded.append((split, len(text), encode(tokenizer, text.decode())))
            except ValueError as error:  # tiktoken's, of a million spaces in a row
                why = f"{tokenizer.name} cannot encode a document of {len(text):,} bytes ({error})"
                raise UserError(f"{item.path}: {why}\nleave it out, or cut it") from None
    return encoded, lowest, n_bad


def encode_all(tokenizer, threshold: int, to_come: Iterable[list], workers: int) -> Iterator[tuple]:
    """encode_chunk of each in order, some chunks ahead but never more than memory allows."""
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:
        for chunk in to_come:
            pending.append(pool.submit(encode_chunk, tokenizer, threshold, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ------------------------------------------------------------------------------------------------ downloads


def download(repo: str, file: str, revision: str, folder: Path, expected: str = "") -> Path:
    """A file of a dataset on the Hub -> folder/FILE, whose SHA-256 is what is expected of it, or else what
    the Hub says. huggingface_hub resumes and retries by itself; what it gives up on raises UserError."""
    hub = optional("huggingface_hub")
    try:
        path = Path(hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_dir=folder))
        url = hub.hf_hub_url(repo, file, repo_type="dataset", revision=revision)
        expected = expected or hub.get_hf_file_metadata(url).etag
        if sha256(path) != expected:
            path.unlink()
            raise ValueError("the file arrived corrupted, or is another one: its SHA-256 differs")
    except Exception as error:  # whatever the Hub, the network, a proxy or the disk came up with
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "nothing is lost: the same command goes on\nHF_ENDPOINT names a mirror, HF_TOKEN your token"
        raise UserError(f"{repo}, {file}: {reason}\n{advice}") from None
    return path


class Source(NamedTuple):
    """Text on the Hub, in n_files of about so many GPT-2 tokens each, of which `default` are taken."""

    repo: str
    revision: str
    file: str  # with {} for its number
    n_files: int
    default: int
    tokens: int


C4, STORIES = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "TinyStoriesV2-GPT4-train.txt"
EDU = "sample/10BT/{:03d}_00000.parquet"
SOURCES = {
    "c4": Source("allenai/c4", C4, "en/c4-train.{:05d}-of-01024.json.gz", 1024, 48, 152_000_000),
    "tinystories": Source("roneneldan/TinyStories", "main", STORIES, 1, 1, 540_000_000),
    "fineweb_edu": Source("HuggingFaceFW/fineweb-edu", "main", EDU, 14, 10, 730_000_000),
}


# ----------------------------------------------------------------------------------------- tokens -> shards

SPLITS = ("train", "val")


def write_parts(path: Path, parts: list):
    """A file of these bytes, one part after the other."""
    try:
        write_whole(path, lambda file: file.writelines(parts))
    except OSError as error:
        again = "nothing is lost: once that is mended, the same command goes on"
        raise UserError(f"{path}: {error.strerror}\n{again}") from None


def write_batch(folder: Path, meta: dict, batch: dict[str, list]):
    """A shard of each split that has documents in the batch, and then what is done so far."""
    for split, documents in batch.items():
        if documents:
            shards = meta["splits"][split]["shards"]
            path = folder / f"{split}_{len(shards):05d}.bin"
            write_parts(path, documents)
            n_tokens = sum(len(tokens) for tokens in documents)
            shards.append({"file": path.name, "tokens": n_tokens, "sha256": sha256(path)})
            documents.clear()
    sync_folder(folder)
    write_json(folder / "unfinished.json", meta)


def write_shards(args, stages: list[list[Input]], meta: dict, tokenizer):
    """Read the stages from meta["progress"] on, and write their shards; after each batch meta goes to
    unfinished.json, from which a killed job goes on. A stage is files that are read as one stream: one's own
    all together, or one that is downloaded, before its stage, and deleted after it."""
    folder, progress, source = Path(args.out), meta["progress"], SOURCES.get(args.command)
    write_json(folder / "unfinished.json", meta)
    batch = {split: [] for split in SPLITS}
    # The whole is known of a source in tokens, of one's own files in bytes (if they are not compressed).
    unit = "tokens" if source else "bytes"
    sizes = [source.tokens if source else item.path.stat().st_size for stage in stages for item in stage]
    done = sum(meta["splits"][split][unit] for split in SPLITS)
    bar = tqdm(total=sum(sizes), initial=done, unit=f" {unit}", unit_scale=True, disable=None)
    for inputs in stages[progress["stage"] :]:
        if source:
            file = inputs[0].path.relative_to(folder / DOWNLOADS).as_posix()
            download(source.repo, file, source.revision, folder / DOWNLOADS)
        to_come = islice(chunks(inputs, args.field, args.skip_bad), progress["chunk"], None)
        results, n_tokens = encode_all(tokenizer, progress["threshold"], to_come, args.workers), 0
        for encoded, lowest, n_bad in results:
            for split, n_bytes, tokens in encoded:
                batch[split].append(tokens)
                n_tokens += len(tokens)
                entry = meta["splits"][split]
                entry["documents"] += 1
                entry["tokens"] += len(tokens)
                entry["bytes"] += n_bytes
                bar.update(len(tokens) if source else n_bytes)
            meta["skipped"] += n_bad
            progress["lowest"] = min(progress["lowest"], lowest)
            progress["chunk"] += 1
            if n_tokens >= args.shard_tokens:
                write_batch(folder, meta, batch)
                n_tokens = 0
        progress["stage"], progress["chunk"] = progress["stage"] + 1, 0
        write_batch(folder, meta, batch)
        if source:
            shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)
    bar.close()


def nothing_yet(threshold: int) -> dict:
    """What meta.json counts, before the first batch; progress says at which chunk of a stage one begins."""
    return {
        "splits": {split: {"documents": 0, "tokens": 0, "bytes": 0, "shards": []} for split in SPLITS},
        "skipped": 0,
        "progress": {"stage": 0, "chunk": 0, "threshold": threshold, "lowest": NO_HASH},
    }


def prepare(args, stages: list[list[Input]], source: str, identity):
    """Shards and meta.json in args.out. identity: whatever tells this job from others of the same source.
    Goes on where the same job stopped, and leaves it alone once it is done. A folder with other data,
    finished or not, is refused: what took long to make is never deleted."""
    folder = Path(args.out)
    finished, unfinished = folder / "meta.json", folder / "unfinished.json"
    decides = [source, identity, args.tokenizer, args.val_fraction, args.shard_tokens, args.field]
    job = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    meta = json_or_empty(finished)
    if meta.get("job") == job:
        return report(f"{folder} is complete", meta)
    tokenizer = get_tokenizer(args.tokenizer)
    meta = meta or json_or_empty(unfinished)
    if meta.get("job") == job:
        print(f"{folder}: going on after {meta['splits']['train']['tokens']:,} tokens")
    else:
        other = f"{folder} holds other data, or of other settings, files or Python"
        remedy = f"remove {folder}, or choose another folder with --out"
        check(not finished.exists() and not any(folder.glob("*.bin")), f"{other}\n{remedy}")
        meta = {"tokenizer": args.tokenizer, "vocab_size": tokenizer.n_vocab, "source": source, "job": job}
        meta.update(nothing_yet(threshold=int(args.val_fraction * 2**64)))
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(args, stages, meta, tokenizer)
    lowest = meta["progress"]["lowest"]
    if not meta["splits"]["val"]["documents"] and lowest < NO_HASH:
        # Too little text for chance: all again, and the document with the smallest hash goes.
        for path in folder.glob("*.bin"):
            path.unlink()
        meta.update(nothing_yet(threshold=lowest + 1))
        write_shards(args, stages, meta, tokenizer)
    for split in SPLITS:
        documents = meta["splits"][split]["documents"]
        more = f"remove {folder} and give more text, or validation text of its own with --val_input"
        check(documents > 0, f"{source}: no document is left for the {split} split\n{more}")
    shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)  # where it was killed after the last batch
    os.replace(unfinished, finished)
    sync_folder(folder)
    report(f"{folder} is ready", meta)


def report(what: str, meta: dict):
    print(f"{what}\n{meta['source']}; tokenizer {meta['tokenizer']}; {meta['skipped']} documents left out")
    for split, n in meta["splits"].items():
        print(f"{split}: {n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens")


# ------------------------------------------------------------------------------------------ evaluation sets


def fetch_eval_set(task: str, folder: Path):
    """-> folder/TASK/SPLIT.jsonl, a Hugging Face row a line."""
    known = TASKS[task]
    path = folder / task / f"{known.split}.jsonl"
    if task == "hellaswag":
        print("hellaswag: its WikiHow rows are under a copyright takedown claim of September 2026, for which")
        print("GitHub disabled the authors' repository. You fetch them for yourself; do not pass them on.")
    if path.exists():
        print(f"{path} is there")
        return
    fetched = download(known.repo, known.file, known.revision, folder / DOWNLOADS, known.sha256)
    if fetched.suffix == ".parquet":
        rows = optional("pyarrow.parquet").read_table(fetched).to_pylist()
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    else:
        lines = fetched.read_bytes().splitlines(keepends=True)
    found = f"{known.repo}, {known.file} has {len(lines)} rows"
    check(len(lines) == known.n_rows, f"{found}, not the {known.n_rows} of the task: it may have changed")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parts(path, lines)
    shutil.rmtree(folder / DOWNLOADS)
    print(f"{path}: {known.n_rows} rows", flush=True)


# ------------------------------------------------------------------------------------------------- commands


def stdlib_files() -> tuple[list[Input], str]:
    """The library's source without site-packages and test folders, and a SHA-256 over file names and text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    inputs, digest = [], hashlib.sha256()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        text = (root / name).read_bytes() if left_out.isdisjoint(name.split("/")) else b""
        if text:
            inputs.append(Input(root / name))
            digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return inputs, digest.hexdigest()


def text_inputs(names: list[str], split: str) -> list[Input]:
    """Files, and those below folders in the order of their names, but for empty ones of text."""
    inputs = []
    for path in map(Path, names):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if file.name.lower().endswith(FORMATS) and file.is_file()]
        texts = [file for file in found if file.suffix.lower() in (".txt", ".md", ".py")]
        empty = {file for file in texts if not file.stat().st_size}  # __init__.py, above all
        found = [file for file in found if file == path or file not in empty]
        formats = ", ".join(FORMATS)
        check(bool(found), f"{path}: no file that can be read\nfiles must hold text and end in {formats}")
        inputs += [Input(file, split) for file in found]
    return inputs


def web_stages(args) -> list[list[Input]]:
    """A stage for each file to fetch."""
    source, folder, n = SOURCES[args.command], Path(args.out, DOWNLOADS), args.shards
    check(1 <= n <= source.n_files, f"--shards {n}: {args.command} has 1 to {source.n_files} files")
    optional("huggingface_hub")  # what is missing is said at once
    if source.file.endswith(".parquet"):
        optional("pyarrow.parquet")
    paths = [folder / source.file.format(number) for number in range(n)]
    return [[Input(path, stories=path.suffix == ".txt")] for path in paths]


COMMANDS = {
    "stdlib": "the source of this Python's standard library, as bytes",
    "text": f"your own files ({' '.join(FORMATS)})",
    "c4": "C4 (English): 1024 files of 0.32 GB, each about 152M GPT-2 tokens",
    "tinystories": "TinyStories V2 (GPT-4): 2.2 GB, about 540M GPT-2 tokens",
    "fineweb_edu": "FineWeb-Edu's sample of 10B tokens: 14 files of 2.2 GB, each about 730M (needs pyarrow)",
    "icl": "the evaluation sets",
}


def parse(argv: list[str]):
    parser = ArgumentParser(prog="prepare_data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.set_defaults(field="text", skip_bad=True)
    for name, about in COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about)
        flag, out = sub.add_argument, None if name == "text" else f"data/{name}"
        flag("--out", default=out, required=not out, help="folder to write" + (f" ({out})" if out else ""))
        if name == "icl":
            flag("--tasks", default=",".join(DOWNLOADED), help="with commas between them (all)")
            continue
        if name == "text":
            flag("--input", nargs="+", required=True, metavar="FILE_OR_DIR", help="text")
            flag("--val_input", nargs="+", default=[], metavar="FILE_OR_DIR", help="all for validation")
            flag("--field", default="text", help="key or column of .jsonl and .parquet (text)")
            flag("--skip_bad", action="store_true", help="leave out and count the bad (of .txt, .md: 1 MB)")
        tokenizer, fraction = "bytes", 0.05
        if name in SOURCES:
            tokenizer, fraction, n = "gpt2", 0.002, SOURCES[name].default
            flag("--shards", type=int, default=n, help=f"files to take ({n})")
        flag("--tokenizer", default=tokenizer, help=f"bytes, gpt2, ..., hf:FOLDER ({tokenizer})")
        flag("--val_fraction", type=float, default=fraction, help=f"for validation ({fraction})")
        flag("--shard_tokens", type=int, default=10**8, help="about, of a batch (100 million)")
        flag("--workers", type=int, default=CORES, help="threads (as many as cores)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: list[str]):
    args = parse(argv)
    if args.command == "icl":
        tasks = args.tasks.split(",")
        for task in tasks:
            check(task in DOWNLOADED, f"unknown task: {task}\nknown: {', '.join(DOWNLOADED)}")
        for task in tasks:
            fetch_eval_set(task, Path(args.out))
        return
    check(0 < args.val_fraction < 1, "--val_fraction must lie between 0 and 1")
    check(args.shard_tokens > 0 and args.workers > 0, "--shard_tokens and --workers must be positive")
    if args.command == "stdlib":
        inputs, digest = stdlib_files()
        stages, identity = [inputs], None
        version = ".".join(map(str, sys.version_info[:3]))
        source = f"standard library of Python {version}, {len(inputs)} files, SHA-256 {digest}"
    elif args.command == "text":
        inputs = text_inputs(args.input, "train" if args.val_input else "hash")
        inputs += text_inputs(args.val_input, "val")
        places, stages, identity = args.input + args.val_input, [inputs], []
        for item in inputs:
            stat = item.path.stat()
            identity.append((str(item.path.absolute()), item.split, stat.st_size, stat.st_mtime_ns))
        source = f"{len(inputs)} files of {', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"
    else:
        stages = web_stages(args)
        source, identity = f"{args.command}, {len(stages)} files", [item.path.name for [item] in stages]
    prepare(args, stages, source, identity)


if __name__ == "__main__":
    cli(main)
