"""prepare_data.py: what it promises about text, shards, downloads and windows, on real files and servers."""

import gzip
import hashlib
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import tiktoken
import torch

import prepare_data
from model import UserError
from prepare_data import Shards, documents, get_tokenizer

ROOT = Path(prepare_data.__file__).parent


def start(*args, before="pass", **kwargs) -> subprocess.Popen:
    """prepare_data.py in a process of its own; `before` is Python that runs first."""
    code = f"import sys, prepare_data, config\n{before}\nconfig.cli(prepare_data.main)"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def fails(process: subprocess.Popen) -> str:
    """Its error message: at most three lines on stderr, no traceback, exit status 2."""
    _, stderr = process.communicate(timeout=300)
    lines = stderr.strip().splitlines()
    assert process.returncode == 2 and lines[0].startswith("error: ") and len(lines) <= 3, stderr
    return stderr


RNG = random.Random(0)
LETTERS = "abcdefghijklmnopqrstuvwxyzéß中😀"
VOCABULARY = ["".join(RNG.choices(LETTERS, k=RNG.randint(1, 9))) for _ in range(500)]


def words(n: int, seed: int = 0) -> str:
    """About n characters of paragraphs with some letters beyond ASCII."""
    rng = random.Random(seed)
    parts, size = [], 0
    while size < n:
        parts.append(" ".join(rng.choices(VOCABULARY, k=rng.randint(5, 80))) + "\n\n")
        size += len(parts[-1])
    return "".join(parts)


def write_jsonl(path: Path, texts, **more) -> Path:
    data = "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def prepare(out: Path, *inputs, **flags) -> Path:
    args = [f"--{name}={value}" for name, value in flags.items() if value is not True]
    args += [f"--{name}" for name, value in flags.items() if value is True]
    prepare_data.main(["text", "--input", *map(str, inputs), "--out", str(out), *args])
    return out


