"""prepare_data.py: what it promises about text, shards, kills and downloads, on real files, processes and a
real server (tests/hub.py)."""

import gzip
import hashlib
import itertools
import json
import os
import platform
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from common import ROOT
from hub import Hub

import prepare_data
from data import Shards, documents, get_tokenizer
from model import UserError
from tasks import TASKS

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
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, 100)
    return path


def run(command: str, *args, out: Path, **flags) -> Path:
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    prepare_data.main([*command.split(), *map(str, args), "--out", str(out), *flags])
    return out


def prepare(out: Path, *inputs, **flags) -> Path:
    return run("text --input", *inputs, out=out, **flags)


def texts(folder: Path, split: str) -> list[str]:
    return [get_tokenizer("bytes").decode(document.tolist()) for document in documents(folder, split)]


def both(folder: Path) -> list[str]:
    return texts(folder, "train") + texts(folder, "val")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


FOUND = [paragraphs(n, seed=n) for n in range(20, 2820, 7)]  # 400 documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", FOUND)


# -------------------------------------------------------------------------------------------------- the split


def test_a_document_goes_to_validation_by_its_hash_whatever_is_added_later(tmp_path, corpus):
    small = prepare(tmp_path / "small", write_jsonl(tmp_path / "b.jsonl", FOUND[:250]), val_fraction=0.1)
    large = prepare(tmp_path / "large", corpus, val_fraction=0.1)
    tenth = "1999999999999999"  # 0.1 in hexadecimal digits
    val = [text for text in FOUND if hashlib.sha256(text.encode()).hexdigest() < tenth]
    assert texts(large, "val") == val
    assert texts(large, "train") == [text for text in FOUND if text not in val]
    assert texts(small, "val") == [text for text in val if text in FOUND[:250]]
    meta, n_bytes = json.loads((large / "meta.json").read_text()), len("".join(val).encode())
    entry = meta["splits"]["val"]
    assert (entry["documents"], entry["bytes"], entry["tokens"]) == (len(val), n_bytes, n_bytes + len(val))
    Shards(large, "train", 64), Shards(large, "val", 64)  # which checks sizes and hashes


def test_one_book_has_both_splits_and_nothing_of_it_is_lost(tmp_path):
    text = paragraphs(1_200_000) + "中😀é" * 10_000 + "\n\n"  # some of it without any place to cut
    (tmp_path / "book.txt").write_text(text, newline="")
    out = prepare(tmp_path / "out", tmp_path / "book.txt")
    rest = {split: texts(out, split) for split in ("train", "val")}
    assert 0.01 < sum(map(len, rest["val"])) / len(text) < 0.1
    assert sum(not text.endswith("\n\n") for text in rest["train"] + rest["val"]) <= 12  # else at paragraphs
    at = 0
    while at < len(text):  # the documents of both splits, taken in turn, are the book
        split = next(split for split in rest if rest[split] and text.startswith(rest[split][0], at))
        at += len(rest[split].pop(0))
    assert not rest["train"] and not rest["val"]


