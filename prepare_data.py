"""Text -> token shards on disk (data.py reads them), and the evaluation sets.

    python prepare_data.py stdlib               # the source of this Python's library, as bytes: no download
    python prepare_data.py text --input FILE_OR_DIR ... --tokenizer gpt2 --out data/NAME
    python prepare_data.py c4 --shards 48       # 1024 files of 0.32 GB, each about 152M GPT-2 tokens
    python prepare_data.py tinystories          # version 2, by GPT-4: 2.2 GB, about 540M tokens
    python prepare_data.py fineweb_edu          # of 10B tokens 14 files of 2.2 GB, each about 730M
    python prepare_data.py icl                  # the evaluation sets

A document is a line of .jsonl, a row of .parquet, a .py file, or the text between lines <|endoftext|> of .txt
and .md. It goes to validation where the first 64 bits of its SHA-256 lie below --val_fraction of their range,
and stays there whatever is added later. A .txt or .md file of more than PIECE characters is cut at paragraphs
into pieces of at most so many, which are hashed one by one; neighbours that go the same way stay joined. With
--val_input nothing is hashed: that is validation, and all of --input is training.

The unit of work is a group of files: one that is downloaded, or one's own up to about SHARD_TOKENS. It
becomes a shard of each split, under another name until it is whole; unfinished.json tells of the groups that
are done, and in the end becomes meta.json. So the same command, killed at any time, goes on and ends with the
same bytes.

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
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from checkpoint import read_json, sync, write_json, write_whole
from config import ArgumentParser, cli, optional
from data import get_tokenizer, token_dtype
from eval_icl import TASKS
from model import UserError, check

SPLITS = ("train", "val")
FORMATS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")  # C4's .json.gz has lines
RUNNING = (".txt", ".md")
SHARD_TOKENS = 10**8  # of one's own files that become one shard, about
SECTION = 1 << 20  # characters of running text that are read at a time
PIECE = 8192  # characters of running text that are hashed, and so split, as one, at most
PIECES = re.compile(rf"(?s).{{1,{PIECE - 2}}}\n\n|.{{1,{PIECE - 1}}}\s|.{{1,{PIECE}}}")  # of paragraphs
SEPARATOR = re.compile(r"(?m)^<\|endoftext\|>[ \t\r]*\n")
CHUNK = 1 << 18  # characters that a thread encodes at a time, or one document that is larger
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORK = ".unfinished"  # in the folder that is made: downloads, and shards until they are whole
GOES_ON = "nothing is lost: once that is mended, the same command goes on"


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


def documents(path: Path, file, field: str) -> Iterator[str]:
    """Those of a file, as they stand there (in .jsonl as JSON)."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        table = optional("pyarrow.parquet").ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise KeyError(field)
        for batch in table.iter_batches(batch_size=64, columns=[field]):
            yield from batch.column(0).to_pylist()
        return
    binary = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    # utf-8-sig takes a byte order mark away; invalid bytes become surrogates, which encode() refuses.
    text = io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="\n")
    if name.endswith(".py"):
        yield text.read()
    else:
        yield from running_text(text) if path.suffix.lower() in RUNNING else text


def read(path: Path, args, meta: dict, bar) -> Iterator[str]:
    """The texts of a file. meta counts what is left out; the bar follows the place in the file."""
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
            except Exception as error:  # of gzip, JSON, Arrow, or of a text that is none
                if isinstance(error, OSError) and error.errno:  # the disk's
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                problem = f"{path}: document {number} cannot be read ({reason})"
                check(
                    args.skip_bad,
                    f"{problem}\nfiles are UTF-8, rows have their text under {args.field!r} (--field)\n"
                    "mend it, or leave out and count the bad with --skip_bad",
                )
                if not meta["skipped"]:
                    tqdm.write(f"left out, and counted with others: {problem}", file=sys.stderr)
                meta["skipped"] += 1
                continue
            if text:
                yield text
            else:
                meta["empty"] += 1
            bar.update(file.tell() - position)
            position = file.tell()


# -------------------------------------------------------------------------------------- documents -> tokens


def split_of(text: str, val_fraction: float) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "val" if number < int(val_fraction * 2**64) else "train"