def texts(folder: Path, split: str) -> list[str]:
    return [get_tokenizer("bytes").decode(document.tolist()) for document in documents(folder, split)]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list[str]]:
    """400 documents as lines of JSON, and those documents."""
    rng = random.Random(1)
    found = [words(rng.randint(20, 3000), seed) for seed in range(400)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", found), found


# ----------------------------------------------------------------------------------------------- tokenizers

TRICKY = ["", "a", "\r\n \t\n\n", "<|endoftext|>", "\0\x7f\x80\ufeff\U0010ffff", "e\u0301中😀" * 99,
          "\n" * 1000, "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))]


@pytest.mark.parametrize("text", TRICKY)
def test_bytes_tokenizer_is_a_tiktoken_encoding_that_gives_exactly_the_bytes(text):
    bytes_ = get_tokenizer("bytes")
    assert isinstance(bytes_, tiktoken.Encoding)
    assert (bytes_.name, bytes_.n_vocab, bytes_.eot_token) == ("bytes", 257, 256)
    ids = bytes_.encode_ordinary(text)
    assert ids == list(text.encode())
    assert bytes_.decode(ids) == text and bytes_.decode_bytes(ids) == text.encode()
    assert prepare_data.encode(bytes_, text).tolist() == ids + [256]


def test_bytes_tokenizer_takes_linear_time():
    bytes_, seconds = get_tokenizer("bytes"), []
    for n in (1 << 20, 1 << 23):
        begun = time.perf_counter()
        bytes_.encode_ordinary("a" * n)
        seconds.append(time.perf_counter() - begun)
    assert seconds[1] < 40 * seconds[0]  # 8 times the text; were it quadratic, 64 times the time


def test_unknown_tokenizer_and_vocabulary_that_cannot_be_downloaded(tmp_path, corpus):
    with pytest.raises(UserError, match="unknown tokenizer 'gpt3'\nknown: bytes, .*gpt2"):
        get_tokenizer("gpt3")
    offline = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    args = "text", "--input", corpus[0], "--out", tmp_path / "out", "--tokenizer", "gpt2"
    error = fails(start(*args, env=offline))
    assert "TIKTOKEN_CACHE_DIR" in error and "--tokenizer bytes" in error


def test_wide_vocabularies_are_written_as_uint32(tmp_path, corpus, monkeypatch):
    wide = tiktoken.Encoding("wide", pat_str=r"(?s:.{1,64})", special_tokens={"<|endoftext|>": 70000},
                             mergeable_ranks={bytes([i]): 69000 + i for i in range(256)})
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: wide)
    out = prepare(tmp_path / "out", corpus[0])
    x, _ = Shards(out, "train", 64).batch([0])
    assert x.min() >= 69000 and shards(out)["train_00000.bin"][2:4] == b"\x01\x00"
    assert sorted(map(wide.decode, [*documents(out, "train"), *documents(out, "val")])) == sorted(corpus[1])


# ------------------------------------------------------------------------------------------------ the split

def is_val(text: str, fraction: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2 ** 64 < fraction


def test_a_document_goes_to_validation_by_its_hash_whatever_is_added_later(tmp_path, corpus):
    path, found = corpus
    small = prepare(tmp_path / "small", write_jsonl(tmp_path / "b.jsonl", found[:250]), val_fraction=0.1)
    large = prepare(tmp_path / "large", path, val_fraction=0.1)
    assert texts(large, "val") == [text for text in found if is_val(text, 0.1)]
    assert texts(large, "train") == [text for text in found if not is_val(text, 0.1)]
    assert set(texts(small, "val")) <= set(texts(large, "val"))
    meta = json.loads((large / "meta.json").read_text())
    val = [text.encode() for text in found if is_val(text, 0.1)]
    assert meta["tokenizer"] == "bytes" and meta["vocab_size"] == 257 and meta["skipped"] == 0
    assert meta["splits"]["val"] == {
        "documents": len(val), "bytes": sum(map(len, val)), "tokens": sum(map(len, val)) + len(val),
        "shards": [{"file": "val_00000.bin", "tokens": sum(map(len, val)) + len(val),
                    "sha256": hashlib.sha256(shards(large)["val_00000.bin"]).hexdigest()}]}


def test_one_book_has_both_splits_and_nothing_of_it_is_lost(tmp_path):
    text = words(2_500_000)
    (tmp_path / "book.txt").write_text(text, newline="")
    out = prepare(tmp_path / "out", tmp_path / "book.txt")
    train, val = texts(out, "train"), texts(out, "val")
    assert 0.02 < sum(map(len, val)) / len(text) < 0.09
    at, rest = 0, {"train": train[:], "val": val[:]}
    while at < len(text):  # the documents of both splits, taken in turn, are the book
        split = next(split for split in rest if rest[split] and text.startswith(rest[split][0], at))
        at += len(rest[split].pop(0))
    assert not rest["train"] and not rest["val"]
    assert all(document.endswith("\n\n") for document in train + val)  # cut at paragraphs


def test_running_text_without_any_place_to_cut_keeps_its_characters_whole(tmp_path):
    text = "中😀é" * 200_000
    (tmp_path / "line.md").write_text(text)
    out = prepare(tmp_path / "out", tmp_path / "line.md")
    assert sum(map(len, texts(out, "train") + texts(out, "val"))) == len(text)


def test_too_little_text_for_chance_still_has_validation_text(tmp_path):
    poems = write_jsonl(tmp_path / "poems.jsonl", [f"poem {i}" for i in range(3)])
    out = prepare(tmp_path / "out", poems, val_fraction=1e-9)
    smallest = min((f"poem {i}" for i in range(3)), key=lambda t: hashlib.sha256(t.encode()).digest())
    assert texts(out, "val") == [smallest] and len(texts(out, "train")) == 2
    assert (out / "meta.json").exists() and not (out / "progress.json").exists()
    with pytest.raises(UserError, match="no document is left for the train split\n.*--val_input"):
        prepare(tmp_path / "one", write_jsonl(tmp_path / "one.jsonl", ["alone"]))


def test_val_input_is_the_validation_split(tmp_path, corpus):
    (tmp_path / "val.md").write_text("held out")
    out = prepare(tmp_path / "out", corpus[0], val_input=tmp_path / "val.md")
    assert texts(out, "val") == ["held out"] and texts(out, "train") == corpus[1]


# -------------------------------------------------------------------------------------------------- sources

@pytest.fixture(scope="module")
def stdlib(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "stdlib"
    prepare_data.main(["stdlib", "--out", str(out)])
    return out


def test_stdlib_is_the_library_by_whole_files(stdlib, capsys):
    meta = json.loads((stdlib / "meta.json").read_text())
    version = re.escape(".".join(map(str, sys.version_info[:3])))
    n_files = int(re.match(rf"standard library of Python {version}, (\d+) files, SHA-256 [0-9a-f]{{64}}$",
                           meta["source"])[1])
    train, val = texts(stdlib, "train"), texts(stdlib, "val")
    assert len(train) + len(val) == n_files and len(val) > 5
    for module in (json, gzip, random):  # each is one document, whole
        assert Path(module.__file__).read_bytes().decode() in train + val
    ours = {Path(tiktoken.__file__).read_text(), Path(__file__).read_text()}
    assert not ours & {*train, *val} and not any("class TestBasicOps" in text for text in train + val)
    before, begun = shards(stdlib), time.perf_counter()
    prepare_data.main(["stdlib", "--out", str(stdlib)])
    assert time.perf_counter() - begun < 2 and shards(stdlib) == before
    assert "is complete" in (printed := capsys.readouterr().out) and meta["source"] in printed


def test_a_python_without_library_source_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no library source .*\n.*prepare_data.py text --input"):
        prepare_data.main(["stdlib", "--out", str(tmp_path / "out")])


def test_every_format_gives_the_same_documents(tmp_path, corpus):
    _, found = corpus
    paths = [tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "code", "parquet")]
    write_jsonl(paths[0], found)
    write_jsonl(paths[1], found)
    paths[2].mkdir()
    for number, text in enumerate(found):
        (paths[2] / f"{number:03d}.py").write_text(text, newline="")
    try:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"id": range(400), "text": found}), tmp_path / "a.parquet",
                                    row_group_size=100)
        paths[3] = tmp_path / "a.parquet"
    except ImportError:
        paths.pop()
    outs = [shards(prepare(tmp_path / f"out{i}", path, shard_tokens=100_000)) for i, path in enumerate(paths)]
    assert len(outs[0]) > 5 and all(out == outs[0] for out in outs)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        prepare(tmp_path / "out", tmp_path / "a.parquet")


