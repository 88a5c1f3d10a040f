"""How fast text becomes shards, and in how much memory. -> results/data.jsonl

    python -m experiments.data BOOKS SHAKESPEARE.txt    # BOOKS has the folders train and val
    python -m experiments.data --soak                   # 3 GB of made text: memory of writing, of reading

Speed is that of real text, with one worker and with two, beside tiktoken alone on the same text. The sides
take turns, and medians are reported.
"""

import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

import prepare_data
from config import ArgumentParser, cli
from experiments import ROOT, append
from model import check

ROUNDS, SOME, COPIES = 5, 60, 1000  # of each side; books of a round; of the made text


def seconds_of(function) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def counts(folder: Path) -> dict:
    splits = json.loads((folder / "meta.json").read_text())["splits"]
    for entry in splits.values():
        del entry["shards"]
    return splits


def speed(books: Path, shakespeare: Path, folder: Path) -> dict:
    some = sorted((books / "train").iterdir())[:SOME]
    flags = ["--val_input", str(books / "val"), "--tokenizer", "gpt2"]
    contents = [path.read_text(encoding="utf-8") for path in [*some, *sorted((books / "val").iterdir())]]
    n_bytes = sum(len(content.encode()) for content in contents)
    tokenizer = tiktoken.get_encoding("gpt2")

    def prepare(name: str, *args):
        shutil.rmtree(folder / name, ignore_errors=True)
        prepare_data.main(["text", *map(str, args), "--out", str(folder / name)])

    def tiktoken_alone(n_threads: int):  # lists of ids, discarded: neither arrays nor hashes nor files
        for i in range(0, len(contents), 16):
            tokenizer.encode_ordinary_batch(contents[i : i + 16], num_threads=n_threads)

    seconds = {"1 worker": [], "2 workers": [], "tiktoken, 1 thread": [], "tiktoken, 2 threads": []}
    for _ in range(ROUNDS):
        for n in (1, 2):
            ours = seconds_of(lambda: prepare("some", "--input", *some, *flags, "--workers", n))  # noqa: B023
            seconds[f"{n} worker{'s' * (n > 1)}"].append(ours)
            theirs = seconds_of(lambda: tiktoken_alone(n))  # noqa: B023
            seconds[f"tiktoken, {n} thread{'s' * (n > 1)}"].append(theirs)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = seconds_of(lambda: prepare("books", "--input", books / "train", *flags))
    play = seconds_of(lambda: prepare("shakespeare", "--input", shakespeare))
    return {
        "what": "prepare",
        "command": "python -m experiments.data BOOKS SHAKESPEARE.txt",
        "machine": f"{prepare_data.CORES} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"tiktoken {tiktoken.__version__}",
        "books": {
            "command": "python prepare_data.py text --input books/train --val_input books/val "
            "--tokenizer gpt2 --out data/books",
            "splits": counts(folder / "books"),
            "seconds": round(whole, 2),
        },
        "workers": {
            "text": f"{SOME} of the books and the validation books, {n_bytes} bytes; gpt2",
            "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
            "median_mb_per_second": {name: round(n_bytes / s / 1e6, 1) for name, s in median.items()},
            "ratio_2_workers_to_1": round(median["1 worker"] / median["2 workers"], 2),
            "ratio_tiktoken_2_to_1": round(median["tiktoken, 1 thread"] / median["tiktoken, 2 threads"], 2),
        },
        "tiny_shakespeare": {
            "command": "python prepare_data.py text --input input.txt --out data/shakespeare",
            "tokenizer": "bytes",
            "splits": counts(folder / "shakespeare"),
            "seconds": round(play, 2),
        },
    }


PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
WRITE = f"import sys, prepare_data; prepare_data.main(sys.argv[1:]); {PEAK}"
READ = f"""
import sys
from data import Shards
shards = Shards(sys.argv[1], "train", 1024)
order = shards.window_order(1, 0)
assert sum(len(shards.batch(order[i : i + 64])[0]) for i in range(0, len(order), 64)) == shards.n_windows
{PEAK}
"""


def peak_mb(code: str, *args) -> int:
    """Of a process of its own (Linux counts in KB)."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return int(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout.split()[-1])


def soak(folder: Path) -> dict:
    rng, sizes = random.Random(0), {}
    words = prepare_data.__doc__.split()
    block = "".join(" ".join(rng.choices(words, k=40)) + "\n\n" for _ in range(5000))  # about 1.2 MB
    lines = {"a.txt": f"%d\n\n{block}", "b.jsonl": f'{{"text": "%d {json.dumps(block)[1:]}}}\n'}
    for name, line in lines.items():
        with open(folder / name, "w") as file:
            file.writelines(line % i for i in range(COPIES))
        sizes[name] = (folder / name).stat().st_size
    out = folder / "out"
    writing = peak_mb(WRITE, "text", "--input", *(folder / name for name in lines), "--out", out)
    reading = peak_mb(READ, out)
    return {
        "what": "soak",
        "command": "python -m experiments.data --soak",
        "input_bytes": sizes,
        "tokenizer": "bytes",
        "tokens": [entry["tokens"] for entry in counts(out).values()],
        "write": {"peak_mb": writing},
        "read_every_window": {"peak_mb": reading},
    }


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.data", description=__doc__)
    parser.add_argument("text", nargs="*", type=Path, metavar="BOOKS SHAKESPEARE.txt")
    parser.add_argument("--soak", action="store_true", help="measure memory")
    args = parser.parse_args(argv)
    check(args.soak or len(args.text) == 2, "give two places of text, or --soak")
    with tempfile.TemporaryDirectory() as folder:
        record = soak(Path(folder)) if args.soak else speed(*args.text, Path(folder))
    append("data", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    cli(main)
