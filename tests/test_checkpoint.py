"""The specification of checkpoint.py: saved whole or not at all, verified where it is read, loaded."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
from common import ROOT, make, save, tokens

import checkpoint
from checkpoint import FILES, find_checkpoint, is_sound, load_model, load_tensors, save_checkpoint
from model import UserError


def flip(path, position=None):
    """Change one bit of a byte, by default of the middle one."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("keys", [dict(), dict(tie_embeddings=False, rule="zero_pt", iters="1-3")])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, keys):
    model, other, idx = make(**keys), make(seed=1, **keys), tokens()
    save(tmp_path / "run", 6, other)
    folder = save(tmp_path / "run", 7, model)
    assert folder == tmp_path / "run/step_00000007"
    assert {path.name for path in folder.iterdir()} == {*FILES, "manifest.json"}
    for path in (folder, tmp_path / "run", str(folder)):
        again = load_model(path)
        assert again.config == model.config and again.meta["ckpt"] == str(folder) and again.meta["step"] == 7
        assert torch.equal(again(idx)[0], model(idx)[0]) and not torch.equal(again(idx)[0], other(idx)[0])
        tied = again.unembed.weight.data_ptr() == again.embed.weight.data_ptr()
        assert tied == model.config.tie_embeddings and again.n_params() == model.n_params()
        state, loaded = model.state_dict(), again.state_dict()
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
    moments = load_tensors(folder / "train.pt")["optimizer"]
    for name, p in model.named_parameters():
        assert torch.equal(moments[name][0], p + 1) and torch.equal(moments[name][1], p**2), name


@pytest.mark.parametrize("cut", [(0, 4, 0), (2, 1, 1), (1, 1, 2)])
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


def test_a_checkpoint_of_earlier_versions_loads(tmp_path):
    """They kept the newest folder's name beside the folders, in a file `latest` that nothing reads."""
    save(tmp_path, 1, make())
    newest = save(tmp_path, 2, make(seed=1))
    (tmp_path / "latest").write_text("step_00000001")
    assert find_checkpoint(tmp_path) == newest and load_model(tmp_path).meta["step"] == 2


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


def test_a_flipped_byte_anywhere_is_never_loaded_and_the_older_checkpoint_is(tmp_path, capsys):
    old, new = save(tmp_path, 999, make()), save(tmp_path, 1000, make(seed=1))
    rng = random.Random(0)
    for name in (*FILES, "manifest.json"):
        size = (new / name).stat().st_size
        for position in {0, size - 1, *rng.choices(range(size), k=20)}:
            flip(new / name, position)
            assert not is_sound(new), (name, position)
            flip(new / name, position)
        assert is_sound(new) and find_checkpoint(tmp_path, FILES) == new
        flip(new / name)
        assert find_checkpoint(tmp_path, FILES) == old
        assert "step_00001000 is damaged: passed over" in capsys.readouterr().err
        if name != "train.pt":
            assert load_model(tmp_path).meta["step"] == 999
            with pytest.raises(UserError, match="no checkpoint here is sound"):
                load_model(new)
        flip(new / name)


def test_a_damaged_optimizer_hinders_training_and_nothing_else(tmp_path):
    old, new, newer = (save(tmp_path, step, make(seed=step)) for step in (1, 2, 3))
    flip(new / "train.pt")
    flip(newer / "model.pt")
    assert find_checkpoint(tmp_path) == new and load_model(tmp_path).meta["step"] == 2
    assert find_checkpoint(tmp_path, FILES) == old
    with pytest.raises(UserError, match="no checkpoint here is sound"):
        find_checkpoint(new, FILES)


@pytest.mark.parametrize("name", ["config.json", "model.pt", "manifest.json"])
def test_a_missing_or_cut_file_is_never_loaded(tmp_path, name):
    old, new = save(tmp_path, 1, make()), save(tmp_path, 2, make())
    (new / name).write_bytes((new / name).read_bytes()[:-1])
    assert find_checkpoint(tmp_path) == old
    (new / name).unlink()
    assert find_checkpoint(tmp_path) == old
    (old / name).unlink()
    with pytest.raises(UserError):
        find_checkpoint(tmp_path)


def test_without_a_path_the_run_that_was_written_last_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint under out/\nmake one: "):
        find_checkpoint()
    for age, run in enumerate(("b", "c", "a")):
        folder = save(tmp_path / "out" / run, 5 - age, make())
        os.utime(folder / "manifest.json", (1000 - age, 1000 - age))
    assert str(find_checkpoint()) == "out/b/step_00000005"


def test_paths_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path in ("missing", "file", "empty"):
        with pytest.raises(UserError, match="is no checkpoint: it needs .*manifest.json\ngive a run folder"):
            load_model(tmp_path / path)


