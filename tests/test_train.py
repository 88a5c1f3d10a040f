"""Training: the same step on any number of processes, the same run after any interruption, and no bad step.

Processes, ranks, signals and kills are real; tests/faulty_train.py runs train.py with one fault injected."""

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pty
import shutil
import signal
import socket
import sys
import termios
import time
from functools import partial
from pathlib import Path

import faulty_train
import numpy as np
import pytest
import torch
from common import ROOT, fork_server, make, refused, start_python

import prepare_data
import train
from checkpoint import checkpoints, load_model, locked, read_tensors
from config import choose_device, cli, load_config

T, FINAL_REPORT = 32, train.final_report


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


@pytest.fixture(scope="module")
def start(small):
    """start(folder, *flags): train in this process, without the tasks and the sample at the end, which the
    main job shows -> folder."""

    def start(folder: Path, *flags: str) -> Path:
        train.main([small, f"--out_dir={folder}", *flags])
        torch.backends.cuda.enable_flash_sdp(True)  # a run in bf16 has done without
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "final_report", lambda *args: None)
        yield start


ALL_SAVED = ["--save_every=1", "--keep_last=9"]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The run that nothing interrupts. Tests read it, or change a copy."""
    return start(tmp_path_factory.mktemp("whole") / "run", *ALL_SAVED)


@pytest.fixture(scope="module")
def whole_of_2(small, tmp_path_factory) -> Path:
    """The same run as two ranks."""
    out = tmp_path_factory.mktemp("whole_of_2") / "run"
    assert ranks(2, small, out, flags=ALL_SAVED) == [0, 0]
    return out


def digest(run: Path) -> str:
    """The newest checkpoint: its name, and the SHA-256 of its weights and optimizer's state."""
    folder, sha = checkpoints(run)[-1], hashlib.sha256()
    tensors = {"weights": read_tensors(folder / "model.pt")}
    tensors |= read_tensors(folder / "train.pt")["optimizer"]["state"]
    for part in tensors.values():
        for name, tensor in sorted(part.items()):
            sha.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.numpy().tobytes())
    return f"{folder.name} {sha.hexdigest()}"


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def steps(run: Path, key: str = "loss") -> dict:
    """{step: what was logged last}."""
    return {r["step"]: r[key] for r in log(run) if "step" in r and key in r}


def faulty(small: str, out: Path, fault="none", step=0, rank=0, flags=()) -> list[str]:
    """The arguments of tests/faulty_train.py on the small config."""
    marker = out.with_name(f"{out.name}.{fault}{step}")
    return [fault, str(step), str(rank), str(marker), small, f"--out_dir={out}", *flags]


