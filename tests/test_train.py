"""Training: the same step on any number of processes, the same run after any interruption, and no bad step.

Processes, ranks, signals and kills are real; tests/faulty_train.py runs train.py with one fault injected."""

import hashlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import prepare_data
import train
from config import load_config
from model import AbbIE, AbbIEConfig, UserError, find_checkpoint, is_complete, save_checkpoint

ROOT = Path(__file__).parent.parent
FAULTY = str(ROOT / "tests" / "faulty_train.py")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # of every process started here: the same number of threads
T = 32


# ------------------------------------------------------------------------------------------------- the ground


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with data in data/words and a config of a very small model."""
    folder = tmp_path_factory.mktemp("ground")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=4)) for _ in range(40)]
    for i in range(60):
        text = "\n".join(" ".join(rng.choice(words, size=8)) for _ in range(12))
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{i}.txt").write_text(text)
    prepare_data.main(
        ["text", "--input", str(folder / "text"), "--tokenizer", "bytes", "--out", str(folder / "words")]
    )
    (folder / "small.py").write_text(f"""
data = {str(folder / "words")!r}
block_size, n_embd, n_attn_heads, ffn_dim = {T}, 32, 2, 64
n_head_blocks, n_body_blocks, n_tail_blocks = 1, 1, 1
tokens_per_step, micro_batch, max_steps, lr = {8 * T}, 2, 8, 1e-2
eval_every, eval_iters, eval_tokens, save_every, keep_last = 4, "1,2,4", {16 * T}, 2, 2
device, dtype = "cpu", "float32"
""")
    return folder


@pytest.fixture(scope="module")
def show_nothing():
    """Most runs here skip the tasks and the sample at the end, which have tests of their own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "show_off", lambda *args: None)
    yield
    patch.undo()


@pytest.fixture
def here(ground, show_nothing, tmp_path):
    """run(out, *flags): train.main on the small config, in this process -> the run's folder."""

    def run(out="run", *flags):
        train.main([str(ground / "small.py"), f"--out_dir={tmp_path / out}", *flags])
        return tmp_path / out

    return run