COUNT = """
import contextlib, io, runpy, sys
import decode, eval_icl, sample  # what importing reads is not counted

def read_so_far():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])

def count(script, argv):
    before = read_so_far()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        script.main(argv)
    print(read_so_far() - before)

sampling = ["--prompt=a", "--max_new_tokens=1", "--device=cpu"]
count(sample, ["--ckpt=out/run", *sampling])  # and once more, now that nothing is left to be imported
count(sample, ["--ckpt=out/run", *sampling])
count(sample, sampling)
count(eval_icl, ["--ckpt=out/run", "--device=cpu", "--iters=1", "--tasks=lambada_openai", "--limit=1"])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts bytes as Linux does")
def test_sampling_and_evaluation_read_the_weights_once_and_no_byte_of_the_optimizer(tmp_path):
    model = make(vocab_size=257, block_size=64, n_embd=256, ffn_dim=2048)  # 7 million numbers
    folder = save(tmp_path / "out" / "run", 1, model)
    rows = tmp_path / "data/icl/lambada_openai"
    rows.mkdir(parents=True)
    (rows / "test.jsonl").write_text(json.dumps({"text": "a river runs to the sea"}) + "\n")
    weights, optimizer = ((folder / name).stat().st_size for name in ("model.pt", "train.pt"))
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, *counts = map(int, done.stdout.split())
    assert len(counts) == 3 and optimizer > 1.9 * weights > 2e7
    for count in counts:
        assert weights <= count < 1.05 * weights, (counts, weights, optimizer)


# ----------------------------------------------------------------------------------------------------- saving


class Interrupted:
    """Counts the file operations of a save; number `at` fails with a full disk after half of what was to be
    written, or ends the process."""

    def __init__(self, patch, at: int, dies: bool):
        self.n, self.at, self.dies, self.open = 0, at, dies, open
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, self.counted(getattr(os, name)))
        patch.setattr(checkpoint, "open", self.open_counted, raising=False)

    def counted(self, operation):
        def count_and_do(*args, **kwargs):
            self.count()
            return operation(*args, **kwargs)

        return count_and_do

    def open_counted(self, path, mode="r"):
        file = self.open(path, mode, buffering=0 if "b" in mode else -1)
        if "w" not in mode:
            return file
        self.count()
        return CountedFile(file, self)

    def count(self):
        self.n += 1
        if self.n == self.at and self.dies:
            os._exit(9)
        if self.n == self.at:
            raise OSError(28, "No space left on device")


class CountedFile:
    def __init__(self, file, interrupted):
        self.file, self.interrupted = file, interrupted
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data):
        data, half = bytes(data), len(data) // 2
        self.file.write(data[:half])
        self.interrupted.count()
        self.file.write(data[half:])
        return len(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def save_number(run, number: int):
    weights = torch.full((3,), float(number))
    save_checkpoint(run, number, {"weights": weights}, {"moments": weights + 0.5}, {"step": number})


def interrupted_save(run, at: int, dies: bool) -> bool:
    """Save number 2 with a failure at operation `at` -> whether it came to that."""
    child = os.fork() if dies else 0  # a process of its own has a real end, without cleaning up
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        with pytest.MonkeyPatch.context() as patch:
            Interrupted(patch, at, dies)
            save_number(run, 2)
        return False
    except UserError as error:
        assert "step 2 could not be saved ([Errno 28] No space left on device)" in str(error)
        return True
    finally:
        if dies:  # the child must not become a second pytest
            os._exit(0)


@pytest.mark.parametrize("dies", [False, True], ids=["the disk is full", "the process dies"])
def test_a_save_cut_short_anywhere_leaves_the_old_state_or_the_new_one_whole(tmp_path, monkeypatch, dies):
    """After a failure at file operation 1, 2, ..., n of n."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted, but no disk is to be waited for
    save_number(tmp_path, 1)
    outcomes, interrupted = [], True
    while interrupted:
        interrupted = interrupted_save(tmp_path, len(outcomes) + 1, dies)
        found = find_checkpoint(tmp_path, FILES)
        number = int(found.name.removeprefix("step_"))
        assert load_tensors(found / "model.pt")["weights"].tolist() == [number] * 3
        assert load_tensors(found / "train.pt")["moments"].tolist() == [number + 0.5] * 3
        assert json.loads((found / "config.json").read_text()) == {"step": number}
        outcomes.append(number)
        save_number(tmp_path, 2)  # the same save can be repeated, and clears up
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
        shutil.rmtree(tmp_path / "step_00000002")
    assert len(outcomes) > 50 and set(outcomes) == {1, 2} and outcomes == sorted(outcomes)
