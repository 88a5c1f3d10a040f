"""bench.py: figures that can be checked by hand, sides that take turns, the GPU report as one command."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

import bench
import prepare_data
from config import load_config
from model import AbbIE, AbbIEConfig, UserError

ROOT = Path(__file__).parent.parent
TOY = ["config/abbie_tiny.py", "--n_embd=32", "--n_attn_heads=2", "--ffn_dim=64", "--n_head_blocks=1",
       "--n_body_blocks=1", "--n_tail_blocks=1", "--block_size=32", "--vocab_size=300",
       "--tokens_per_step=128", "--micro_batch=2", "--device=cpu", "--dtype=float32", "--compile=off"]
QUICK = ["--rounds=3", "--steps=1"]

PEER = '''
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):  # no attention: enough to be trained
    def __init__(self, config):
        super().__init__()
        print("a peer may print")
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(nn.Linear(config.n_embd, config.n_embd) for _ in range(config.n_layer))
        self.unembed = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets):
        x = self.embed(idx)
        for layer in self.layers:
            x = x + layer(x).relu()
        logits = self.unembed(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
'''


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A clone of a peer: a folder with a model.py."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "model.py").write_text(PEER)
    return folder


def run(capfd, *argv) -> dict:
    """bench.py's result: the last line of its stdout."""
    bench.main([str(arg) for arg in argv])
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_training_is_measured_for_every_side_and_iters(capfd, monkeypatch, peer):
    monkeypatch.chdir(ROOT)
    result = run(capfd, "train", *TOY, *QUICK, "--iters=1,2,4", "--side", "iters=1 n_body_blocks=2",
                 "--side", f"nanogpt={peer}")
    cells, sides = result["cells"], result["sides"]
    assert [(cell["side"], cell["iters"]) for cell in cells] == [
        ("as given", 1), ("as given", 2), ("as given", 4), ("iters=1 n_body_blocks=2", 1),
        (f"nanogpt={peer}", 1)]

    # FLOPs count the Body r times, so r = 2 of one Body block costs what two Body blocks cost.
    model = AbbIE(load_config(TOY).model_config(300))
    assert [cell["flops_per_token"] for cell in cells[:3]] == [model.flops_per_token(r) for r in (1, 2, 4)]
    assert cells[1]["flops_per_token"] == cells[3]["flops_per_token"]
    assert sides["as given"]["n_params"] == model.n_params() < sides["iters=1 n_body_blocks=2"]["n_params"]
    assert sides[f"nanogpt={peer}"]["model"] == "nanoGPT" and sides["as given"]["model"] == "abbie_d"

    shares = list(sides["as given"]["profile"].values())
    assert shares == sorted(shares, reverse=True) and 0.2 < sum(shares) < 1.01
    assert any("mm" in op or "linear" in op for op in sides["as given"]["profile"])

    can = result["machine"]
    for cell in cells:
        rates = cell["tokens_per_s_rounds"]
        assert len(rates) == 3 and cell["tokens_per_s"] == statistics.median(rates) > 0
        assert cell["flops_per_s"] == cell["tokens_per_s"] * cell["flops_per_token"]
        assert cell["mfu"] == pytest.approx(cell["flops_per_s"] / can["float32"])
        assert cell["mfu_of"] == "measured matmul"  # no data sheet for this CPU
        assert cell["bandwidth_share"] == pytest.approx(
            cell["tokens_per_s"] * cell["bytes_per_token"] / can["bandwidth"])
        paired = [a / b for a, b in zip(rates, cells[0]["tokens_per_s_rounds"])]
        assert cell["tokens_per_s_to_first"] == pytest.approx(statistics.median(paired))
        assert cell["peak_memory_bytes"] > 2 ** 26  # a process with PyTorch
    assert cells[0]["tokens_per_s_to_first"] == 1
    assert result["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("batch, iters", [(1, 1), (4, 3)])
def test_bytes_of_a_decoded_token(batch, iters):
    """Every weight that a step reads, once per iteration and shared by the batch, and the row's cache."""
    config = load_config(TOY)
    [cell] = next(bench.decode_side(config, "", [batch], [iters], 0, 8))["cells"]
    D, F, V = 32, 64, 320
    weights = (2 + iters) * (4 * D * D + 3 * D * F + 2 * D) + V * D
    cache = (2 + iters) * 2 * D * (8 + 4)  # keys and values: a prompt of 8, half of 8 new ones
    assert cell["bytes_per_token"] == 4 * (weights / batch + cache)


def test_decoding_is_measured_with_and_without_drafts(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run(capfd, "decode", *TOY, "--rounds=2", "--iters=1,2", "--batch=1,3", "--draft_iters=1",
                 "--new_tokens=8")
    cells = result["cells"]
    assert [(cell["batch"], cell["iters"], cell["draft_iters"]) for cell in cells] == [
        (1, 1, 0), (1, 2, 0), (1, 2, 1), (3, 1, 0), (3, 2, 0)]
    assert all(cell["tokens_per_s"] > 0 for cell in cells)
    assert 0 <= cells[2]["accepted"] <= 1 and "accepted" not in cells[1]


def test_race_gives_our_side_the_tokens_that_its_speed_buys(capfd, monkeypatch, tmp_path, peer):
    monkeypatch.chdir(ROOT)
    text = "\n\n".join(f"{i} and {i} make {2 * i}, which is no news." for i in range(2000))
    (tmp_path / "text.txt").write_text(text[:40000])
    (tmp_path / "val.txt").write_text(text[40000:44000])
    prepare_data.main(["text", "--input", f"{tmp_path}/text.txt", "--val_input", f"{tmp_path}/val.txt",
                       "--out", f"{tmp_path}/data"])
    result = run(capfd, "race", *TOY, "--vocab_size=0", *QUICK, f"--data={tmp_path}/data",
                 f"--nanogpt={peer}", "--nanogpt_steps=10", "--eval_iters=2", "--eval_tokens=1024")
    ours, theirs = result["race"]["ours"], result["race"]["nanoGPT"]
    times = result["cells"][1]["tokens_per_s_to_first"]
    assert theirs["tokens"] == 10 * 12 * 64
    assert ours["steps"] == round(theirs["tokens"] / times / 128)
    assert list(ours["val_loss"]) == ["context 32"] and list(theirs["val_loss"]) == ["context 64"]
    assert 0 < theirs["val_loss"]["context 64"] < 5.6  # nats per byte; ln 257 = 5.55 knows nothing


def test_gpu_report_is_one_command_that_continues(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"decode": {"already": "done"}}))
    result = run(capfd, "gpu", *TOY, "--rounds=1", "--steps=1", "--out", out)
    assert result["decode"] == {"already": "done"}
    assert [cell["iters"] for cell in result["train"]["cells"]] == [1, 2, 4, 8]
    assert [cell["side"] for cell in result["options"]["cells"]] == [
        "as given", "activation_checkpointing=true", "micro_batch=8", "compile=off"]
    assert json.loads(out.read_text()) == result


def test_gpu_report_is_of_abbie_350m(monkeypatch):
    """Without a config: the shape and the precision that the README speaks of."""
    monkeypatch.chdir(ROOT)
    seen = []
    monkeypatch.setattr(bench, "compare", lambda names, sides, *rest: seen.append(sides) or {"cells": []})
    monkeypatch.setattr(bench, "show", lambda result: None)
    bench.main(["gpu", "--device=cpu"])
    config = seen[0][0].args[0]
    assert config.model_config(50257) == AbbIEConfig(rule="abbie_d", iters=2)
    assert config.tokens_per_step == 2 ** 16 and config.dtype == config.compile == "auto"


def test_a_side_that_fails_ends_in_a_short_error(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="holds no nanoGPT"):
        bench.main(["train", *TOY, "--side", f"nanogpt={tmp_path}"])
    with pytest.raises(UserError, match="unknown key stps .did you mean"):
        bench.main(["train", *TOY, "--stps=3"])


def dies():
    yield "alive"
    sys.exit(1)


def test_a_side_whose_process_dies_ends_in_a_short_error():
    with pytest.raises(UserError, match="died"):
        bench.in_turn([dies], 1)