def test_another_field_and_a_folder_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"body": "{name} {i}"}}\n\n' for i in range(50)))
    (tmp_path / "notes.pdf").write_text("not for us")
    out = prepare(tmp_path / "out", tmp_path, field="body", val_input=tmp_path / "a.jsonl")
    assert texts(out, "train") == [f"{name} {i}" for name in ("a.jsonl", "b.jsonl") for i in range(50)]


# -------------------------------------------------------------------------------------------- what goes wrong

BAD = {  # file name: its content, what is said of it, documents that are left with --skip_bad
    "empty.txt": (b"", "an empty document", 0),
    "empty.jsonl": (b"", "no document in it", 0),
    "emptytext.jsonl": (b'{"text": ""}\n{"text": "good"}\n', "an empty document", 1),
    "json.jsonl": (b'{"text": "good"}\n{"text": "cut of\n{"text": "fine"}', "line 2 is broken JSON", 2),
    "deep.jsonl": (b"[" * 100_000 + b'\n{"text": "good"}', "line 1 is broken JSON", 1),
    "field.jsonl": (b'{"text": "good"}\n{"body": "x"}\n', "line 2 has no text under 'text'", 1),
    "list.jsonl": (b'["text"]\n{"text": "good"}\n', "line 1 has no text", 1),
    "number.jsonl": (b'{"text": 3}\n{"text": "good"}\n', "line 1 has no text", 1),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n{"text": "good"}\n', "line 1 is invalid UTF-8", 1),
    "latin1.jsonl": (b'{"text": "caf\xe9"}\n{"text": "good"}\n', "line 1 is invalid UTF-8", 1),
    "latin1.txt": (b"caf\xe9 au lait", "invalid UTF-8, bytes e9", 0),
    "latin1.py": (b"# caf\xe9", "invalid UTF-8, bytes e9", 0),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "good"}\n' * 9)[:-9], "broken gzip", 9),
    "no.jsonl.gz": (b"not gzip at all", "broken gzip", 0),
    "long.jsonl": (b'{"text": "' + b"x" * (9 << 20) + b'"}\n{"text": "good"}\n', "longer than 8 MB", 1),
    "long.py": (b"#" * (9 << 20), "longer than 8 MB", 0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_an_error_or_a_counted_skip(tmp_path, capfd, name):
    content, what, n_left = BAD[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "val.md").write_text("validation")
    (tmp_path / "good.md").write_text("training")
    args = tmp_path / "out", tmp_path / "good.md", tmp_path / name
    with pytest.raises(UserError) as error:
        prepare(*args, val_input=tmp_path / "val.md")
    assert name in str(error.value) and what in str(error.value) and "--skip_bad" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3 and not shards(tmp_path / "out")
    out = prepare(*args, val_input=tmp_path / "val.md", skip_bad=True)
    assert json.loads((out / "meta.json").read_text())["skipped"] == 1
    assert len(texts(out, "train")) == 1 + n_left and what in capfd.readouterr().err


def test_broken_parquet_and_missing_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"] * 9}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="no column 'text' .*--field.* body"):
        prepare(tmp_path / "out", tmp_path / "a.parquet")
    with pytest.raises(UserError, match="broken parquet"):
        prepare(tmp_path / "out2", tmp_path / "b.parquet")


@pytest.mark.parametrize("args, said", [
    (["nowhere"], "unknown"),
    (["texts"], "texts"),
    (["text", "--input", "nowhere.txt", "--out", "OUT"], "nowhere.txt"),
    (["text", "--input", "OUT/a.pdf", "--out", "OUT"], ".jsonl"),
    (["text", "--input", "OUT", "--out", "OUT"], "no file"),
    (["text", "--input", "x.txt"], "--out"),
    (["text", "--input", "x.txt", "--out", "OUT", "--val_fraktion=1"], "--val_fraction"),
    (["stdlib", "--out", "OUT", "--val_fraction=2"], "between 0 and 1"),
    (["c4", "--out", "OUT", "--shards=2000"], "1024"),
    (["icl", "--out", "OUT", "--tasks=hellaswag,hellswag"], "hellswag"),
])
def test_wrong_arguments_end_in_a_short_error(tmp_path, args, said):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=re.escape(said) if said != "unknown" else "invalid choice") as error:
        prepare_data.main([arg.replace("OUT", str(tmp_path)) for arg in args])
    assert len(str(error.value).splitlines()) <= 3


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path, corpus):
    out = prepare(tmp_path / "out", corpus[0])
    before = shards(out)
    with pytest.raises(UserError, match="holds other data.*\nremove"):
        prepare(out, corpus[0], val_fraction=0.2)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nbroken')
    other = tmp_path / "other"
    with pytest.raises(UserError, match="broken JSON"):
        prepare(other, tmp_path / "bad.jsonl")
    prepare(other, corpus[0])  # nothing had come of it
    assert shards(out) == before
    (out / "train_00000.bin").unlink()  # but what has lost a shard is made again
    prepare(out, corpus[0])
    assert shards(out) == before