def encode(chunk: list[tuple], tokenizer, val_fraction: float) -> list[tuple]:
    """A chunk -> [(split, bytes of text, its tokens and end-of-text), ...] in order. The threads' work."""
    encoded, dtype = [], token_dtype(tokenizer.n_vocab)
    for path, given, document in chunk:
        long = path.suffix.lower() in RUNNING and len(document) > PIECE
        pieces = PIECES.findall(document) if long else [document]
        splits = [(given or split_of(piece, val_fraction), piece) for piece in pieces]
        for split, stretch in groupby(splits, itemgetter(0)):
            text = "".join(piece for _, piece in stretch)
            try:
                if hasattr(tokenizer, "encode_to_numpy"):  # making a list would keep other threads waiting
                    ids = tokenizer.encode_to_numpy(text, disallowed_special=())
                else:
                    ids = tokenizer.encode_ordinary(text)
            except ValueError as error:  # tiktoken's, of a million spaces in a row
                raise UserError(f"{path}: {tokenizer.name} cannot encode this text\n{error}") from None
            tokens = np.append(ids, tokenizer.eot_token).astype(dtype)
            encoded.append((split, len(text.encode()), tokens))
    return encoded


def encode_all(files: list[tuple], args, meta: dict, tokenizer, bar) -> Iterator[tuple]:
    """What encode makes of the documents of files, in order. Threads are some chunks ahead, never more than
    memory allows; a chunk is CHUNK characters of documents, or one document that is larger."""
    pending, chunk, size = deque(), [], 0
    with ThreadPoolExecutor(CORES) as pool:
        for path, split in files:
            for document in read(path, args, meta, bar):
                chunk.append((path, split, document))
                size += len(document)
                if size >= CHUNK:
                    pending.append(pool.submit(encode, chunk, tokenizer, args.val_fraction))
                    chunk, size = [], 0
                if len(pending) > 2 * CORES:
                    yield from pending.popleft().result()
        pending.append(pool.submit(encode, chunk, tokenizer, args.val_fraction))
        for future in pending:
            yield from future.result()


# ------------------------------------------------------------------------------ downloads, evaluation sets

C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
# Repository on the Hub, file with {} for its number, revision, number of files, how many are taken.
SOURCES = {
    "c4": ("allenai/c4", "en/c4-train.{:05d}-of-01024.json.gz", C4, 1024, 48),
    "tinystories": ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt", "main", 1, 1),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/{:03d}_00000.parquet", "main", 14, 10),
}


# Of the evaluation sets: repository, file, revision. What the Hub has converted is on a branch of its own.
CONVERTED = "refs/convert/parquet"
HELLASWAG = "218ec52e09a7e7462a5400043bb9a69a41d06b76"  # a revision that has all rows
LAMBADA = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"  # SHA-256 of OpenAI's file
EVAL_SETS = {
    "hellaswag": ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet", HELLASWAG),
    "lambada_openai": ("EleutherAI/lambada_openai", "data/lambada_test.jsonl", "main"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy/test/0000.parquet", CONVERTED),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge/test/0000.parquet", CONVERTED),
    "commonsense_qa": ("tau/commonsense_qa", "default/validation/0000.parquet", CONVERTED),
    "piqa": ("baber/piqa", "default/validation/0000.parquet", CONVERTED),
    "openbookqa": ("allenai/openbookqa", "main/test/0000.parquet", CONVERTED),
    "sciq": ("allenai/sciq", "default/test/0000.parquet", CONVERTED),
    "winogrande": ("allenai/winogrande", "winogrande_xl/validation/0000.parquet", CONVERTED),
}


def download(repo: str, file: str, revision: str, folder: Path) -> Path:
    """A file of a dataset on the Hub -> folder/FILE. huggingface_hub resumes and retries by itself."""
    fetch = optional("huggingface_hub").hf_hub_download
    try:
        return Path(fetch(repo, file, repo_type="dataset", revision=revision, local_dir=folder))
    except Exception as error:  # whatever the Hub, the network, a proxy or the disk came up with
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "HF_ENDPOINT names a mirror, HF_TOKEN your token"
        raise UserError(f"{repo}, {file}: {reason}\n{GOES_ON}\n{advice}") from None


def fetch_eval_set(name: str, folder: Path):
    """-> folder/TASK/SPLIT.jsonl, a Hugging Face row a line."""
    task, path = TASKS[name], folder / name / f"{TASKS[name].split}.jsonl"
    if name == "hellaswag":
        print("hellaswag: its WikiHow rows are under a copyright takedown claim of September 2026.")
        print("You fetch them for yourself; do not pass them on.")
    if not path.exists():
        file = download(*EVAL_SETS[name], folder / WORK)
        data = file.read_bytes()
        if file.suffix == ".parquet":
            rows = optional("pyarrow.parquet").read_table(file).to_pylist()
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        n = len(data.splitlines())
        official = name != "lambada_openai" or hashlib.sha256(data).hexdigest() == LAMBADA
        check(n == task.n_rows and official, f"{name}: {n} rows that are not the {task.n_rows} official ones")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
        shutil.rmtree(folder / WORK)
    print(f"{path}: {task.n_rows} rows", flush=True)


