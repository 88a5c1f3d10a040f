"""Text -> token shards on disk (data.py reads them), and the evaluation sets.

    python prepare_data.py stdlib                                   # the source of this Python: no download
    python prepare_data.py text --input FILE_OR_DIR ... --tokenizer gpt2 --out data/NAME
    python prepare_data.py c4 --shards 48                           # or tinystories, fineweb_edu
    python prepare_data.py icl                                      # the evaluation sets

A document is a line of .jsonl, a row of .parquet, a .py file, or the text between lines <|endoftext|> of .txt
and .md. It goes to validation where the first 64 bits of its SHA-256 lie below --val_fraction of their range,
and stays there whatever is added later. Text of .txt and .md is cut at paragraphs into pieces, which are
hashed one by one; neighbours that go the same way stay joined. With --val_input nothing is hashed: that is
validation, and all of --input is training.

The unit of work is a group of files: one that is downloaded, or one's own up to about --shard_tokens. It
becomes a shard of each split, under another name until it is whole; unfinished.json lists the groups that are
done. So the same command, killed at any time, goes on and ends with the same bytes.

Downloads come from the Hugging Face Hub: HF_ENDPOINT names a mirror, HF_TOKEN is your token.
"""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from checkpoint import sync, write_json, write_whole
from config import ArgumentParser, cli, optional
from data import get_tokenizer, token_dtype
from eval_icl import DOWNLOADED, TASKS
from model import UserError, check

SPLITS = ("train", "val")
FORMATS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")  # C4's .json.gz has lines
RUNNING = (".txt", ".md")
SECTION = 1 << 20  # characters of running text that are read at a time
PIECE = 8192  # characters of running text that are hashed, and so split, as one, at most
PIECES = re.compile(rf"(?s).{{1,{PIECE - 2}}}\n\n|.{{1,{PIECE - 1}}}\s|.{{1,{PIECE}}}")  # of paragraphs
SEPARATOR = re.compile(r"(?m)^<\|endoftext\|>[ \t\r]*\n")
BROKEN = (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, AttributeError, RecursionError)
CHUNK = 1 << 18  # characters that a thread encodes at a time, or one document that is larger
DOWNLOADS = ".download"  # in the folder that is made: what has been fetched and not yet read
GOES_ON = "nothing is lost: once that is mended, the same command goes on"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------- files -> documents


def running_text(file) -> Iterator[str]:
    """The documents of a .txt or .md file; of a long one its parts, each of whole paragraphs or lines."""
    text = ""
    while block := file.read(SECTION):
        text += block
        if "<|endoftext|>" in text:
            *documents, text = SEPARATOR.split(text)
            yield from map(str.strip, documents)
        if len(text) >= SECTION:
            end = text.rfind("\n\n") + 2 if "\n\n" in text else text.rfind("\n") + 1 or len(text)
            yield text[:end]
            text = text[end:]
    text = text.removesuffix("<|endoftext|>")
    if text:
        yield text


