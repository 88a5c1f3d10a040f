"""The documents say what is there: commands, flags, files, the loop and the output that README quotes."""

import json
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache, partial
from io import StringIO
from runpy import run_path

import pytest
import torch
from common import ROOT, make, tokens

import sample

DOCUMENTS = [ROOT / name for name in ("README.md", "hf/README.md", "experiments/README.md")]


def commands() -> list[tuple[str, ...]]:
    """(script or module, *arguments) of every command in the documents, once."""
    listed = {}
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ {4,}((?:.*&& )?(?:\S*python3?|\S*torchrun) .*)$", text, re.M):
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                scripts = [w for w in words if w.endswith(".py") and not w.startswith("config/")]
                modules = [w for w in words if re.fullmatch(r"(experiments|hf)\.\w+", w)]
                for script in (scripts + modules)[:1]:
                    listed[(script, *words[words.index(script) + 1 :])] = None
    return list(listed)


@cache
def help_of(script: str, *subcommand: str) -> str:
    """What `script --help` prints; run in this process, since each import of PyTorch takes seconds."""
    path, output = script.removesuffix(".py").replace(".", "/") + ".py", StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end, redirect_stdout(output):
        patch.setattr(sys, "argv", [script, *subcommand, "--help"])
        run_path(str(ROOT / path), run_name="__main__")
    assert not end.value.code, script
    return output.getvalue()


def test_every_command_has_its_script_its_config_and_its_flags():
    assert len(commands()) > 20
    for script, *after in commands():
        for word in after:
            assert not word.startswith(("config/", "models/")) or (ROOT / word).exists(), word
        subcommands = after[:1] if script in ("prepare_data.py", "experiments.speed") else []
        shown = help_of(script, *subcommands)
        flags = {word[2:].split("=")[0] for word in after if word.startswith("--")}
        assert all(re.search(rf"--{flag}\b", shown) for flag in flags), (script, flags)


def test_the_two_commands_of_a_fresh_machine_stand_in_the_readme():
    text = (ROOT / "README.md").read_text()
    setup = "python3 -m venv .venv && .venv/bin/pip install -r"
    assert f"{setup} requirements.txt && .venv/bin/python train.py config/abbie_tiny.py\n" in text
    assert f"{setup} requirements-dev.txt && .venv/bin/python -m pytest\n" in text
    assert f"{setup} requirements-dev.txt && .venv/bin/python -m pytest\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("rule", ["abbie_d", "recall", "zero_pt"])
@torch.no_grad()
def test_the_quoted_loop_computes_the_models_logits(rule):
    quoted = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    model, idx = make(rule=rule), tokens()
    names = {"model": model, "idx": idx, "iters": 3, "partial": partial}
    exec(quoted, names)
    assert torch.equal(names["logits"], model(idx, iters=3)[0])
    assert not torch.equal(names["logits"], model(idx, iters=1)[0])


def test_the_printed_lens_is_what_the_shipped_model_shows(capsys):
    text = (ROOT / "README.md").read_text()
    lens = re.compile(r"    python sample.py (.*--lens.*)\n(?:.*\n)*?\n((?:    .*\n)+)\n")
    command, shown = lens.search(text).groups()
    sample.main(shlex.split(command.replace("models/", f"{ROOT}/models/")))
    now, then = capsys.readouterr().out.splitlines(), [line[4:] for line in shown.splitlines()]
    assert len(now) == len(then) > 5
    for ours, quoted in zip(now[:-1], then[:-1]):  # the last line is of tiny numbers
        assert re.sub(r"\d+%", "%", ours).split() == re.sub(r"\d+%", "%", quoted).split()
        for share, other in zip(re.findall(r"(\d+)%", ours), re.findall(r"(\d+)%", quoted)):
            assert abs(int(share) - int(other)) <= 1, "but for rounding on another CPU"


def test_every_file_that_is_named_exists():
    for document in DOCUMENTS:
        text = document.read_text()
        links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
        paths = re.findall(r"`((?:config|experiments|hf|tests|models)/[\w./]*\w)`", text)
        for path in links:
            assert (document.parent / path).exists(), f"{document.name} names {path}"
        for path in paths:
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_numbers_come_from_results_with_a_line_per_run():
    for path in sorted((ROOT / "experiments" / "results").iterdir()):
        assert path.suffix == ".jsonl", f"{path.name}: results hold data, one JSON line per run"
        assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines()), path
