"""prepare_data.py: text, shards, kills and downloads, on real files, processes and a server."""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import resource
import signal
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import tiktoken
from common import fork_server, refused

import prepare_data
from data import documents, get_tokenizer
from prepare_data import TASKS

RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyzéß中😀", k=RNG.randint(1, 9))) for _ in range(500)]


def paragraphs(n: int, seed: int = 0) -> str:
    """About n characters, some of them beyond ASCII."""
    rng, text = random.Random(seed), ""
    while len(text) < n:
        text += " ".join(rng.choices(WORDS, k=rng.randint(5, 80))) + "\n\n"
    return text


TEXTS = [paragraphs(n, seed=n) for n in range(20, 2820, 7)]  # 400 documents


def as_jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, 100)
    return path


def run(command: str, *args, out: Path, **flags) -> Path:
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    prepare_data.main([*command.split(), *map(str, args), "--out", str(out), *flags])
    return out


def prepare(out: Path, *inputs, **flags) -> Path:
    return run("text --input", *inputs, out=out, **flags)


def texts(folder: Path, *splits: str) -> list[str]:
    tokenizer = get_tokenizer("bytes")
    splits = splits or ("train", "val")
    return [tokenizer.decode(tokens.tolist()) for split in splits for tokens in documents(folder, split)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("corpus") / "a.jsonl", as_jsonl(TEXTS))


# -------------------------------------------------------------------------------------------------- the split


def test_a_document_goes_to_validation_by_its_hash_whatever_is_added(tmp_path, corpus):
    part = write(tmp_path / "b.jsonl", as_jsonl(TEXTS[:250]))
    small = prepare(tmp_path / "small", part, val_fraction=0.1)
    large = prepare(tmp_path / "large", corpus, val_fraction=0.1)
    tenth = "1999999999999999"  # 0.1 in hexadecimal digits
    val = [text for text in TEXTS if hashlib.sha256(text.encode()).hexdigest() < tenth]
    assert texts(large, "val") == val
    assert texts(large, "train") == [text for text in TEXTS if text not in val]
    assert texts(small, "val") == [text for text in val if text in TEXTS[:250]]
    n_bytes, sha256 = len("".join(val).encode()), hashlib.sha256((large / "val_00000.bin").read_bytes())
    shard = {"file": "val_00000.bin", "tokens": n_bytes + len(val), "sha256": sha256.hexdigest()}
    entry = {"documents": len(val), "tokens": shard["tokens"], "bytes": n_bytes, "shards": [shard]}
    assert json.loads((large / "meta.json").read_text())["splits"]["val"] == entry


def test_one_book_has_both_splits_and_nothing_of_it_is_lost(tmp_path):
    text = paragraphs(1_200_000) + "中😀é" * 500_000 + "\n\n"  # some of it without any place to cut
    book = write(tmp_path / "book.txt", f"\ufeff{text}".encode())  # the mark is no text
    out = prepare(tmp_path / "out", book)
    rest = {split: texts(out, split) for split in ("train", "val")}
    assert 0.01 < sum(map(len, rest["val"])) / len(text) < 0.1
    at = 0
    while at < len(text):  # the documents of both splits, taken in turn, are the book
        split = next(split for split in rest if rest[split] and text.startswith(rest[split][0], at))
        document = rest[split].pop(0)
        at += len(document)
        assert document.endswith("\n\n") or at > 1_200_000
    assert not rest["train"] and not rest["val"]


@pytest.mark.parametrize("name, newline", [("a.txt", "\n"), ("b.md", "\r\n")])
def test_lines_of_endoftext_separate_documents(tmp_path, name, newline):
    stories = [f"Once {i} <|endoftext|> {'there was ' * (i % 70)}.\n\nThe end." for i in range(9000)]
    text = "\n<|endoftext|>\n".join(["", *stories, ""])  # 3 MB: more than is read at a time
    path = write(tmp_path / name, text.replace("\n", newline).encode())
    out = prepare(tmp_path / "out", path, val_fraction=0.3)
    assert sorted(texts(out)) == sorted(story.replace("\n", newline) for story in stories)


def test_an_empty_split_is_refused_and_an_uneven_one_warned_of(tmp_path, out, corpus, capsys):
    two = write(tmp_path / "two.jsonl", as_jsonl(["one", "two"]))
    message = "^0.0% of the text went to validation\n.*--val_fraction than 1e-09,\n.*--val_input"
    refused(message, prepare, out, two, val_fraction=1e-9)
    refused("^100.0% of the text", prepare, tmp_path / "most", two, val_fraction=0.999999)
    repeated = next(text for text in map(str, range(99)) if hashlib.sha256(text.encode()).digest()[0] < 12)
    prepare(tmp_path / "uneven", write(tmp_path / "many.jsonl", as_jsonl([repeated] * 999 + ["other"])))
    assert re.search(r"warning: 99.\d% of the text went to validation", capsys.readouterr().err)
    prepare(tmp_path / "fine", corpus)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------- sources


