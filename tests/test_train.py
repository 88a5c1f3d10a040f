"""Training: the same step on any number of processes, the same run after any interruption, and no bad step.

Processes, ranks, signals and kills are real; tests/faulty_train.py runs train.py with one fault injected."""

import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import faulty_train
import numpy as np
import pytest
import torch
from common import ROOT, fork_server, make

import eval_icl
import prepare_data
import sample
import train
from checkpoint import checkpoints, load_model, locked, read_tensors
from config import choose_device, load_config
from model import AbbIE, UserError

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # of every process started here: the same number of threads
T = 32


# ------------------------------------------------------------------------------------------------- the ground


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory) -> str:
    """The config file of a very small model."""
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(f"""
data = {str(corpus)!r}
block_size, n_embd, n_attn_heads, ffn_dim = {T}, 32, 2, 64
n_head_blocks, n_body_blocks, n_tail_blocks = 1, 1, 1
tokens_per_step, micro_batch, max_steps, lr = {8 * T}, 2, 8, 1e-2
eval_every, eval_iters, eval_tokens, save_every, keep_last = 4, "1,2,4", {2 * T}, 2, 2
device, dtype = "cpu", "float32"
""")
    return str(file)


@pytest.fixture
def here(small, tmp_path, monkeypatch):
    """run(out, *flags): train.main on the small config, in this process -> the run's folder. The tasks and
    the sample at the end are left out: the main job shows them."""
    monkeypatch.setattr(train, "show_off", lambda *args, **options: None)

    def run(out="run", *flags):
        train.main([small, f"--out_dir={tmp_path / out}", *flags])
        return tmp_path / out

    yield run
    torch.backends.cuda.enable_flash_sdp(True)  # a run in bf16 has done without: train.choose_attention


def digest(run: Path) -> str:
    """SHA-256 over the sorted (name, dtype, shape, raw bytes) of the weights and the optimizer's state."""
    folder = newest(run)
    tensors = read_tensors(folder / "model.pt")
    for number, moments in read_tensors(folder / "train.pt")["optimizer"]["state"].items():
        tensors |= {f"{number}.{name}": tensor for name, tensor in moments.items()}
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return f"{folder.name} {sha.hexdigest()}"


def newest(run: Path) -> Path:
    return checkpoints(run)[-1]


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if line]


def losses(folder: Path) -> dict[int, float]:
    """By step, of which the last line counts."""
    return {r["step"]: r["loss"] for r in log(folder) if "loss" in r}


def validation(folder: Path) -> dict:
    return {(r["step"], len(r["val_loss"])): r for r in log(folder) if "val_loss" in r}


def weights(folder: Path, step: int) -> dict:
    return read_tensors(folder / f"step_{step:08d}" / "model.pt")


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def faulty(small: str, out: Path, fault="none", step=0, rank=0, flags=()) -> list[str]:
    """The arguments of tests/faulty_train.py on the small config."""
    marker = out.with_name(f"{out.name}.{fault}{step}")
    return [fault, str(step), str(rank), str(marker), small, f"--out_dir={out}", *flags]


def ranks(world: int, small: str, out: Path, *fault, **flags) -> SimpleNamespace:
    """Run tests/faulty_train.py as `world` gloo ranks, as torchrun would start them -> their exit statuses
    and what each has printed. They are forked from a process that has imported PyTorch and done no more."""
    context = fork_server()
    port, folder, started = free_port(), out.parent, []
    try:
        for rank in range(world):
            where = (rank, world, port, faulty(small, out, *fault, **flags), folder)
            started.append(context.Process(target=faulty_train.as_rank, args=where))
            started[-1].start()
        for process in started:
            process.join(timeout=120)
        statuses = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
    printed = {name: [(folder / f"{name}.{r}").read_text() for r in range(world)] for name in ("out", "err")}
    return SimpleNamespace(statuses=statuses, **printed)