def test_a_full_disk_ends_in_a_short_error_and_the_same_command_goes_on(tmp_path, corpus):
    whole = prepare(tmp_path / "whole", corpus[0], shard_tokens=10 ** 5)
    args = "text", "--input", corpus[0], "--out", tmp_path / "out", "--shard_tokens", 10 ** 5
    no_room = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    assert "the same command goes on" in fails(start(*args, before=no_room))
    assert not shards(tmp_path / "out") and not (tmp_path / "out" / "meta.json").exists()
    assert start(*args).wait(300) == 0
    assert shards(tmp_path / "out") == shards(whole)


# ------------------------------------------------------------------------------ determinism, kills and memory

@pytest.fixture(scope="module")
def long_text(tmp_path_factory) -> Path:
    """15 MB in three files of two kinds."""
    folder = tmp_path_factory.mktemp("long")
    block = words(1_000_000)
    (folder / "a.txt").write_text("".join(f"{i}\n\n{block}" for i in range(4)))
    write_jsonl(folder / "b.jsonl.gz", [f"{i} {block[i * 999:i * 999 + i * 20]}" for i in range(500)])
    (folder / "c.md").write_text("".join(f"{i * i}\n\n{block}" for i in range(5)))
    return folder


def test_output_does_not_depend_on_the_number_of_workers(tmp_path, long_text):
    one, five = (prepare(tmp_path / str(n), long_text, workers=n, shard_tokens=2 ** 20) for n in (1, 5))
    assert shards(one) == shards(five) and len(shards(one)) > 10
    assert (one / "meta.json").read_text() == (five / "meta.json").read_text()
    entries = json.loads((one / "meta.json").read_text())["splits"]["train"]["shards"]
    sizes = [entry["tokens"] for entry in entries]
    assert set(sizes[:-1]) == {2 ** 20} and 0 < sizes[-1] <= 2 ** 20


def killed_at_sync(n: int, *args):
    """Run prepare_data.py, every chunk noted, up to the n-th time that it asks the disk to confirm something:
    there SIGKILL ends it."""
    process = start(*args, before=f"""
import itertools, os, signal
calls, sync, prepare_data.JOURNAL_SECONDS = itertools.count(1), os.fsync, -1
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == {n} else sync(file)
""")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL


