"""prepare_data.py: what it promises about text, shards, kills and downloads, on real files, processes and a
real server (tests/hub.py)."""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiktoken
from hub import Hub

import data
import prepare_data
from data import EVAL_SETS, Shards, documents, get_tokenizer
from model import UserError

ROOT = Path(prepare_data.__file__).parent
RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyzéß中😀", k=RNG.randint(1, 9))) for _ in range(500)]


def paragraphs(n: int, seed: int = 0) -> str:
    """About n characters, some of them beyond ASCII."""
    rng, parts, size = random.Random(seed), [], 0
    while size < n:
        parts.append(" ".join(rng.choices(WORDS, k=rng.randint(5, 80))) + "\n\n")
        size += len(parts[-1])
    return "".join(parts)


def write_jsonl(path: Path, texts) -> Path:
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def arguments(out: Path, *inputs, **flags) -> list[str]:
    args = ["text", "--input", *map(str, inputs), "--out", str(out)]
    return args + [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]


def prepare(out: Path, *inputs, **flags) -> Path:
    prepare_data.main(arguments(out, *inputs, **flags))
    return out


def texts(folder: Path, split: str) -> list[str]:
    return [get_tokenizer("bytes").decode(document.tolist()) for document in documents(folder, split)]


def all_texts(folder: Path) -> list[str]:
    return sorted(texts(folder, "train") + texts(folder, "val"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list[str]]:
    """400 documents as lines of JSON, and those documents."""
    rng = random.Random(1)
    found = [paragraphs(rng.randint(20, 3000), seed) for seed in range(400)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", found), found


# -------------------------------------------------------------------------------------------------- the split


def is_val(text: str, fraction: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < fraction


def test_a_document_goes_to_validation_by_its_hash_whatever_is_added_later(tmp_path, corpus):
    path, found = corpus
    small = prepare(tmp_path / "small", write_jsonl(tmp_path / "b.jsonl", found[:250]), val_fraction=0.1)
    large = prepare(tmp_path / "large", path, val_fraction=0.1)
    assert texts(large, "val") == [text for text in found if is_val(text, 0.1)]
    assert texts(large, "train") == [text for text in found if not is_val(text, 0.1)]
    assert set(texts(small, "val")) <= set(texts(large, "val"))
    meta, n_bytes = (
        json.loads((large / "meta.json").read_text()),
        sum(len(t.encode()) for t in texts(large, "val")),
    )
    entry, n = meta["splits"]["val"], len(texts(large, "val"))
    assert (entry["documents"], entry["bytes"], entry["tokens"]) == (n, n_bytes, n_bytes + n)
    assert (meta["tokenizer"], meta["vocab_size"], meta["skipped"]) == ("bytes", 257, 0)
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
    assert texts(out, "val") == [smallest] and all_texts(out) == poems
    assert set(contents(out)) == {"meta.json", "train_00000.bin", "val_00000.bin"}
    with pytest.raises(UserError, match="no document is left for the train split\n.*--val_input"):
        prepare(tmp_path / "one", write_jsonl(tmp_path / "one.jsonl", ["alone"]))


def test_val_input_is_the_validation_split(tmp_path, corpus):
    (tmp_path / "val.md").write_text("held out")
    out = prepare(tmp_path / "out", corpus[0], val_input=tmp_path / "val.md")
    assert texts(out, "val") == ["held out"] and texts(out, "train") == corpus[1]


# ---------------------------------------------------------------------------------------------------- sources


def test_stdlib_is_the_library_by_whole_files(tmp_path, capsys):
    prepare_data.main(["stdlib", "--out", str(tmp_path)])
    before, train, val = contents(tmp_path), texts(tmp_path, "train"), texts(tmp_path, "val")
    source = json.loads(before["meta.json"])["source"]
    version = re.escape(".".join(map(str, sys.version_info[:3])))
    found = re.match(rf"standard library of Python {version}, (\d+) files, SHA-256 [0-9a-f]{{64}}$", source)
    assert len(train) + len(val) == int(found[1]) and len(val) > 5
    for module in (json, gzip, random):  # each is one document, whole
        assert Path(module.__file__).read_bytes().decode() in train + val
    assert Path(tiktoken.__file__).read_text() not in train + val
    assert not any("class TestBasicOps" in text for text in train + val)
    prepare_data.main(["stdlib", "--out", str(tmp_path)])
    assert contents(tmp_path) == before and f"{tmp_path} is complete\n{source}" in capsys.readouterr().out


def test_every_format_gives_the_same_documents(tmp_path, corpus):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    found = corpus[1]
    (tmp_path / "code").mkdir()
    for number, text in enumerate(found):
        (tmp_path / "code" / f"{number:03d}.py").write_text(text, newline="")
    write_jsonl(tmp_path / "a.jsonl.gz", found)
    parquet.write_table(pyarrow.table({"id": range(400), "text": found}), tmp_path / "a.parquet", 100)
    expected = prepare(tmp_path / "expected", corpus[0])
    for name in ("a.jsonl.gz", "a.parquet", "code"):
        out = prepare(tmp_path / f"out_{name}", tmp_path / name)
        for split in ("train", "val"):
            assert (out / f"{split}_00000.bin").read_bytes() == (expected / f"{split}_00000.bin").read_bytes()


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
    "json.jsonl": (b'{"text": "good"}\n{"text": "cut of\n{"text": "fine"}', "line 2 is broken JSON", 2),
    "deep.jsonl": (b"[" * 100_000 + b'\n{"text": "good"}', "line 1 is broken JSON", 1),
    "field.jsonl": (b'{"text": "good"}\n{"body": "x"}\n', "line 2 has no text under 'text'", 1),
    "number.jsonl": (b'{"text": 3}\n{"text": "good"}\n', "line 1 has no text", 1),
    "latin1.jsonl": (b'{"text": "caf\xe9"}\n{"text": "good"}\n', "line 1 is invalid UTF-8", 1),
    "latin1.txt": (b"caf\xe9 au lait", "invalid UTF-8, bytes e9", 0),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "good"}\n' * 9)[:-9], "broken gzip", 9),
    "no.parquet": (b"PAR1 not parquet PAR1", "broken parquet", 0),
    "long.jsonl": (b'{"text": "' + b"x" * (9 << 20) + b'"}\n{"text": "good"}\n', "longer than 8 MB", 1),
    "long.py": (b"#" * (9 << 20), "longer than 8 MB", 0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_an_error_or_a_counted_skip(tmp_path, capfd, name):
    content, what, n_left = BAD[name]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    (tmp_path / "val.md").write_text("validation")
    (tmp_path / "good.md").write_text("training")
    args = tmp_path / "out", tmp_path / "good.md", tmp_path / name
    with pytest.raises(UserError) as error:
        prepare(*args, val_input=tmp_path / "val.md")
    assert name in str(error.value) and what in str(error.value) and "--skip_bad" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3 and not list((tmp_path / "out").glob("*.bin"))
    out = prepare(*args, val_input=tmp_path / "val.md", skip_bad=True)
    assert json.loads((out / "meta.json").read_text())["skipped"] == 1
    assert len(texts(out, "train")) == 1 + n_left and what in capfd.readouterr().err


def test_a_missing_column_names_those_that_are_there(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"] * 9}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text' .*--field.* body"):
        prepare(tmp_path / "out", tmp_path / "a.parquet")


@pytest.mark.parametrize("package, command", [("pyarrow", "fineweb_edu"), ("huggingface_hub", "c4")])
def test_a_missing_package_is_one_clear_line_before_anything_is_done(tmp_path, monkeypatch, package, command):
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        prepare_data.main([command, "--shards=1", "--out", str(tmp_path / "out"), "--tokenizer=bytes"])
    assert not (tmp_path / "out").exists()


WRONG = {  # arguments: what is said of them
    "nowhere": "invalid choice",
    "text --input nowhere.txt --out OUT": "nowhere.txt",
    "text --input OUT/a.pdf --out OUT": ".jsonl",
    "text --input OUT --out OUT": "no file",
    "text --input x.txt": "--out",
    "text --input x.txt --out OUT --val_fraktion=1": "--val_fraction",
    "stdlib --out OUT --val_fraction=2": "between 0 and 1",
    "c4 --out OUT --shards=2000": "1024",
    "icl --out OUT --tasks=hellaswag,hellswag": "hellswag",
}


@pytest.mark.parametrize("args", WRONG)
def test_wrong_arguments_end_in_a_short_error(tmp_path, args):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=re.escape(WRONG[args])) as error:
        prepare_data.main(args.replace("OUT", str(tmp_path)).split())
    assert len(str(error.value).splitlines()) <= 3


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path, corpus):
    out = prepare(tmp_path / "out", corpus[0])
    before = contents(out)
    with pytest.raises(UserError, match="holds other data.*\nremove"):
        prepare(out, corpus[0], val_fraction=0.2)
    (out / "meta.json").rename(tmp_path / "meta.json")  # shards that nothing describes
    with pytest.raises(UserError, match="holds other data.*\nremove"):
        prepare(out, corpus[0])
    (tmp_path / "meta.json").rename(out / "meta.json")
    assert contents(out) == before
    (out / "train_00000.bin").unlink()
    with pytest.raises(UserError, match="train_00000.bin is missing\nremove"):
        prepare(out, corpus[0])


# ------------------------------------------------------------------------------ the same bytes, in every case


@pytest.fixture
def batches(tmp_path, corpus, monkeypatch) -> tuple[Path, dict]:
    """Inputs of two kinds, and flags with which they make three batches of several chunks."""
    monkeypatch.setattr(prepare_data, "CHUNK", 1 << 14)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text(paragraphs(90_000, seed=7))
    write_jsonl(tmp_path / "in" / "b.jsonl.gz", corpus[1][:120])
    return tmp_path / "in", {"shard_tokens": 150_000, "val_fraction": 0.1}


def test_output_does_not_depend_on_the_number_of_threads(tmp_path, batches):
    inputs, flags = batches
    one, two = (prepare(tmp_path / str(n), inputs, workers=n, **flags) for n in (1, 2))
    assert contents(one) == contents(two)
    shards = json.loads((one / "meta.json").read_text())["splits"]["train"]["shards"]
    assert len(shards) == 3 and all(120_000 < shard["tokens"] < 170_000 for shard in shards[:-1])
    for path in one.glob("*.bin"):  # no document runs on into the next shard
        assert path.read_bytes().endswith(get_tokenizer("bytes").eot_token.to_bytes(2, "little"))


def in_child(args: list[str], before=lambda: None) -> int:
    """Run prepare_data.py in a process of its own -> its process id."""
    child = os.fork()
    if child == 0:
        try:
            before()
            prepare_data.main(args)
        finally:
            os._exit(0)
    return child


def was_killed(child: int) -> bool:
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_at(n: int):
    """SIGKILL this process when it is about to sync or rename for the n-th time."""
    calls = itertools.count(1)

    def counted(function):
        return lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else function(*args)

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="makes processes by fork")


