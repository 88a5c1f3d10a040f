"""Chains of variables: the programs, how they are asked, and the stages of training."""

import json.decoder
import random
import re
from pathlib import Path

import pytest
import torch
from common import ROOT
from torch.nn import functional as F

from checkpoint import load_model
from experiments import chains, read
from model import UserError

TOY = "--n_embd=32 --n_attn_heads=2 --ffn_dim=64 --device=cpu --tokens_per_step=256 --micro_batch=2"


def solve(text: str):
    """A program -> [(variable, value that it has, look-ups that this takes)] of its queries."""
    source, queries = {}, []
    for statement in text.split(";"):
        if statement[0] != "?":
            name, value = re.fullmatch(r"([a-z])=([a-z0-9])", statement).groups()
            assert name not in source  # every variable is defined once
            source[name] = value
        else:
            value, n_hops = statement[1], 0
            while value in source:
                value, n_hops = source[value], n_hops + 1
            assert statement[2] == value
            queries.append((statement[1], value, n_hops))
    assert len({name for name, _, _ in queries}) == len(queries)
    assert sum(n_hops for _, _, n_hops in queries) == len(source)  # chains share nothing, all are asked for
    return queries


@pytest.mark.parametrize("kind, lengths", [("full", {127}), ("short", {8 * n - 1 for n in range(1, 16)})])
def test_programs_are_right_and_of_the_lengths_that_are_asked(kind, lengths):
    texts = chains.programs(kind, 300, 6)
    assert {len(text) for text in texts} == lengths
    assert {n_hops for text in texts for _, _, n_hops in solve(text)} == {1, 2, 3, 4, 5, 6}
    for text in texts:
        asked = [(text[at], n_hops) for at, n_hops in chains.questions(text)]
        assert asked == [(name, n_hops) for name, _, n_hops in solve(text)]


@pytest.mark.parametrize("statements, longest", [(8, 1), (16, 3), (32, 6)])
def test_windows_are_filled_by_programs_that_share_no_variable(statements, longest):
    rng, first = random.Random(0), []
    for _ in range(200):
        text = chains.window(rng, statements, longest)
        assert len(text) == 4 * statements - 1
        assert all(value.isdigit() and n_hops <= longest for _, value, n_hops in solve(text))
        first.append(text.index("?"))
    assert min(first) == 4 and max(first) >= 2 * statements  # programs begin with 2 statements or fill it


def test_chains_of_the_first_stages_also_end_in_letters_that_name_nothing():
    rng = random.Random(0)
    values = [value for _ in range(100) for _, value, _ in solve(chains.window(rng, 8, 1, letters=True))]
    assert 0.5 < sum(value.isalpha() for value in values) / len(values) < 0.9


class Oracle:
    """Knows every answer that takes at most r look-ups, and says 'x' otherwise."""

    def logits_at(self, idx, iters):
        for r in iters:
            logits = torch.zeros(*idx.shape, 257)
            logits[:, :, ord("x")] = 1
            for row, tokens in enumerate(idx.tolist()):
                text = bytes(tokens).decode().rstrip()
                for (at, n_hops), (_, digit, _) in zip(chains.questions(text), solve(text)):
                    logits[row, at, ord(digit)] = 2 if n_hops <= r else 0
            yield logits


def test_accuracy_of_one_who_needs_an_iteration_per_hop():
    result = chains.accuracy(Oracle(), chains.programs("short", 150, 4), [1, 3])
    assert set(result["n"]) == {1, 2, 3, 4} and min(result["n"].values()) > 5
    assert result["acc"] == {r: {n: float(n <= r) for n in (1, 2, 3, 4)} for r in (1, 3)}


@pytest.fixture
def short_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *_, last = chains.STAGES
    first = (*first[:3], ["--iters=1", "--max_steps=2"])
    monkeypatch.setattr(chains, "STAGES", [first, (*last[:3], ["--max_steps=3"])])
    monkeypatch.setattr(chains, "N_WINDOWS", 50)
    monkeypatch.setattr(chains, "N_VAL", 8)
    monkeypatch.setattr(chains, "LEARNT", 0)
    flags = ["--out_dir", "out", "--results", str(tmp_path), "--n_programs", "20", "--iters_asked", "1,4"]
    return ["--rule", "recall", "--iters", "2", *flags, "--flags", TOY]


def test_stages_follow_one_another_and_end_in_a_record_and_a_model(short_stages, tmp_path, capsys):
    chains.main([*short_stages, "--save", "models/recall"])
    first, last = load_model("out/recall_seed_1/stage_1"), load_model("out/recall_seed_1/iters_2")
    assert (first.config.iters, first.config.block_size) == (1, 32)
    assert (last.config.iters, last.config.block_size) == (2, 128)
    assert last.meta["run"]["init_from"] == "out/recall_seed_1/stage_1" and last.meta["step"] == 3
    short, full = read("chains", tmp_path)
    assert (short["programs"], full["programs"]) == ("short", "full")
    assert (full["rule"], full["iters"], full["seed"]) == ("recall", "2", 1)
    assert set(full["acc"]) == {"1", "4"} and set(full["acc"]["4"]) == set(full["n"])
    saved = load_model("models/recall")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), last.parameters()))
    assert saved.meta["made_by"]["command"].startswith("python -m experiments.chains --rule recall")

    log = tmp_path / "out/recall_seed_1/stage_1/log.jsonl"
    written = log.read_text().count('"loss"')
    chains.main(short_stages)  # trains nothing again
    assert log.read_text().count('"loss"') == written
    capsys.readouterr()
    chains.main(["--ckpt", "models/recall", "--n_programs", "20", "--iters_asked", "2"])
    assert "20 full programs" in capsys.readouterr().out


def test_a_stage_that_has_not_learnt_ends_the_training(short_stages, monkeypatch):
    monkeypatch.setattr(chains, "LEARNT", 1.1)
    with pytest.raises(
        UserError, match=r"out/recall_seed_1/stage_1: \d+% of 1 hops at r = 1\ntry another --seed"
    ):
        chains.main(short_stages)


HOPS_AT = [("abbie_d", {1: 1, 2: 3, 3: 5, 8: 5}), ("recall", {1: 1, 2: 2, 3: 3, 8: 5})]


@pytest.mark.parametrize("rule, hops_at", HOPS_AT)
def test_the_shipped_models_follow_the_longer_chains_the_more_they_iterate(rule, hops_at):
    """hops_at: r -> the longest chains that are answered then, to 90 %; the next longer ones are not."""
    model = load_model(ROOT / "models" / f"chains_{rule}")
    for kind in ("short", "full"):
        acc = chains.accuracy(model, chains.programs(kind, 300, 6), list(hops_at))["acc"]
        for r, hops in hops_at.items():
            assert all(acc[r][n] > 0.9 for n in range(1, hops + 1)), (kind, r, acc[r])
            if hops < 5:
                assert acc[r][hops + 1] < 0.7, (kind, r, acc[r])


@torch.no_grad()
def test_the_shipped_model_of_source_code_predicts_it_better_at_more_iterations():
    model, text = load_model(ROOT / "models" / "recall_tiny"), Path(json.decoder.__file__).read_bytes()
    tokens = torch.tensor(list(text))[: 32 * 257].view(32, 257)
    x, y = tokens[:, :-1], tokens[:, 1:].flatten()
    nats = [F.cross_entropy(logits.flatten(0, 1), y) for logits in model.logits_at(x, [1, 2, 4])]
    assert nats[0] > nats[1] + 0.05 > nats[2] + 0.06
