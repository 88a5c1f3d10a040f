"""The configuration: dataclass default < Python file < flag, typed, with everything that is wrong refused
together."""

import subprocess
import sys
from pathlib import Path

import pytest

from config import Config, load_config, parse_list
from model import AbbIE, AbbIEConfig, UserError

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "config" / "abbie_tiny.py")


def refused(*argv) -> str:
    with pytest.raises(UserError) as error:
        load_config(list(argv))
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_a_flag_beats_the_file_which_beats_the_default(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from config.abbie_tiny import *\nseed = 7\nlr = 1\n")
    assert load_config([str(file)]).seed == 7
    assert load_config([str(file), "--seed=8"]).seed == 8
    config = load_config([str(file)])
    assert (config.grad_clip, config.n_embd) == (Config.grad_clip, load_config([TINY]).n_embd)
    assert isinstance(config.lr, float), "an integer may stand for a float"


def test_both_spellings_of_a_flag_and_every_type():
    config = load_config(
        [
            TINY,
            "--max_steps",
            "3",
            "--lr=1e-3",
            "--force",
            "true",
            "--n_kv_heads=2",
            "--iters=1-3",
            "--data=a=b",
            "--rope_scaling=none",
            "--tie_embeddings=false",
        ]
    )
    assert (config.max_steps, config.lr, config.force, config.n_kv_heads) == (3, 1e-3, True, 2)
    assert (config.iters, config.data, config.rope_scaling, config.tie_embeddings) == (
        "1-3",
        "a=b",
        None,
        False,
    )
    assert load_config([TINY, "--iters=4"]).iters == 4


def test_the_folder_of_a_run_has_the_name_of_its_config(tmp_path):
    assert load_config([TINY]).out_dir == "out/abbie_tiny"
    assert load_config([TINY, "--out_dir=elsewhere"]).out_dir == "elsewhere"


def test_everything_wrong_is_named_at_once_with_the_nearest_key():
    message = refused(TINY, "--itrs=2", "--lr=fast", "--n_embd=127", "--rule=abie_d", "--max_steps")
    for part in (
        "itrs",
        "did you mean iters",
        "lr='fast' is not float",
        "--max_steps has no value",
        "127",
        "abie_d",
    ):
        assert part in message


@pytest.mark.parametrize(
    "flag, part",
    [
        ("--iters=0", "iters=0"),
        ("--iters=129", "iters=129"),
        ("--iters=3-1", "3-1"),
        ("--iters=poisson:x", "poisson:x"),
        ("--iters=2.5", "2.5"),
        ("--micro_batch=0", "micro_batch=0"),
        ("--tokens_per_step=77", "tokens_per_step=77"),
        ("--eval_iters=1,x", "eval_iters"),
        ("--dtype=float16", "float16"),
        ("--compile=yes", "compile"),
        ("--decay_frac=2", "decay_frac"),
        ("--lr=nan", "lr=nan"),
        ("--keep_last=0", "keep_last"),
        ("--n_kv_heads=3", "3"),
        ("--rope_scaling={}", "rope_scaling"),
        ("--force=maybe", "force"),
        ("--seed=-1", "seed"),
    ],
)
def test_values_that_cannot_be(flag, part):
    assert part in refused(TINY, flag)


def test_the_raw_rule_refuses_iterations_that_overflow():
    assert "48" in refused(TINY, "--rule=abbie_d_literal", "--iters=49")


def test_a_config_file_that_is_missing_misspelt_or_broken(tmp_path):
    assert "abbie_tiny" in refused("config/abie_tiny.py")
    broken = tmp_path / "broken.py"
    broken.write_text("n_embd = = 3\n")
    assert "SyntaxError" in refused(str(broken))
    broken.write_text("n_embed = 3\nlr = '1'\n")
    message = refused(str(broken))
    assert "n_embed" in message and "n_embd" in message and "lr='1' is not float" in message
    assert "one config file" in refused()


def test_the_help_lists_every_key():
    shown = subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, check=True
    )
    for name in Config.__dataclass_fields__:
        assert f"  {name} " in shown.stdout


@pytest.mark.parametrize(
    "name, parameters",
    [("abbie_350m", 359_842_816), ("abbie_200m", 201_077_632), ("abbie_124m", 123_587_328)],
)
def test_the_sizes_that_the_configs_promise(name, parameters):
    import torch

    config = load_config([str(ROOT / "config" / f"{name}.py")])
    with torch.device("meta"):
        assert AbbIE(config.model_config(50257)).n_params() == parameters
    assert config.tokens_per_step == 2**19 and config.block_size == 1024 and config.data == "data/c4"


def test_the_baselines_differ_in_what_they_are_named_for_and_nothing_else():
    def keys(name):
        return {**vars(load_config([str(ROOT / "config" / f"{name}.py")])), "out_dir": None}

    base = keys("abbie_350m")
    for name, changed in (
        ("std_350m", {"iters": 1}),
        ("abbie_c_350m", {"rule": "abbie_c"}),
        ("zero_pt_350m", {"rule": "zero_pt"}),
        ("recall_350m", {"rule": "recall"}),
    ):
        assert keys(name) == {**base, **changed}


def test_every_config_loads():
    for path in (ROOT / "config").glob("[!_]*.py"):
        load_config([str(path)])


def test_the_vocabulary_follows_the_data_unless_set():
    assert load_config([TINY]).model_config(257).vocab_size == 257
    assert load_config([TINY, "--vocab_size=300"]).model_config(257).vocab_size == 300
    with pytest.raises(UserError, match="vocab_size"):
        AbbIE(AbbIEConfig(vocab_size=0))


def test_lists_of_iters():
    assert parse_list("1,2,8", "iters") == [1, 2, 8]
    for text in ("", "1,,2", "0", "1,129", "a"):
        with pytest.raises(UserError):
            parse_list(text, "iters")
