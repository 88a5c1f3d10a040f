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
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import tiktoken
from common import ROOT, fork_server, refused
from hub import Hub

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


def write_jsonl(path: Path, texts) -> Path:
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
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


def texts(folder: Path, split: str) -> list[str]:
    tokenizer = get_tokenizer("bytes")
    return [tokenizer.decode(document.tolist()) for document in documents(folder, split)]


def both(folder: Path) -> list[str]:
    return texts(folder, "train") + texts(folder, "val")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


TEXTS = [paragraphs(n, seed=n) for n in range(20, 2820, 7)]  # 400 documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", TEXTS)


# -------------------------------------------------------------------------------------------------- the split


def test_a_document_goes_to_validation_by_its_hash(tmp_path, corpus):
    part = write_jsonl(tmp_path / "b.jsonl", TEXTS[:250])
    small = prepare(tmp_path / "small", part, val_fraction=0.1)
    large = prepare(tmp_path / "large", corpus, val_fraction=0.1)
    tenth = "1999999999999999"  # 0.1 in hexadecimal digits
    val = [text for text in TEXTS if hashlib.sha256(text.encode()).hexdigest() < tenth]
    assert texts(large, "val") == val
    assert texts(large, "train") == [text for text in TEXTS if text not in val]
    assert texts(small, "val") == [text for text in val if text in TEXTS[:250]]
    entry = json.loads((large / "meta.json").read_text())["splits"]["val"]
    n_bytes = len("".join(val).encode())
    assert (entry["documents"], entry["bytes"], entry["tokens"]) == (len(val), n_bytes, n_bytes + len(val))
    sha256 = hashlib.sha256((large / "val_00000.bin").read_bytes()).hexdigest()
    assert entry["shards"] == [{"file": "val_00000.bin", "tokens": entry["tokens"], "sha256": sha256}]


def test_one_book_has_both_splits_and_nothing_of_it_is_lost(tmp_path):
    text = paragraphs(1_200_000) + "中😀é" * 500_000 + "\n\n"  # some of it without any place to cut
    (tmp_path / "book.txt").write_text("\ufeff" + text, encoding="utf-8", newline="")  # the mark is no text
    out = prepare(tmp_path / "out", tmp_path / "book.txt")
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
    (tmp_path / name).write_text(text, newline=newline)
    out = prepare(tmp_path / "out", tmp_path / name, val_fraction=0.3)
    assert sorted(both(out)) == sorted(story.replace("\n", newline) for story in stories)


def test_a_split_without_documents_names_the_flags(tmp_path, out):
    two = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    message = "for the val split\n.*--val_fraction than 1e-09.*--val_input"
    refused(message, prepare, out, two, val_fraction=1e-9)
    refused("for the train split", prepare, tmp_path / "most", two, val_fraction=0.999999)


def test_an_uneven_split_is_warned_of(tmp_path, out, corpus, capsys):
    goes = next(text for text in map(str, range(99)) if hashlib.sha256(text.encode()).digest()[0] < 12)
    repeated = write_jsonl(tmp_path / "a.jsonl", [goes] * 999 + ["other"])
    prepare(out, repeated)
    assert re.search(r"warning: 99.\d% of the text went to validation, not 5.0%", capsys.readouterr().err)
    prepare(tmp_path / "fine", corpus)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------- sources


def test_stdlib_is_the_library_by_whole_files(tmp_path, capsys):
    run("stdlib", out=tmp_path)
    before, found = contents(tmp_path), both(tmp_path)
    source = json.loads(before["meta.json"])["source"]
    assert re.search(rf"Python 3[.\d]+, {len(found)} files, SHA-256 [0-9a-f]{{64}}$", source)
    for module in (json, gzip, random):  # each is one document, whole
        assert Path(module.__file__).read_bytes().decode() in found
    assert Path(tiktoken.__file__).read_text() not in found
    assert not any("class TestBasicOps" in text for text in found)
    run("stdlib", out=tmp_path)
    assert contents(tmp_path) == before
    assert f"{tmp_path} is complete\n{source}" in capsys.readouterr().out