def test_too_little_text_for_chance_still_has_validation_text(tmp_path):
    poems = [f"poem {i}" for i in range(3)]
    out = prepare(tmp_path / "out", write_jsonl(tmp_path / "poems.jsonl", poems), val_fraction=1e-9)
    smallest = min(poems, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert texts(out, "val") == [smallest] and sorted(both(out)) == poems
    with pytest.raises(UserError, match="no document is left for the train split\n.*--val_input"):
        prepare(tmp_path / "one", write_jsonl(tmp_path / "one.jsonl", ["alone"]))


# ---------------------------------------------------------------------------------------------------- sources


def test_stdlib_is_the_library_by_whole_files(tmp_path, capsys):
    run("stdlib", out=tmp_path)
    before, found = contents(tmp_path), both(tmp_path)
    source = json.loads(before["meta.json"])["source"]
    assert f"standard library of Python {platform.python_version().rstrip('+')}" in source
    assert re.search(rf", {len(found)} files, SHA-256 [0-9a-f]{{64}}$", source)
    for module in (json, gzip, random):  # each is one document, whole
        assert Path(module.__file__).read_bytes().decode() in found
    assert Path(tiktoken.__file__).read_text() not in found
    assert not any("class TestBasicOps" in text for text in found)
    run("stdlib", out=tmp_path)
    assert contents(tmp_path) == before and f"{tmp_path} is complete\n{source}" in capsys.readouterr().out


def test_every_format_gives_the_same_documents(tmp_path, corpus):
    (tmp_path / "code").mkdir()
    for number, text in enumerate(FOUND):
        (tmp_path / "code" / f"{number:03d}.py").write_text(text, newline="")
    write_jsonl(tmp_path / "a.jsonl.gz", FOUND)
    write_parquet(tmp_path / "a.parquet", [{"id": i, "text": text} for i, text in enumerate(FOUND)])
    expected = contents(prepare(tmp_path / "expected", corpus))
    for name in ("a.jsonl.gz", "a.parquet", "code"):
        shards = contents(prepare(tmp_path / f"out_{name}", tmp_path / name))
        assert {**shards, "meta.json": expected["meta.json"]} == expected


def test_another_field_a_folder_in_the_order_of_names_and_validation_text_of_its_own(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"body": "{name} {i}"}}\n\n' for i in range(50)))
    (tmp_path / "notes.pdf").write_text("not for us")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "val.md").write_text("held out")
    inputs = tmp_path / "b.jsonl", tmp_path
    out = prepare(tmp_path / "out", *inputs, field="body", val_input=tmp_path / "held_out")
    order = ["b.jsonl", "a.jsonl", "b.jsonl"]
    assert texts(out, "train") == [f"{name} {i}" for name in order for i in range(50)] + ["held out"]
    assert texts(out, "val") == ["held out"]


# -------------------------------------------------------------------------------------------- what goes wrong

BAD = {  # file name: its content, what is said of it, documents that are left with --skip_bad
    "empty.txt": (b"", "document 1 is empty", 0),
    "hollow.jsonl": (b'{"text": "good"}\n{"text": ""}', "document 2 is empty", 1),
    "json.jsonl": (b'{"text": "good"}\n{"text": "cut of\n{"text": "fine"}', "row 2 is no JSON in UTF-8", 2),
    "deep.jsonl": (b"[" * 100_000 + b'\n{"text": "good"}', "row 1 is no JSON", 1),
    "number.jsonl": (b'{"text": 3}\n{"text": "good"}\n', "row 1 has no text", 1),
    "field.jsonl": (b'{"text": "good"}\n{"body": "x"}\n', "row 2 has no text under 'text'", 1),
    "latin1.txt": (b"caf\xe9 au lait", "invalid UTF-8, e9 at byte 3 of section 1", 0),
    "no.parquet": (b"PAR1 not parquet PAR1", "broken file", 0),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "good"}\n' * 9)[:-9], "broken file", 9),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_an_error_or_a_counted_skip(tmp_path, capfd, name):
    content, what, n_left = BAD[name]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.md").write_text("good")
    args, val = (tmp_path / "out", tmp_path / "good.md", tmp_path / name), tmp_path / "good.md"
    with pytest.raises(UserError) as error:
        prepare(*args, val_input=val)
    assert name in str(error.value) and what in str(error.value) and "--skip_bad" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3 and not list((tmp_path / "out").glob("*.bin"))
    out = prepare(*args, val_input=val, skip_bad=True)
    assert json.loads((out / "meta.json").read_text())["skipped"] == 1
    assert len(texts(out, "train")) == 1 + n_left and what in capfd.readouterr().err


@pytest.mark.parametrize("module, command", [("pyarrow.parquet", "fineweb_edu"), ("huggingface_hub", "c4")])
def test_a_missing_package_is_one_clear_line_before_anything_is_done(tmp_path, monkeypatch, module, command):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {module.split('.')[0]}"):
        run(command, out=tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()


WRONG = {  # arguments: what is said of them
    "text --input nowhere.txt --out OUT": "nowhere.txt",
    "text --input x.txt --out OUT --val_fraktion=1": "--val_fraction",
    "c4 --out OUT --shards=2000": "1024",
    "icl --out OUT --tasks=hellaswag,hellswag": "hellswag",
}


@pytest.mark.parametrize("args", WRONG)
def test_wrong_arguments_end_in_a_short_error(tmp_path, args):
    with pytest.raises(UserError, match=re.escape(WRONG[args])) as error:
        prepare_data.main(args.replace("OUT", str(tmp_path)).split())
    assert len(str(error.value).splitlines()) <= 3


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path, corpus):
    out = prepare(tmp_path / "out", corpus)
    before = contents(out)
    with pytest.raises(UserError, match="holds other data.*\nremove"):
        prepare(out, corpus, val_fraction=0.2)
    assert contents(out) == before
    (out / "meta.json").unlink()  # shards that nothing describes
    with pytest.raises(UserError, match="holds other data.*\nremove"):
        prepare(out, corpus)