def digest(folder: Path) -> str:
    """SHA-256 over the sorted (name, dtype, shape, raw bytes) of the weights and the optimizer's state."""

    def tensors(prefix, value):
        if isinstance(value, torch.Tensor):
            yield prefix, value
        elif isinstance(value, dict):
            for name, inner in value.items():
                yield from tensors(f"{prefix}.{name}", inner)

    checkpoint = find_checkpoint(folder)
    states = {name: torch.load(checkpoint / f"{name}.pt", weights_only=True) for name in ("model", "train")}
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors("", states)):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return f"{checkpoint.name} {sha.hexdigest()}"


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    steps = [(r["step"], r["loss"]) for r in log(folder) if "loss" in r]
    assert len(dict(steps)) == len(steps), "a step stands in the log twice"
    return dict(steps)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(world: int, argv: list[str], ground: Path) -> list[subprocess.CompletedProcess]:
    """Run argv as `world` gloo ranks, as torchrun would start them, and wait."""
    env = {**ENV, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    if world == 1:
        started = [
            subprocess.Popen(
                [sys.executable, *argv],
                cwd=ground,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=ENV,
            )
        ]
    else:
        started = [
            subprocess.Popen(
                [sys.executable, *argv],
                cwd=ground,
                stdout=subprocess.PIPE,
                text=True,
                stderr=subprocess.PIPE,
                env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            )
            for r in range(world)
        ]
    done = []
    try:
        for process in started:
            out, err = process.communicate(timeout=300)
            done.append(subprocess.CompletedProcess(argv, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return done


def faulty(ground: Path, fault: str, step: int, rank: int, marker, out: Path, *flags) -> list[str]:
    """The arguments of tests/faulty_train.py on the small config."""
    config = str(ground / "small.py")
    return [FAULTY, fault, str(step), str(rank), str(marker), config, f"--out_dir={out}", *flags]


def torchrun(flags: list[str], argv: list[str], ground: Path):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *flags, *argv],
        cwd=ground,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(ground, tmp_path_factory):
    """The run that nothing interrupts, as one process and as two: its folder for each."""
    out = tmp_path_factory.mktemp("undisturbed")
    for world in (1, 2):
        done = ranks(world, faulty(ground, "none", 0, 0, "-", out / str(world)), ground)
        assert [d.returncode for d in done] == [0] * world, done[0].stderr
    return {world: out / str(world) for world in (1, 2)}


# ---------------------------------------------------------------------- what a step is: (seed, step), no more


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_every_window_is_seen_once_per_epoch_whatever_the_batch(batch):
    n, order = 50, lambda epoch: np.random.default_rng([1, epoch]).permutation(50)
    seen = np.concatenate([train.windows_at(n, order, step * batch, batch) for step in range(300 // batch)])
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert not np.array_equal(seen[:n], seen[n : 2 * n]), "each epoch has its own order"


def test_the_samples_of_a_step_do_not_depend_on_the_ranks_so_far():
    """Ranks 1, 2, 4, 1 take turns through a run: every step's windows are those of one process."""
    n, order = 500, lambda epoch: np.random.default_rng([1, epoch]).permutation(500)
    for step, world in enumerate((1, 2, 4, 1)):
        windows = train.windows_at(n, order, step * 16, 16)
        shares = [windows.reshape(-1, world, 2)[:, rank].ravel() for rank in range(world)]
        assert sorted(np.concatenate(shares)) == sorted(windows) and len(set(map(len, shares))) == 1


def test_iteration_schedules_are_pure_functions_with_the_stated_distributions():
    assert {train.draw_iters(2, 1, step) for step in range(50)} == {2}
    uniform = Counter(train.draw_iters("1-3", 1, step) for step in range(3000))
    assert set(uniform) == {1, 2, 3} and all(abs(c - 1000) < 120 for c in uniform.values())
    drawn = np.array([train.draw_iters("poisson:4", 1, step) for step in range(6000)])
    rate_variance = 9 * (math.exp(0.25) - 1)  # of a log-normal of mean 3 and sigma 0.5; Poisson adds its mean
    assert abs(drawn.mean() - 4) < 0.15 and abs(drawn.var() - (3 + rate_variance)) < 0.8
    assert drawn.min() == 1 and drawn.max() <= 128
    assert [train.draw_iters("poisson:4", 1, s) for s in range(20)] == drawn[:20].tolist()
    assert [train.draw_iters("poisson:4", 2, s) for s in range(20)] != drawn[:20].tolist()


def test_warmup_stable_decay():
    schedule = ["--lr=1", "--min_lr=0.1", "--warmup_steps=10", "--decay_frac=0.2"]
    config = load_config([str(ROOT / "config" / "abbie_tiny.py"), *schedule])
    lr = [train.lr_at(step, config, 100) for step in range(101)]
    assert lr[0] == 0.1 and lr[9] == 1 and lr[10:81] == [1] * 71
    assert lr[100] == pytest.approx(0.1) and np.allclose(np.diff(lr[80:]), -0.045)


def test_the_run_length_is_twenty_tokens_per_parameter_unless_set(here):
    folder = here("run", "--max_steps=0", "--tokens_per_param=0.02", "--eval_every=0", "--save_every=0")
    header = log(folder)[0]
    assert header["max_steps"] == round(0.02 * header["n_params"] / (8 * T)) == len(losses(folder))


# ------------------------------------------------------------------------------------ any number of processes


def test_the_same_step_for_4x1_2x2_1x4_and_for_two_nodes(ground, tmp_path):
    """Accumulation x ranks: gradients per tensor within 1e-6, and the reported loss, norm and validation
    loss."""

    def argv(name):
        return faulty(
            ground, "grads", 0, 0, tmp_path / f"{name}.pt", tmp_path / name, "--max_steps=1", "--eval_every=1"
        )

    for world in (1, 2, 4):
        assert {d.returncode for d in ranks(world, argv(str(world)), ground)} == {0}
    port = free_port()
    nodes = [
        torchrun(
            [
                "--nnodes=2",
                "--nproc_per_node=1",
                f"--node_rank={n}",
                "--master_addr=127.0.0.1",
                f"--master_port={port}",
            ],
            argv("nodes"),
            ground,
        )
        for n in range(2)
    ]
    for node in nodes:
        out, _ = node.communicate(timeout=300)
        assert node.returncode == 0, out
    reference, first = torch.load(tmp_path / "1.pt", weights_only=True), log(tmp_path / "1")
    assert len(reference) > 10
    for name in ("2", "4", "nodes"):
        for g, h in zip(reference, torch.load(tmp_path / f"{name}.pt", weights_only=True), strict=True):
            assert (g - h).norm() <= 1e-6 * g.norm()
        for a, b in zip(first[1:], log(tmp_path / name)[1:], strict=True):
            if "val_loss" in a:
                assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-6)
            else:
                assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-6)


def test_no_all_reduce_on_accumulation_micro_steps(ground, tmp_path):
    done = ranks(
        2, faulty(ground, "count", 0, 0, tmp_path / "count", tmp_path / "run", "--max_steps=3"), ground
    )
    assert {d.returncode for d in done} == {0}, done[0].stderr
    assert " = 2 x 2 x 2" in done[0].stdout, "2 ranks x 2 micro-batches of 2"
    assert (tmp_path / "count").read_text() == "3", "one bucket, reduced once in each of 3 steps"


# ------------------------------------------------------------------------------------------- any interruption


@pytest.mark.parametrize("world", [1, 2])
def test_killed_again_and_again_it_ends_bit_for_bit_the_same(ground, undisturbed, tmp_path, world):
    """SIGKILL between steps and in the middle of a save, then a rerun of the same command to the end."""
    out = tmp_path / "run"
    for fault, step in (("kill", 1), ("kill_in_save", 3), ("none", 0)):
        argv = faulty(ground, fault, step, 0, tmp_path / f"{fault}{step}", out)
        statuses = [d.returncode for d in ranks(world, argv, ground)]
        assert (statuses[0] == -signal.SIGKILL) == (fault != "none")
    assert digest(out) == digest(undisturbed[world])
    assert losses(out) == losses(undisturbed[world]) and len(losses(out)) == 8
    assert [r for r in log(out) if "val_loss" in r] == [r for r in log(undisturbed[world]) if "val_loss" in r]


def test_torchrun_restarts_after_a_crash_and_ends_the_same(ground, undisturbed, tmp_path):
    process = torchrun(
        ["--nproc_per_node=2", "--max-restarts=1", f"--master_port={free_port()}"],
        faulty(ground, "crash", 5, 1, tmp_path / "crashed", tmp_path / "run"),
        ground,
    )
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and (tmp_path / "crashed").exists(), out
    assert digest(tmp_path / "run") == digest(undisturbed[2])
    assert losses(tmp_path / "run") == losses(undisturbed[2])


def test_a_signal_on_one_rank_saves_and_ends_all(ground, undisturbed, tmp_path):
    argv = faulty(ground, "term", 3, 1, tmp_path / "signalled", tmp_path / "run")
    done = ranks(2, argv, ground)
    assert [d.returncode for d in done] == [143, 143], done[0].stderr
    assert find_checkpoint(tmp_path / "run").name == "step_00000004"
    assert "SIGTERM: step 4 is saved" in done[0].stdout and not any("Traceback" in d.stderr for d in done)
    assert [d.returncode for d in ranks(2, argv, ground)] == [0, 0]
    assert digest(tmp_path / "run") == digest(undisturbed[2])


@pytest.mark.parametrize("fault, status, saved", [("int", 130, 4), ("term_in_save", 143, 5)])
def test_a_signal_during_a_save_waits_for_it(ground, undisturbed, tmp_path, fault, status, saved):
    """SIGTERM in the middle of the save of step 4 is acted on after step 5; SIGINT between steps at once."""
    argv = faulty(ground, fault, 3, 0, tmp_path / "signalled", tmp_path / "run", "--keep_last=9")
    assert [d.returncode for d in ranks(1, argv, ground)] == [status]
    assert find_checkpoint(tmp_path / "run").name == f"step_{saved:08d}"
    assert all(is_complete(path) for path in (tmp_path / "run").glob("step_*"))


# ------------------------------------------------------------------------------------------------ checkpoints


class Interrupted:
    """Counts the file operations of a save and, at number `at`, fails with a full disk, writes half, or
    dies."""

    def __init__(self, patch, at: int, how: str):
        self.n, self.at, self.how = 0, at, how
        real_open = open

        def wrap(module, name):
            real = getattr(module, name)

            def operation(*args, **kwargs):
                self.count()
                return real(*args, **kwargs)

            patch.setattr(module, name, operation)

        for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
            wrap(os, name)

        class File:
            def __init__(file, *args, **kwargs):
                file.real = real_open(*args, **kwargs)
                self.count()

            def write(file, data):
                if self.n + 1 == self.at and self.how == "short":
                    file.real.write(bytes(data)[: len(bytes(data)) // 2])
                    file.real.flush()
                self.count()
                return file.real.write(data)

            def __getattr__(file, name):
                return getattr(file.real, name)

            def __enter__(file):
                return file

            def __exit__(file, *error):
                file.real.close()

        patch.setattr(
            model,
            "open",
            lambda path, mode="r": File(path, mode) if "w" in mode else real_open(path, mode),
            raising=False,
        )

    def count(self):
        self.n += 1
        if self.n == self.at:
            if self.how == "die":
                os._exit(9)
            raise OSError(28, "No space left on device")


def states(value: float):
    net = torch.nn.Linear(3, 3)
    torch.nn.init.constant_(net.weight, value)
    return net.state_dict(), {"optimizer": {"exp_avg": torch.full((3,), value)}, "step": int(value)}


@pytest.mark.parametrize("how", ["full", "short", "die"])
def test_a_save_cut_short_at_any_file_operation_never_yields_a_wrong_state(tmp_path, how):
    """After a failure at operation 1, 2, ..., n of n, what loads is the old state or the new one, whole."""

    def save(folder, value):
        save_checkpoint(folder, int(value), *states(value), {"step": int(value)})

    outcomes, n = Counter(), 0
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        save(folder, 1.0)
        child = os.fork()  # a process of its own: "die" is a real end without cleaning up
        if child == 0:
            patch = pytest.MonkeyPatch()
            interrupted = Interrupted(patch, at, how)
            try:
                save(folder, 2.0)
                os._exit(0 if interrupted.n < at else 1)
            except UserError as error:
                os._exit(9 if "No space left" in str(error) else 2)
            finally:  # whatever else happens, the child must not become a second pytest
                os._exit(3)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = find_checkpoint(folder)
        value = float(found.name.removeprefix("step_"))
        weights, rest = states(value)
        assert torch.equal(torch.load(found / "model.pt", weights_only=True)["weight"], weights["weight"])
        assert torch.load(found / "train.pt", weights_only=True)["step"] == rest["step"]
        assert json.loads((found / "config.json").read_text())["step"] == value
        if status == 0:
            break
        assert status == 9
        outcomes[value], n = outcomes[value] + 1, at
        save(folder, 2.0)  # and the same save can be repeated
        assert find_checkpoint(folder).name == "step_00000002"
    assert n == sum(outcomes.values()) > 20 and outcomes[1.0] and outcomes[2.0]
    print(
        f"{how}: {n} of {n} failures left a whole state: {outcomes[1.0]} the old one, {outcomes[2.0]} the new"
    )


def test_the_last_few_checkpoints_are_kept(here):
    folder = here("run", "--save_every=1", "--keep_last=3")
    assert sorted(p.name for p in folder.glob("*step_*")) == [f"step_{n:08d}" for n in (6, 7, 8)]
    assert (folder / "latest").read_text() == "step_00000008"
    state = torch.load(folder / "step_00000008" / "model.pt", weights_only=True)
    assert set(state) == set(AbbIE.from_checkpoint(folder).state_dict()), "the raw module's names"


def test_a_damaged_newest_checkpoint_costs_only_its_steps(here, undisturbed):
    folder = here("run", "--keep_last=4")
    damaged = folder / "step_00000008" / "train.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    assert find_checkpoint(folder).name == "step_00000006"
    assert digest(here("run", "--keep_last=4")) == digest(undisturbed[1])
    assert is_complete(folder / "step_00000008") and losses(folder) == losses(undisturbed[1])


# ----------------------------------------------------------------------------------- resuming, or refusing to


def test_a_finished_run_prints_its_evaluation_again_and_trains_on_if_it_is_made_longer(here, capsys):
    folder = here("run", "--decay_frac=0")
    before = digest(folder)
    assert capsys.readouterr().out.count("step      8 | validation loss") == 1
    assert digest(here("run", "--decay_frac=0")) == before
    assert capsys.readouterr().out.count("step      8 | validation loss") == 1
    here("run", "--decay_frac=0", "--max_steps=10")
    assert list(losses(folder)) == list(range(10))


def test_starting_afresh_moves_the_earlier_run_aside(here):
    folder = here("run")
    before = digest(folder)
    assert digest(here("run", "--resume=never")) == before
    assert digest(folder.with_name("run.1")) == before


def test_resuming_from_a_checkpoint_by_name(here, undisturbed):
    folder = here("run", "--keep_last=9")
    other = here("other", f"--resume={folder / 'step_00000004'}")
    assert min(losses(other)) == 4 and digest(other) == digest(undisturbed[1])


@pytest.mark.parametrize(
    "flag, named",
    [
        ("--n_embd=64", "n_embd"),
        ("--n_body_blocks=2", "n_body_blocks"),
        ("--rule=recall", "rule"),
        ("--data=", "data_sha256"),
    ],
)
def test_changed_data_shape_or_rule_is_refused(here, ground, tmp_path, flag, named):
    here("run", "--max_steps=2")
    if flag == "--data=":
        prepare_data.main(
            [
                "text",
                "--input",
                str(ground / "text" / "1.txt"),
                str(ground / "text" / "2.txt"),
                "--tokenizer",
                "bytes",
                "--out",
                str(tmp_path / "other"),
            ]
        )
        flag += str(tmp_path / "other")
    with pytest.raises(UserError, match=named) as error:
        here("run", "--max_steps=4", flag)
    assert len(str(error.value).splitlines()) <= 3 and "force" in str(error.value)
    if named == "data_sha256":
        assert 3 in losses(here("run", "--max_steps=4", flag, "--force=true"))


# -------------------------------------------------------------------------------- starting from other weights


def test_a_standard_model_can_be_iterated_and_trained_on(here):
    std = here("std", "--iters=1", "--max_steps=2")
    folder = here(
        "iterated", f"--init_from={std}", "--iters=2", "--max_steps=3", "--save_every=1", "--keep_last=9"
    )
    assert [r["iters"] for r in log(folder) if "iters" in r] == [2, 2, 2]
    start, given = (AbbIE.from_checkpoint(p) for p in (std, std / "step_00000002"))
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), given.parameters()))
    first = log(folder)[1]["val_loss"]
    assert first["1"] == [r for r in log(std) if "val_loss" in r][-1]["val_loss"]["1"]
    assert digest(here("iterated", f"--init_from={std}", "--iters=2", "--max_steps=3")) == digest(folder)


def test_init_from_another_shape_is_refused_and_another_cut_is_not(here):
    std = here("std", "--iters=1", "--max_steps=1")
    with pytest.raises(UserError, match="n_embd is 32 there, 64 here"):
        here("wide", f"--init_from={std}", "--n_embd=64")
    here(
        "recut",
        f"--init_from={std}",
        "--n_head_blocks=0",
        "--n_body_blocks=3",
        "--n_tail_blocks=0",
        "--max_steps=1",
    )
    zero = here("zero", f"--init_from={std}", "--rule=zero_pt", "--max_steps=1")
    assert AbbIE.from_checkpoint(zero).project.weight.shape == (32, 64)


# ------------------------------------------------------------------------------- bad steps, too little memory


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(ground, tmp_path):
    done = ranks(
        2,
        faulty(
            ground,
            "nan",
            2,
            1,
            tmp_path / "nan",
            tmp_path / "run",
            "--max_steps=4",
            "--save_every=1",
            "--keep_last=9",
        ),
        ground,
    )
    assert [d.returncode for d in done] == [0, 0], done[0].stderr
    skipped = {r["step"]: r["skipped"] for r in log(tmp_path / "run") if "skipped" in r}
    assert skipped == {0: False, 1: False, 2: True, 3: False}
    assert next(r for r in log(tmp_path / "run") if r.get("skipped"))["loss"] is None
    states = [
        torch.load(tmp_path / "run" / f"step_0000000{n}" / "model.pt", weights_only=True) for n in (2, 3, 4)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), "weights unchanged"
    assert not all(torch.equal(states[1][name], states[2][name]) for name in states[0]), "then it goes on"
    assert all(torch.isfinite(t).all() for t in states[2].values())


def test_too_many_bad_steps_in_a_row_stop_the_run_with_its_weights_saved(here, monkeypatch, tmp_path):
    forward = AbbIE.forward

    def bad(self, idx, targets=None, iters=None):
        logits, loss = forward(self, idx, targets, iters)
        return logits, loss * float("inf") if torch.is_grad_enabled() else loss

    here("run", "--max_steps=2")
    before = find_checkpoint(tmp_path / "run")
    weights = torch.load(before / "model.pt", weights_only=True)
    monkeypatch.setattr(AbbIE, "forward", bad)
    with pytest.raises(UserError, match="3 steps in a row"):
        here("run", "--max_steps=9", "--max_skips=3", "--eval_every=0", "--keep_last=9")
    after = torch.load(find_checkpoint(tmp_path / "run") / "model.pt", weights_only=True)
    assert find_checkpoint(tmp_path / "run").name == "step_00000005"
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_out_of_memory_names_micro_batch_and_a_value_to_try(ground, tmp_path):
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
        f"sys.path.insert(0, {str(ROOT)!r}); import train; from config import cli; cli(train.main)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            limited,
            str(ground / "small.py"),
            f"--out_dir={tmp_path / 'run'}",
            "--eval_every=0",
            f"--tokens_per_step={2**15 * T}",
            f"--micro_batch={2**15}",
            "--ffn_dim=2048",
        ],
        capture_output=True,
        text=True,
        cwd=ground,
        env=ENV,
    )
    assert done.returncode == 2, done.stderr
    assert "micro_batch=32768" in done.stderr and "--micro_batch=16384" in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def live_bytes_after_forward(net, idx, iters) -> int:
    """Bytes that a forward pass leaves allocated for the backward pass, as the allocator counts them."""
    with torch.profiler.profile(profile_memory=True) as prof:
        loss = net(idx, idx, iters)[1]
    del loss
    return sum(event.self_cpu_memory_usage for event in prof.events())


