"""Real text, one worker against two, beside tiktoken alone on the same text: -> results/prepare_data.json.

    python results/prepare_data_speed.py BOOKS SHAKESPEARE.txt    # BOOKS has the folders train and val

The sides take turns, and medians are reported."""

import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
from config import cli  # noqa: E402

ROUNDS, SOME = 5, 60  # books of a round


def timed(function) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main(argv: list[str]):
    books, shakespeare = map(Path, argv)
    folder = Path(tempfile.mkdtemp())
    paths = sorted((books / "train").iterdir())[:SOME]
    val = ["--val_input", str(books / "val"), "--tokenizer", "gpt2"]
    enc = tiktoken.get_encoding("gpt2")
    contents = [path.read_text(encoding="utf-8") for path in [*paths, *sorted((books / "val").iterdir())]]
    size = sum(len(content.encode()) for content in contents)

    def prepared(name: str, args: list[str]) -> float:
        shutil.rmtree(folder / name, ignore_errors=True)
        return timed(lambda: prepare_data.main([*args, "--out", str(folder / name)]))

    def alone(threads: int) -> float:  # lists of ids, discarded: neither arrays nor hashes nor files
        return timed(lambda: [enc.encode_ordinary_batch(contents[i:i + 16], num_threads=threads) and None
                              for i in range(0, len(contents), 16)])

    seconds = {"1 worker": [], "2 workers": [], "tiktoken, 1 thread": [], "tiktoken, 2 threads": []}
    for _ in range(ROUNDS):
        for workers in (1, 2):
            seconds[f"{workers} worker{'s'[:workers - 1]}"].append(
                prepared("some", ["text", "--input", *map(str, paths), *val, "--workers", str(workers)]))
            seconds[f"tiktoken, {workers} thread{'s'[:workers - 1]}"].append(alone(workers))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = prepared("books", ["text", "--input", str(books / "train"), *val])
    meta = json.loads((folder / "books" / "meta.json").read_text())
    play = prepared("shakespeare", ["text", "--input", str(shakespeare)])
    shakespeare_meta = json.loads((folder / "shakespeare" / "meta.json").read_text())
    result = {
        "command": "python results/prepare_data_speed.py BOOKS SHAKESPEARE.txt",
        "machine": f"{prepare_data.CORES} cores, {platform.machine()}, Python {platform.python_version()}, "
                   f"tiktoken {tiktoken.__version__}",
        "books": {
            "command": "python prepare_data.py text --input books/train --val_input books/val "
                       "--tokenizer gpt2 --out data/books",
            "splits": {name: {key: entry[key] for key in ("documents", "bytes", "tokens")}
                       for name, entry in meta["splits"].items()},
            "seconds": round(whole, 2),
        },
        "workers": {
            "text": f"{SOME} of the books and the validation books, {size} bytes; gpt2",
            "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
            "median_mb_per_second": {name: round(size / value / 1e6, 1) for name, value in median.items()},
            "ratio_2_workers_to_1": round(median["1 worker"] / median["2 workers"], 2),
            "ratio_tiktoken_2_to_1": round(median["tiktoken, 1 thread"] / median["tiktoken, 2 threads"], 2),
        },
        "tiny_shakespeare": {
            "command": "python prepare_data.py text --input input.txt --out data/shakespeare",
            "tokenizer": "bytes",
            "splits": {name: {key: entry[key] for key in ("documents", "bytes", "tokens")}
                       for name, entry in shakespeare_meta["splits"].items()},
            "seconds": round(play, 2),
        },
    }
    (ROOT / "results" / "prepare_data.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    cli(main)