@needs_fork
def test_killed_at_any_time_it_goes_on_and_ends_with_the_same_bytes(tmp_path, batches, capfd):
    inputs, flags = batches
    whole, printed = contents(prepare(tmp_path / "whole", inputs, **flags)), []
    for n in itertools.count(1):
        out = tmp_path / str(n)
        child = in_child(arguments(out, inputs, workers=1, **flags), before=lambda: kill_at(n))  # noqa: B023
        if not was_killed(child):
            break
        for path in out.glob("*.bin"):  # what has its final name is whole
            assert path.read_bytes() == whole[path.name]
            with pytest.raises(UserError, match="holds other data"):  # and is not given up for other data
                prepare(out, inputs)
        if not (out / "meta.json").exists():
            with pytest.raises(UserError, match="interrupted"):
                Shards(out, "train", 64)
        capfd.readouterr()
        prepare(out, inputs, workers=2, **flags)
        assert contents(out) == whole
        printed.append(capfd.readouterr().out)
    assert n > 20 and contents(out) == whole
    assert ["going on after" in text for text in printed[2:-1]] == [True] * (n - 4)
    assert "is complete" in printed[-1]  # killed after the last rename


def test_a_full_disk_ends_in_a_short_error_and_the_same_command_goes_on(tmp_path, batches):
    resource = pytest.importorskip("resource")
    inputs, flags = batches
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond
    try:
        with pytest.raises(UserError, match="File too large\nnothing is lost: .* the same command goes on"):
            prepare(tmp_path / "out", inputs, **flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").glob("*.bin"))
    out = prepare(tmp_path / "out", inputs, **flags)
    assert contents(out) == contents(prepare(tmp_path / "whole", inputs, **flags))


# -------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants, server = pytest.importorskip("huggingface_hub.constants"), Hub()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def c4(hub, corpus) -> list[str]:
    """Two files as C4 has them."""
    for number in range(2):
        lines = [json.dumps({"text": text, "url": "http://x"}) + "\n" for text in corpus[1][number::2]]
        file = f"en/c4-train.{number:05d}-of-01024.json.gz"
        hub.offer("allenai/c4", prepare_data.C4, file, gzip.compress("".join(lines).encode(), mtime=0))
    return corpus[1][0::2] + corpus[1][1::2]


FIRST, SECOND = "c4-train.00000-of-01024.json.gz", "c4-train.00001-of-01024.json.gz"


def fetch_args(out: Path, command="c4", shards=2) -> list[str]:
    flags = f"--shards={shards} --tokenizer=bytes --val_fraction=0.05"
    return [command, "--out", str(out), *flags.split()]


def fetch(out: Path, *args) -> Path:
    prepare_data.main(fetch_args(out, *args))
    return out


def test_a_download_cut_off_goes_on_by_range_and_disk_is_freed_file_by_file(tmp_path, hub, c4, capsys):
    out, on_disk = tmp_path / "out", []
    hub.on_get = lambda: on_disk.append({path.name for path in out.rglob("*.json.gz")})
    hub.faults = ["", "cut"]
    fetch(out)
    assert texts(out, "train") == [text for text in c4 if not is_val(text, 0.05)]
    assert texts(out, "val") == [text for text in c4 if is_val(text, 0.05)]
    assert hub.log[:2] == [(FIRST, None), (SECOND, None)] and len(hub.log) == 3
    assert re.fullmatch(r"bytes=[1-9]\d{4,}-", hub.log[2][1])  # what had come is not asked for again
    assert on_disk == [set(), set(), set()] and not (out / "download").exists()
    printed = capsys.readouterr().out
    assert "download: 0.6 GB" in printed and "disk: " in printed and "tokenising: " in printed


def test_wrong_bytes_are_never_tokenised(tmp_path, hub, c4):
    hub.faults = ["", "corrupt"]
    with pytest.raises(UserError, match="arrived corrupted.*\nnothing is lost"):
        fetch(tmp_path / "out")
    assert not list((tmp_path / "out").rglob(SECOND))
    assert json.loads((tmp_path / "out" / "unfinished.json").read_text())["progress"]["stage"] == 1
    assert all_texts(fetch(tmp_path / "out")) == sorted(c4)
    assert [name for name, _ in hub.log] == [FIRST, SECOND, SECOND]  # what is in shards is not fetched again


def test_what_the_hub_refuses_is_a_short_error_and_the_same_command_goes_on(tmp_path, hub, c4):
    hub.faults = ["", 503]
    with pytest.raises(UserError, match="503.*\nnothing is lost: the same command goes on") as error:
        fetch(tmp_path / "out")
    assert len(str(error.value).splitlines()) <= 3
    assert contents(fetch(tmp_path / "out")) == contents(fetch(tmp_path / "whole"))
    with pytest.raises(UserError, match="Not Found"):
        fetch(tmp_path / "none", "tinystories", 1)


@needs_fork
def test_killed_in_a_download_the_same_command_goes_on(tmp_path, hub, c4):
    out, killed = tmp_path / "out", threading.Event()
    hub.faults, hub.on_get = ["", "kill"], lambda: killed.wait(10) if len(hub.log) == 2 else None
    hub.victim = in_child(fetch_args(out))
    killed.set()
    assert was_killed(hub.victim) and (out / "train_00000.bin").exists() and not (out / "meta.json").exists()
    assert all_texts(fetch(out)) == sorted(c4) and not (out / "download").exists()
    assert hub.log[-1] == (SECOND, None)


def test_tinystories_are_separated_by_their_lines(tmp_path, hub):
    stories = [f"Once upon a time {i}.\n\nThe end." for i in range(2000)]
    body = "\n<|endoftext|>\n".join(stories).encode()
    hub.offer("roneneldan/TinyStories", "main", "TinyStoriesV2-GPT4-train.txt", body)
    out = fetch(tmp_path / "out", "tinystories", 1)
    assert all_texts(out) == sorted(stories) and texts(out, "val")


# -------------------------------------------------------------------------------------------- evaluation sets


def offer_rows(hub: Hub, task: str, rows: list[dict], folder: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    known = EVAL_SETS[task]
    hub.offer(known.repo, known.revision, known.file, (folder / "rows.parquet").read_bytes())


def icl(out: Path, tasks: str):
    prepare_data.main(["icl", "--tasks", tasks, "--out", str(out)])


def test_evaluation_sets_are_the_rows_of_the_hubs_parquet_files(tmp_path, hub, capsys):
    rows = [
        {"question_stem": f"é {i}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}} for i in range(500)
    ]
    offer_rows(hub, "openbookqa", rows, tmp_path)
    icl(tmp_path / "icl", "openbookqa")
    path = tmp_path / "icl" / "openbookqa" / "test.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    hub.log.clear()
    icl(tmp_path / "icl", "openbookqa")
    assert not hub.log and "takedown" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "icl").iterdir()] == ["openbookqa"]


def test_a_mirror_is_named_by_hf_endpoint(tmp_path, hub):
    offer_rows(hub, "sciq", [{"question": str(i)} for i in range(1000)], tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "prepare_data.py", "icl", "--tasks=sciq", "--out", str(tmp_path / "icl")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    assert (tmp_path / "icl" / "sciq" / "test.jsonl").read_text().count("\n") == 1000


def test_a_set_of_another_size_is_refused_and_hellaswag_comes_with_its_notice(tmp_path, hub, capsys):
    offer_rows(hub, "hellaswag", [{"ctx": "x"}] * 3241, tmp_path)
    with pytest.raises(UserError, match="has 3241 rows, not the 10042"):
        icl(tmp_path / "icl", "hellaswag")
    assert "takedown" in capsys.readouterr().out and not list(tmp_path.rglob("*.jsonl"))


def test_lambada_is_the_official_file_or_nothing(tmp_path, hub, monkeypatch):
    known, body = EVAL_SETS["lambada_openai"], b'{"text": "made here"}\n' * 5153
    hub.offer(known.repo, known.revision, known.file, body)
    with pytest.raises(UserError, match="another one"):
        icl(tmp_path / "icl", "lambada_openai")
    assert not list(tmp_path.rglob("*.jsonl"))
    official = known._replace(sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(data.EVAL_SETS, "lambada_openai", official)
    icl(tmp_path / "icl", "lambada_openai")
    assert (tmp_path / "icl" / "lambada_openai" / "test.jsonl").read_bytes() == body
