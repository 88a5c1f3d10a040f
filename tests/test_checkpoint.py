"""checkpoint.py: saved whole or not at all, checked where it is read, loaded."""

import json
import os
import random
import resource
import shutil
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from common import fork_server, make, refused, save, tokens

from checkpoint import checkpoints, load_model, read_tensors, save_checkpoint
from model import UserError


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run of two checkpoints."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save(tmp_path / "run", step, make(seed=step))
    return tmp_path / "run"


@pytest.mark.parametrize("keys", [{}, {"tie_embeddings": False, "rule": "zero_pt", "iters": 3}])
def test_a_checkpoint_comes_back_as_it_was(run, keys):
    model, idx = make(**keys), tokens()
    folder = save(run, 3, model)
    shutil.copytree(folder, "model", ignore=shutil.ignore_patterns("train.pt"))
    for path in (folder, "run", "model"):
        loaded = load_model(path)
        assert (loaded.config, loaded.meta["step"]) == (model.config, 3)
        assert loaded.n_params() == model.n_params()
        assert torch.equal(loaded(idx)[0], model(idx)[0])


def test_the_same_blocks_load_under_another_cut_and_rule(run):
    model, idx = make(seed=2), tokens()
    cut = {"n_head_blocks": 0, "n_body_blocks": 4, "n_tail_blocks": 0}
    other = load_model(run, rule="recall", iters=3, **cut)
    assert (other.config.rule, other.config.iters, len(other.body)) == ("recall", 3, 4)
    assert torch.equal(other(idx, iters=1)[0], model(idx, iters=1)[0]), "the same standard Transformer"
    zero_pt = load_model(run, rule="zero_pt", **cut)  # `adapter` has no counterpart: fresh
    assert torch.equal(zero_pt.embed.weight, model.embed.weight)
    refused("has 4 blocks, not", load_model, run, n_body_blocks=3)


def test_the_newest_checkpoint_of_the_newest_run_is_taken_and_no_copy(run):
    shutil.copytree(run, "out/z")
    shutil.copytree(run, "out/study/b")
    os.utime("out/study/b/step_00000001/config.json", (2e9, 2e9))
    shutil.copytree("out/z/step_00000001", "out/study/b/step_best")
    assert load_model().meta["ckpt"] == "out/study/b/step_00000002"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


NO_MODEL = [
    (lambda meta, weights: meta.update(ffn_dim=50), "its weights do not fit its config"),
    (lambda meta, weights: meta.pop("rule"), "does not describe a model"),
    (lambda meta, weights: meta.update(model_class="AbbIE"), "of an earlier version"),
    (lambda meta, weights: weights.pop("norm.weight"), "its weights do not fit its config"),
    (lambda meta, weights: weights["norm.weight"].fill_(torch.nan), "its weights are not finite"),
    (lambda meta, weights: weights.update(code=Bomb()), "model.pt cannot be read"),
]


@pytest.mark.parametrize("change, message", NO_MODEL)
def test_what_cannot_be_a_model_is_said_and_passed_over(run, capsys, change, message):
    newest = checkpoints(run)[-1]
    meta, weights = json.loads((newest / "config.json").read_text()), torch.load(newest / "model.pt")
    change(meta, weights)
    save_checkpoint(run, 2, weights, {}, meta)
    assert load_model(run).meta["step"] == 1
    assert message in capsys.readouterr().err
    refused(message, load_model, newest)
    assert not Path("exploded").exists()


def test_damaged_weights_are_never_loaded(run):
    """A bit changed anywhere in a tensor, the second half cut off, or missing."""
    newest = checkpoints(run)[-1]
    whole = (newest / "model.pt").read_bytes()
    start = whole.find(load_model(newest).embed.weight.detach().numpy().tobytes())
    places = random.Random(0).sample(range(start, start + 4000), 20)
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    for content in (whole[: len(whole) // 2], b"", *damaged):
        (newest / "model.pt").write_bytes(content)
        refused("model.pt", load_model, newest)


def save_number(run, number: int):
    tensors = {"number": torch.tensor(number)}
    save_checkpoint(run, number, tensors, tensors, {"step": number})


def die_at_operation(number: int, run):
    """The process that saves number 2 is gone at its file operation of this number."""
    operations = count(1)
    watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

    def watch(event, args):
        if event in watched and next(operations) == number:
            os._exit(9)

    sys.addaudithook(watch)
    save_number(run, 2)


def full_at_byte(number: int, run):
    """No file can grow beyond this size: a short error says so, and nothing of the attempt is left."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    try:
        save_number(run, 2)
    except UserError as error:
        clean = [path.name for path in run.iterdir()] == ["step_00000001"]
        os._exit(9 if "step_00000002 could not be saved ([Errno " in str(error) and clean else 1)


@pytest.mark.parametrize("cut_short, stride", [(die_at_operation, 1), (full_at_byte, 100)])
def test_a_save_cut_short_leaves_the_old_state_or_the_new(tmp_path, cut_short, stride):
    save_number(tmp_path, 1)
    outcomes, fork = [], fork_server()
    for number in count(1, stride):
        process = fork.Process(target=cut_short, args=(number, tmp_path))
        process.start()
        process.join()
        assert process.exitcode in (0, 9)  # saved, or cut short
        newest = checkpoints(tmp_path)[-1]
        step = json.loads((newest / "config.json").read_text())["step"]
        assert newest.name == f"step_{step:08d}"
        assert all(read_tensors(newest / name)["number"] == step for name in ("model.pt", "train.pt"))
        outcomes.append(step)
        if process.exitcode == 0:
            break
        save_number(tmp_path, 2)  # the same save can be repeated, and clears up
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
        shutil.rmtree(tmp_path / "step_00000002")
    assert len(outcomes) > 9 and set(outcomes) == {1, 2} and outcomes == sorted(outcomes)