def test_stdlib_is_the_library_by_whole_files(out, capsys):
    before = contents(run("stdlib", out=out))
    modules, source = texts(out), json.loads(before["meta.json"])["source"]
    assert re.search(rf"Python 3[.\d]+, {len(modules)} files, SHA-256 [0-9a-f]{{64}}$", source)
    for module in (json, gzip, random):  # each is one document, whole
        assert Path(module.__file__).read_bytes().decode() in modules
    assert Path(tiktoken.__file__).read_text() not in modules
    assert not any("class TestBasicOps" in text for text in modules)
    assert contents(run("stdlib", out=out)) == before
    assert f"{out} is complete\n{source}" in capsys.readouterr().out


def test_every_format_gives_the_same_documents(tmp_path, corpus):
    (tmp_path / "code").mkdir()
    for number, text in enumerate(TEXTS):
        write(tmp_path / "code" / f"{number:03d}.py", text.encode())
    write(tmp_path / "a.jsonl.gz", gzip.compress(as_jsonl(TEXTS)))
    write_parquet(tmp_path / "a.parquet", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    expected = contents(prepare(tmp_path / "expected", corpus))
    for name in ("a.jsonl.gz", "a.parquet", "code"):
        shards = contents(prepare(tmp_path / f"out_{name}", tmp_path / name))
        assert {**shards, "meta.json": expected["meta.json"]} == expected


def test_fields_folders_and_validation_text_may_be_named(tmp_path, capsys):
    source = tmp_path / "out" / "own"  # within the folder that is made: it stays there
    source.mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl"):
        rows = "".join(f'{{"body": "{name} {i}"}}\n' for i in range(50))
        write(source / name, f'\ufeff{{"body": ""}}\n\n{rows}'.encode())
    for name in ("notes.pdf", "table.csv", "__init__.py"):
        write(source / name, b"" if name.endswith(".py") else b"not for us")
    val = write(tmp_path / "val.md", b"held out")
    out = prepare(tmp_path / "out", source / "b.jsonl", source, field="body", val_input=val)
    order = ["b.jsonl", "a.jsonl", "b.jsonl"]
    assert texts(out, "train") == [f"{name} {i}" for name in order for i in range(50)]
    assert texts(out, "val") == ["held out"] and (source / "notes.pdf").exists()
    captured = capsys.readouterr()
    assert "2 files of other formats left out" in captured.err
    assert "0 bad documents, 7 empty ones" in captured.out


# -------------------------------------------------------------------------------------------- what goes wrong

BAD = {  # file name: its content, what is said of it, documents that are left with --skip_bad
    "json.jsonl": (b'{"text": "good"}\n{"text": "cut of\n{"text": "fine"}', "2 .*JSONDecodeError", 2),
    "deep.jsonl": (b"[" * 100_000 + b'\n{"text": "good"}', "1 .*RecursionError", 1),
    "number.jsonl": (b'{"text": 3}\n{"text": "good"}\n', "1 .*'int'", 1),
    "field.jsonl": (b'{"text": "good"}\n{"body": "x"}\n', "2 .*KeyError: 'text'.*\n.*--field", 1),
    "latin1.txt": (b"caf\xe9 au lait", "1 .*position 3.*\nfiles are UTF-8", 0),
    "no.parquet": (b"PAR1 not parquet PAR1", "1 ", 0),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "good"}\n' * 9)[:-9], "10 .*EOFError", 9),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_an_error_or_a_counted_skip(tmp_path, out, capfd, name):
    content, said, n_kept = BAD[name]
    good, val = write(tmp_path / "good.md", b"good"), write(tmp_path / "val.md", b"good")
    args = (out, good, write(tmp_path / name, content))
    refused(f"{name}: document {said}(.*\n)+.*--skip_bad", prepare, *args, val_input=val)
    assert list(contents(out)) == ["unfinished.json"]
    prepare(*args, val_input=val, skip_bad=True)
    assert json.loads((out / "meta.json").read_text())["skipped"] == 1
    assert len(texts(out, "train")) == 1 + n_kept and name in capfd.readouterr().err


@pytest.mark.parametrize(
    "module, command",
    [("pyarrow.parquet", "fineweb_edu"), ("pyarrow.parquet", "text --input ."), ("huggingface_hub", "c4")],
)
def test_a_missing_package_is_named_at_once(tmp_path, out, monkeypatch, module, command):
    monkeypatch.chdir(write(tmp_path / "a.parquet", b"PAR1").parent)
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"pip install {module.split('.')[0]}", run, command, out=out, tokenizer="bytes")
    assert not out.exists()


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path, corpus):
    out, mine = prepare(tmp_path / "out", corpus), tmp_path / "mine"
    mine.mkdir()
    write(mine / "meta.json", b'{"of": "another program"}')
    write(mine / "unfinished.json", b"[1, 2")
    for folder in (out, mine):
        before = contents(folder)
        refused("holds other data.*\nremove", prepare, folder, corpus, val_fraction=0.2)
        assert contents(folder) == before
    (out / "meta.json").unlink()  # shards that nothing describes
    refused("holds other data.*\nremove", prepare, out, corpus)