def ranks(world: int, small: str, out: Path, *fault, **flags) -> list[int]:
    """Run tests/faulty_train.py as `world` gloo ranks, as torchrun would start them -> their exit statuses.
    What rank 0 prints is in out.0 and err.0 beside the run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv, started = faulty(small, out, *fault, **flags), []
    for rank in range(world):
        args = (rank, world, port, argv, out.parent)
        started.append(fork_server().Process(target=faulty_train.as_rank, args=args, daemon=True))
        started[-1].start()
    for process in started:
        process.join(timeout=120)
    return [process.exitcode for process in started]


# ---------------------------------------------------------------------- what a step is: (seed, step), no more


def test_iteration_schedules_are_pure_functions_with_the_stated_distributions():
    def draw(spec, seed=1, n=6000):
        return np.array([train.draw_iters(spec, seed, step) for step in range(n)])

    assert set(draw(2)) == {2}
    values, counts = np.unique(draw("1-3"), return_counts=True)
    assert values.tolist() == [1, 2, 3] and abs(counts - 2000).max() < 200
    drawn = draw("poisson:4")
    variance = 3 + 9 * (math.exp(0.25) - 1)  # Poisson's, and that of its rate: log-normal, mean 3, sigma 0.5
    assert abs(drawn.mean() - 4) < 0.15 and abs(drawn.var() - variance) < 0.8
    assert (draw("poisson:4", n=20) == drawn[:20]).all()
    assert (draw("poisson:4", seed=2, n=20) != drawn[:20]).any()


def test_warmup_stable_decay(small):
    schedule = ["--lr=1", "--min_lr=0.1", "--warmup_steps=10", "--decay_frac=0.2", "--max_steps=100"]
    config = load_config([small, *schedule])
    lr = [train.lr_at(step, config) for step in range(101)]
    assert lr[0] == 0.1 and lr[9] == 1 and lr[10:81] == [1] * 71
    assert lr[100] == pytest.approx(0.1) and np.allclose(np.diff(lr[80:]), -0.045)
    short = dataclasses.replace(config, max_steps=11)  # the decay begins within the warmup
    lr = [train.lr_at(step, short) for step in range(12)]
    assert np.allclose(lr, [*np.arange(1, 10) / 10, 1, 0.55, 0.1])


def test_the_run_length_is_twenty_tokens_per_parameter_unless_set(start, out):
    start(out, "--max_steps=0", "--tokens_per_param=0.02", "--eval_every=0", "--save_every=0")
    header = log(out)[0]
    n_steps = round(0.02 * header["made_by"]["n_params"] / (8 * T))
    assert header["run"]["max_steps"] == n_steps == len(steps(out))


def test_the_peak_of_a_device_is_that_of_its_name_and_of_no_other():
    names = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "NVIDIA L40S", "NVIDIA RTX A1000", "NVIDIA L40")
    assert [train.peak_flops(name) for name in names] == [312e12, 756e12, 362e12, None, None]


# ------------------------------------------------------------------------------------ any number of processes


def test_the_same_step_for_1_2_and_4_ranks(small, whole, whole_of_2, tmp_path):
    """Accumulation x ranks 4 x 1, 2 x 2, 1 x 4: loss, norm and validation loss within 1e-6, and the gradient
    of each tensor, of which the first moment is a tenth."""

    def first_step(run):
        evaluation, step = log(run)[1:3]
        state = read_tensors(run / "step_00000001/train.pt")["optimizer"]["state"]
        figures = [step["loss"], step["grad_norm"], *evaluation["val_loss"].values()]
        return figures, [state[number]["exp_avg"] for number in sorted(state)]

    assert ranks(4, small, tmp_path / "4", flags=["--max_steps=1"]) == [0] * 4
    figures, moments = first_step(whole)
    assert len(moments) > 10
    for other_figures, others in (first_step(whole_of_2), first_step(tmp_path / "4")):
        assert other_figures == pytest.approx(figures, rel=1e-6)
        for one, other in zip(moments, others, strict=True):
            assert (one - other).norm() <= 1e-6 * one.norm()


def test_nodes_that_see_other_checkpoints_are_refused(start, out, monkeypatch):
    monkeypatch.setattr(train, "from_rank_0", lambda value: (3, *value[1:]))
    refused("do not see the same out_dir and data", start, out)


@pytest.mark.parametrize("flag, part", [("--data=data/c4", "prepare_data.py c4"), ("--itrs=2", "--iters")])
def test_a_mistake_is_one_error_of_all_ranks(small, tmp_path, flag, part):
    assert ranks(2, small, tmp_path / "run", flags=[flag]) == [2, 2]
    printed = "".join(path.read_text() for path in tmp_path.glob("err.*"))
    assert printed.startswith("error: ") and part in printed and len(printed.splitlines()) <= 3


# ------------------------------------------------------------------------------------------- any interruption


def test_killed_again_and_again_it_ends_bit_for_bit_the_same(small, whole, tmp_path):
    """SIGKILL between steps and in the middle of a save, then a rerun of the same command to the end."""
    out = tmp_path / "run"
    for fault, step, status in (("kill", 1, -9), ("kill_in_save", 3, -9), ("kill", 5, -9), ("none", 0, 0)):
        assert ranks(1, small, out, fault, step) == [status]
    assert digest(out) == digest(whole)
    assert steps(out) == steps(whole) and len(steps(out)) == 8
    assert steps(out, "val_loss") == steps(whole, "val_loss")


def test_two_ranks_signalled_then_killed_and_restarted_by_torchrun_end_the_same(small, whole_of_2, tmp_path):
    """A signal to one rank saves and ends all. The same command goes on; torchrun restarts it when it is
    killed."""
    out = tmp_path / "run"
    assert ranks(2, small, out, "term", 2, 1) == [143, 143]
    assert "SIGTERM: step_00000003 is saved" in (tmp_path / "out.0").read_text()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = start_python([*command, ROOT / "tests/faulty_train.py", *faulty(small, out, "kill", 5, 1)])
    printed = process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / "run.kill5").exists(), printed
    assert digest(out) == digest(whole_of_2) and steps(out) == steps(whole_of_2)


@pytest.mark.parametrize(
    "fault, step, status, saved",
    [("int", 3, 130, 4), ("hup", 3, 129, 4), ("term_in_save", 3, 143, 5), ("term_in_save", 7, 143, 8)],
)
def test_a_signal_during_a_save_waits_for_it(small, tmp_path, fault, step, status, saved):
    """SIGTERM in the middle of the save of step 4 is acted on after step 5, in that of step 8, the last, when
    it is done; SIGINT between steps at once."""
    out = tmp_path / "run"
    assert ranks(1, small, out, fault, step, 0, ["--keep_last=9"]) == [status]
    assert checkpoints(out)[-1].name == f"step_{saved:08d}"
    assert all(load_model(path) for path in checkpoints(out))
    assert "heard: it ends after the step at hand" in (tmp_path / "err.0").read_text()


def test_a_reader_and_a_terminal_that_have_gone_cost_no_save(small, out):
    """Without a reader, as in `train.py | head -1`, it goes on unheard; the kernel sends SIGHUP when the
    terminal goes."""
    ours, terminal = pty.openpty()
    reader, pipe = os.pipe()
    process = start_python(
        [ROOT / "train.py", small, "--max_steps=1000000", "--eval_every=1", f"--out_dir={out}"],
        stdin=terminal, stdout=pipe, stderr=terminal, start_new_session=True,
        preexec_fn=partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    os.close(pipe)
    with open(reader) as lines:
        next(line for line in lines if "step      0 | loss" in line)
    time.sleep(0.2)
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert load_model(out).meta["step"] > 2


def test_every_signal_is_acknowledged_the_third_would_end_it_and_nohup_holds(capfd, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.noticed_signals(0) as asked:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, before[1])
    assert asked == [signal.SIGINT] * 2 and signal.getsignal(signal.SIGINT) == before[0]
    first, second = capfd.readouterr().err.split("SIGINT heard: ")[1:]
    assert "ends after the step at hand" in first and "once more ends it now, unsaved" in second


def test_it_continues_in_another_folder_under_a_drawn_schedule_in_bf16(start, tmp_path):
    schedule = ["--iters=poisson:4", "--backprop_iters=2", "--keep_last=9", "--dtype=bfloat16"]
    whole = start(tmp_path / "whole", *schedule)
    assert len(set(steps(whole, "iters").values())) > 2, "it was drawn"
    before = digest(whole)
    other = start(tmp_path / "other", *schedule, f"--resume={whole}/step_00000004")
    assert digest(other) == digest(whole) == before and min(steps(other)) == 4
    assert digest(start(tmp_path / "end", *schedule, f"--resume={whole}/step_00000008")) == before


# ----------------------------------------------------------------------------------- resuming, or refusing to


def test_a_damaged_checkpoint_costs_its_steps_alone(start, whole, tmp_path, capsys):
    """The last few are kept, and 6, where the decay begins."""
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "step_00000008")
    start(run, "--keep_last=1")
    assert [path.name[-1] for path in checkpoints(run)] == ["6", "8"]
    os.truncate(run / "step_00000008" / "train.pt", 1000)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # torn by the kill
    start(run)
    assert "passed over: " in capsys.readouterr().err
    assert digest(run) == digest(whole) and steps(run) == steps(whole)


def test_a_finished_run_prints_its_evaluation_again(start, whole, tmp_path, capsys):
    run = start(shutil.copytree(whole, tmp_path / "run"))
    last = log(whole)[-1]  # at the model's own iters, of a quarter of the tokens of its training
    assert digest(run) == digest(whole) and log(run)[-1] == last and last["tokens"] == 16 * T
    line = f"{last['tokens']:,} tokens (nats/token)  r=2 {last['val_loss']['2']:.4f}\n"
    assert capsys.readouterr().out.endswith(line)


def test_a_run_made_longer_goes_on_from_before_its_decay_and_keeps_the_decayed_end(start, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    decayed = digest(start(run, "--decay_frac=0.5"))
    for folder in (run, straight):
        start(folder, "--decay_frac=0.5", "--max_steps=16")
    assert digest(run) == digest(straight) and steps(run) == steps(straight)
    assert {steps(run, "lr")[step] for step in range(1, 9)} == {1e-2}
    os.renames(run / "passed_over_00000008", tmp_path / "again" / "step_00000008")
    assert digest(tmp_path / "again") == decayed


REFUSED = {
    "--seed=2": "cannot be continued: seed is 1 there, 2 here\nnothing was trained",
    "--rule=recall": "rule is 'abbie_d' there, 'recall' here",
    "--init_from=/nope": "init_from is '' there, '/nope' here",
    "--lr=1": "lr is 0.01 there, 1.0 here\nnothing was trained",
    "--max_steps=4": "max_steps is 8 there, 4 here\nnothing was trained",
    "--data=OTHER": "was trained on other data than",
    "--resume=never": "holds a run, which would lose checkpoints",
    "--resume=RUN/step_00000006": "holds a run, which would lose checkpoints",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_finished_run_refuses_what_would_change_it_and_stays_as_it_is(start, whole, corpus, flag):
    """What decides the result of a run may not change, and no checkpoint is lost."""
    other = whole.parent / "other"
    if "OTHER" in flag:
        text = ["--input", str(corpus.parent / "text.txt"), "--val_fraction=0.3"]
        prepare_data.main(["text", *text, "--out", str(other)])
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    part = REFUSED[flag]
    refused(part, start, whole, flag.replace("RUN", str(whole)).replace("OTHER", str(other)))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_two_processes_do_not_train_in_one_folder(start, out):
    with locked(out):
        refused("another process is training here", start, out)
    assert not checkpoints(out)


def test_a_standard_model_can_be_iterated_trained_on_and_cut_anew_but_has_its_shape(start, tmp_path):
    std = start(tmp_path / "std", "--iters=1", "--max_steps=2")
    flags = [f"--init_from={std}", "--max_steps=2"]
    folder = start(tmp_path / "iterated", *flags)
    assert set(steps(folder, "iters").values()) == {2}
    assert log(folder)[1]["val_loss"]["1"] == log(std)[-2]["val_loss"]["1"]
    before = digest(folder)
    assert digest(start(folder, *flags)) == before, "the same command goes on with the run"
    start(tmp_path / "cut", *flags, "--n_head_blocks=0", "--n_body_blocks=3", "--n_tail_blocks=0")
    start(tmp_path / "zero", *flags, "--rule=zero_pt")
    refused("n_embd is 32 there, 64 here", start, tmp_path / "wide", *flags, "--n_embd=64")


# ------------------------------------------------------------------------------- bad steps, too little memory


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(small, tmp_path):
    out = tmp_path / "run"
    assert ranks(2, small, out, "nan", 2, 1, ["--max_steps=4", *ALL_SAVED]) == [0, 0]
    assert list(steps(out, "skipped").values()) == [False, False, True, False]
    assert steps(out)[2] is None, "JSON has no NaN"
    assert [path.name[-1] for path in checkpoints(out)] == ["1", "2", "4"], "none of a skipped step"
    assert load_model(out)


def test_a_step_whose_gradient_is_not_finite_leaves_the_weights(small):
    config, model, batch = load_config([small]), make(), torch.zeros(2, 8, dtype=torch.int64)
    before, optimizer = copy.deepcopy(model.state_dict()), train.adamw(model, config)
    model.norm.weight.register_hook(lambda grad: grad * math.inf)
    loss, norm, _ = train.train_step(model, optimizer, [(batch, batch)], 2, config, contextlib.nullcontext)
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bad, after", [("loss", 5), ("weights", 3)])
def test_a_run_that_diverges_saves_nothing_of_it_and_its_advice_works(
    start, tmp_path, monkeypatch, bad, after
):
    train_step = train.train_step

    def diverging_step(net, optimizer, batches, iters, config, *rest):
        loss, *others = train_step(net, optimizer, batches, iters, config, *rest)
        if config.lr == 1 and bad == "weights":
            net.norm.weight.data.fill_(math.inf)
        return math.nan if config.lr == 1 and bad == "loss" else loss, *others

    monkeypatch.setattr(train, "train_step", diverging_step)
    monkeypatch.setattr(train, "MAX_SKIPS", 3)
    run, longer = start(tmp_path / "run", "--max_steps=2"), ["--max_steps=9", *ALL_SAVED]
    before = digest(run)
    for _ in range(2):  # asked again, it says the same
        advice = "step_00000002 is saved: run again with a lower --lr"
        refused(f"step {after}: .* not finite any more\n{advice}", start, run, *longer, "--lr=1")
        assert digest(run) == before and len(checkpoints(run)) == 1
    start(run, *longer, "--iters=1")
    assert checkpoints(run)[-1].name == "step_00000009"
    assert [*steps(run, "iters").values()] == 2 * [2] + 7 * [1], "in mid-run this may change too"
    refused("nothing is saved: run again with a lower --lr", start, tmp_path / "fresh", "--lr=1")


def test_out_of_memory_names_micro_batch(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="2"):
        cli(lambda argv: torch.empty(1 << 60))
    assert "out of memory\ntry a smaller --micro_batch" in capsys.readouterr().err


def test_a_full_disk_is_said_with_the_name_of_the_log():
    with pytest.raises(OSError, match="/dev/full"):
        train.append(Path("/dev/full"), {"loss": 1})


# ------------------------------------------------------------------------------------------------- compiling


def test_without_a_compiler_it_runs_eagerly_and_says_so(start, out, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **options: 1 / 0)
    start(out, "--compile=on", "--max_steps=1")
    assert capsys.readouterr().err.count("running without") == 1
    assert log(out)[0]["made_by"]["compiled"] is False


@pytest.mark.parametrize("available, kind", [(True, "meta"), (False, "cpu")])
def test_auto_is_the_machines_accelerator_or_else_the_cpu(monkeypatch, available, kind):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert choose_device("auto").type == kind


# ----------------------------------------------------------------------------------------------- the main job


def test_the_main_job_end_to_end(tmp_path):
    """`python train.py config/abbie_tiny.py` from nothing, cut to a few steps: it makes the embedded corpus,
    trains, prints validation losses, the built-in tasks and a sample, and leaves a checkpoint and a log."""
    size = ["--max_steps=3", "--eval_tokens=1024", "--n_embd=32", "--ffn_dim=64"]
    process = start_python([ROOT / "train.py", ROOT / "config/abbie_tiny.py", *size], tmp_path, text=True)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    parts = ("Python ", "n_params=", "validation loss", "r=1 ", "r=32 ", "cloze", "lastword", "a sample")
    assert [part for part in (*parts, "--lens") if part not in printed] == []
    out = tmp_path / "out" / "abbie_tiny"
    header, evaluation, step, *_ = log(out)
    assert {"torch", "device", "commit", "command", "dtype"} <= set(header["made_by"])
    assert {"step", "iters", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "flops", "eta_s"} <= set(step)
    assert set(evaluation["val_loss"]) == {"1", "2", "4", "32"}
    assert abs(evaluation["val_loss"]["2"] - math.log(257)) < 0.5, "at initialisation the loss is near ln V"
    meta = load_model(out).meta
    assert meta["made_by"]["command"].startswith("train.py ") and meta["step"] == 3


def test_what_cannot_be_shown_at_the_end_is_no_error(small, capsys):
    FINAL_REPORT(load_config([small, "--out_dir=/nowhere"]))
    assert capsys.readouterr().out.count("not shown: /nowhere is no checkpoint") == 1