def test_what_else_lies_in_the_folder_stays_there(tmp_path):
    """Were it a folder of downloads, of one's own, and the input itself."""
    source = tmp_path / "out" / "download" / "a.jsonl"
    source.parent.mkdir(parents=True)
    write_jsonl(source, FOUND[:9])
    out = prepare(tmp_path / "out", source, val_fraction=1e-9)  # read twice: for chance it is too little
    assert len(both(out)) == 9 and source.exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "meta.json").write_text('{"of": "another program"}')
    with pytest.raises(UserError, match="holds other data"):
        prepare(mine, source)
    assert contents(mine) == {"meta.json": b'{"of": "another program"}'}


def test_a_document_that_tiktoken_cannot_take_is_named(tmp_path):
    pattern = r"\s+(?!\S)|\S+|\s+"  # of GPT-2's, what recurses a million times on a million spaces
    ranks = {bytes([i]): i for i in range(256)}
    special = {"<|endoftext|>": 256}
    tokenizer = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    chunk = [(prepare_data.Input(tmp_path / "space.py"), b" " * 2_000_000 + b"a")]
    with pytest.raises(UserError, match="space.py: own cannot encode a document of 2,000,001 bytes"):
        prepare_data.encode_chunk(tokenizer, 0, chunk)


# ------------------------------------------------------------------------------ the same bytes, in every case


@pytest.fixture
def batches(tmp_path, monkeypatch) -> tuple[Path, dict]:
    """Inputs of two kinds, and flags with which they make three batches of several chunks."""
    monkeypatch.setattr(prepare_data, "CHUNK", 1 << 14)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text(paragraphs(90_000, seed=7))
    write_jsonl(tmp_path / "in" / "b.jsonl.gz", FOUND[280:])
    return tmp_path / "in", {"shard_tokens": 150_000, "val_fraction": 0.1}


def kill_at(n: int):
    """SIGKILL this process when it is about to sync or rename for the n-th time."""
    calls = itertools.count(1)

    def counted(function):
        return lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else function(*args)

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def test_killed_at_any_time_it_ends_with_the_same_bytes_with_any_number_of_threads(tmp_path, batches, capfd):
    inputs, flags = batches
    whole = contents(prepare(tmp_path / "whole", inputs, workers=3, **flags))
    shards = json.loads(whole["meta.json"])["splits"]["train"]["shards"]
    assert len(shards) == 3 and all(120_000 < shard["tokens"] < 170_000 for shard in shards[:-1])
    for n in itertools.count(1):
        out, child = tmp_path / str(n), os.fork()
        if child == 0:
            kill_at(n)
            prepare(out, inputs, workers=1, **flags)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            break
        for path in out.glob("*.bin"):  # what has its final name is whole
            assert path.read_bytes() == whole[path.name]
        prepare(out, inputs, workers=2, **flags)
        assert contents(out) == whole
    assert n > 20 and contents(out) == whole
    assert capfd.readouterr().out.count("going on after") > n - 5


