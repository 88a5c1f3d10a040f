"""Chains of variables: the programs, the stages of training, and what the models that ship answer."""

import json.decoder
import random
import re
from pathlib import Path

import pytest
import torch
from common import ROOT, refused
from torch.nn import functional as F

from checkpoint import load_model
from experiments import chains, read


def windows(letters=False) -> list[str]:
    return [chains.window(random.Random(seed), 32, 6, letters) for seed in range(100)]


@pytest.mark.parametrize("letters", [True, False])
def test_windows_are_full_of_chains_that_share_no_variable(letters):
    for text in windows(letters):
        variables = re.findall(r"(\w)=", text)
        assert len(text) == 127 and len(variables) == len(set(variables))
        assert sum(hops for _, hops in chains.questions(text)) == len(variables), "each is of use once"
    ends = re.findall(r"\?.(.)", "".join(windows(letters)))
    assert any(map(str.isalpha, ends)) == letters, "which then name nothing"


HOPS_AT = [("abbie_d", {1: 1, 2: 3, 3: 5, 8: 5}), ("recall", {1: 1, 2: 2, 3: 3, 8: 5})]
TEXTS = {
    "windows": windows(),
    "short": chains.programs("short", 100, 6),
    "full": chains.programs("full", 100, 6),
}


@pytest.mark.parametrize("rule, hops_at", HOPS_AT)
@pytest.mark.parametrize("texts", TEXTS)
def test_the_shipped_models_follow_the_longer_chains_the_more_they_iterate(rule, hops_at, texts):
    """hops_at: r -> the longest chains that are answered then, to 90 %; the next longer ones are not."""
    model = load_model(ROOT / "models" / f"chains_{rule}")
    acc = chains.accuracy(model, TEXTS[texts], list(hops_at))["acc"]
    for r, hops in hops_at.items():
        assert all(acc[r][n] > 0.9 for n in range(1, hops + 1)), (r, acc[r])
        assert hops == 5 or acc[r][hops + 1] < 0.7, (r, acc[r])


@torch.no_grad()
def test_the_shipped_model_of_source_code_predicts_it_better_at_more_iterations():
    model = load_model(ROOT / "models/recall_tiny")
    text = Path(json.decoder.__file__).read_bytes()
    tokens = torch.tensor(list(text))[: 32 * 257].view(32, 257)
    swept = model.logits_at(tokens[:, :-1], [1, 2, 4])
    nats = [F.cross_entropy(logits.mT, tokens[:, 1:]) for logits in swept]
    assert nats[0] > nats[1] + 0.05 > nats[2] + 0.06


TOY = "--n_embd=32 --n_attn_heads=2 --ffn_dim=64 --device=cpu --tokens_per_step=256 --micro_batch=2"


@pytest.fixture
def argv(tmp_path, monkeypatch) -> list[str]:
    """The flags of a training in two stages of a few steps."""
    monkeypatch.chdir(tmp_path)
    first, *_, last = chains.STAGES
    stages = [(*first[:3], ["--iters=1", "--max_steps=2"]), (*last[:3], ["--max_steps=3"])]
    for name, value in {"STAGES": stages, "N_WINDOWS": 50, "N_VAL": 8, "LEARNT": 0}.items():
        monkeypatch.setattr(chains, name, value)
    flags = "--rule=recall --iters=2 --out_dir=out --results=. --n_programs=20 --iters_asked=1,4"
    return [*flags.split(), f"--flags={TOY}"]


def test_stages_follow_one_another_and_end_in_a_record_and_a_model(argv, capsys):
    chains.main([*argv, "--save=models/recall"])
    chains.main(["--ckpt=models/recall", "--n_programs=20", "--iters_asked=2"])
    assert capsys.readouterr().out.count("20 full programs") == 2
    first, last = load_model("out/recall_seed_1/stage_1"), load_model("out/recall_seed_1/iters_2")
    saved = load_model("models/recall")
    assert (first.config.iters, first.config.block_size) == (1, 32)
    assert (last.config.iters, last.config.block_size) == (2, 128)
    assert last.meta["run"]["init_from"] == "out/recall_seed_1/stage_1"
    assert torch.equal(saved.embed.weight, last.embed.weight)
    assert saved.meta["made_by"]["command"].startswith("python -m experiments.chains --rule=recall")
    short, full = read("chains", ".")
    assert (short["programs"], full["programs"]) == ("short", "full")
    assert (full["rule"], full["iters"], full["seed"]) == ("recall", "2", 1)
    assert set(full["acc"]) == {"1", "4"} and set(full["acc"]["4"]) == set(full["n"])


def test_a_stage_that_has_not_learnt_ends_the_training(argv, monkeypatch):
    monkeypatch.setattr(chains, "LEARNT", 1.1)
    message = r"out/recall_seed_1/stage_1: \d+% of 1 hops at r = 1\ntry another --seed"
    refused(message, chains.main, argv)