# ----------------------------------------------------------------------------------------- tokens -> shards


def state_of(folder: Path, job: str) -> dict:
    """meta.json, or until it is there unfinished.json, of this job; {} where there is no data. A folder with
    other data is refused: what took long to make is never deleted."""
    path = folder / "meta.json"
    if not path.exists():
        path = folder / "unfinished.json"
        if not any(folder.glob("*.bin")):
            return {}
    state = read_json(path, f"remove {folder}, or choose another with --out")
    check(
        state.get("job") == job and "splits" in state,
        f"{folder} holds other data, or of other settings, files or Python\n"
        f"remove {folder}, or choose another folder with --out",
    )
    return state


def write_group(files: list[tuple], number: int, args, meta: dict, tokenizer, bar):
    """Write a shard of each split from these files, and tell meta of them."""
    digests = {split: hashlib.sha256() for split in SPLITS}
    with TemporaryDirectory(dir=Path(args.out, WORK)) as temporary:
        paths = {split: Path(temporary, f"{split}_{number:05d}.bin") for split in SPLITS}
        with open(paths["train"], "wb") as train, open(paths["val"], "wb") as val:
            for split, n_bytes, tokens in encode_all(files, args, meta, tokenizer, bar):
                (train if split == "train" else val).write(tokens)
                digests[split].update(tokens)
                meta["splits"][split]["documents"] += 1
                meta["splits"][split]["tokens"] += len(tokens)
                meta["splits"][split]["bytes"] += n_bytes
        for split, path in paths.items():
            n_tokens = path.stat().st_size // token_dtype(tokenizer.n_vocab).itemsize
            shard = {"file": path.name, "tokens": n_tokens, "sha256": digests[split].hexdigest()}
            meta["splits"][split]["shards"].append(shard)
            sync(path)
            os.replace(path, Path(args.out, path.name))
    sync(Path(args.out))


def write_groups(groups: list[list[tuple]], args, meta: dict, tokenizer):
    """Write the shards that are missing."""
    folder, n_done = Path(args.out), len(meta["splits"]["train"]["shards"])
    if n_done:
        print(f"{folder}: going on after {n_done} of {len(groups)} shards")
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:
        for number in range(n_done, len(groups)):
            (folder / WORK).mkdir(exist_ok=True)
            to_come = groups[number:]
            if args.command in SOURCES:
                repo, file, revision, *_ = SOURCES[args.command]
                download(repo, file.format(number), revision, folder / WORK)
                to_come = groups[number : number + 1] * (len(groups) - number)  # as if all were of this size
            bar.total = bar.n + sum(path.stat().st_size for group in to_come for path, _ in group)
            write_group(groups[number], number, args, meta, tokenizer, bar)
            shutil.rmtree(folder / WORK)
            write_json(folder / "unfinished.json", meta)


def prepare(args, groups: list[list[tuple]], source: str, identity):
    """Shards of the groups of (path, split), "" where hashes choose the split, and meta.json in args.out.
    identity: whatever tells them from others of the same source."""
    folder, unfinished = Path(args.out), Path(args.out, "unfinished.json")
    decides = [source, identity, args.tokenizer, args.val_fraction, SHARD_TOKENS, args.field]
    job = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    tokenizer, meta = get_tokenizer(args.tokenizer), state_of(folder, job)
    if any(path.suffix.lower() == ".parquet" for group in groups for path, _ in group):
        optional("pyarrow.parquet")  # what is missing is said at once
    if not meta:
        meta = {"tokenizer": args.tokenizer, "vocab_size": tokenizer.n_vocab, "source": source}
        meta |= {"job": job, "skipped": 0, "empty": 0, "splits": {}}
        for split in SPLITS:
            meta["splits"][split] = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(unfinished, meta)  # before the first shard, which it makes ours
    if unfinished.exists():
        write_groups(groups, args, meta, tokenizer)
    train, val = (meta["splits"][split]["bytes"] for split in SPLITS)
    share = val / max(1, train + val)
    reason = f"{share:.1%} of the text went to validation"
    check(
        0 < share < 1,
        f"{reason}\nremove {folder} and give more text, another --val_fraction,\n"
        "or validation text of its own with --val_input",
    )
    if unfinished.exists():
        if args.tokenizer.startswith("hf:"):
            from hf.llama import copy_tokenizer

            copy_tokenizer(args.tokenizer[3:], folder)
        write_json(folder / "meta.json", meta)
        unfinished.unlink()
    print(f"{folder} is complete\n{source}; tokenizer {args.tokenizer}")
    print(f"left out: {meta['skipped']} bad documents, {meta.get('empty', 0)} empty ones")
    for split, n in meta["splits"].items():
        print(f"{split}: {n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens")
    if not args.val_input and not args.val_fraction / 2 < share < args.val_fraction * 2:
        print(f"warning: {reason}: it is short or repeats itself (see --val_input)", file=sys.stderr)


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


