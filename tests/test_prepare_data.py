"""prepare_data.py: text, shards, kills and downloads, on real files, processes and a server."""

import gzip
import hashlib
import json
import os
import random
import re
import resource
import signal
import sys
from itertools import count
from pathlib import Path

import pyarrow.parquet
import pytest
import tiktoken
from common import documents, fork_server, refused

import prepare_data
from data import get_tokenizer

WORDS = "the a bird river stone café 中 😀 under straße light of old green house sings to".split()


def paragraphs(n: int) -> str:
    """About n characters."""
    rng, text = random.Random(n), ""
    while len(text) < n:
        text += " ".join(rng.choices(WORDS, k=rng.randint(5, 80))) + "\n\n"
    return text


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


TEXTS = [paragraphs(n) for n in range(20, 2820, 7)]  # 400 documents


def jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, 100)
    return path


def run(*args, **flags):
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    prepare_data.main([*map(str, args), *flags])


def prepare(out: Path, *inputs, **flags) -> Path:
    run("text", "--input", *inputs, out=out, **flags)
    return out


def texts(folder: Path, split: str) -> list[str]:
    tokenizer = get_tokenizer("bytes")
    return [tokenizer.decode(tokens) for tokens in documents(folder, split)]


def both(folder: Path) -> list[str]:
    return texts(folder, "train") + texts(folder, "val")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("corpus") / "a.jsonl", jsonl(TEXTS))


# -------------------------------------------------------------------------------------------------- the split


