"""The specification of sample.py: text as soon as it is certain, and the command line."""

import io
import os
import pty
import signal
import subprocess
import sys

import pytest
from common import ROOT, make, save

import sample
from checkpoint import load_model
from data import get_tokenizer
from decode import generate, lay_out_for_decoding, quantize
from model import UserError


def test_characters_that_span_tokens_come_whole(monkeypatch):
    def speak(ids: bytes) -> list[str]:
        monkeypatch.setattr(sample, "stream", lambda *args, **options: ((0, i) for i in ids))
        return [piece for _, piece in sample.stream_text(None, get_tokenizer("bytes"), [[1]], 9, 1)]

    assert speak("aé中🙂b".encode()) == ["a", "", "é", "", "", "中", "", "", "", "🙂", "b", ""]
    assert "".join(speak(b"a\xe4\xb8")) == "a\ufffd"  # cut in the middle
    assert "".join(speak(b"\xffa")) == "\ufffda"
    assert speak([97, 300, 98]) == ["a", "", "b", ""]  # 300: of a vocab_size beyond the tokenizer's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with two checkpoints, the second one newer."""
    folder = tmp_path_factory.mktemp("work")
    for name, seed in (("old", 1), ("new", 2)):
        save(folder / "out" / name, 1, make(seed, vocab_size=257, block_size=64))
    (folder / "prompt.txt").write_text("def ")
    (folder / "latin.txt").write_bytes(b"\xff\xfe")
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*args, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        sample.main([*args, "--max_new_tokens=20"])
        return capsys.readouterr()

    return run


def best(model, n: int, iters: int) -> str:
    """The text that the best tokens make after "def "."""
    [ids] = generate(model, [list(b"def ")], n, iters, stop_token=256)
    return get_tokenizer("bytes").decode(ids)


def start(folder, *flags, **pipes) -> subprocess.Popen:
    """sample.py in a process of its own."""
    command = [sys.executable, str(ROOT / "sample.py"), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, **pipes)


def test_only_generated_text_is_on_stdout_from_the_newest_checkpoint(cli):
    flags = ["--iters=3", "--temperature=0"]
    out, err = cli("--prompt", "def ", *flags)
    assert out == best(load_model("out/new"), 20, 3) + "\n"
    assert "def " in err and "tokens/s" in err and "3 iterations per token" in err
    assert cli("--prompt_file=prompt.txt", *flags).out == out
    assert cli(*flags, stdin="def ").out == out
    drafted = cli("--prompt", "def ", *flags, "--draft_iters=1")
    assert drafted.out == out and "drafted tokens accepted" in drafted.err
    older = cli("--prompt", "def ", *flags, "--ckpt=out/old").out
    assert older == best(load_model("out/old"), 20, 3) + "\n" != out


def test_a_seed_repeats_its_samples_which_are_numbered_from_it(cli):
    five, six = (cli("--prompt", "def ", f"--seed={seed}").out for seed in (5, 6))
    assert cli("--prompt", "def ", "--num_samples=2", "--seed=5").out == five + six
    assert five != six


def test_early_exit_reports_its_iterations_and_compare_has_a_column_each(cli):
    report = cli("--prompt", "def ", "--iters=8", "--exit", "kl:1e-2").err
    assert "iterations per token (" in report and "%" in report
    side = cli("--prompt", "def ", "--compare=1,2,4").out
    assert side.splitlines()[0].split(" | ")[2].strip() == "iters 4" and "def " in side


def test_sampling_in_lower_precision(cli):
    flags = ["--prompt", "def ", "--temperature=0", "--iters=2"]
    half = lay_out_for_decoding(load_model("out/new").bfloat16())
    assert cli(*flags, "--dtype=bfloat16").out == best(half, 20, 2) + "\n"
    assert cli(*flags, "--dtype=int8").out == best(quantize(load_model("out/new")), 20, 2) + "\n"


def test_text_comes_while_it_is_generated(folder):
    """Killed at its first bytes, the process has written the beginning of its text and not the end."""
    whole = best(load_model(folder / "out" / "new"), 150, 8).encode()
    flags = ["--prompt=def ", "--iters=8", "--temperature=0", "--max_new_tokens=2000"]  # for seconds
    with start(folder, *flags, stderr=subprocess.PIPE) as process:
        first = os.read(process.stdout.fileno(), 1)
        alive = process.poll() is None
        process.kill()
        out, err = process.communicate()
    assert alive and process.returncode == -signal.SIGKILL and b"tokens/s" not in err
    out = first + out
    assert len(out) < len(whole) and whole.startswith(out)


def test_a_terminal_without_a_prompt_is_interactive(folder, cli):
    expected = cli("--prompt", "def ", "--iters=1").out
    ours, theirs = pty.openpty()
    flags = ["--max_new_tokens=20", "--iters=1"]
    with start(folder, *flags, stdin=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        os.write(ours, b"\n")  # an empty prompt is refused, and the next one asked for
        os.write(ours, b"def \n\x04")
        out, err = process.communicate(timeout=300)
        os.close(ours)
    assert process.returncode == 0, err
    assert out.decode() == expected and err.count(b"> ") == 3
    assert err.index(b"the prompt is empty") < err.index(b"tokens/s")


def test_text_that_the_terminal_cannot_print_is_escaped(folder, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with start(folder, "--prompt=é", "--temperature=2", "--top_k=0", stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert b"\\ufffd" in out


def test_without_any_input_the_prompt_is_missing(folder):
    with start(folder, preexec_fn=lambda: os.close(0), stderr=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and err.startswith(b"error: the prompt is empty\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as locales have it
def test_a_prompt_that_is_no_text_is_refused(folder, monkeypatch, errors):
    monkeypatch.setenv("PYTHONIOENCODING", f"utf-8:{errors}")
    with start(folder, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, err = process.communicate(b"\xff\xfe", timeout=300)
    assert (process.returncode, err) == (2, b"error: the prompt is no UTF-8 text\n")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 65], "65 tokens, the model's context 64"),
        (["--prompt_file=latin.txt"], "no UTF-8"),
        (["--prompt=a", "--draft_iters=2"], "draft_iters=2 must be below iters=2"),
        (["--prompt=a", "--draft_iters=1", "--cache=last"], "drafting needs cache=full"),
        (["--prompt=a", "--draft_iters=1", "--exit=kl:1"], "exclude each other"),
        (["--prompt=a", "--exit=kl:0"], "give kl:1e-3"),
        (["--prompt=a", "--exit=mean:2", "--iters=4"], "needs the model's training data"),
        (["--prompt=a", "--temperature=nan"], "temperature=nan"),
        (["--prompt=a", "--top_p=0"], "top_p=0"),
        (["--prompt=a", "--num_samples=0"], "num_samples=0"),
        (["--prompt=a", "--cache=half"], "neither full nor last"),
        (["--prompt=a", "--compare=1,2", "--iters=2"], "leave out --iters"),
        (["--promt=a"], "did you mean --prompt?"),
    ],
)
def test_bad_input_is_refused(cli, args, message):
    with pytest.raises(UserError) as error:
        cli(*args)
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 3