def test_killed_at_any_time_it_goes_on_and_ends_with_the_same_bytes(tmp_path, long_text):
    whole, out = prepare(tmp_path / "whole", long_text, shard_tokens=2 ** 20), tmp_path / "out"
    args = "text", "--input", long_text, "--out", out, "--shard_tokens", 2 ** 20
    ends = []  # how far each run came
    for n in (5, 16, 18, 21):
        killed_at_sync(n, *args)
        for name, data in shards(out).items():  # what has its final name is whole
            assert data == shards(whole)[name]
        with pytest.raises(UserError, match="interrupted"):
            Shards(out, "train", 64)
        ends.append(json.loads((out / "progress.json").read_text())["splits"]["train"]["tokens"])
    assert 0 <= ends[0] < ends[1] < ends[2] < ends[3]
    process = start(*args)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on" in stdout, stderr
    assert shards(out) == shards(whole) and {path.suffix for path in out.iterdir()} == {".bin", ".json"}
    assert (out / "meta.json").read_text() == (whole / "meta.json").read_text()


def test_unfinished_data_is_not_given_up_and_its_damage_is_noticed(tmp_path, long_text, corpus):
    killed_at_sync(9, "text", "--input", long_text, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="holds other data"):
        prepare(tmp_path / "out", corpus[0])
    (tmp_path / "out" / "train_00000.bin.tmp").write_bytes(b"")
    with pytest.raises(UserError, match="progress.json"):
        prepare(tmp_path / "out", long_text)


PEAK = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))"