def documents(path: Path, file, key: str) -> Iterator[str]:
    """Those of a file, as they stand there (in .jsonl as JSON). Raises an error of BROKEN where it is."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        table = optional("pyarrow.parquet").ParquetFile(file)
        if key not in table.schema_arrow.names:
            raise KeyError(key)
        for batch in table.iter_batches(batch_size=64, columns=[key], use_threads=False):
            yield from batch.column(0).to_pylist()
        return
    binary = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    # utf-8-sig takes a byte order mark away; invalid bytes become surrogates, which encode() refuses.
    text = io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="\n")
    if name.endswith(".py"):
        yield text.read()
    else:
        yield from running_text(text) if path.suffix.lower() in RUNNING else text


def read(path: Path, args, counts: dict, bar) -> Iterator[str]:
    """The texts of a file. What is left out goes to counts; the bar follows the place in the file."""
    with open(path, "rb") as file:
        to_come, position = documents(path, file, args.field), 0
        for number in count(1):
            try:
                text = next(to_come)
                if path.name.lower().endswith((".jsonl", ".gz")):
                    text = json.loads(text)[args.field] if text.strip() else ""
                text.encode()
            except StopIteration:
                return
            except BROKEN as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                problem = f"{path}: document {number} cannot be read ({reason})"
                if not args.skip_bad:
                    form = f"files are UTF-8, rows have their text under {args.field!r} (--field)"
                    advice = "mend it, or leave out and count the bad with --skip_bad"
                    raise UserError(f"{problem}\n{form}\n{advice}") from None
                if not counts["skipped"]:
                    tqdm.write(f"left out, and counted with others: {problem}", file=sys.stderr)
                counts["skipped"] += 1
                continue
            if text:
                yield text
            else:
                counts["empty"] += 1
            bar.update(file.tell() - position)
            position = file.tell()


def chunks(group: list[tuple], args, counts: dict, bar) -> Iterator[list[tuple]]:
    """[(path, split, text), ...] of documents in order, CHUNK characters together or one that is larger."""
    chunk, size = [], 0
    for path, split in group:
        for text in read(path, args, counts, bar):
            chunk.append((path, split, text))
            size += len(text)
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
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


def encode_chunk(tokenizer, val_fraction: float, chunk: list[tuple]) -> list[tuple]:
    """-> [(split, bytes, tokens), ...] in order. The threads' work."""

    def split_of(text: str) -> str:
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return "val" if number < int(val_fraction * 2**64) else "train"

    encoded = []
    for path, whole_split, document in chunk:
        long_text = len(document) > PIECE and path.suffix.lower() in RUNNING
        pieces = PIECES.findall(document) if long_text else [document]
        for split, stretch in [(whole_split, pieces)] if whole_split else groupby(pieces, split_of):
            text = "".join(stretch)
            try:
                encoded.append((split, len(text.encode()), encode(tokenizer, text)))
            except ValueError as error:  # tiktoken's, of a million spaces in a row
                raise UserError(f"{path}: {tokenizer.name} cannot encode this text\n{error}") from None
    return encoded


def encode_all(tokenizer, val_fraction: float, to_come: Iterable[list], workers: int) -> Iterator[tuple]:
    """What encode_chunk makes of each chunk, in order; some chunks ahead, never more than memory allows."""
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:
        for chunk in to_come:
            pending.append(pool.submit(encode_chunk, tokenizer, val_fraction, chunk))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


# ------------------------------------------------------------------------------ downloads, evaluation sets


class Source(NamedTuple):
    """Text on the Hub, in n_files of about so many bytes each, of which `default` are taken."""

    repo: str
    revision: str
    file: str  # with {} for its number
    n_files: int
    default: int
    n_bytes: int


C4, STORIES = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "TinyStoriesV2-GPT4-train.txt"
EDU = "sample/10BT/{:03d}_00000.parquet"
SOURCES = {
    "c4": Source("allenai/c4", C4, "en/c4-train.{:05d}-of-01024.json.gz", 1024, 48, 320_000_000),
    "tinystories": Source("roneneldan/TinyStories", "main", STORIES, 1, 1, 2_230_000_000),
    "fineweb_edu": Source("HuggingFaceFW/fineweb-edu", "main", EDU, 14, 10, 2_150_000_000),
}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(repo: str, file: str, revision: str, folder: Path, expected: str = "") -> Path:
    """A file of a dataset on the Hub -> folder/FILE, whose SHA-256 is what is expected of it, or else what
    the Hub says. huggingface_hub resumes and retries by itself; what it gives up on raises UserError."""
    hub = optional("huggingface_hub")
    try:
        path = Path(hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_dir=folder))
        url = hub.hf_hub_url(repo, file, repo_type="dataset", revision=revision)
        if sha256(path) != (expected or hub.get_hf_file_metadata(url).etag):
            path.unlink()
            raise ValueError("the file arrived corrupted, or is another one: its SHA-256 differs")
    except Exception as error:  # whatever the Hub, the network, a proxy or the disk came up with
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        message = f"{repo}, {file}: {reason}\n{GOES_ON}\nHF_ENDPOINT names a mirror, HF_TOKEN your token"
        raise UserError(message) from None
    return path


