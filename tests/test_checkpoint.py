"""checkpoint.py: saved whole or not at all, checked where it is read, loaded."""

import json
import os
import pickle
import random
import resource
import shutil
import sys
from itertools import count

import pytest
import torch
from common import fork_server, make, refused, save, tokens

from checkpoint import checkpoints, load_model, read_tensors, save_checkpoint
from model import UserError


@pytest.mark.parametrize("keys", [{}, {"tie_embeddings": False, "rule": "zero_pt", "iters": 3}])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, keys):
    model, idx = make(**keys), tokens()
    save(tmp_path / "run", 6, make(seed=1, **keys))
    folder = save(tmp_path / "run", 7, model)
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("train.pt"))
    for path in (folder, str(tmp_path / "run"), tmp_path / "model"):
        loaded = load_model(path)
        assert (loaded.config, loaded.meta["step"]) == (model.config, 7)
        assert loaded.n_params() == model.n_params() and torch.equal(loaded(idx)[0], model(idx)[0])


def test_the_same_blocks_load_under_another_cut_and_rule(tmp_path):
    model, idx = make(), tokens()
    save(tmp_path, 1, model)
    cut = {"n_head_blocks": 0, "n_body_blocks": 4, "n_tail_blocks": 0}
    other = load_model(tmp_path, rule="recall", iters=3, **cut)
    assert (other.config.rule, other.config.iters, len(other.body)) == ("recall", 3, 4)
    assert torch.equal(other(idx, iters=1)[0], model(idx, iters=1)[0]), "the same standard Transformer"
    zero_pt = load_model(tmp_path, rule="zero_pt", **cut)  # `adapter` has no counterpart: fresh
    assert torch.equal(zero_pt.embed.weight, model.embed.weight)
    refused("has 4 blocks, not", load_model, tmp_path, n_body_blocks=3)


def test_the_newest_checkpoint_of_the_newest_run_is_taken_and_no_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, run in enumerate(("study/b", "c", "a")):
        for step in (1, 2 + age):
            config = save(tmp_path / "out" / run, step, make()) / "config.json"
            os.utime(config, (1000 - age, 1000 - age))
    shutil.copytree("out/study/b/step_00000001", "out/study/b/step_best")
    assert load_model().meta["ckpt"] == "out/study/b/step_00000002"


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    pickle.loads(pickle.dumps(Bomb()))
    (tmp_path / "exploded").rmdir()  # the bomb is a real one
    save_checkpoint(tmp_path / "bomb", 1, {"embed.weight": Bomb()}, {}, {"step": 1})
    refused("model.pt cannot be read", load_model, tmp_path / "bomb")
    assert not (tmp_path / "exploded").exists()


NO_MODEL = [
    (lambda meta, weights: meta.update(ffn_dim=50), "its weights do not fit its config"),
    (lambda meta, weights: meta.pop("rule"), "does not describe a model"),
    (lambda meta, weights: meta.update(model_class="AbbIE"), "of an earlier version"),
    (lambda meta, weights: weights.pop("norm.weight"), "its weights do not fit its config"),
    (lambda meta, weights: weights["norm.weight"].fill_(torch.nan), "its weights are not finite"),
]


@pytest.mark.parametrize("change, message", NO_MODEL)
def test_what_cannot_be_a_model_is_said_and_passed_over(tmp_path, capsys, change, message):
    save(tmp_path, 1, make())
    folder = save(tmp_path, 2, make())
    meta, weights = json.loads((folder / "config.json").read_text()), torch.load(folder / "model.pt")
    change(meta, weights)
    save_checkpoint(tmp_path, 2, weights, {}, meta)
    assert load_model(tmp_path).meta["step"] == 1
    assert message in capsys.readouterr().err
    refused(message, load_model, folder)


def test_damaged_weights_are_never_loaded(tmp_path, capsys):
    """A bit changed anywhere in a tensor, the second half cut off, or missing."""
    save(tmp_path, 999, make())
    new = save(tmp_path, 1000, make(seed=1))
    path, rng = new / "model.pt", random.Random(0)
    whole = path.read_bytes()
    start = whole.find(load_model(new).embed.weight.detach().numpy().tobytes())
    flips = [start + rng.randrange(4000) for _ in range(20)]
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in flips]
    for content in (whole[: len(whole) // 2], b"", *damaged):
        path.write_bytes(content)
        assert load_model(tmp_path).meta["step"] == 999
        assert "passed over: " in capsys.readouterr().err
        refused("model.pt", load_model, new)


def save_number(run, number: int):
    weights = torch.full((3,), float(number))
    save_checkpoint(run, number, {"weights": weights}, {"moments": weights}, {"step": number})


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
        for file, name in (("model.pt", "weights"), ("train.pt", "moments")):
            assert read_tensors(newest / file)[name].tolist() == [step] * 3
        outcomes.append(step)
        if process.exitcode == 0:
            break
        save_number(tmp_path, 2)  # the same save can be repeated, and clears up
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
        shutil.rmtree(tmp_path / "step_00000002")
    assert len(outcomes) > 9 and set(outcomes) == {1, 2} and outcomes == sorted(outcomes)