def test_every_format_gives_the_same_documents(tmp_path, corpus):
    (tmp_path / "code").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "code" / f"{number:03d}.py").write_text(text, newline="")
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS)
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
        (source / name).write_text('\ufeff{"body": ""}\n\n' + rows, encoding="utf-8")
    for name in ("notes.pdf", "table.csv"):
        (source / name).write_text("not for us")
    (source / "__init__.py").write_text("")
    (tmp_path / "val.md").write_text("held out")
    out = prepare(tmp_path / "out", source / "b.jsonl", source, field="body", val_input=tmp_path / "val.md")
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
def test_bad_documents_are_an_error_or_a_counted_skip(tmp_path, capfd, name):
    content, said, n_kept = BAD[name]
    (tmp_path / name).write_bytes(content)
    for good in ("good.md", "val.md"):
        (tmp_path / good).write_text("good")
    args, val = (tmp_path / "out", tmp_path / "good.md", tmp_path / name), tmp_path / "val.md"
    refused(f"{name}: document {said}(.*\n)+.*--skip_bad", prepare, *args, val_input=val)
    assert list(contents(tmp_path / "out")) == ["unfinished.json"]
    out = prepare(*args, val_input=val, skip_bad=True)
    assert json.loads((out / "meta.json").read_text())["skipped"] == 1
    assert len(texts(out, "train")) == 1 + n_kept and name in capfd.readouterr().err


MISSING = [
    ("pyarrow.parquet", "fineweb_edu"),
    ("pyarrow.parquet", "text --input {}"),
    ("huggingface_hub", "c4"),
]


@pytest.mark.parametrize("module, command", MISSING)
def test_a_missing_package_is_named_at_once(tmp_path, out, monkeypatch, module, command):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    package, flags = module.split(".")[0], {"out": out, "tokenizer": "bytes"}
    refused(f"pip install {package}", run, command.format(tmp_path), **flags)
    assert not out.exists()


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path, corpus):
    out, mine = prepare(tmp_path / "out", corpus), tmp_path / "mine"
    mine.mkdir()
    (mine / "meta.json").write_text('{"of": "another program"}')
    (mine / "unfinished.json").write_text("[1, 2")
    for folder in (out, mine):
        before = contents(folder)
        refused("holds other data.*\nremove", prepare, folder, corpus, val_fraction=0.2)
        assert contents(folder) == before
    (out / "meta.json").unlink()  # shards that nothing describes
    refused("holds other data.*\nremove", prepare, out, corpus)


def test_a_document_that_tiktoken_cannot_take_is_named(tmp_path):
    pattern = r"\s+(?!\S)|\S+|\s+"  # of GPT-2's, what recurses a million times on a million spaces
    ranks = {bytes([i]): i for i in range(256)}
    special = {"<|endoftext|>": 256}
    tokenizer = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    chunk = [(tmp_path / "space.py", "", " " * 2_000_000 + "a")]
    message = "space.py: own cannot encode this text"
    refused(message, prepare_data.encode_chunk, tokenizer, 0.5, chunk)


# ------------------------------------------------------------------------------ the same bytes, in every case


@pytest.fixture
def groups(tmp_path, monkeypatch) -> tuple[Path, dict]:
    """Inputs of two kinds, and flags with which they make three groups, of several chunks."""
    monkeypatch.setattr(prepare_data, "CHUNK", 1 << 14)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text(paragraphs(90_000, seed=7))
    write_jsonl(tmp_path / "in" / "b.jsonl.gz", TEXTS[280:])
    write_jsonl(tmp_path / "in" / "c.jsonl", TEXTS[:100])
    return tmp_path / "in", {"shard_tokens": 200_000, "val_fraction": 0.1}


def kill_at(n: int):
    """SIGKILL this process when it is about to sync or rename for the n-th time."""
    calls = itertools.count(1)

    def counted(function):
        return lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else function(*args)

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def job(out: Path, inputs: Path, flags: dict, killed_at: int = 0):
    """What the processes of these tests do."""
    prepare_data.CHUNK = 1 << 14
    if killed_at:
        kill_at(killed_at)
    prepare(out, inputs, **flags)