def fetch_eval_set(name: str, folder: Path):
    """-> folder/TASK/SPLIT.jsonl, a Hugging Face row a line."""
    task, path = TASKS[name], folder / name / f"{TASKS[name].split}.jsonl"
    if name == "hellaswag":
        print("hellaswag: its WikiHow rows are under a copyright takedown claim of September 2026, for which")
        print("GitHub disabled the authors' repository. You fetch them for yourself; do not pass them on.")
    if path.exists():
        print(f"{path} is there")
        return
    file = download(task.repo, task.file, task.revision, folder / DOWNLOADS, task.sha256)
    if file.suffix == ".parquet":
        rows = optional("pyarrow.parquet").read_table(file).to_pylist()
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    else:
        lines = file.read_bytes().splitlines(keepends=True)
    n, expected = len(lines), task.n_rows
    check(n == expected, f"{task.repo}, {task.file} has {n} rows, not {expected}: it may have changed")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, b"".join(lines))
    shutil.rmtree(folder / DOWNLOADS)
    print(f"{path}: {n} rows", flush=True)


# ----------------------------------------------------------------------------------------- tokens -> shards


def write_group(group: list[tuple], number: int, args, tokenizer, bar) -> dict:
    """Write a shard of each split from these files -> what each holds, and counts of what is left out."""
    result = {"skipped": 0, "empty": 0}
    digests = {split: hashlib.sha256() for split in SPLITS}
    paths = {split: Path(args.out, f"{split}_{number:05d}.bin") for split in SPLITS}
    # The process is part of the name: two at once, by mistake, cannot write into one file.
    temporary = {split: paths[split].with_suffix(f".{os.getpid()}.tmp") for split in SPLITS}
    for split in SPLITS:
        result[split] = {"file": paths[split].name, "documents": 0, "tokens": 0, "bytes": 0}
    try:
        with open(temporary["train"], "wb") as train, open(temporary["val"], "wb") as val:
            to_come = chunks(group, args, result, bar)
            for split, n_bytes, tokens in encode_all(tokenizer, args.val_fraction, to_come, args.workers):
                (train if split == "train" else val).write(tokens)
                digests[split].update(tokens)
                result[split]["documents"] += 1
                result[split]["tokens"] += len(tokens)
                result[split]["bytes"] += n_bytes
            for file in (train, val):
                file.flush()
                os.fsync(file.fileno())
        for split in SPLITS:
            result[split]["sha256"] = digests[split].hexdigest()
            os.replace(temporary[split], paths[split])
        sync(Path(args.out))
    finally:
        for split in SPLITS:
            temporary[split].unlink(missing_ok=True)
    return result


