"""The documents say what is there: commands, flags, files, results, and the loop that README quotes."""

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

from config import Config
from experiments import read

DOCUMENTS = [ROOT / f"{name}.md" for name in ("README", "RESULTS", "REPRODUCE")]


def commands() -> list[tuple[str, ...]]:
    """(script or module, *arguments) of every command in the documents, once."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ {4,}((?:.*&& )?(?:\S*python3?|\S*torchrun) .*)$", text, re.M):
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                scripts = [w for w in words if w.endswith(".py") and not w.startswith("config/")]
                modules = [w for w in words if re.fullmatch(r"(experiments|hf)\.\w+", w)]
                for script in (scripts + modules)[:1]:
                    found[(script, *words[words.index(script) + 1 :])] = None
    return list(found)


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
    assert len(commands()) > 12
    for script, *after in commands():
        for word in after:
            assert not word.startswith("config/") or (ROOT / word).exists(), word
        subcommand = after[:1] if script == "prepare_data.py" else []
        shown = help_of(script, *subcommand)
        flags = {word[2:].split("=")[0] for word in after if word.startswith("--")}
        if script in ("bench.py", "experiments.speed"):  # which take train.py's flags too
            flags -= set(Config.__dataclass_fields__)
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
    names = {"model": model, "idx": idx, "iters": 3, "rope": model.rope(idx), "partial": partial}
    exec(quoted, names)
    assert torch.equal(names["logits"], model(idx, iters=3)[0])
    assert not torch.equal(names["logits"], model(idx, iters=1)[0])


def test_every_file_that_is_named_exists():
    for document in DOCUMENTS:
        text = document.read_text()
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        paths = re.findall(r"`((?:results|assets|config|experiments|hf|tests)/[\w./]*\w)`", text)
        for path in links + paths:
            assert (ROOT / path).exists(), f"{document.name} names {path}"
        for name in re.findall(r"`(\w+\.(?:py|md|toml|txt))`", text):  # perhaps in a folder
            assert (ROOT / name).exists() or list(ROOT.glob(f"[!.]*/{name}")), f"{document.name} names {name}"


def test_numbers_come_from_results_with_a_line_per_run():
    for path in sorted((ROOT / "results").iterdir()):
        assert path.suffix == ".jsonl", f"{path.name}: results hold data, one JSON line per run"
        assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines()), path
        script = path.stem.split("_")[0]  # that wrote it: study wrote study.jsonl and study_pairs.jsonl
        places = (ROOT, ROOT / "experiments")
        assert any((place / f"{script}.py").exists() for place in places), path


# README's table of leads: a line's title, its row of the study, where that is read, what is subtracted.
LEADS = [
    ("`recall` at r = 1", "recall_p6b3_2e-3", "1", None),
    ("`recall` at r = 6", "recall_p6b3_2e-3", "6", None),
    ("`recall` at r = 32", "recall_p6b3_2e-3", "32", None),
    ("r = 6 less Std: the same parameters and tokens", "recall_p6b3_2e-3", "6", "std_8k"),
    ("r = 6 less Std of ten blocks: the same", "recall_p6b3_2e-3", "6", "std_ten"),
    ("r = 6 less Std on 2.4 times the tokens: the same", "recall_p6b3_2e-3", "6", "std_more_2e-3"),
    ("on a quarter of the text: `recall` at r = 6", "recall_quarter", "6", None),
    ("r = 6 less Std of ten blocks, on a quarter", "recall_quarter", "6", "std_ten_quarter"),
    ("r = 6 less Std on 2.4 times the tokens, on a quarter", "recall_quarter", "6", "std_more_quarter"),
]


def test_the_leads_of_the_readme_are_those_of_the_records():
    loss = {(run["row"], run["seed"]): run["val_loss"] for run in read("study")}
    text = (ROOT / "README.md").read_text()
    table = text.partition("| | seed 1 | seed 2 | seed 3 |\n|---|---|---|---|\n")[2].partition("\n\n")[0]
    lines = table.splitlines()
    assert len(lines) == len(LEADS)
    for line, (title, row, r, control) in zip(lines, LEADS):
        shown, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
        assert shown.startswith(title)
        for seed, cell in zip((1, 2, 3), cells, strict=True):
            if (row, seed) not in loss or (control and (control, seed) not in loss):
                expected = ""
            elif control:
                expected = f"{loss[row, seed][r] - loss[control, seed]['1']:+.3f}"
            else:
                expected = f"{loss[row, seed][r]:.3f}"
            assert cell == expected, (title, seed)
