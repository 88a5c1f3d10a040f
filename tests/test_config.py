"""The configuration: dataclass default < Python file < flag, typed, and what is wrong is named."""

import sys
from dataclasses import replace

import pytest
import torch
from common import ROOT, refused

from config import Config, cli, load_config, mean_iters, parse_iters, parse_list
from model import AbbIE

TINY = str(ROOT / "config" / "abbie_tiny.py")


def named(name: str) -> Config:
    return load_config([str(ROOT / "config" / f"{name}.py")])


def test_a_flag_beats_the_file_which_beats_the_default(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from config.abbie_tiny import *\nseed = 7\nlr = 1\neval_iters = 4\n")
    config = load_config([str(file)])
    assert (config.seed, load_config([str(file), "--seed=8"]).seed) == (7, 8)
    assert config.grad_clip == Config.grad_clip
    assert config.n_embd == load_config([TINY]).n_embd
    assert isinstance(config.lr, float) and config.eval_iters == "4"  # written as integers
    assert config.out_dir == "out/mine"


def test_both_spellings_of_a_flag_and_every_type():
    words = "--max_steps 3 --lr=1e-3 --n_kv_heads=2 --iters=1-3 --data=a=b --min_lr 0"
    config = load_config([TINY, *words.split(), "--rope_scaling=none", "--tie_embeddings=false"])
    assert (config.max_steps, config.lr, config.min_lr, config.n_kv_heads) == (3, 1e-3, 0.0, 2)
    assert (config.tie_embeddings, config.rope_scaling) == (False, None)
    assert (config.iters, config.data) == ("1-3", "a=b")
    config = load_config([TINY, "--iters=4", "--warmup_steps", "-1", "--out_dir="])
    assert (config.iters, config.warmup_steps, config.out_dir) == (4, -1, "out/abbie_tiny")


def test_a_config_file_may_compute(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("import math\nfrom math import sqrt\n_base = 64\nk = 4\nn_embd = int(sqrt(k)) * _base\n")
    assert load_config([str(file)]).n_embd == 128
    assert capsys.readouterr().err.startswith(f"{file}: k is no key")


def test_the_help_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit):
        load_config(["--help"])
    shown = capsys.readouterr().out
    for name, field in Config.__dataclass_fields__.items():
        entry = shown.partition(f"  --{name} ")[2].split("\n  --")[0]
        assert f"default {field.default!r}" in " ".join(entry.split()), name
    assert "1 %" in shown, "what argparse would format"


SIZES = [("abbie_350m", 359_842_816), ("abbie_200m", 201_077_632), ("abbie_124m", 123_587_328)]


@pytest.mark.parametrize("name, parameters", SIZES)
def test_the_sizes_that_the_configs_promise(name, parameters):
    config = named(name)
    with torch.device("meta"):
        assert AbbIE(config.model_config(50257)).n_params() == parameters
    assert (config.tokens_per_step, config.block_size, config.data) == (2**19, 1024, "data/c4")


@pytest.mark.parametrize("size", ["tiny", "350m"])
def test_recall_differs_from_abbie_in_what_it_is_named_for(size):
    config, keys = named(f"recall_{size}"), ("rule", "iters", "backprop_iters", "max_steps", "lr", "out_dir")
    assert config == replace(named(f"abbie_{size}"), **{key: getattr(config, key) for key in keys})
    assert (config.rule, config.iters, config.backprop_iters) == ("recall", "poisson:6", 3)


def test_the_vocabulary_follows_the_data_unless_set():
    assert load_config([TINY]).model_config(257).vocab_size == 257
    assert load_config([TINY, "--vocab_size=300"]).model_config(257).vocab_size == 300


def test_out_of_memory_is_an_error_of_every_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        cli(lambda argv: torch.empty(1 << 50))
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory\ntry ")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # any other stays what it is
        cli(lambda argv: torch.ones(2, 3) @ torch.ones(2, 3))


def test_lists_of_iters():
    assert parse_list("1,2,8", "iters") == [1, 2, 8]
    for text in ("", "1,,2", "0", "1,129"):
        refused("iters", parse_list, text, "iters")


def test_iteration_schedules():
    assert parse_iters(2) == parse_iters("2") == ("fixed", 2, 2)
    assert parse_iters("1-3") == ("uniform", 1, 3)
    assert parse_iters("poisson:4") == ("poisson", 4.0, 128)
    assert [mean_iters(spec) for spec in (3, "1-4", "poisson:2.4")] == [3, 3, 2]
    for wrong in (0, 129, 2.0, "", "3-1", "0-2", "1-129", "1-2-3", "poisson:1", "poisson:nan"):
        refused("give an integer from 1 to 128", parse_iters, wrong)
