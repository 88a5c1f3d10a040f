"""The documents say what is there: commands, flags, files, the loop and the output that README quotes."""

import json
import re
import shlex
import sys
from functools import partial
from runpy import run_path

import pytest
import torch
from common import ROOT, make, tokens

import sample
from experiments import RESULTS

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / name for name in ("README.md", "hf/README.md", "experiments/README.md")]


def commands() -> dict[str, set]:
    """{script or module, and its subcommand: words that are given to it} of all commands in the documents."""
    words = {}
    text = "".join(path.read_text() for path in DOCUMENTS)
    text = text.replace("\\\n", " ").replace("&& ", "\n    ")
    command = r"^ {4,}\S*(?:python3?|torchrun) (?:\S+ )*?(\w+\.py|(?:experiments|hf)\.\w+)(.*)"
    for script, rest in re.findall(command, text, re.M):
        given = shlex.split(rest.replace("[", ""), comments=True)
        if script in ("prepare_data.py", "experiments.speed"):
            script += f" {given[0]}"
        words.setdefault(script, set()).update(given)
    return words


def test_every_command_has_its_script_its_files_and_its_flags(capsys, monkeypatch):
    assert len(commands()) > 10
    for command, words in commands().items():
        script, *subcommand = command.split()
        path = ROOT / (script.removesuffix(".py").replace(".", "/") + ".py")
        monkeypatch.setattr(sys, "argv", [script, *subcommand, "--help"])
        with pytest.raises(SystemExit) as end:
            run_path(str(path), run_name="__main__")
        assert not end.value.code
        shown = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"^ +{word.split('=')[0]}\b", shown, re.M), word
            if word.startswith(("config/", "models/")):
                assert (ROOT / word).exists(), word


def test_the_two_commands_of_a_fresh_machine_stand_in_the_readme():
    setup = "python3 -m venv .venv && .venv/bin/pip install -r"
    suite = f"{setup} requirements-dev.txt && .venv/bin/python -m pytest\n"
    assert suite in README and suite in (ROOT / ".ci/run").read_text()
    assert f"{setup} requirements.txt && .venv/bin/python train.py config/abbie_tiny.py\n" in README


@pytest.mark.parametrize("rule", ["abbie_d", "recall", "zero_pt"])
@torch.no_grad()
def test_the_quoted_loop_computes_the_models_logits(rule):
    quoted = re.search(r"```python\n(.*?)```", README, re.S)[1]
    model, idx = make(rule=rule), tokens()
    names = {"model": model, "idx": idx, "iters": 3, "partial": partial}
    exec(quoted, names)
    assert torch.equal(names["logits"], model(idx, iters=3)[0])
    assert not torch.equal(names["logits"], model(idx, iters=1)[0])


def test_the_printed_lens_is_what_the_shipped_model_shows(capsys):
    lens = re.compile(r"    python sample.py (.*--lens.*)\n(?:.*\n)*?\n((?:    .*\n)+)\n")
    command, quoted = lens.search(README).groups()
    sample.main(shlex.split(command.replace("models/", f"{ROOT}/models/")))
    texts = [text.strip().rpartition("\n")[0] for text in (capsys.readouterr().out, quoted)]
    ours, theirs = texts  # without the last line, which is of tiny numbers
    assert re.sub(r"\d+%", "%", ours).split() == re.sub(r"\d+%", "%", theirs).split()
    shares, expected = ([int(share) for share in re.findall(r"(\d+)%", text)] for text in texts)
    assert len(shares) > 10 and shares == pytest.approx(expected, abs=1), "rounded on another CPU"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_exists(document):
    text = document.read_text()
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (document.parent / path).exists(), path
    for path in re.findall(r"`((?:config|experiments|hf|tests|models)/[\w./]*\w)`", text):
        assert (ROOT / path).exists(), path


def test_numbers_come_from_results_with_a_line_of_json_per_run_each_of_which_is_named():
    named = re.findall(r"results/([\w.]+\w)", (ROOT / "experiments/README.md").read_text())
    assert set(named) == {path.name for path in RESULTS.iterdir()}
    for name in named:
        for line in (RESULTS / name).read_text().splitlines():
            assert isinstance(json.loads(line), dict), name
