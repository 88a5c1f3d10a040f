"""The configuration: dataclass default < Python file < flag, typed, and what is wrong is named."""

import sys

import pytest
import torch
from common import ROOT, refused

from config import Config, cli, load_config, mean_iters, parse_iters, parse_list
from model import AbbIE

TINY = str(ROOT / "config" / "abbie_tiny.py")


MINE = """
from config.abbie_tiny import *
import math
from math import sqrt
_base, k = 64, 4
n_embd, lr, seed, eval_iters = int(sqrt(k)) * _base, 1, 7, 4
"""


def test_a_flag_beats_the_file_which_beats_the_default_and_each_has_its_type(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    config = load_config([str(file), "--seed=8"])
    assert (config.n_embd, config.seed, config.grad_clip) == (128, 8, Config.grad_clip)
    assert isinstance(config.lr, float) and config.eval_iters == "4"
    assert (config.n_body_blocks, config.out_dir) == (2, "out/mine")
    assert config.model_config(257).vocab_size == 257, "that of the data"
    assert capsys.readouterr().err.startswith(f"{file}: k is no key")


def test_both_spellings_of_a_flag_and_every_type():
    words = "--lr=1e-3 --min_lr 0 --n_kv_heads=2 --iters=4 --warmup_steps -1"
    words += " --data=a=b --out_dir= --tie_embeddings=false --rope_scaling=none"
    config = load_config([TINY, *words.split()])
    assert (config.lr, config.min_lr, config.n_kv_heads) == (1e-3, 0.0, 2)
    assert (config.iters, config.warmup_steps) == (4, -1)
    assert (config.data, config.out_dir) == ("a=b", "out/abbie_tiny")
    assert config.tie_embeddings is False and config.rope_scaling is None
    config = load_config([TINY, "--iters", "1-3", "--vocab_size=300"])
    assert config.iters == "1-3" and config.model_config(257).vocab_size == 300


SIZES = {"124m": 123_587_328, "200m": 201_077_632, "350m": 359_842_816}
FILES = sorted((ROOT / "config").glob("[!_]*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_is_the_rule_and_the_size_that_it_is_named_for(path):
    config = load_config([str(path)])
    rule, _, size = path.stem.rpartition("_")
    if rule == "recall":
        assert (config.rule, config.iters, config.backprop_iters) == ("recall", "poisson:6", 3)
    if size in SIZES:
        with torch.device("meta"):
            model = AbbIE(config.model_config(50257))
        assert model.n_params() == SIZES[size]
        assert config.tokens_per_step == 2**19 and config.data == "data/c4"


def test_schedules_and_lists_of_iters():
    assert parse_iters(2) == parse_iters("2") == ("fixed", 2, 2)
    assert parse_iters("1-3") == ("uniform", 1, 3)
    assert parse_iters("poisson:4") == ("poisson", 4.0, 128)
    assert [mean_iters(spec) for spec in (3, "1-4", "poisson:2.4")] == [3, 3, 2]
    for wrong in (0, 129, 2.0, "", "3-1", "0-2", "1-129", "1-2-3", "poisson:1", "poisson:nan"):
        refused("give an integer from 1 to 128", parse_iters, wrong)
    assert parse_list("1, 2,8", "iters") == [1, 2, 8]
    for wrong in ("", "1,,2", "0", "1,129"):
        refused("iters", parse_list, wrong, "iters")


def test_out_of_memory_is_an_error_of_every_script_and_others_stay_what_they_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        cli(lambda argv: torch.empty(1 << 50))
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory\ntry ")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cli(lambda argv: torch.ones(2, 3) @ torch.ones(2, 3))