def test_a_document_goes_to_validation_by_its_hash(tmp_path, corpus):
    part = write(tmp_path / "b.jsonl", jsonl(TEXTS[:250]))
    small = prepare(tmp_path / "small", part, val_fraction=0.1)
    large = prepare(tmp_path / "large", corpus, val_fraction=0.1)
    val = [text for text in TEXTS if sha256(text) < "1999999999999999"]  # 0.1 in hexadecimal
    assert texts(large, "val") == val
    assert texts(large, "train") == [text for text in TEXTS if text not in val]
    assert texts(small, "val") == [text for text in val if text in TEXTS[:250]]
    n_bytes, data = len("".join(val).encode()), (large / "val_00000.bin").read_bytes()
    entry = json.loads((large / "meta.json").read_text())["splits"]["val"]
    [shard] = entry.pop("shards")
    assert entry == {"documents": len(val), "tokens": n_bytes + len(val), "bytes": n_bytes}
    assert shard == {"file": "val_00000.bin", "tokens": len(data) // 2, "sha256": sha256(data)}


def test_one_book_has_both_splits_and_nothing_of_it_is_lost(tmp_path, out):
    text = paragraphs(1_200_000) + "中😀é" * 500_000 + "\n\n"  # some of it without any place to cut
    prepare(out, write(tmp_path / "book.txt", "\ufeff" + text))  # the mark is no text
    rest, at = {split: texts(out, split) for split in ("train", "val")}, 0
    assert 0.01 < sum(map(len, rest["val"])) / len(text) < 0.1
    assert len(both(out)) < 100  # of 400 pieces: neighbours stay joined
    while at < len(text):  # the documents of both splits, taken in turn, are the book
        split = next(split for split in rest if rest[split] and text.startswith(rest[split][0], at))
        document = rest[split].pop(0)
        at += len(document)
        assert document.endswith("\n\n") or at > 1_200_000
    assert rest == {"train": [], "val": []}


@pytest.mark.parametrize("name, newline", [("a.txt", "\n"), ("b.md", "\r\n")])
def test_lines_of_endoftext_separate_documents(tmp_path, out, name, newline):
    stories = [f"Once {i} <|endoftext|> {'a tail ' * (i % 99)}.{newline}End" for i in range(9000)]
    separator = f"{newline}<|endoftext|>{newline}"  # 3 MB: more than is read at a time
    prepare(out, write(tmp_path / name, separator.join(["", *stories, ""])), val_fraction=0.3)
    assert sorted(both(out)) == sorted(stories)


def test_an_empty_split_is_refused_and_an_uneven_one_warned_of(tmp_path, corpus, capsys):
    two = write(tmp_path / "two.jsonl", jsonl(["one", "two"]))
    advice = "of the text .*\n.*--val_fraction,\n.*--val_input"
    refused(f"^0.0% {advice}", prepare, tmp_path / "least", two, val_fraction=1e-9)
    refused(f"^100.0% {advice}", prepare, tmp_path / "most", two, val_fraction=0.999999)
    held_out = next(word for word in map(str, count()) if sha256(word) < "0c")
    path = write(tmp_path / "repeated.jsonl", jsonl([held_out] * 999 + ["other"]))
    prepare(tmp_path / "uneven", path)
    assert "warning: 99." in capsys.readouterr().err
    prepare(tmp_path / "fine", corpus)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------- sources


def test_stdlib_is_the_library_by_whole_files(out, capsys):
    run("stdlib", out=out)
    before, modules = contents(out), both(out)
    source = json.loads(before["meta.json"])["source"]
    assert re.search(rf"Python 3[.\d]+, {len(modules)} files, SHA-256 [0-9a-f]{{64}}$", source)
    for module in (json, gzip, random):  # each is one document, whole
        assert Path(module.__file__).read_text() in modules
    assert not any("class TestBasicOps" in text for text in modules)
    run("stdlib", out=out)
    assert contents(out) == before
    printed = capsys.readouterr().out
    assert f"{out} is complete\n{source}" in printed and "going on" not in printed


def test_every_format_gives_the_same_documents(tmp_path, corpus):
    for number, text in enumerate(TEXTS):
        write(tmp_path / "code" / f"{number:03d}.py", text)
    write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(TEXTS)))
    parquet(tmp_path / "a.parquet", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    expected = contents(prepare(tmp_path / "expected", corpus))
    for name in ("a.jsonl.gz", "a.parquet", "code"):
        shards = contents(prepare(tmp_path / f"out_{name}", tmp_path / name))
        assert {**shards, "meta.json": expected["meta.json"]} == expected


def test_fields_folders_and_validation_text_may_be_named(tmp_path, out, capsys):
    own = out / "own"  # within the folder that is made: it stays there
    for name in ("b", "a"):
        rows = "".join(f'{{"body": "{name} {i}"}}\n' for i in range(50))
        write(own / f"{name}.jsonl", f'\ufeff{{"body": ""}}\n\n{rows}')
    write(own / "empty.py", "")
    write(own / "notes.pdf", "not for us")
    val = write(tmp_path / "val.md", "held out")
    prepare(out, own / "b.jsonl", own, field="body", val_input=val)
    assert texts(out, "train") == [f"{name} {i}" for name in "bab" for i in range(50)]
    assert texts(out, "val") == ["held out"] and (own / "notes.pdf").exists()
    captured = capsys.readouterr()
    assert "1 files of other formats left out" in captured.err
    assert "0 bad documents, 7 empty ones" in captured.out


# -------------------------------------------------------------------------------------------- what goes wrong

GOOD = b'{"text": "good"}\n'
BAD = {  # file name: its content, what is said of it, documents that are left with --skip_bad
    "json.jsonl": (GOOD + b'{"text": "cut of\n' + GOOD, "2 .*JSONDecodeError", 2),
    "deep.jsonl": (b"[" * 100_000 + b"\n" + GOOD, "1 .*RecursionError", 1),
    "number.jsonl": (b'{"text": 3}\n' + GOOD, "1 .*'int'", 1),
    "field.jsonl": (GOOD + b'{"body": "x"}\n', "2 .*KeyError: 'text'.*\n.*--field", 1),
    "latin1.txt": (b"caf\xe9 au lait", "1 .*position 3.*\nfiles are UTF-8", 0),
    "no.parquet": (b"PAR1 not parquet PAR1", "1 ", 0),
    "cut.jsonl.gz": (gzip.compress(GOOD * 9)[:-9], "10 .*EOFError", 9),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_an_error_or_a_counted_skip(tmp_path, out, capfd, name):
    content, problem, n_kept = BAD[name]
    args = (out, write(tmp_path / "good.md", "good"), write(tmp_path / name, content))
    val = write(tmp_path / "val.md", "good")
    refused(f"{name}: document {problem}(.*\n)+.*--skip_bad", prepare, *args, val_input=val)
    assert list(contents(out)) == ["unfinished.json"]
    prepare(*args, val_input=val, skip_bad=True)
    assert json.loads((out / "meta.json").read_text())["skipped"] == 1
    assert len(texts(out, "train")) == 1 + n_kept and name in capfd.readouterr().err


def test_a_missing_package_is_named_at_once(tmp_path, out, monkeypatch):
    path = write(tmp_path / "a.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused("pip install pyarrow", prepare, out, path)
    refused("pip install pyarrow", run, "fineweb_edu", out=out, tokenizer="bytes")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("pip install huggingface_hub", run, "c4", out=out, tokenizer="bytes")
    assert not out.exists()


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path, out, corpus):
    mine = write(tmp_path / "mine" / "meta.json", '{"of": "another program"}').parent
    damaged = write(tmp_path / "damaged" / "unfinished.json", "[1, 2").parent
    write(damaged / "train_00000.bin", "")
    unnamed = write(tmp_path / "unnamed" / "train_00000.bin", "").parent
    for folder in (prepare(out, corpus), mine, damaged, unnamed):
        before = contents(folder)
        refused("(holds other data|damaged).*\nremove", prepare, folder, corpus, val_fraction=0.2)
        assert contents(folder) == before


def test_what_an_earlier_version_left_beside_finished_data_goes_and_the_data_stay(out, corpus):
    before = contents(prepare(out, corpus))
    write(out / "unfinished.json", '{"job": "of that version", "groups": []}')
    assert contents(prepare(out, corpus)) == before


def test_a_refused_preparation_does_not_stand_in_the_way_of_its_mend(tmp_path, out):
    path = write(tmp_path / "rows.jsonl", '{"content": "a"}\n{"content": "b"}\n')
    refused("text under 'text' .--field", prepare, out, path)
    prepare(out, path, field="content", val_fraction=0.6)
    assert sorted(both(out)) == ["a", "b"]


def test_a_document_that_tiktoken_cannot_take_is_named():
    pattern = r"\s+(?!\S)|\S+|\s+"  # of GPT-2's, what recurses a million times on a million spaces
    ranks, special = {bytes([i]): i for i in range(256)}, {"eot": 256}
    own = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    chunk = [(Path("space.py"), "", " " * 2_000_000 + "a")]
    refused("space.py: own cannot encode this text", prepare_data.encode, chunk, own, 0.5)


# ------------------------------------------------------------------------------ the same bytes, in every case


def make_small(cores: int):
    """Every file is a group, of several chunks."""
    prepare_data.SHARD_TOKENS, prepare_data.CHUNK, prepare_data.CORES = 1, 1 << 14, cores


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> Path:
    """Two files, a group each."""
    for name in ("SHARD_TOKENS", "CHUNK", "CORES"):  # which the end of the test restores
        monkeypatch.setattr(prepare_data, name, 1)
    make_small(cores=3)
    write(tmp_path / "in" / "a.md", paragraphs(90_000))
    return write(tmp_path / "in" / "b.jsonl.gz", gzip.compress(jsonl(TEXTS[280:]))).parent


def prepare_and_die(out: Path, inputs: Path, n: int):
    """SIGKILL this process when it is about to sync or rename for the n-th time."""
    calls = count(1)

    def mortal(function):
        def call(*args):
            if next(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            function(*args)

        return call

    os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)
    make_small(cores=1)
    prepare(out, inputs)


def test_killed_at_any_operation_it_ends_the_same_on_any_cores(tmp_path, inputs, capfd):
    whole = contents(prepare(tmp_path / "whole", inputs))
    assert "train_00001.bin" in whole
    make_small(cores=2)
    for n in count(1):
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
    assert capfd.readouterr().out.count("going on after 1 of 2") > 5


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


def test_what_is_in_shards_is_not_fetched_again(out, hub):
    first, second = (f"c4-train.{number:05d}-of-01024.json.gz" for number in range(2))
    for name, part in ((first, TEXTS[:200]), (second, TEXTS[200:])):
        hub.offer("allenai/c4", prepare_data.C4, f"en/{name}", gzip.compress(jsonl(part)))
    flags = {"out": out, "shards": 2, "tokenizer": "bytes", "val_fraction": 0.05}
    hub.faults = [200, 503]
    refused("503.*\nnothing is lost: .* the same command goes on", run, "c4", **flags)
    assert not list(out.rglob(first))  # it is in a shard, and takes no room
    run("c4", **flags)
    assert sorted(both(out)) == sorted(TEXTS)
    assert hub.log == [(first, 200), (second, 503), (second, 200)] and not (out / ".unfinished").exists()


def test_evaluation_sets_are_the_rows_of_the_hub(tmp_path, out, hub, capsys, monkeypatch):
    rows = [{"stem": f"é {i}?", "choices": {"text": ["a", "b"]}} for i in range(500)]
    table = parquet(tmp_path / "rows.parquet", rows).read_bytes()
    lines = jsonl(["It rained"] * 5153)
    bodies = {"openbookqa": table, "lambada_openai": lines, "hellaswag": table}
    for name, body in bodies.items():
        repo, file, revision = prepare_data.EVAL_SETS[name]
        hub.offer(repo, revision, file, body)
    refused("5153 rows that are not", run, "icl", out=tmp_path / "changed", tasks="lambada_openai")
    hub.log.clear()
    monkeypatch.setattr(prepare_data, "LAMBADA", hashlib.sha256(lines).hexdigest())
    for _ in range(2):  # what is there is not fetched again
        run("icl", out=out, tasks="openbookqa, lambada_openai")
    made = (out / "openbookqa" / "test.jsonl").read_text()
    assert [json.loads(line) for line in made.splitlines()] == rows
    assert (out / "lambada_openai" / "test.jsonl").read_bytes() == lines
    assert len(hub.log) == 2 and len(list(out.iterdir())) == 2
    refused("500 rows that are not the 10042 official", run, "icl", out=out, tasks="hellaswag")
    assert "takedown" in capsys.readouterr().out and not (out / "hellaswag").exists()