def test_killed_at_any_operation_it_ends_the_same(tmp_path, groups, capfd):
    inputs, flags = groups
    whole = contents(prepare(tmp_path / "whole", inputs, workers=3, **flags))
    shards = json.loads(whole["meta.json"])["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards] == [f"train_{number:05d}.bin" for number in range(3)]
    for n in itertools.count(1):
        out = tmp_path / str(n)
        process = fork_server().Process(target=job, args=(out, inputs, {**flags, "workers": 1}, n))
        process.start()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            break
        for path in out.glob("*.bin"):  # what has its final name is whole
            assert path.read_bytes() == whole[path.name]
        prepare(out, inputs, workers=2, **flags)
        assert contents(out) == whole
    assert n > 20 and contents(out) == whole
    assert capfd.readouterr().out.count("going on after") > 10


def test_killed_at_random_moments_it_ends_the_same(tmp_path, groups):
    inputs, flags = groups
    whole, rng = contents(prepare(tmp_path / "whole", inputs, **flags)), random.Random(0)
    for out in (tmp_path / "first", tmp_path / "second"):
        patience, statuses = 0.01, []
        while 0 not in statuses:
            process = fork_server().Process(target=job, args=(out, inputs, flags))
            process.start()
            time.sleep(rng.uniform(0, patience))
            process.kill()
            process.join()
            statuses.append(process.exitcode)
            patience *= 1.2
        assert len(statuses) > 3 and contents(out) == whole


def test_after_a_full_disk_the_same_command_goes_on(tmp_path, out, groups):
    inputs, flags = groups
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond
    try:
        message = f"{out}: File too large\n.* the same command goes on"
        refused(message, prepare, out, inputs, **flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(contents(out)) == ["unfinished.json"]
    whole = contents(prepare(tmp_path / "whole", inputs, **flags))
    assert contents(prepare(out, inputs, **flags)) == whole


# -------------------------------------------------------------------------------------------------- downloads

FIRST, SECOND = "c4-train.00000-of-01024.json.gz", "c4-train.00001-of-01024.json.gz"


@pytest.fixture
def c4(hub):
    """Two files as C4 has them, which hold TEXTS."""
    for name, part in ((FIRST, TEXTS[:200]), (SECOND, TEXTS[200:])):
        lines = [json.dumps({"text": text, "url": "http://x"}) + "\n" for text in part]
        hub.offer("allenai/c4", prepare_data.C4, f"en/{name}", gzip.compress("".join(lines).encode()))


def fetch(out: Path, command="c4", shards=2) -> Path:
    return run(command, out=out, shards=shards, tokenizer="bytes", val_fraction=0.05)


def test_a_download_cut_off_goes_on_by_range(tmp_path, hub, c4):
    out, on_disk = tmp_path / "out", []
    hub.on_get = lambda: on_disk.extend(out.rglob("*.json.gz"))
    hub.faults = [None, "cut"]
    fetch(out)
    assert sorted(both(out)) == sorted(TEXTS)
    assert hub.log[:2] == [(FIRST, None), (SECOND, None)] and len(hub.log) == 3
    assert re.fullmatch(r"bytes=[1-9]\d{4,}-", hub.log[2][1])  # what had come is not asked for again
    assert not on_disk and not (out / ".download").exists()


@pytest.mark.parametrize("fault, said", [("corrupt", "arrived corrupted"), (503, "503")])
def test_wrong_bytes_are_never_tokenised(out, hub, c4, fault, said):
    hub.faults = [None, fault]
    refused(f"{said}.*\nnothing is lost: .* the same command goes on", fetch, out)
    assert not list(out.rglob(SECOND))
    assert sorted(both(fetch(out))) == sorted(TEXTS)
    assert [name for name, _ in hub.log] == [FIRST, SECOND, SECOND]  # what is in shards is not fetched again


def offer_rows(hub: Hub, task: str, rows: list[dict], folder: Path):
    body = write_parquet(folder / "rows.parquet", rows).read_bytes()
    hub.offer(TASKS[task].repo, TASKS[task].revision, TASKS[task].file, body)


def test_evaluation_sets_are_the_rows_of_the_hub(tmp_path, hub):
    rows = [{"stem": f"é {i}?", "choices": {"text": ["a", "b"]}} for i in range(500)]
    out = tmp_path / "icl"
    offer_rows(hub, "openbookqa", rows, tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "prepare_data.py", "icl", "--tasks=openbookqa", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    run("icl", out=out, tasks="openbookqa")  # it is there
    lines = (out / "openbookqa" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert len(hub.log) == 1 and [path.name for path in out.iterdir()] == ["openbookqa"]


def test_a_set_of_another_size_is_refused(tmp_path, out, hub, capsys):
    offer_rows(hub, "hellaswag", [{"ctx": "x"}] * 3241, tmp_path)
    refused("has 3241 rows, not 10042", run, "icl", out=out, tasks="hellaswag")
    assert "takedown" in capsys.readouterr().out and not list(tmp_path.rglob("*.jsonl"))


def test_lambada_is_the_official_file_or_nothing(tmp_path, hub, monkeypatch):
    known, body = TASKS["lambada_openai"], b'{"text": "made here"}\n' * 5153
    hub.offer(known.repo, known.revision, known.file, body)
    refused("another one", run, "icl", out=tmp_path / "icl", tasks="lambada_openai")
    assert not list(tmp_path.rglob("*.jsonl"))
    official = known._replace(sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(TASKS, "lambada_openai", official)
    out = run("icl", out=tmp_path / "icl", tasks="lambada_openai")
    assert (out / "lambada_openai" / "test.jsonl").read_bytes() == body