def torchrun(flags: list[str], argv: list[str], folder: Path):
    command = [sys.executable, "-m", "torch.distributed.run", *flags, str(ROOT / "tests/faulty_train.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *argv], cwd=folder, env=ENV, **pipes)


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """The run that nothing interrupts, as one process and as two: its folder for each."""
    out = tmp_path_factory.mktemp("undisturbed")
    for world in (1, 2):
        done = ranks(world, small, out / str(world), "grads")
        assert done.statuses == [0] * world, done.err
    return {world: out / str(world) for world in (1, 2)}


# ---------------------------------------------------------------------- what a step is: (seed, step), no more


@pytest.mark.parametrize("world, micro_batch", [(1, 8), (2, 2), (4, 1)])
def test_every_window_of_a_step_is_seen_once_on_one_of_the_ranks(world, micro_batch):
    windows = np.random.default_rng(1).permutation(50)[:8]
    shares = [train.share_of(windows, rank, world, micro_batch) for rank in range(world)]
    assert all(share.shape == (8 // world // micro_batch, micro_batch) for share in shares)
    assert sorted(np.concatenate(shares).ravel()) == sorted(windows)


def test_iteration_schedules_are_pure_functions_with_the_stated_distributions():
    assert {train.draw_iters(2, 1, step) for step in range(50)} == {2}
    uniform = Counter(train.draw_iters("1-3", 1, step) for step in range(3000))
    assert set(uniform) == {1, 2, 3} and all(abs(c - 1000) < 120 for c in uniform.values())
    drawn = np.array([train.draw_iters("poisson:4", 1, step) for step in range(6000)])
    rate_variance = 9 * (math.exp(0.25) - 1)  # of a log-normal of mean 3 and sigma 0.5; Poisson adds its mean
    assert abs(drawn.mean() - 4) < 0.15 and abs(drawn.var() - (3 + rate_variance)) < 0.8
    assert [train.draw_iters("poisson:4", 1, s) for s in range(20)] == drawn[:20].tolist()
    assert [train.draw_iters("poisson:4", 2, s) for s in range(20)] != drawn[:20].tolist()


def test_warmup_stable_decay():
    schedule = ["--lr=1", "--min_lr=0.1", "--warmup_steps=10", "--decay_frac=0.2", "--max_steps=100"]
    config = load_config([str(ROOT / "config" / "abbie_tiny.py"), *schedule])
    lr = [train.lr_at(step, config) for step in range(101)]
    assert lr[0] == 0.1 and lr[9] == 1 and lr[10:81] == [1] * 71
    assert lr[100] == pytest.approx(0.1) and np.allclose(np.diff(lr[80:]), -0.045)
    short = dataclasses.replace(config, max_steps=11)  # the decay begins within the warmup
    lr = [train.lr_at(step, short) for step in range(12)]
    assert np.allclose(lr[:9], np.arange(1, 10) / 10) and np.allclose(lr[9:], [1, 0.55, 0.1])
    overlapping = dataclasses.replace(short, decay_frac=1.0)
    assert max(train.lr_at(step, overlapping) for step in range(12)) < 0.6


def test_the_peak_of_a_device_is_that_of_its_name_and_of_no_other():
    names = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "NVIDIA L40S", "NVIDIA RTX A1000", "NVIDIA L40")
    assert [train.peak_flops(name) for name in names] == [312e12, 756e12, 362e12, None, None]


def test_the_run_length_is_twenty_tokens_per_parameter_unless_set(here):
    folder = here("run", "--max_steps=0", "--tokens_per_param=0.02", "--eval_every=0", "--save_every=0")
    header = log(folder)[0]["made_by"]
    assert header["max_steps"] == round(0.02 * header["n_params"] / (8 * T)) == len(losses(folder))


# ------------------------------------------------------------------------------------ any number of processes


def test_the_same_step_for_1_2_and_4_ranks_and_for_two_nodes(small, undisturbed, tmp_path):
    """Accumulation x ranks 4 x 1, 2 x 2, 1 x 4: gradients per tensor within 1e-6, and the reported loss, norm
    and validation loss. Gradients are averaged over ranks once a step, not with every micro-batch."""
    one_step = ["--max_steps=1", "--eval_every=1"]
    four, nodes = tmp_path / "4", tmp_path / "nodes"
    assert ranks(4, small, four, "grads", flags=one_step).statuses == [0] * 4
    argv = faulty(small, nodes, "grads", flags=one_step)
    flags = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    for node in [torchrun([*flags, f"--node_rank={n}"], argv, tmp_path) for n in range(2)]:
        out, _ = node.communicate(timeout=120)
        assert node.returncode == 0, out

    def first_step(folder):
        evaluation, step = log(folder)[1:3]
        figures = [step["loss"], step["grad_norm"], *evaluation["val_loss"].values()]
        return figures, torch.load(folder.with_name(f"{folder.name}.grads0"))

    figures, seen = first_step(undisturbed[1])
    assert len(seen["grads"]) > 10
    for folder in (undisturbed[2], four, nodes):
        other_figures, others = first_step(folder)
        assert other_figures == pytest.approx(figures, rel=1e-6)
        for g, h in zip(seen["grads"], others["grads"], strict=True):
            assert (g - h).norm() <= 1e-6 * g.norm()
        assert others["reductions"] == 1, "one bucket, reduced once whatever the micro-batches"


# ------------------------------------------------------------------------------------------- any interruption


def test_killed_again_and_again_it_ends_bit_for_bit_the_same(small, undisturbed, tmp_path):
    """SIGKILL between steps and in the middle of a save, then a rerun of the same command to the end."""
    out = tmp_path / "run"
    for fault, step, status in (("kill", 1, -9), ("kill_in_save", 3, -9), ("kill", 5, -9), ("none", 0, 0)):
        assert ranks(1, small, out, fault, step).statuses == [status]
    assert digest(out) == digest(undisturbed[1])
    assert losses(out) == losses(undisturbed[1]) and len(losses(out)) == 8
    assert validation(out) == validation(undisturbed[1])


def test_two_ranks_signalled_then_crashed_and_restarted_by_torchrun_end_the_same(
    small, undisturbed, tmp_path
):
    """A signal to one rank saves and ends all. The same command goes on; torchrun restarts it when it
    crashes."""
    out = tmp_path / "run"
    done = ranks(2, small, out, "term", 2, rank=1)
    assert done.statuses == [143, 143] and not any("Traceback" in err for err in done.err)
    assert "SIGTERM: step_00000003 is saved" in done.out[0]
    assert newest(out).name == "step_00000003"
    flags = ["--nproc_per_node=2", "--max-restarts=1", f"--master_port={free_port()}"]
    process = torchrun(flags, faulty(small, out, "crash", 5, rank=1), tmp_path)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "injected" in printed, printed
    assert digest(out) == digest(undisturbed[2]) and losses(out) == losses(undisturbed[2])


@pytest.mark.parametrize(
    "fault, step, status, saved",
    [("int", 3, 130, 4), ("hup", 3, 129, 4), ("term_in_save", 3, 143, 5), ("term_in_save", 7, 143, 8)],
)
def test_a_signal_during_a_save_waits_for_it(small, tmp_path, fault, step, status, saved):
    """SIGTERM in the middle of the save of step 4 is acted on after step 5, in that of step 8, the last, when
    it is done; SIGINT between steps at once."""
    out = tmp_path / "run"
    done = ranks(1, small, out, fault, step, flags=["--keep_last=9"])
    assert done.statuses == [status] and newest(out).name == f"step_{saved:08d}"
    assert all(load_model(path) for path in out.glob("step_*"))
    assert "heard: it ends after the step at hand" in done.err[0]


def test_a_lost_terminal_saves_the_run(small, tmp_path):
    """The kernel sends SIGHUP when the terminal goes, and nothing can be printed from then on."""
    ours, theirs = pty.openpty()
    flags = ["--max_steps=1000000", "--eval_every=0", "--save_every=0", f"--out_dir={tmp_path}/run"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", small, *flags], stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env=ENV,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while b"step      0 | loss" not in shown:
        shown += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert load_model(tmp_path / "run").meta["step"] > 0


def test_every_signal_is_acknowledged_and_the_third_would_end_it(capfd):
    with train.noticed_signals(0) as asked:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert asked == [signal.SIGINT] * 2 and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    first, second = capfd.readouterr().err.split("SIGINT heard: ")[1:]
    assert "ends after the step at hand" in first and "once more ends it now, unsaved" in second


def test_continued_under_a_drawn_schedule_with_truncated_gradients_in_another_folder(here):
    schedule = ["--iters=poisson:4", "--backprop_iters=2", "--keep_last=9", "--dtype=bfloat16"]
    whole = here("whole", *schedule)
    before = digest(whole)
    other = here("other", *schedule, f"--resume={whole / 'step_00000004'}")
    assert digest(other) == digest(whole) == before and min(losses(other)) == 4
    assert len({r["iters"] for r in log(whole) if "loss" in r}) > 2  # it was drawn
    assert digest(here("end", *schedule, f"--resume={whole / 'step_00000008'}")) == digest(whole)


# ----------------------------------------------------------------------------------- resuming, or refusing to


def test_the_last_few_checkpoints_are_kept_and_a_damaged_one_costs_only_its_steps(here, undisturbed, capsys):
    folder = here("run", "--save_every=1", "--keep_last=1")
    names = sorted(path.name for path in folder.glob("*step_*"))
    assert names == ["step_00000006", "step_00000008"], "6: where the decay begins"
    assert set(weights(folder, 8)) == set(load_model(folder).state_dict()), "the raw module's names"
    os.truncate(folder / "step_00000008" / "train.pt", 1000)
    here("run", "--save_every=1", "--keep_last=2")
    assert "passed over: " in capsys.readouterr().err
    assert digest(folder) == digest(undisturbed[1]) and losses(folder) == losses(undisturbed[1])


def test_a_finished_run_prints_its_evaluation_again(here, capsys):
    folder = here("run")
    before, first = digest(folder), capsys.readouterr().out
    here("run")
    again = capsys.readouterr().out
    assert digest(folder) == before
    last = log(folder)[-1]  # on all of the validation split, at the model's own iters
    assert last["tokens"] % T == 0
    line = f"validation loss, {last['tokens']:,} tokens (nats/token)  r=2 {last['val_loss']['2']:.4f}"
    for printed in (first, again):
        assert printed.count("step      8 | validation loss") == 2 and printed.count(line) == 1


def test_a_run_made_longer_goes_on_from_before_its_decay_and_keeps_the_decayed_end(here):
    folder = here("run", "--decay_frac=0.5")
    decayed = digest(folder)
    longer = digest(here("run", "--decay_frac=0.5", "--max_steps=16"))
    straight = here("straight", "--decay_frac=0.5", "--max_steps=16")
    assert longer == digest(straight) and losses(folder) == losses(straight)
    rates = {r["step"]: r["lr"] for r in log(folder) if "loss" in r}
    assert all(rates[step] == 1e-2 for step in range(1, 9))
    (folder / "again").mkdir()
    os.rename(folder / "passed_over_00000008", folder / "again" / "step_00000008")
    assert digest(folder / "again") == decayed


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--seed=2"], "seed is 1 there, 2 here"),
        (["--n_body_blocks=2"], "n_body_blocks is 1 there, 2 here"),
        (["--rule=recall"], "rule is 'abbie_d' there, 'recall' here"),
        (["--init_from=/nope"], "init_from is '' there, '/nope' here"),
        (["--lr=1"], "ended its run, and lr is 0.01 there, 1.0 here\nnothing was trained"),
        (["--iters=1-3"], "ended its run, and iters is 2 there, '1-3' here\nnothing was trained"),
        (["--max_steps=4"], "is beyond max_steps=4\nnothing was trained"),
        (["--data=OTHER"], "was trained on other data than"),
        (["--resume=never"], "holds a run, which would lose checkpoints"),
        (["--resume=RUN/step_00000006"], "holds a run, which would lose checkpoints"),
        (["--resume=ELSEWHERE"], "holds a run, which would lose checkpoints"),
    ],
)
def test_a_finished_run_refuses_what_would_change_it_and_stays_as_it_is(finished, flags, part, capsys):
    """What decides the result of a run may not change, and no checkpoint is lost."""
    run, start, places = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    flags = [functools.reduce(lambda text, place: text.replace(*place), places, flag) for flag in flags]
    with pytest.raises(UserError) as error:
        start(*flags)
    assert part in str(error.value) and len(str(error.value).splitlines()) <= 3
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


@pytest.fixture(scope="module")
def finished(small, corpus, tmp_path_factory):
    """A finished run, a way to start it again, and what stands for other places in flags."""
    folder, text = tmp_path_factory.mktemp("finished"), str(corpus.parent / "text.txt")
    prepare_data.main(["text", "--input", text, "--val_fraction=0.3", "--out", str(folder / "other")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_off", lambda *args, **options: None)
        train.main([small, f"--out_dir={folder}/run"])
        train.main([small, f"--out_dir={folder}/elsewhere", "--max_steps=1"])
    places = [("OTHER", f"{folder}/other"), ("RUN", f"{folder}/run"), ("ELSEWHERE", f"{folder}/elsewhere")]
    return folder / "run", lambda *flags: train.main([small, f"--out_dir={folder}/run", *flags]), places


def test_in_mid_run_the_rate_and_the_schedule_of_iterations_may_change(here):
    folder = here("run", "--max_steps=2", "--decay_frac=0")
    here(
        "run",
        "--max_steps=4",
        "--decay_frac=0",
        "--lr=2e-2",
        "--iters=1",
        "--eval_every=1",
        "--micro_batch=4",
    )
    assert [(r["lr"], r["iters"]) for r in log(folder) if "loss" in r] == [(1e-2, 2)] * 2 + [(2e-2, 1)] * 2


def test_two_processes_do_not_train_in_one_folder(small, tmp_path, here):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training here"):
        here("run")
    assert not checkpoints(tmp_path / "run")
    here("run", "--max_steps=1")


def test_the_log_is_json_whatever_a_loss_is_and_goes_on_after_a_torn_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"st')
    write = train.open_log(tmp_path / "log.jsonl")
    write({"val_loss": {"1": math.nan, "2": 1.5}, "loss": math.inf})
    first, torn, last = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(last) == {"val_loss": {"1": None, "2": 1.5}, "loss": None} and torn == '{"st'


def test_what_cannot_be_shown_at_the_end_is_no_error(small, capsys):
    config, model = load_config([small]), make(vocab_size=257)
    train.show_off(model, config, SimpleNamespace(tokenizer="hf:/nowhere"), 20)
    assert capsys.readouterr().out.count("not shown: hf:/nowhere") == 1


# -------------------------------------------------------------------------------- starting from other weights


def test_a_standard_model_can_be_iterated_and_trained_on(here):
    std = here("std", "--iters=1", "--max_steps=2")
    flags = [f"--init_from={std}", "--iters=2", "--max_steps=3"]
    folder = here("iterated", *flags)
    assert [r["iters"] for r in log(folder) if "loss" in r] == [2, 2, 2]
    assert validation(folder)[0, 3]["val_loss"]["1"] == validation(std)[2, 3]["val_loss"]["1"]
    before = digest(folder)
    assert digest(here("iterated", *flags)) == before, "the same command goes on with the run"


def test_init_from_another_shape_is_refused_and_another_cut_is_not(here):
    std = here("std", "--iters=1", "--max_steps=1")
    start = [f"--init_from={std}", "--max_steps=1", "--eval_every=0"]
    with pytest.raises(UserError, match="n_embd is 32 there, 64 here"):
        here("wide", *start, "--n_embd=64")
    here("recut", *start, "--n_head_blocks=0", "--n_body_blocks=3", "--n_tail_blocks=0")
    here("zero", *start, "--rule=zero_pt")


# ------------------------------------------------------------------------------- bad steps, too little memory


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(small, tmp_path):
    out = tmp_path / "run"
    flags = ["--max_steps=4", "--save_every=1", "--keep_last=9"]
    assert ranks(2, small, out, "nan", 2, 1, flags).statuses == [0, 0]
    records = [r for r in log(out) if "skipped" in r]
    assert [r["skipped"] for r in records] == [False, False, True, False] and records[2]["loss"] is None
    assert [path.name[-1] for path in checkpoints(out)] == ["1", "2", "4"], "none of a skipped step"
    assert all(weights(out, 4)["norm.weight"].isfinite())


def test_a_step_whose_gradient_is_not_finite_leaves_the_weights(small):
    config, model, batch = load_config([small]), make(), torch.zeros(2, 8, dtype=torch.int64)
    before, optimizer = copy.deepcopy(model.state_dict()), train.adamw(model, config)
    model.norm.weight.register_hook(lambda grad: grad * math.inf)
    loss, norm, _ = train.train_step(model, optimizer, [(batch, batch)], 2, config, contextlib.nullcontext)
    assert math.isfinite(loss) and not math.isfinite(norm) and equal(before, model.state_dict())


def test_a_run_that_diverges_saves_nothing_of_it_and_its_advice_works(here, monkeypatch, tmp_path):
    """At this rate the weights blow up after some steps. What was saved before is what the advice names."""
    monkeypatch.setattr(train, "MAX_SKIPS", 3)
    forward = AbbIE.forward

    def bad(self, idx, targets=None, iters=None, backprop_iters=0):
        logits, loss = forward(self, idx, targets, iters, backprop_iters)
        return logits, loss * (math.nan if torch.is_grad_enabled() and broken[0] > 3e-2 else 1)

    lr_at, broken = train.lr_at, [0.0]
    monkeypatch.setattr(AbbIE, "forward", bad)
    monkeypatch.setattr(train, "lr_at", lambda *args: broken.insert(0, lr_at(*args)) or broken[0])
    folder, flags = here("run", "--max_steps=2"), ["--max_steps=9", "--save_every=1", "--keep_last=9"]
    before = digest(folder)
    for _ in range(2):  # asked again, it says the same
        with pytest.raises(UserError) as error:
            here("run", *flags, "--lr=1")
        assert str(error.value) == (
            "3 steps in a row had no finite loss and gradient\n"
            "step_00000002 is saved: run again with a lower --lr, and it goes on from there"
        )
        assert digest(folder) == before and len(checkpoints(folder)) == 1
    here("run", *flags, "--lr=1e-2")
    assert newest(folder).name == "step_00000009" and load_model(folder)
    with pytest.raises(UserError, match="nothing is saved: run again with a lower --lr"):
        here("fresh", "--lr=1")


def test_weights_that_are_not_finite_are_never_saved(here, monkeypatch, tmp_path):
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(math.inf)
    )
    with pytest.raises(UserError, match="the weights are not finite any more\nnothing is saved"):
        here("run", "--save_every=1", "--eval_every=0")
    assert not checkpoints(tmp_path / "run")


def test_out_of_memory_names_micro_batch(small, tmp_path):
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
        "import train; from config import cli; cli(train.main)"
    )
    size = [f"--tokens_per_step={2**12 * T}", "--micro_batch=4096", "--ffn_dim=32768", "--eval_every=0"]
    command = [sys.executable, "-c", limited, small, f"--out_dir={tmp_path}", *size]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV)
    assert done.returncode == 2 and len(done.stderr.splitlines()) <= 3
    assert "out of memory\ntry a smaller --micro_batch" in done.stderr


# ------------------------------------------------------------------------------------------------- compiling


def test_changing_iters_never_recompiles(small):
    """What train.py compiles, with the eager backend: the graphs of two iterations serve any."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = load_config([small])
    net, idx, graphs = AbbIE(config.model_config(64)), torch.randint(0, 64, (2, T)), []
    assert train.compile_blocks(net, "on", torch.device("cpu"), backend="eager")
    for iters in (2, 1, 3, 8, 5):
        net(idx, idx, iters)[1].backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] <= 3, "of the trial, the blocks, and the loss"


def test_without_a_compiler_it_runs_eagerly_and_says_so(here, capsys, monkeypatch):
    def no_compiler(*args, **how):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    folder = here("run", "--compile=on", "--max_steps=1")
    assert capsys.readouterr().err.count("running without") == 1
    assert log(folder)[0]["made_by"]["compiled"] is False


# ----------------------------------------------------------------------------------------------- the main job


def test_the_main_job_end_to_end(tmp_path):
    """`python train.py config/abbie_tiny.py` from nothing, cut to a few steps: it makes the embedded corpus,
    trains, prints validation losses, the built-in tasks and a sample, and leaves a checkpoint and a log."""
    small = ["--max_steps=3", "--eval_tokens=1024", "--n_embd=32", "--ffn_dim=64"]
    command = [sys.executable, ROOT / "train.py", ROOT / "config/abbie_tiny.py", *small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stderr
    for part in (
        "Python ",
        "n_params=",
        "validation loss",
        "r=1 ",
        "r=32 ",
        "cloze",
        "lastword",
        "a sample",
        "--lens",
    ):
        assert part in done.stdout, part
    out = tmp_path / "out" / "abbie_tiny"
    header, *records = log(out)
    assert {"torch", "device", "commit", "command"} <= set(header["made_by"])
    step = next(r for r in records if "loss" in r)
    assert {"step", "iters", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "flops", "eta_s"} <= set(step)
    first = validation(out)[0, 4]["val_loss"]
    assert set(first) == {"1", "2", "4", "32"}
    assert abs(first["2"] - math.log(257)) < 0.5, "at initialisation the loss is near ln V"
    assert load_model(out).meta["made_by"]["command"].startswith("train.py ") and newest(out).name[-1] == "3"


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--data=data/c4"], "prepare_data.py c4"),
        (["--itrs=2"], "did you mean --iters"),
        (["--resume=nowhere"], "nowhere"),
        (["--init_from=nowhere"], "nowhere"),
        (["--out_dir=/dev/null/run"], "Not a directory"),
        (["--micro_batch=3"], "micro_batch"),
    ],
)
def test_a_mistake_is_one_error_of_all_ranks_in_seconds(small, tmp_path, flags, part):
    began = time.perf_counter()
    done = ranks(2, small, tmp_path / "run", flags=flags)
    assert done.statuses == [2, 2] and time.perf_counter() - began < 30
    printed = "".join(done.err)
    assert printed.startswith("error: ") and part in printed and len(printed.splitlines()) <= 3
    assert "Traceback" not in printed


@pytest.mark.parametrize("script", [train, sample, eval_icl], ids=lambda script: script.__name__)
def test_every_script_says_the_same_of_a_device_that_cannot_be_used(small, here, tmp_path, script):
    argv = {train: [small, f"--out_dir={tmp_path}"]}
    with pytest.raises(UserError, match="^device=mps cannot be used: .*\ntry --device=cpu$"):
        script.main([*argv.get(script, []), "--device=mps"])


def test_auto_is_the_machines_accelerator_or_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert choose_device("auto") == choose_device() == torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