def test_a_full_disk_ends_in_a_short_error_and_the_same_command_goes_on(tmp_path, batches):
    inputs, flags = batches
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond
    try:
        with pytest.raises(UserError, match="File too large\nnothing is lost: .* the same command goes on"):
            prepare(tmp_path / "out", inputs, **flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = contents(prepare(tmp_path / "whole", inputs, **flags))
    assert contents(prepare(tmp_path / "out", inputs, **flags)) == whole


# -------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants, server = pytest.importorskip("huggingface_hub.constants"), Hub()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


FIRST, SECOND = "c4-train.00000-of-01024.json.gz", "c4-train.00001-of-01024.json.gz"


@pytest.fixture
def c4(hub):
    """Two files as C4 has them, which hold FOUND."""
    for name, part in ((FIRST, FOUND[:200]), (SECOND, FOUND[200:])):
        lines = [json.dumps({"text": text, "url": "http://x"}) + "\n" for text in part]
        hub.offer("allenai/c4", prepare_data.C4, f"en/{name}", gzip.compress("".join(lines).encode()))


def fetch(out: Path, command="c4", shards=2) -> Path:
    return run(command, out=out, shards=shards, tokenizer="bytes", val_fraction=0.05)


def test_a_download_cut_off_goes_on_by_range_and_disk_is_freed_file_by_file(tmp_path, hub, c4):
    out, on_disk = tmp_path / "out", []
    hub.on_get = lambda: on_disk.extend(out.rglob("*.json.gz"))
    hub.faults = [None, "cut"]
    fetch(out)
    assert sorted(both(out)) == sorted(FOUND)
    assert hub.log[:2] == [(FIRST, None), (SECOND, None)] and len(hub.log) == 3
    assert re.fullmatch(r"bytes=[1-9]\d{4,}-", hub.log[2][1])  # what had come is not asked for again
    assert not on_disk and not (out / ".download").exists()


@pytest.mark.parametrize("fault, said", [("corrupt", "arrived corrupted"), (503, "503")])
def test_wrong_bytes_are_never_tokenised_and_the_same_command_goes_on(tmp_path, hub, c4, fault, said):
    hub.faults = [None, fault]
    with pytest.raises(UserError, match=f"{said}.*\nnothing is lost: the same command goes on") as error:
        fetch(tmp_path / "out")
    assert len(str(error.value).splitlines()) <= 3 and not list((tmp_path / "out").rglob(SECOND))
    assert sorted(both(fetch(tmp_path / "out"))) == sorted(FOUND)
    assert [name for name, _ in hub.log] == [FIRST, SECOND, SECOND]  # what is in shards is not fetched again


def test_tinystories_are_separated_by_their_lines(tmp_path, hub):
    stories = [f"Once upon a time {i}.\n\nThe end." for i in range(2000)]
    body = "\n<|endoftext|>\n".join(stories).encode()
    hub.offer("roneneldan/TinyStories", "main", prepare_data.STORIES, body)
    out = fetch(tmp_path / "out", "tinystories", 1)
    assert sorted(both(out)) == sorted(stories) and texts(out, "val")


# -------------------------------------------------------------------------------------------- evaluation sets


def offer_rows(hub: Hub, task: str, rows: list[dict], folder: Path):
    body = write_parquet(folder / "rows.parquet", rows).read_bytes()
    hub.offer(TASKS[task].repo, TASKS[task].revision, TASKS[task].file, body)


def test_evaluation_sets_are_the_rows_of_parquet_files_of_the_hub_or_a_mirror(tmp_path, hub):
    rows, out = [{"stem": f"é {i}?", "choices": {"text": ["a", "b"]}} for i in range(500)], tmp_path / "icl"
    offer_rows(hub, "openbookqa", rows, tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "prepare_data.py", "icl", "--tasks=openbookqa", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    run("icl", out=out, tasks="openbookqa")  # it is there
    lines = (out / "openbookqa" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert len(hub.log) == 1 and [path.name for path in out.iterdir()] == ["openbookqa"]


def test_a_set_of_another_size_is_refused_and_hellaswag_comes_with_its_notice(tmp_path, hub, capsys):
    offer_rows(hub, "hellaswag", [{"ctx": "x"}] * 3241, tmp_path)
    with pytest.raises(UserError, match="has 3241 rows, not the 10042"):
        run("icl", out=tmp_path / "icl", tasks="hellaswag")
    assert "takedown" in capsys.readouterr().out and not list(tmp_path.rglob("*.jsonl"))


def test_lambada_is_the_official_file_or_nothing(tmp_path, hub, monkeypatch):
    known, body = TASKS["lambada_openai"], b'{"text": "made here"}\n' * 5153
    hub.offer(known.repo, known.revision, known.file, body)
    with pytest.raises(UserError, match="another one"):
        run("icl", out=tmp_path / "icl", tasks="lambada_openai")
    assert not list(tmp_path.rglob("*.jsonl"))
    official = known._replace(sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(TASKS, "lambada_openai", official)
    out = run("icl", out=tmp_path / "icl", tasks="lambada_openai")
    assert (out / "lambada_openai" / "test.jsonl").read_bytes() == body
