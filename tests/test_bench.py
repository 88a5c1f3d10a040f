"""bench.py: figures that can be checked by hand, sides that take turns, the training step of train.py."""

import json
import os
import statistics

import pytest
import torch
from common import ROOT

import bench
import train
from config import load_config
from model import AbbIE, UserError

TOY = [
    "config/abbie_tiny.py", "--n_embd=32", "--n_attn_heads=2", "--ffn_dim=64", "--n_head_blocks=1",
    "--n_body_blocks=1", "--n_tail_blocks=1", "--block_size=32", "--vocab_size=300",
    "--tokens_per_step=128", "--micro_batch=2", "--device=cpu", "--dtype=float32", "--compile=off",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(capfd, *argv) -> dict:
    """bench.py's result: the last line of its stdout."""
    bench.main([str(arg) for arg in argv])
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_training_is_measured_for_every_side_and_iters(capfd, tmp_path):
    out = tmp_path / "result.json"
    argv = ["train", *TOY, "--rounds=3", "--steps=1", "--iters=1,2,4", "--side", "iters=1 n_body_blocks=2"]
    result = run(capfd, *argv, "--out", out)
    assert json.loads(out.read_text()) == result
    cells, sides, can = result["cells"], result["sides"], result["machine"]
    names = ["as given", "iters=1 n_body_blocks=2"]
    assert [cell["side"] for cell in cells] == [names[0]] * 3 + [names[1]]
    assert [cell["iters"] for cell in cells] == [1, 2, 4, 1]

    # FLOPs count the Body r times, so r = 2 of one Body block costs what two Body blocks cost.
    model = AbbIE(load_config(TOY).model_config(300))
    assert [cell["flops_per_token"] for cell in cells[:3]] == [model.flops_per_token(r) for r in (1, 2, 4)]
    assert cells[1]["flops_per_token"] == cells[3]["flops_per_token"]
    assert sides[names[0]]["n_params"] == model.n_params() < sides[names[1]]["n_params"]

    for cell in cells:
        rates = cell["tokens_per_s_rounds"]
        assert len(rates) == 3 and cell["tokens_per_s"] == statistics.median(rates) > 0
        assert cell["mfu"] == pytest.approx(cell["tokens_per_s"] * cell["flops_per_token"] / can["float32"])
        assert cell["mfu_of"] == "measured matmul", "no data sheet for this CPU"
        paired = [a / b for a, b in zip(rates, cells[0]["tokens_per_s_rounds"])]
        assert cell["tokens_per_s_to_first"] == pytest.approx(statistics.median(paired))
        assert cell["peak_memory_bytes"] > 2**26, "a process with PyTorch"
    assert cells[0]["tokens_per_s_to_first"] == 1
    assert result["versions"]["torch"] == torch.__version__


def test_what_is_measured_is_the_training_step_of_train(monkeypatch):
    seen, train_step = [], train.train_step

    def counted(net, optimizer, batches, iters, *rest):
        seen.append((len(batches), tuple(batches[0][0].shape), iters))
        return train_step(net, optimizer, batches, iters, *rest)

    monkeypatch.setattr(train, "train_step", counted)
    side = bench.train_side(load_config(TOY), [1, 3], 5)
    next(side)
    seen.clear()
    measured = next(side)
    assert seen == [(2, (2, 32), 1)] * 5 + [(2, (2, 32), 3)] * 5
    assert all(figures["tokens_per_s"] > 0 for figures in measured)


@pytest.mark.parametrize("batch, iters", [(1, 1), (4, 3)])
def test_bytes_of_a_decoded_token(batch, iters):
    """Every weight that a step reads, once per iteration and shared by the batch, and the row's cache."""
    [cell] = next(bench.decode_side(load_config(TOY), "", [batch], [iters], 0, 8))["cells"]
    D, M, V = 32, 64, 320
    weights = (2 + iters) * (4 * D * D + 3 * D * M + 2 * D) + V * D
    cache = (2 + iters) * 2 * D * (8 + 4)  # keys and values: a prompt of 8, half of 8 new ones
    assert cell["bytes_per_token"] == 4 * (weights / batch + cache)


def test_decoding_is_measured_with_and_without_drafts(capfd):
    options = ["--rounds=2", "--iters=1,2", "--batch=1,3", "--draft_iters=1", "--new_tokens=8"]
    result = run(capfd, "decode", *TOY, *options)
    cells = result["cells"]
    what = [(cell["batch"], cell["iters"], cell["draft_iters"]) for cell in cells]
    assert what == [(1, 1, 0), (1, 2, 0), (1, 2, 1), (3, 1, 0), (3, 2, 0)]
    moved = cells[1]["tokens_per_s"] * cells[1]["bytes_per_token"]
    assert cells[1]["bandwidth_share"] == pytest.approx(moved / result["machine"]["bandwidth"])
    assert 0 <= cells[2]["accepted"] <= 1 and "accepted" not in cells[1]


def dies():
    yield "alive"
    os._exit(1)


def test_a_side_that_fails_ends_in_a_short_error():
    with pytest.raises(UserError, match="unrecognized arguments: --stps=3 .did you mean"):
        bench.main(["train", *TOY, "--stps=3"])
    with pytest.raises(UserError, match="died"):
        bench.in_turn([dies], 1)