def json_or_empty(path: Path) -> dict:
    """{} where there is none, or none that can be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def write_groups(args, groups: list[list[tuple]], job: str, tokenizer) -> list[dict]:
    """What write_group says of each group. Goes on after those that unfinished.json lists. A folder with
    other data is refused: what took long to make is never deleted."""
    folder, source, unfinished = Path(args.out), SOURCES.get(args.command), Path(args.out, "unfinished.json")
    state = json_or_empty(unfinished)
    if state.get("job") != job or "groups" not in state:
        if (folder / "meta.json").exists() or any(folder.glob("*.bin")):
            other = f"{folder} holds other data, or of other settings, files or Python"
            raise UserError(f"{other}\nremove {folder}, or choose another folder with --out")
        state = {"job": job, "groups": []}
    done = state["groups"]
    if done:
        print(f"{folder}: going on after {len(done)} of {len(groups)} shards")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*_?????.*.tmp"):  # of a process that was killed
        path.unlink()
    write_json(unfinished, state)  # before the first shard, which tells whose it is
    sizes = [source.n_bytes if source else sum(path.stat().st_size for path, _ in group) for group in groups]
    begun = sum(sizes[: len(done)])
    with tqdm(total=sum(sizes), initial=begun, unit="B", unit_scale=True, disable=None) as bar:
        for number in range(len(done), len(groups)):
            if source:
                download(source.repo, source.file.format(number), source.revision, folder / DOWNLOADS)
            done.append(write_group(groups[number], number, args, tokenizer, bar))
            bar.update(sum(sizes[: number + 1]) - bar.n)
            if source:
                shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)
            write_json(unfinished, state)
    return done


def describe(done: list[dict]) -> dict:
    """What meta.json says of the splits, and of what was left out."""
    meta = {key: sum(group[key] for group in done) for key in ("skipped", "empty")} | {"splits": {}}
    for split in SPLITS:
        shards = [group[split] for group in done]
        entry = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
        entry["shards"] = [{key: shard[key] for key in ("file", "tokens", "sha256")} for shard in shards]
        meta["splits"][split] = entry
    return meta


def prepare(args, groups: list[list[tuple]], source: str, identity):
    """Shards of the groups of (path, split), "" where hashes choose the split, and meta.json in args.out.
    identity: whatever tells them from others of the same source."""
    folder = Path(args.out)
    decides = [source, identity, args.tokenizer, args.val_fraction, args.shard_tokens, args.field]
    job = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    meta = json_or_empty(folder / "meta.json")
    if meta.get("job") != job:
        tokenizer = get_tokenizer(args.tokenizer)
        meta = {"tokenizer": args.tokenizer, "vocab_size": tokenizer.n_vocab, "source": source, "job": job}
        meta |= describe(write_groups(args, groups, job, tokenizer))
        for split in SPLITS:
            if not meta["splits"][split]["documents"]:
                raise UserError(
                    f"no document is left for the {split} split\nremove {folder} and give more text, another "
                    f"--val_fraction than {args.val_fraction}, or validation text of its own with --val_input"
                )
        if args.tokenizer.startswith("hf:"):
            from hf.llama import copy_tokenizer

            copy_tokenizer(args.tokenizer[3:], folder)
        write_json(folder / "meta.json", meta)
    (folder / "unfinished.json").unlink(missing_ok=True)
    print(f"{folder} is complete\n{meta['source']}; tokenizer {meta['tokenizer']}")
    print(f"left out: {meta['skipped']} bad documents, {meta.get('empty', 0)} empty ones")
    for split, n in meta["splits"].items():
        print(f"{split}: {n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens")
    n_train, n_val = (meta["splits"][split]["bytes"] for split in SPLITS)
    share = n_val / (n_train + n_val)
    if not args.val_input and not args.val_fraction / 2 < share < args.val_fraction * 2:
        gone = f"{share:.1%} of the text went to validation, not {args.val_fraction:.1%}"
        print(f"warning: {gone}: it is short or repeats itself (see --val_input)", file=sys.stderr)


# ------------------------------------------------------------------------------------------------- commands


def stdlib_groups(args):
    """The library's source without site-packages and test folders, known by a SHA-256 over names and text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    group, digest = [], hashlib.sha256()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        text = (root / name).read_bytes() if left_out.isdisjoint(name.split("/")) else b""
        if text:
            group.append((root / name, ""))
            digest.update(f"{name}\0{len(text)}\0".encode() + text)
    version = ".".join(map(str, sys.version_info[:3]))
    source = f"standard library of Python {version}, {len(group)} files, SHA-256 {digest.hexdigest()}"
    return [group], source, None