def test_a_document_that_tiktoken_cannot_take_is_named(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    pattern = r"\s+(?!\S)|\S+|\s+"  # of GPT-2's, what recurses a million times on a million spaces
    tokenizer = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"eot": 256})
    chunk = [(tmp_path / "space.py", "", " " * 2_000_000 + "a")]
    refused("space.py: own cannot encode this text", prepare_data.encode, chunk, tokenizer, 0.5)


# ------------------------------------------------------------------------------ the same bytes, in every case


def make_small(cores: int):
    """Files of hundreds of kilobytes make several groups, of several chunks each."""
    prepare_data.SHARD_TOKENS, prepare_data.CHUNK, prepare_data.CORES = 200_000, 1 << 14, cores


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> Path:
    """Files of two kinds, which make three groups."""
    for name in ("SHARD_TOKENS", "CHUNK", "CORES"):  # so that the end of the test restores them
        monkeypatch.setattr(prepare_data, name, getattr(prepare_data, name))
    make_small(cores=3)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.md", paragraphs(90_000, seed=7).encode())
    write(tmp_path / "in" / "b.jsonl.gz", gzip.compress(as_jsonl(TEXTS[280:])))
    write(tmp_path / "in" / "c.jsonl", as_jsonl(TEXTS[:100]))
    return tmp_path / "in"


def prepare_and_die(out: Path, inputs: Path, n: int):
    """SIGKILL this process when it is about to sync or rename for the n-th time."""
    calls = itertools.count(1)

    def counted(function):
        return lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else function(*args)

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    make_small(cores=1)
    prepare(out, inputs)


def test_killed_at_any_operation_it_ends_the_same_on_any_number_of_cores(tmp_path, inputs, capfd):
    whole = contents(prepare(tmp_path / "whole", inputs))
    shards = json.loads(whole["meta.json"])["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards] == [f"train_{number:05d}.bin" for number in range(3)]
    make_small(cores=2)
    for n in itertools.count(1):
        out = tmp_path / str(n)
        process = fork_server().Process(target=prepare_and_die, args=(out, inputs, n))
        process.start()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            break
        for path in out.glob("*.bin"):  # what has its final name is whole
            assert path.read_bytes() == whole[path.name]
        assert contents(prepare(out, inputs)) == whole and not (out / ".unfinished").exists()
    assert n > 20 and contents(out) == whole
    assert capfd.readouterr().out.count("going on after") > 10


def test_after_a_full_disk_the_same_command_goes_on(tmp_path, out, inputs):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond
    try:
        refused(f"{out}: File too large\n.* the same command goes on", prepare, out, inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.rglob("*.bin"))  # what was begun takes no room
    assert contents(prepare(out, inputs)) == contents(prepare(tmp_path / "whole", inputs))


# -------------------------------------------------------------------------------------------------- downloads


def test_downloads_go_on_where_they_broke_off(out, hub):
    first, second = (f"c4-train.{number:05d}-of-01024.json.gz" for number in range(2))
    for name, part in ((first, TEXTS[:200]), (second, TEXTS[200:])):
        hub.offer("allenai/c4", prepare_data.C4, f"en/{name}", gzip.compress(as_jsonl(part)))
    flags = {"out": out, "shards": 2, "tokenizer": "bytes", "val_fraction": 0.05}
    hub.faults = [None, 503]
    refused("503.*\nnothing is lost: .* the same command goes on", run, "c4", **flags)
    assert not list(out.rglob(first))  # it is in a shard, and takes no room
    hub.faults = ["cut"]
    assert sorted(texts(run("c4", **flags))) == sorted(TEXTS)
    assert hub.log[:3] == [(first, None), (second, None), (second, None)]
    assert len(hub.log) == 4 and re.fullmatch(r"bytes=[1-9]\d{4,}-", hub.log[3][1])
    assert not (out / ".unfinished").exists()


def test_evaluation_sets_are_the_rows_of_the_hub(tmp_path, out, hub, capsys):
    rows = [{"stem": f"é {i}?", "choices": {"text": ["a", "b"]}} for i in range(500)]
    table = write_parquet(tmp_path / "rows.parquet", rows).read_bytes()
    lines = as_jsonl(["It rained"] * 5153)
    for name, body in (("openbookqa", table), ("lambada_openai", lines), ("hellaswag", table)):
        hub.offer(TASKS[name].repo, TASKS[name].revision, TASKS[name].file, body)
    for _ in range(2):  # what is there is not fetched again
        run("icl", out=out, tasks="openbookqa, lambada_openai")
    made = (out / "openbookqa" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in made] == rows
    assert (out / "lambada_openai" / "test.jsonl").read_bytes() == lines
    assert len(hub.log) == 2 and len(list(out.iterdir())) == 2
    refused("has 500 rows, not 10042", run, "icl", out=out, tasks="hellaswag")
    assert "takedown" in capsys.readouterr().out and not (out / "hellaswag").exists()