def peak_mb(*args, before="pass") -> float:
    process = start(*args, before=f"{PEAK}; {before}")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return int(re.search(r"VmHWM:\s+(\d+) kB", stdout)[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_input(tmp_path, long_text):
    block = words(1_000_000)
    with open(tmp_path / "large.jsonl", "w") as file:
        for i in range(4):  # documents near the largest size allowed
            file.write(json.dumps({"text": f"{i} " + block * 3}) + "\n")
    with open(tmp_path / "large.txt", "w") as file:
        for i in range(15):
            file.write(f"{i}\n\n{block}")
    small = peak_mb("text", "--input", long_text / "a.txt", "--out", tmp_path / "small")
    large = peak_mb("text", "--input", tmp_path, "--out", tmp_path / "large", "--workers", 4)
    assert large < 500 and large < small + 200, (small, large)


@pytest.mark.soak
def test_soak_several_gb_in_500_mb(tmp_path):
    """3 GB of made text become shards, and every window is read: -> results/prepare_data_soak.json."""
    block, sizes = words(1_000_000), {}
    lines = {"a.txt": f"%d\n\n{block}", "b.jsonl": f'{{"text": "%d {json.dumps(block)[1:]}}}\n'}
    for name, line in lines.items():
        with open(tmp_path / name, "w") as file:
            file.writelines(line % i for i in range(1000))
        sizes[name] = (tmp_path / name).stat().st_size
    writing = peak_mb("text", "--input", tmp_path, "--out", tmp_path / "out")
    sweep = ("data = prepare_data.Shards(sys.argv[1], 'train', 1024); order = data.window_order(1, 0); "
             "count = sum(len(data.batch(order[i:i + 64])[0]) for i in range(0, len(order), 64)); "
             "assert count == data.n_windows; prepare_data.main = lambda argv: None")
    reading = peak_mb(tmp_path / "out", before=sweep)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    result = {"command": "python -m pytest -m soak tests/test_prepare_data.py", "input_bytes": sizes,
              "tokenizer": "bytes", "tokens": [meta["splits"][name]["tokens"] for name in ("train", "val")],
              "write": {"peak_mb": round(writing)}, "read_every_window": {"peak_mb": round(reading)}}
    (ROOT / "results" / "prepare_data_soak.json").write_text(json.dumps(result, indent=1) + "\n")
    assert sum(sizes.values()) > 2.5e9 and writing < 500 and reading < 500, result


# -------------------------------------------------------------------------------------------------- windows

@pytest.fixture(scope="module")
def prepared(tmp_path_factory, corpus) -> Path:
    """Several train shards whose last windows are cut off."""
    return prepare(tmp_path_factory.mktemp("prepared") / "data", corpus[0], shard_tokens=50_001)


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_every_window_is_served_once_and_y_is_one_token_ahead(prepared):
    T, data = 100, Shards(prepared, "train", 100)
    expected = []
    for shard in sorted(prepared.glob("train_*.bin")):
        tokens = np.fromfile(shard, "<u2").astype(np.int64)
        expected += [tokens[at:at + T + 1] for at in range(0, len(tokens) - T, T)]
    assert data.n_windows == len(expected) > 7000
    x, y = data.batch(range(data.n_windows))
    assert x.shape == y.shape == (len(expected), T) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(torch.cat([x, y[:, -1:]], dim=1), torch.from_numpy(np.stack(expected)))
    shuffled = [5, 0, data.n_windows - 1, 5]
    assert torch.equal(data.batch(shuffled)[0], x[shuffled])
    for outside in (-1, data.n_windows):
        with pytest.raises(IndexError):
            data.batch([outside])
    assert (data.tokenizer, data.vocab_size) == ("bytes", 257)
    assert data.n_tokens - data.n_bytes == data.meta["splits"]["train"]["documents"]


def test_window_order_is_a_permutation_and_a_pure_function_of_seed_and_epoch(prepared):
    data, again = Shards(prepared, "train", 64), Shards(prepared, "train", 64)
    order = data.window_order(3, 1)
    assert sorted(order) == list(range(data.n_windows))
    assert (order == again.window_order(3, 1)).all()
    assert not (order == data.window_order(3, 2)).all() and not (order == data.window_order(4, 1)).all()


def test_documents_run_across_shards(tmp_path, corpus):
    out = prepare(tmp_path / "out", corpus[0], shard_tokens=10_000)
    assert len(list(out.glob("train_*"))) > 70
    assert texts(out, "train") == [text for text in corpus[1] if not is_val(text, 0.05)]


@pytest.mark.parametrize("folder, command", [
    ("data/c4", "python prepare_data.py c4\n"), ("data/stdlib", "python prepare_data.py stdlib\n"),
    ("/nowhere/c4", "python prepare_data.py c4 --out /nowhere/c4\n"),
    ("data/mine", "python prepare_data.py text --input FILE_OR_DIR --out data/mine\n")])
def test_missing_data_names_the_command_that_makes_it(folder, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        Shards(folder, "train", 64)
    assert (str(error.value) + "\n").endswith(command)


def test_damage_is_noticed(prepared, tmp_path):
    def flip(folder):
        data = bytearray((folder / "train_00001.bin").read_bytes())
        data[1000] ^= 1
        (folder / "train_00001.bin").write_bytes(data)

    def lower_vocabulary(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": 200}))

    damages = [
        (flip, "train_00001.bin is not what was prepared"),
        (lambda folder: (folder / "train_00001.bin").unlink(), "train_00001.bin is missing"),
        (lambda folder: os.truncate(folder / "train_00001.bin", 4000), "missing or has not 100002 bytes"),
        (lambda folder: (folder / "meta.json").write_text("{"), "does not describe"),
        (lambda folder: (folder / "meta.json").write_text('{"tokenizer": "bytes"}'), "does not describe"),
        (lower_vocabulary, "a token over 199"),
    ]
    for number, (damage, said) in enumerate(damages):
        folder = copy(prepared, tmp_path / str(number))
        damage(folder)
        with pytest.raises(UserError, match=said) as error:
            data = Shards(folder, "train", 64)
            data.batch(range(data.n_windows))
        assert "prepare the data again" in str(error.value)
    with pytest.raises(UserError, match="no window of 1000000 . 1"):
        Shards(prepared, "val", 1_000_000)


def test_hashes_are_checked_once_and_remembered(prepared, tmp_path, monkeypatch):
    folder, hashed = copy(prepared, tmp_path / "a"), []
    real = prepare_data.file_sha256
    monkeypatch.setattr(prepare_data, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    (folder / "verified.json").unlink(missing_ok=True)
    names = [path.name for path in sorted(folder.glob("train_*.bin"))]
    Shards(folder, "train", 64, verify=False)
    assert hashed == []
    Shards(folder, "train", 64)
    Shards(folder, "train", 128)
    assert hashed == names
    Shards(folder, "val", 64)
    assert hashed == names + ["val_00000.bin"]
    os.utime(folder / names[1], (0, 0))
    Shards(folder, "train", 64)
    assert hashed == names + ["val_00000.bin", names[1]]
    (folder / "verified.json").unlink()
    (folder / "verified.json").mkdir()  # the memory cannot be written, as in a read-only folder
    Shards(folder, "val", 64)
    Shards(folder, "val", 64)
    assert hashed[-2:] == ["val_00000.bin"] * 2


# ------------------------------------------------------------------------------------------------- downloads

class Server:
    """A real HTTP server. `files` maps paths to contents; `faults` are met once each, in turn, by requests:
    429, 503: that status; 'stall': silence after half; 'cut': the end after half; 'corrupt': a flipped byte;
    'no range': the whole file whatever was asked. `hashes`: is a SHA-256 stated, with a redirect?"""

    def __init__(self):
        self.files, self.faults, self.log, self.hashes, self.rows = {}, [], [], True, {}
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", length=None, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            def do_GET(self):
                url, asked = urlsplit(self.path), self.headers.get("Range")
                if url.path in ("/rows", "/splits"):
                    return server.answer_rows(self, url)
                if url.path not in server.files and not url.path.startswith("/storage"):
                    server.log.append((404, asked))
                    return self.answer(404)
                if server.hashes and not url.path.startswith("/storage"):
                    digest = hashlib.sha256(server.files[url.path]).hexdigest()
                    return self.answer(302, Location=f"/storage{url.path}", X_Linked_ETag=f'"{digest}"')
                body = server.files[url.path.removeprefix("/storage")]
                fault = server.faults.pop(0) if server.faults else ""
                server.log.append((fault, asked))
                if isinstance(fault, int):
                    return self.answer(fault, Retry_After="0")
                first, headers, status = 0, {}, 200
                if asked and fault != "no range":
                    first, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
                    if first >= len(body):
                        return self.answer(416)
                    headers["Content_Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                rest = body[first:]
                if fault == "corrupt":
                    rest = rest[:-20] + bytes([rest[-20] ^ 1]) + rest[-19:]
                if fault in ("stall", "cut"):
                    self.answer(status, rest[:len(rest) // 2], len(rest), **headers)
                    if fault == "stall":
                        time.sleep(1)
                    self.close_connection = True
                    return None
                return self.answer(status, rest, **headers)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer_rows(self, handler, url):
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        fault = self.faults.pop(0) if self.faults else ""
        self.log.append((fault, query.get("offset", url.path)))
        rows = self.rows[query["dataset"]]
        if url.path == "/splits":
            answer = {"splits": [{"config": "plain_text", "split": "validation"}]}
        else:
            offset, length = int(query["offset"]), int(query["length"])
            page = [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(rows)]
            answer = {"rows": page[offset:offset + length], "num_rows_total": len(rows)}
        if isinstance(fault, int):
            return handler.answer(fault)
        return handler.answer(200, b"<html>" if fault == "corrupt" else json.dumps(answer).encode())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare_data, "PAUSE", 0.01)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def c4(server, corpus) -> list[str]:
    """Two files as C4 has them."""
    prefix = "/datasets/allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/"
    for number in range(2):
        lines = "".join(json.dumps({"text": text, "url": "http://x"}) + "\n" for text in corpus[1][number::2])
        server.files[f"{prefix}c4-train.{number:05d}-of-01024.json.gz"] = gzip.compress(lines.encode())
    return corpus[1][0::2] + corpus[1][1::2]


def fetch(server: Server, out: Path, command="c4", shards=2) -> Path:
    prepare_data.main([command, "--shards", str(shards), "--out", str(out), "--tokenizer", "bytes",
                       "--timeout=0.3", "--base_url", server.url, "--val_fraction=0.05"])
    return out


def test_c4_comes_whole_through_every_fault(tmp_path, server, c4, capsys):
    server.faults = [429, "cut", 503, "cut", "stall", "", "cut", "no range"]
    out = fetch(server, tmp_path / "out")
    assert sorted(texts(out, "train") + texts(out, "val")) == sorted(c4)
    assert texts(out, "train") == [text for text in c4 if not is_val(text, 0.05)]
    asked = [int(header.removeprefix("bytes=").removesuffix("-")) for _, header in server.log if header]
    assert len(asked) == 5 and asked[:4] == sorted(asked[:4]) and len(set(asked[:4])) == 3  # it goes on
    assert not (out / "download").exists() and not server.faults
    printed = capsys.readouterr().out
    assert "0.6 GB to download" in printed and "disk: " in printed and "time: " in printed


@pytest.mark.parametrize("hashes", [True, False])
def test_a_corrupted_download_is_noticed_and_never_tokenised(tmp_path, server, c4, hashes):
    server.hashes = hashes  # without a stated hash, gzip's own checksum tells
    server.faults = ["corrupt"]
    out = fetch(server, tmp_path / "once")
    assert sorted(texts(out, "train") + texts(out, "val")) == sorted(c4)
    server.faults = ["corrupt"] * 20
    with pytest.raises(UserError, match="arrived corrupted, 6 times in a row"):
        fetch(server, tmp_path / "always")
    assert [path.name for path in (tmp_path / "always").rglob("*") if path.is_file()] == ["progress.json"]


def test_a_missing_file_is_an_error_at_once_and_a_dead_server_after_some_tries(tmp_path, server):
    with pytest.raises(UserError, match="HTTP 404"):
        fetch(server, tmp_path / "out")
    assert server.log == [(404, None)]
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match="6 times in a row\nnothing is lost"):
        fetch(server, tmp_path / "out")


def test_an_interrupted_download_goes_on_in_the_next_run(tmp_path, server, c4):
    server.faults = ["", "cut", *[503] * 20]
    with pytest.raises(UserError, match="HTTP 503"):
        fetch(server, tmp_path / "out")
    left = [path.name for path in (tmp_path / "out" / "download").iterdir()]
    assert left == ["c4-train.00001-of-01024.json.gz.part"]  # the first file is in the shards and gone
    server.faults, server.log = [], []
    out = fetch(server, tmp_path / "out")
    assert len(server.log) == 1 and server.log[0][1]  # one request, by Range
    assert sorted(texts(out, "train") + texts(out, "val")) == sorted(c4)


def test_tinystories_are_separated_by_their_lines(tmp_path, server):
    stories = [f"Once upon a time {i}.\n\nThe end." for i in range(2000)]
    server.files["/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"] = \
        "\n<|endoftext|>\n".join(stories).encode()
    out = fetch(server, tmp_path / "out", "tinystories", 1)
    assert sorted(texts(out, "train") + texts(out, "val")) == sorted(stories) and texts(out, "val")


# ------------------------------------------------------------------------------------------ evaluation sets

def icl(server: Server, out: Path, tasks: str) -> Path:
    prepare_data.main(["icl", "--tasks", tasks, "--out", str(out), "--timeout=0.3", "--base_url", server.url])
    return out


def test_evaluation_sets_come_by_the_rows_api_and_go_on_where_they_stopped(tmp_path, server, capsys):
    rows = [{"question_stem": f"é {i}?", "choices": {"text": ["a"], "label": ["A"]}} for i in range(500)]
    server.rows = {"allenai/openbookqa": rows, "baber/piqa": [{"goal": str(i)} for i in range(1838)]}
    server.faults = ["", 429, "corrupt", "", *[500] * 20]
    with pytest.raises(UserError, match="HTTP 500"):
        icl(server, tmp_path, "openbookqa")
    part = tmp_path / "openbookqa" / "test.jsonl.part"
    assert part.read_bytes().count(b"\n") == 200 and not (tmp_path / "openbookqa" / "test.jsonl").exists()
    part.write_bytes(part.read_bytes() + b'{"question_st')  # as a kill in the middle of a line leaves it
    server.faults, server.log = [], []
    icl(server, tmp_path, "openbookqa,piqa")
    assert [offset for _, offset in server.log[:4]] == ["200", "300", "400", "/splits"]
    lines = (tmp_path / "openbookqa" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == rows
    assert len((tmp_path / "piqa" / "validation.jsonl").read_text().splitlines()) == 1838
    server.log = []
    icl(server, tmp_path, "openbookqa,piqa")
    assert not server.log and "takedown" not in capsys.readouterr().out


def test_a_set_of_another_size_is_refused_and_hellaswag_comes_with_its_notice(tmp_path, server, capsys):
    server.rows = {"Rowan/hellaswag": [{"ctx": "x"}] * 3241}
    with pytest.raises(UserError, match="10042 whole rows of the task, but 3241"):
        icl(server, tmp_path, "hellaswag")
    assert "takedown" in capsys.readouterr().out and not list(tmp_path.rglob("*.jsonl"))


def test_lambada_is_the_official_file_or_nothing(tmp_path, server, monkeypatch):
    server.files["/gpt-2/data/lambada_test.jsonl"] = b'{"text": "made here"}\n' * 5
    with pytest.raises(UserError, match="arrived corrupted"):
        icl(server, tmp_path, "lambada_openai")
    assert not list(tmp_path.rglob("*.jsonl*"))
    official = hashlib.sha256(server.files["/gpt-2/data/lambada_test.jsonl"]).hexdigest()
    monkeypatch.setattr(prepare_data, "LAMBADA_SHA256", official)
    icl(server, tmp_path, "lambada_openai")
    assert (tmp_path / "lambada_openai" / "test.jsonl").read_bytes() == b'{"text": "made here"}\n' * 5
