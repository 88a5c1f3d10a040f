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


def solve(text: str) -> list[tuple[str, int]]:
    """A program -> (variable, hops) of its queries, each of which has the right answer."""
    source, queries = {}, []
    for first, second, third in text.split(";"):
        if first != "?":
            assert first not in source, "every variable is defined once"
            source[first] = third
        else:
            value, hops = second, 0
            while value in source:
                value, hops = source[value], hops + 1
            assert value == third
            queries.append((second, hops))
    assert sum(hops for _, hops in queries) == len(source), "chains share nothing, all are asked for"
    return queries


@pytest.mark.parametrize("kind, lengths", [("full", {127}), ("short", set(range(7, 120, 8)))])
def test_programs_are_right_and_of_the_lengths_that_are_asked(kind, lengths):
    texts = chains.programs(kind, 300, 6)
    assert {len(text) for text in texts} == lengths
    assert {hops for text in texts for _, hops in solve(text)} == {1, 2, 3, 4, 5, 6}
    for text in texts:
        assert [(text[at], hops) for at, hops in chains.questions(text)] == solve(text)


@pytest.mark.parametrize("statements, longest, letters", [(8, 1, True), (32, 6, False)])
def test_windows_are_filled_by_programs_that_share_no_variable(statements, longest, letters):
    """With letters, chains also end in some that name nothing."""
    rng = random.Random(0)
    texts = [chains.window(rng, statements, longest, letters) for _ in range(200)]
    assert {len(text) for text in texts} == {4 * statements - 1}
    assert max(hops for text in texts for _, hops in solve(text)) == longest
    assert bool(re.search(r"\?.[a-z]", ";".join(texts))) == letters
    first = [text.index("?") for text in texts]
    assert min(first) == 4 and max(first) >= 2 * statements, "of 2 statements, or as many as fill it"


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


HOPS_AT = [("abbie_d", {1: 1, 2: 3, 3: 5, 8: 5}), ("recall", {1: 1, 2: 2, 3: 3, 8: 5})]


@pytest.mark.parametrize("rule, hops_at", HOPS_AT)
def test_the_shipped_models_follow_the_longer_chains_the_more_they_iterate(rule, hops_at):
    """hops_at: r -> the longest chains that are answered then, to 90 %; the next longer ones are not."""
    model = load_model(ROOT / "models" / f"chains_{rule}")
    for kind in ("short", "full"):
        texts = chains.programs(kind, 200, 6)
        acc = chains.accuracy(model, texts, list(hops_at))["acc"]
        for r, hops in hops_at.items():
            assert all(acc[r][n] > 0.9 for n in range(1, hops + 1)), (kind, r, acc[r])
            assert hops == 5 or acc[r][hops + 1] < 0.7, (kind, r, acc[r])


@torch.no_grad()
def test_the_shipped_model_of_source_code_predicts_it_better_at_more_iterations():
    model = load_model(ROOT / "models/recall_tiny")
    text = Path(json.decoder.__file__).read_bytes()
    tokens = torch.tensor(list(text))[: 32 * 257].view(32, 257)
    swept = model.logits_at(tokens[:, :-1], [1, 2, 4])
    nats = [F.cross_entropy(logits.mT, tokens[:, 1:]) for logits in swept]
    assert nats[0] > nats[1] + 0.05 > nats[2] + 0.06