def text_groups(args):
    """One's own files, those of folders in the order of their names: as many in a group as have SHARD_TOKENS
    together, or one that has more."""
    files, groups, size, identity, splits = [], [], 0, [], {}
    named = [(Path(name), "train" if args.val_input else "") for name in args.input]
    named += [(Path(name), "val") for name in args.val_input]
    for path, split in named:
        below = [file for file in sorted(path.rglob("*")) if file.is_file()] or [path]
        usable = [(file, split) for file in below if file.name.lower().endswith(FORMATS)]
        formats = ", ".join(FORMATS)
        check(bool(usable), f"{path}: no file that can be read\nfiles must end in {formats}")
        n_others = len(below) - len(usable)
        if n_others:
            print(f"{path}: {n_others} files of other formats left out", file=sys.stderr)
        files += usable
    largest = SHARD_TOKENS * (1 if args.tokenizer == "bytes" else 4)  # about 4 bytes of text a token
    for path, split in files:
        if splits.setdefault(path.resolve(), split) != split:
            raise UserError(f"{path} is in both --input and --val_input\nvalidate on text of its own")
        stat = path.stat()
        if not groups or size + stat.st_size > largest:
            groups.append([])
            size = 0
        groups[-1].append((path, split))
        size += stat.st_size
        identity.append((str(path.absolute()), split, stat.st_size, stat.st_mtime_ns))
    places = args.input + args.val_input
    source = f"{len(files)} files of {', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"
    return groups, source, identity


def web_groups(args):
    """A group for each file to fetch."""
    n = args.shards
    _, file, _, n_files, _ = SOURCES[args.command]
    check(1 <= n <= n_files, f"--shards {n}: {args.command} has 1 to {n_files} files")
    optional("huggingface_hub")  # what is missing is said at once
    paths = [Path(args.out, WORK, file.format(number)) for number in range(n)]
    groups = [[(path, "")] for path in paths]
    return groups, f"{args.command}, {n} files", [path.name for path in paths]


def parse(argv: list[str]):
    parser = ArgumentParser(prog="prepare_data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.set_defaults(field="text", skip_bad=True, val_input=[])  # where a command has no such flag
    for name in ("stdlib", "text", *SOURCES, "icl"):
        flag = commands.add_parser(name).add_argument
        flag("--out", default=f"data/{name}", help="folder to write (%(default)s)")
        if name == "icl":
            flag("--tasks", default=",".join(EVAL_SETS), help="with commas between them (all)")
            continue
        tokenizer, fraction = ("gpt2", 0.002) if name in SOURCES else ("bytes", 0.05)
        flag("--tokenizer", default=tokenizer, help="bytes, gpt2, ..., hf:FOLDER (%(default)s)")
        flag("--val_fraction", type=float, default=fraction, help="for validation (%(default)s)")
        if name in SOURCES:
            *_, default = SOURCES[name]
            flag("--shards", type=int, default=default, help="files to take (%(default)s)")
        if name == "text":
            many = {"nargs": "+", "metavar": "FILE_OR_DIR"}
            flag("--input", required=True, help="text", **many)
            flag("--val_input", default=[], help="all of it for validation", **many)
            flag("--field", default="text", help="key or column of the text (%(default)s)")
            flag("--skip_bad", action="store_true", help="leave out and count the bad")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: list[str]):
    args = parse(argv)
    try:
        if args.command == "icl":
            names = [name.strip() for name in args.tasks.split(",")]
            for name in names:
                known = ", ".join(EVAL_SETS)
                check(name in EVAL_SETS, f"unknown task {name!r}\nknown: {known}")
            for name in names:
                fetch_eval_set(name, Path(args.out))
        else:
            check(0 < args.val_fraction < 1, "--val_fraction must lie between 0 and 1")
            own = {"stdlib": stdlib_groups, "text": text_groups}
            prepare(args, *own.get(args.command, web_groups)(args))
    except OSError as error:  # of a full disk it is not said which file had no room
        raise UserError(f"{error.filename or args.out}: {error.strerror or error}\n{GOES_ON}") from None


if __name__ == "__main__":
    cli(main)