@pytest.mark.parametrize("rule", ["abbie_d", "recall"])
def test_activation_checkpointing_grows_by_one_state_per_iteration(rule):
    net = AbbIE(
        AbbIEConfig(
            vocab_size=64,
            block_size=64,
            n_embd=64,
            n_attn_heads=2,
            ffn_dim=256,
            n_head_blocks=1,
            n_body_blocks=2,
            n_tail_blocks=1,
            rule=rule,
        )
    )
    idx, state = torch.randint(0, 64, (8, 64)), 8 * 64 * 64 * 4
    growth = {}
    for on in (False, True):
        net.activation_checkpointing = on
        growth[on] = (live_bytes_after_forward(net, idx, 8) - live_bytes_after_forward(net, idx, 4)) / 4
    assert growth[True] <= 1.1 * state < 5 * state < growth[False]


# ------------------------------------------------------------------------------------------------- compiling


def test_changing_iters_never_recompiles(monkeypatch):
    """The blocks are compiled as train.py does it (with the eager backend): the graphs of two iterations
    serve any."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = AbbIE(
        AbbIEConfig(
            vocab_size=64,
            block_size=T,
            n_embd=32,
            n_attn_heads=2,
            ffn_dim=64,
            n_head_blocks=2,
            n_body_blocks=3,
            n_tail_blocks=2,
        )
    )
    for block in [*net.head, *net.body, *net.tail]:
        block.compile()
    idx, graphs = torch.randint(0, 64, (2, T)), []
    for iters in (2, 1, 3, 8, 5):
        net(idx, idx, iters)[1].backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] == 2, (
        "one graph for Head and Tail, one for the Body: whatever the depth and iters"
    )


def test_without_a_compiler_it_runs_eagerly_and_says_so(ground, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            str(ground / "small.py"),
            "--compile=on",
            f"--out_dir={tmp_path / 'run'}",
            "--max_steps=1",
        ],
        capture_output=True,
        text=True,
        cwd=ground,
        env={
            **os.environ,
            "CXX": "/nonexistent",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stderr.splitlines() if "running without" in line]) == 1
    assert log(tmp_path / "run")[0]["compiled"] is False


# ----------------------------------------------------------------------------------------------- the main job


def test_the_main_job_end_to_end(tmp_path):
    """`python train.py config/abbie_tiny.py` from nothing, cut to a few steps: it makes the embedded corpus,
    trains, prints validation losses, the built-in tasks and a sample, and leaves a checkpoint and a log."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            str(ROOT / "config" / "abbie_tiny.py"),
            "--max_steps=3",
            "--eval_tokens=4096",
            "--n_embd=32",
            "--ffn_dim=64",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "Python ",
        "parameters",
        "validation loss",
        "r=1 ",
        "r=32 ",
        "cloze",
        "lastword",
        "a sample",
    ):
        assert part in done.stdout, part
    header, *records = log(tmp_path / "out" / "abbie_tiny")
    assert {"config", "torch", "device", "commit"} <= set(header)
    step = next(r for r in records if "loss" in r)
    assert {"step", "iters", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "flops", "eta_s"} <= set(step)
    first = next(r["val_loss"] for r in records if "val_loss" in r)
    assert set(first) == {"1", "2", "3", "4", "8", "16", "32"}
    assert abs(first["2"] - math.log(257)) < 0.5, "at initialisation the loss is near ln V"
    assert is_complete(tmp_path / "out" / "abbie_tiny" / "step_00000003")


@pytest.mark.parametrize(
    "argv, part",
    [
        (["config/none.py"], "no file"),
        (["config/abbie_350m.py"], "prepare_data.py c4"),
        (["config/abbie_tiny.py", "--init_from=nowhere"], "nowhere"),
        (["config/abbie_tiny.py", "--device=tpu"], "device=tpu"),
        (["config/abbie_tiny.py", "--micro_batch=3"], "micro_batch"),
    ],
)
def test_mistakes_are_named(ground, tmp_path, monkeypatch, argv, part):
    monkeypatch.chdir(tmp_path)
    argv = [str(ROOT / argv[0]), f"--out_dir={tmp_path}", *argv[1:]]
    if "350m" not in argv[0]:
        argv.append(f"--data={ground / 'words'}")
    with pytest.raises(UserError, match=part) as error:
        train.main(argv)
    assert len(str(error.value).splitlines()) <= 3


def test_a_mistake_ends_in_three_lines_and_status_2():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(ROOT / "config" / "abbie_tiny.py"), "--itrs=2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "did you mean iters" in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) <= 3
