"""bench.py: figures that can be checked by hand, sides that take turns, the training step of train.py."""

import json
import os
import statistics

import pytest
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
    out, other = tmp_path / "result.json", "iters=1 n_body_blocks=2"
    options = ["--rounds=3", "--steps=1", "--iters=1,2,4", "--side", other, "--out", out]
    result = run(capfd, "train", *TOY, *options)
    assert json.loads(out.read_text()) == result
    cells = result["cells"]
    what = [(cell["side"], cell["iters"]) for cell in cells]
    assert what == [("as given", 1), ("as given", 2), ("as given", 4), (other, 1)]

    # FLOPs count the Body r times, so r = 2 of one Body block costs what two Body blocks cost.
    model = AbbIE(load_config(TOY).model_config(300))
    flops = [model.flops_per_token(r) for r in (1, 2, 4, 2)]
    assert [cell["flops_per_token"] for cell in cells] == flops
    assert result["sides"]["as given"]["n_params"] == model.n_params()

    for cell in cells:
        rates = cell["tokens_per_s_rounds"]
        assert len(rates) == 3 and cell["tokens_per_s"] == statistics.median(rates) > 0
        flops_per_s = cell["tokens_per_s"] * cell["flops_per_token"]
        assert cell["mfu"] == pytest.approx(flops_per_s / result["machine"]["float32"])
        paired = [a / b for a, b in zip(rates, cells[0]["tokens_per_s_rounds"])]
        assert cell["tokens_per_s_to_first"] == pytest.approx(statistics.median(paired))
        assert cell["peak_memory_bytes"] > 2**26, "a process with PyTorch"


def test_what_is_measured_is_the_training_step_of_train(monkeypatch):
    seen = []

    def train_step(net, optimizer, batches, iters, *rest):
        seen.append((len(batches), tuple(batches[0][0].shape), iters))

    monkeypatch.setattr(train, "train_step", train_step)
    side = bench.train_side(load_config(TOY), [1, 3], 5)
    next(side)
    seen.clear()
    next(side)
    assert seen == [(2, (2, 32), 1)] * 5 + [(2, (2, 32), 3)] * 5


def test_bytes_of_a_decoded_token():
    """Every weight that a step reads, once per iteration and shared by the batch, and the row's cache."""
    batch, iters = 4, 3
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
    for flag in ("--side=rule=recall", "--rounds=0", "--new_tokens=1"):
        with pytest.raises(UserError, match=flag.split("=")[0]):
            bench.main(["decode", *TOY, flag])
    with pytest.raises(UserError, match="died"):
        bench.in_turn([dies], 1)