def text_files(names: list[str], split: str) -> list[tuple]:
    """Files, and those below folders in the order of their names, for a split ("": as their hashes say)."""
    files = []
    for path in map(Path, names):
        below = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
        usable = [file for file in below if file.name.lower().endswith(FORMATS)]
        check(bool(usable), f"{path}: no file that can be read\nfiles must end in {', '.join(FORMATS)}")
        if len(usable) < len(below):
            print(f"{path}: {len(below) - len(usable)} files of other formats left out", file=sys.stderr)
        files += [(file, split) for file in usable]
    return files


def text_groups(args):
    """One's own files, as many in a group as have --shard_tokens together, or one that has more."""
    files = text_files(args.input, "train" if args.val_input else "")
    val_files = text_files(args.val_input, "val")
    for path in {path.resolve() for path, _ in files} & {path.resolve() for path, _ in val_files}:
        raise UserError(f"{path} is in both --input and --val_input\nvalidate on text that is not trained on")
    if any(path.suffix.lower() == ".parquet" for path, _ in files + val_files):
        optional("pyarrow.parquet")  # what is missing is said at once
    groups, size, identity = [], 0, []
    largest = args.shard_tokens * (1 if args.tokenizer == "bytes" else 4)  # about 4 bytes of text a token
    for path, split in files + val_files:
        stat = path.stat()
        if not groups or size + stat.st_size > largest:
            groups.append([])
            size = 0
        groups[-1].append((path, split))
        size += stat.st_size
        identity.append((str(path.absolute()), split, stat.st_size, stat.st_mtime_ns))
    places = args.input + args.val_input
    source = f"{len(identity)} files of {', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"
    return groups, source, identity


def web_groups(args):
    """A group for each file to fetch."""
    source, folder, n = SOURCES[args.command], Path(args.out, DOWNLOADS), args.shards
    check(1 <= n <= source.n_files, f"--shards {n}: {args.command} has 1 to {source.n_files} files")
    optional("huggingface_hub")
    if source.file.endswith(".parquet"):
        optional("pyarrow.parquet")
    paths = [folder / source.file.format(number) for number in range(n)]
    return [[(path, "")] for path in paths], f"{args.command}, {n} files", [path.name for path in paths]


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
    parser.set_defaults(field="text", skip_bad=True, shard_tokens=10**8, val_input=[])
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
            flag("--shard_tokens", type=int, default=10**8, help="about, of files together (100 million)")
        tokenizer, fraction = "bytes", 0.05
        if name in SOURCES:
            tokenizer, fraction, n = "gpt2", 0.002, SOURCES[name].default
            flag("--shards", type=int, default=n, help=f"files to take ({n})")
        flag("--tokenizer", default=tokenizer, help=f"bytes, gpt2, ..., hf:FOLDER ({tokenizer})")
        flag("--val_fraction", type=float, default=fraction, help=f"for validation ({fraction})")
        flag("--workers", type=int, default=CORES, help="threads (as many as cores)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def run(args):
    if args.command == "icl":
        names = [name.strip() for name in args.tasks.split(",")]
        for name in names:
            check(name in DOWNLOADED, f"unknown task {name!r}\nknown: {', '.join(DOWNLOADED)}")
        for name in names:
            fetch_eval_set(name, Path(args.out))
        return
    check(0 < args.val_fraction < 1, "--val_fraction must lie between 0 and 1")
    check(args.shard_tokens > 0 and args.workers > 0, "--shard_tokens and --workers must be positive")
    make = {"stdlib": stdlib_groups, "text": text_groups}.get(args.command, web_groups)
    prepare(args, *make(args))


def main(argv: list[str]):
    args = parse(argv)
    try:
        run(args)
    except OSError as error:  # of a full disk it is not said which file had no room
        raise UserError(f"{error.filename or args.out}: {error.strerror or error}\n{GOES_ON}") from None


if __name__ == "__main__":
    cli(main)
