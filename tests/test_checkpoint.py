"""The specification of checkpoint.py: saved whole or not at all, verified where it is read, loaded."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
from itertools import count

import pytest
import torch
from common import make, save, tokens

import sample
from checkpoint import (
    FILES,
    checkpoints,
    find_checkpoint,
    is_sound,
    load_model,
    load_tensors,
    save_checkpoint,
)
from model import UserError

# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("keys", [dict(), dict(tie_embeddings=False, rule="zero_pt", iters="1-3")])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, keys):
    model, idx = make(**keys), tokens()
    save(tmp_path / "run", 6, make(seed=1, **keys))
    folder = save(tmp_path / "run", 7, model)
    assert folder == tmp_path / "run/step_00000007"
    assert {path.name for path in folder.iterdir()} == {*FILES, "manifest.json"}
    for path in (folder, str(tmp_path / "run")):
        again = load_model(path)
        assert (again.config, again.n_params()) == (model.config, model.n_params())
        assert (again.meta["ckpt"], again.meta["step"]) == (str(folder), 7)
        assert torch.equal(again(idx)[0], model(idx)[0])
    moments = load_tensors(folder / "train.pt")["optimizer"]
    for name, p in model.named_parameters():
        assert torch.equal(moments[name][0], p + 1) and torch.equal(moments[name][1], p**2), name


@pytest.mark.parametrize("cut", [(0, 4, 0), (2, 1, 1)])
def test_the_same_blocks_load_under_another_cut_and_rule(tmp_path, cut):
    model, idx = make(), tokens()
    save(tmp_path, 1, model)
    keys = dict(zip(("n_head_blocks", "n_body_blocks", "n_tail_blocks"), cut))
    other = load_model(tmp_path, rule="recall", iters=3, **keys)
    assert (other.config.rule, other.config.iters, len(other.body)) == ("recall", 3, cut[1])
    assert torch.equal(other(idx, iters=1)[0], model(idx, iters=1)[0])  # the same standard Transformer
    zero_pt = load_model(tmp_path, rule="zero_pt", **keys)  # `project` has no counterpart: fresh
    assert torch.equal(zero_pt.embed.weight, model.embed.weight)
    with pytest.raises(UserError, match="has 4 blocks, not"):
        load_model(tmp_path, n_body_blocks=3)


def test_a_checkpoint_cannot_run_code_and_must_fit_its_config(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    pickle.loads(pickle.dumps(Bomb()))
    (tmp_path / "exploded").rmdir()  # the bomb is a real one
    config = json.loads((save(tmp_path / "run", 1, make()) / "config.json").read_text())
    save_checkpoint(tmp_path / "bomb", 1, {"embed.weight": Bomb()}, {}, config)
    with pytest.raises(UserError, match="model.pt cannot be read"):
        load_model(tmp_path / "bomb")
    assert not (tmp_path / "exploded").exists()
    save_checkpoint(tmp_path / "other", 1, make().state_dict(), {}, {**config, "ffn_dim": 50})
    with pytest.raises(UserError, match="weights do not fit its config"):
        load_model(tmp_path / "other")


# -------------------------------------------------------------------------- finding: what is read is verified


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_file_is_never_loaded_and_the_older_checkpoint_is(tmp_path, capsys, name):
    """A bit changed anywhere, the second half cut off, or missing."""
    old, new = save(tmp_path, 999, make()), save(tmp_path, 1000, make(seed=1))
    whole, rng = (new / name).read_bytes(), random.Random(0)
    assert is_sound(new)
    (new / name).unlink()
    assert not is_sound(new)
    (new / name).write_bytes(whole[: len(whole) // 2])
    assert not is_sound(new)
    for position in {0, len(whole) - 1, *rng.choices(range(len(whole)), k=20)}:
        flipped = bytes([whole[position] ^ 1])
        (new / name).write_bytes(whole[:position] + flipped + whole[position + 1 :])
        assert not is_sound(new), position
    assert find_checkpoint(tmp_path, FILES) == old
    assert "step_00001000 is damaged: passed over" in capsys.readouterr().err
    if name == "train.pt":  # which using a model does not read
        assert find_checkpoint(tmp_path) == new and load_model(new).meta["step"] == 1000
    else:
        assert load_model(tmp_path).meta["step"] == 999
        with pytest.raises(UserError, match="no checkpoint here is sound"):
            load_model(new)


def test_a_copy_under_another_name_is_no_checkpoint_of_the_run(tmp_path):
    old, new = save(tmp_path, 1, make()), save(tmp_path, 2, make(seed=1))
    shutil.copytree(old, tmp_path / "step_best")
    assert checkpoints(tmp_path) == [old, new] and find_checkpoint(tmp_path) == new
    assert find_checkpoint(tmp_path / "step_best") == tmp_path / "step_best"


def test_without_a_path_the_run_that_was_written_last_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint under out/\nmake one: "):
        find_checkpoint()
    for age, run in enumerate(("b", "c", "a")):
        folder = save(tmp_path / "out" / run, 5 - age, make())
        os.utime(folder / "manifest.json", (1000 - age, 1000 - age))
    assert str(find_checkpoint()) == "out/b/step_00000005"


def test_paths_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("missing", "empty"):
        with pytest.raises(UserError, match="is no checkpoint: it needs .*manifest.json\ngive a run folder"):
            load_model(tmp_path / path)


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts bytes as Linux does")
def test_sampling_reads_the_weights_once_and_no_byte_of_the_optimizer(tmp_path, monkeypatch):
    def read_so_far():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    monkeypatch.chdir(tmp_path)
    model = make(vocab_size=257, block_size=64, n_embd=256, ffn_dim=2048)  # 7 million numbers
    folder = save(tmp_path / "out" / "run", 1, model)
    weights = (folder / "model.pt").stat().st_size
    for ckpt in (["--ckpt=out/run"], []):
        before = read_so_far()
        sample.main([*ckpt, "--prompt=a", "--max_new_tokens=1", "--device=cpu"])
        assert weights <= read_so_far() - before < 1.1 * weights
    (folder / "train.pt").unlink()
    assert load_model(folder).config == model.config


# ----------------------------------------------------------------------------------------------------- saving


def save_number(run, number: int):
    weights = torch.full((3,), float(number))
    save_checkpoint(run, number, {"weights": weights}, {"moments": weights + 0.5}, {"step": number})


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
    """No file can grow beyond this size: a short error says so."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    try:
        save_number(run, 2)
    except UserError as error:
        os._exit(9 if "step 2 could not be saved ([Errno " in str(error) else 1)


@pytest.mark.parametrize("cut_short, stride", [(die_at_operation, 1), (full_at_byte, 50)])
def test_a_save_cut_short_anywhere_leaves_the_old_state_or_the_new_one_whole(tmp_path, cut_short, stride):
    save_number(tmp_path, 1)
    outcomes, fork = [], multiprocessing.get_context("fork")
    for number in count(1, stride):
        process = fork.Process(target=cut_short, args=(number, tmp_path))
        process.start()
        process.join()
        assert process.exitcode in (0, 9)  # saved, or cut short
        found = find_checkpoint(tmp_path, FILES)
        step = int(found.name.removeprefix("step_"))
        assert load_tensors(found / "model.pt")["weights"].tolist() == [step] * 3
        assert load_tensors(found / "train.pt")["moments"].tolist() == [step + 0.5] * 3
        assert json.loads((found / "config.json").read_text()) == {"step": step}
        outcomes.append(step)
        if process.exitcode == 0:
            break
        save_number(tmp_path, 2)  # the same save can be repeated, and clears up
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["step_00000001", "step_00000002"]
        shutil.rmtree(tmp_path / "step_00000002")
    assert len(outcomes) > 12 and set(outcomes) == {1, 2} and outcomes == sorted(outcomes)
