"""The documents say what is there: commands, flags, configs, files, and the loop that the README quotes."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from config import Config
from model import AbbIE

ROOT = Path(__file__).parent.parent
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "REPRODUCE.md") if path.exists()]


def commands():
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for line in re.findall(
            r"^(?: {4}|\$ )((?:.*&& )?(?:\S*python3?|\S*torchrun|\S*pip) .*)$", text, re.M
        ):
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                scripts = [word for word in words if word.endswith(".py") and "config/" not in word]
                if scripts:
                    yield document.name, words, scripts[0]


@lru_cache
def help_of(script: str, *subcommand: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / script, *subcommand, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script} --help: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "document, words, script",
    [
        pytest.param(*c, id=f"{c[0]}: {' '.join(c[1])[:90]}")
        for c in dict.fromkeys((d, tuple(w), s) for d, w, s in commands())
    ],
)
def test_every_command_has_its_script_its_config_and_its_flags(document, words, script):
    assert (ROOT / script).exists()
    after = words[words.index(script) + 1 :]
    for word in after:
        if word.startswith("config/"):
            assert (ROOT / word).exists(), word
    flags = {word[2:].split("=")[0] for word in after if word.startswith("--")}
    if script == "train.py":
        assert flags <= set(Config.__dataclass_fields__)
    else:
        subcommand = [after[0]] if script == "prepare_data.py" else []
        shown = help_of(script, *subcommand)
        assert all(f"--{flag}" in shown for flag in flags), flags


def test_there_are_commands_to_check():
    assert len(list(commands())) > 8


def test_the_two_commands_of_a_fresh_machine_stand_in_the_readme():
    text = (ROOT / "README.md").read_text()
    setup = "python3 -m venv .venv && .venv/bin/pip install -r"
    assert f"{setup} requirements.txt && .venv/bin/python train.py config/abbie_tiny.py\n" in text
    assert f"{setup} requirements-dev.txt && .venv/bin/python -m pytest\n" in text
    assert f"{setup} requirements-dev.txt && .venv/bin/python -m pytest\n" in (ROOT / ".ci/run").read_text()


def test_the_quoted_loop_is_the_loop():
    quoted = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    source = inspect.getsource(AbbIE)
    calls = re.findall(r"self\.(\w+)\(", quoted)
    assert calls == ["run_head", "start", "iterate", "logits", "run_tail"]
    assert "for k in range(iters):" in quoted and "for k in range(iters):" in inspect.getsource(AbbIE.forward)
    assert all(f"def {name}(" in source for name in calls)


def test_every_linked_file_exists():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name} links to {target}"


def test_results_are_json():
    for path in (ROOT / "results").glob("*.json"):
        json.loads(path.read_text())
