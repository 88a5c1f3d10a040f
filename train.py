"""Train a model at `iters` applications of its Body.

    python train.py config/abbie_tiny.py                                     # a laptop: the main job
    python train.py config/abbie_tiny.py --iters=1-3 --max_steps 1000        # any key of config/ is a flag
    torchrun --nproc_per_node=8 train.py config/abbie_350m.py                # one node
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=N --master_addr=HOST --master_port=29500 \\
        train.py config/abbie_350m.py                                        # two: N = 0 on HOST, else 1
    srun --nodes=2 --ntasks-per-node=1 torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=$(scontrol show hostnames | head -1):29500 train.py config/abbie_350m.py     # Slurm

The same command continues an interrupted run; MID_RUN and FREE say what may then differ. What a step computes
does not depend on the number of processes: data order and iterations are pure functions of (seed, step), and
nothing else is random. All nodes need the same out_dir and data. SIGTERM, SIGINT and SIGHUP end the run after
the step at hand, and save it. torchrun passes signals on and kills its workers 30 s later: a save that takes
longer is lost, and the run goes on from the checkpoint before it."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import eval_icl
import prepare_data
import sample
from checkpoint import (
    checkpoints,
    load_model,
    load_newest,
    locked,
    prune,
    read_tensors,
    save_checkpoint,
    set_aside,
)
from config import (
    Config,
    choose_device,
    choose_dtype,
    cli,
    from_rank_0,
    leave_ranks,
    load_config,
    mean_iters,
    parse_iters,
    parse_list,
    start_ranks,
    together,
)
from data import Shards, tokenizer_in
from model import AbbIE, UserError, check

# Dense bf16 peaks in FLOP/s (no sparsity) from the vendors' data sheets; MFU is shown for these devices only.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
FINAL_EVAL_TOKENS = 2**20  # of validation, for the loss at the model's own iters at the end
MAX_SKIPS = 10  # steps in a row without a finite loss and gradient that end a run

# What may change while a run goes on; a finished one goes on where max_steps grows.
MID_RUN = ("max_steps", "lr", "min_lr", "warmup_steps", "decay_frac", "iters", "backprop_iters")
# What may always change: results differ by rounding at most. Data may move.
FREE = (
    "data", "out_dir", "resume", "device", "dtype", "compile", "micro_batch", "activation_checkpointing",
    "eval_every", "eval_iters", "eval_tokens", "save_every", "keep_last", "tokens_per_param",
)  # fmt: skip


# --------------------------------------------------------- what a step is: pure functions of (config, step)


def draw_iters(spec: int | str, seed: int, step: int) -> int:
    """The iterations of a step: the same on every rank, a pure function of (seed, step). "poisson:m" is r = 1
    + Poisson(t) with t log-normal, sigma 0.5, of mean m - 1, cut at 128 (after arXiv 2502.05171, section
    3.3)."""
    kind, low, high = parse_iters(spec)
    rng = np.random.default_rng([seed, step, 1])  # [.., 1]: apart from the data order's stream
    if kind == "poisson":
        mean, sigma = low - 1, 0.5
        rate = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma)
        return min(1 + int(rng.poisson(rate)), high)
    return int(rng.integers(low, high + 1))


def with_length(config: Config, model: AbbIE) -> Config:
    """The config with its max_steps, which tokens_per_param decides where it is 0."""
    steps = round(config.tokens_per_param * model.n_params() / config.tokens_per_step)
    return dataclasses.replace(config, max_steps=config.max_steps or max(1, steps))


def decay_start(config: Config) -> int:
    """The first step of the decay; its checkpoint is the one that a longer run goes on from."""
    return config.max_steps - round(config.decay_frac * config.max_steps)


def lr_at(step: int, config: Config) -> float:
    """Warmup-Stable-Decay: up linearly, constant, down linearly over the last decay_frac of the run, so that
    the step after the last would have min_lr. The lower of the two where a short run does both at once."""
    warmup = config.warmup_steps if config.warmup_steps >= 0 else config.max_steps // 100
    remaining = (config.max_steps - step) / max(1, config.max_steps - decay_start(config))
    decayed = config.min_lr + (config.lr - config.min_lr) * min(1.0, remaining)
    return min(config.lr * (step + 1) / warmup, decayed) if step < warmup else decayed


def read_step(shards: Shards, config: Config, step: int, rank: int, world: int) -> list:
    """A rank's micro-batches of a step, x and y (micro_batch, T) each: the ranks take turns."""
    sequences = config.tokens_per_step // config.block_size
    windows = shards.windows(config.seed, step * sequences, sequences)
    return [shards.batch(part) for part in windows.reshape(-1, world, config.micro_batch)[:, rank]]


def train_step(net, optimizer, batches: list[tuple[Tensor, Tensor]], iters, config, autocast, stop=False):
    """One optimizer step of a model or its DDP, over this process's micro-batches of (x, y) -> the loss and
    the gradient's norm, and whether any process wants to stop. A step of which loss or norm is not finite
    leaves the weights as they are."""
    ddp, device = isinstance(net, DistributedDataParallel), batches[0][0].device
    precise = torch.float32 if device.type == "mps" else torch.float64
    totals = torch.tensor([0.0, float(stop)], dtype=precise, device=device)  # one reduction, one wait a step
    for i, (x, y) in enumerate(batches):
        waits = ddp and i < len(batches) - 1  # gradients are averaged over processes with the last one only
        with net.no_sync() if waits else contextlib.nullcontext():
            with autocast():
                micro_loss = net(x, y, iters, config.backprop_iters)[1] / len(batches)
            micro_loss.backward()
        totals[0] += micro_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip or math.inf)
    if ddp:
        dist.all_reduce(totals)
        totals[0] /= dist.get_world_size()
    loss, stop, norm = torch.cat((totals, norm.to(precise)[None])).tolist()
    if math.isfinite(loss) and math.isfinite(norm):  # the same everywhere: all processes step, or none does
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, stop > 0


# ------------------------------------------------------------------------------------------------- setting up


def with_micro_batch(config: Config, world: int) -> Config:
    """The config with a micro_batch that is no larger than a process's share of a step, and divides it."""
    sequences = config.tokens_per_step // config.block_size
    micro_batch = min(config.micro_batch, max(1, sequences // world))
    check(
        sequences % (micro_batch * world) == 0,
        f"tokens_per_step={config.tokens_per_step} is {sequences} sequences of {config.block_size}, "
        f"no multiple of {world} process(es) x micro_batch {micro_batch}\nset micro_batch or tokens_per_step",
    )
    return dataclasses.replace(config, micro_batch=micro_batch)


def compile_blocks(model: AbbIE, setting: str, device: torch.device, **options) -> bool:
    """torch.compile each block in place, and the loss; all blocks share one compilation, which serves any
    number of iterations. Returns whether it was done. auto: on CUDA only, since a short run on a CPU does not
    earn the compilation back."""
    if setting == "off" or (setting == "auto" and device.type != "cuda"):
        return False
    # dynamic=False: the smaller last batch of an evaluation leaves training's graphs alone. DDP would cut the
    # graphs of wide blocks, and breaks those that take a number (pytorch #196227).
    options = {"dynamic": False, **options}
    torch._dynamo.config.optimize_ddp = False
    try:
        torch.compile(torch.sin, **options)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        print(f"torch.compile does not work here ({type(error).__name__}): running without", file=sys.stderr)
        return False
    for block in model.blocks:
        block.compile(**options)
    model.logits_and_loss = torch.compile(model.logits_and_loss, **options)
    return True


def adamw(model: AbbIE, config: Config) -> torch.optim.AdamW:
    """Matrices are decayed, norms are not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=decay, fused=True)


def place(model: AbbIE, config: Config, device: torch.device, world: int):
    """Bring the model to its device -> what a step calls, the model or its DDP; the autocast around it; and
    what was chosen, for the log."""
    model.to(device).train()
    model.activation_checkpointing = config.activation_checkpointing
    dtype = choose_dtype(config.dtype, device, training=True)
    compiled = compile_blocks(model, config.compile, device)
    if device.type == "cpu" and dtype == torch.bfloat16 and not compiled:
        # The backward pass of PyTorch's fused attention is slow there: take the plain one, without a detour
        # through fp32. Both switches are of CPUs too, in spite of the name.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    net = model
    if world > 1:
        cards = [device] if device.type == "cuda" else None
        net = DistributedDataParallel(model, device_ids=cards, gradient_as_bucket_view=True)
    return net, autocast, {"dtype": str(dtype).removeprefix("torch."), "compiled": compiled}


# --------------------------------------------------------------------------------------- starting, continuing


def differences(old: dict, new: dict, names) -> str:
    changed = [name for name in names if old.get(name, new[name]) != new[name]]
    return ", ".join(f"{name} is {old[name]!r} there, {new[name]!r} here" for name in changed)


def new_model(config: Config, shards: Shards) -> AbbIE:
    """A freshly initialised model, or the weights of `init_from` under this config's rule, iters and cut."""
    torch.manual_seed(config.seed)
    shape, source = config.model_config(shards.vocab_size), config.init_from
    if not source:
        return AbbIE(shape)
    free = ("rule", "iters", "block_size", "n_head_blocks", "n_body_blocks", "n_tail_blocks")
    model = load_model(source, **{name: getattr(shape, name) for name in free})
    there = {**vars(model.config), "tokenizer": model.meta["tokenizer"]}
    here = {**vars(shape), "tokenizer": shards.tokenizer}
    # The shape of a Llama is taken as it is.
    changed = differences(there, here, ["tokenizer"] if source.startswith("hf:") else here)
    check(not changed, f"init_from={source}: {changed}\nset these keys, or prepare the data, as it is there")
    return model


def load_run(folder: Path, config: Config) -> tuple[AbbIE, dict]:
    """A checkpoint -> its model and train.pt. Raises UserError for one that does not load, and for one whose
    learning rate has decayed, if the run is to go on: then it goes on from the one before the decay."""
    model = load_model(folder, iters=mean_iters(config.iters))
    config, weights = with_length(config, model), f"its weights: --init_from={folder} --out_dir=ANOTHER"
    try:
        state, before = read_tensors(folder / "train.pt"), Config(**model.meta["run"])
        state = {name: state[name] for name in ("step", "flops", "optimizer")}
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run that can go on: {error}\n{weights}") from None
    same = (before.max_steps, decay_start(before)) == (config.max_steps, decay_start(config))
    if not same and decay_start(before) < state["step"] < config.max_steps:
        raise UserError(f"{folder}: its learning rate has decayed, on another schedule\n{weights}")
    return model, state


def begin(config: Config, shards: Shards) -> tuple[Config, AbbIE, dict]:
    """The config with its length, the model, fresh or continued, and the train.pt that goes with it. Nothing
    is touched. Refused is what would lose checkpoints of out_dir, or change the settings of its run."""
    out_dir, source = Path(config.out_dir), config.resume
    saved = checkpoints(out_dir)
    if source == "auto":
        source = str(out_dir) if saved else "never"
    goes_on = Path(source).resolve() in [path.resolve() for path in (out_dir, *saved[-1:])]
    if saved and (source == "never" or not goes_on):
        advice = "choose another --out_dir, or leave out --resume to continue the run"
        raise UserError(f"{out_dir} holds a run, which would lose checkpoints\n{advice}")
    if source == "never":
        model = new_model(config, shards)
        return with_length(config, model), model, {"step": 0, "flops": 0.0}
    model, state = load_newest(source, functools.partial(load_run, config=config))
    config, meta = with_length(config, model), model.meta
    here, unfinished = vars(config), config.max_steps > state["step"]
    fixed = [name for name in here if name not in FREE and not (unfinished and name in MID_RUN)]
    changed = differences(meta["run"], here, fixed)
    if meta.get("data_sha256") != shards.digest():
        changed = f"it was trained on other data than {config.data} holds"
    if changed:
        advice = "set these keys as they were, or choose another --out_dir"
        if not unfinished:
            advice = f"nothing was trained: give a --max_steps above {state['step']}, {advice}"
        raise UserError(f"{meta['ckpt']} cannot be continued: {changed}\n{advice}")
    return config, model, state


# ----------------------------------------------------------------------------- the log, the terminal, signals


def append(path: Path, record: dict):
    """Add a line to log.jsonl: a header for every start, then a line per step and per evaluation. A resumed
    run appends: a step that stands there twice counts as its last line says."""
    line = re.sub(r": (NaN|-?Infinity)\b", ": null", json.dumps(record))  # JSON has no such numbers
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        error.filename = str(path)  # which a full disk does not say
        raise


def describe(record: dict) -> str:
    """A step's record as the fixed fields of a terminal line."""
    mfu = "-" if record["mfu"] is None else f"{record['mfu']:.1%}"
    return (
        f"step {record['step']:>6d} | loss {record['loss']:.4f} | lr {record['lr']:.2e} | "
        f"norm {record['grad_norm']:.3f} | iters {record['iters']} | {record['tokens_per_s']:,.0f} tok/s | "
        f"mfu {mfu} | {record['flops']:.2e} flops | eta {record['eta_s'] / 60:.1f} min"
    )


def versions(device: torch.device) -> dict:
    """Where a run took place; of a CPU its instruction set, on which the fastest way to compute depends."""
    name, cpu = platform.machine(), Path("/proc/cpuinfo")
    if cpu.exists():
        name = cpu.read_text().partition("model name\t: ")[2].partition("\n")[0] or name
    name += f", {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    folder = shlex.quote(str(Path(__file__).parent))
    status, commit = subprocess.getstatusoutput(f"git -C {folder} rev-parse HEAD")
    return {
        "device": f"{device.type}: {name}", "torch": torch.__version__, "threads": torch.get_num_threads(),
        "commit": None if status else commit,
    }  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def say(text: str):
    """Print a line. A terminal or a reader that has gone, as in `train.py | tee log`, costs no save."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def noticed_signals(rank: int):
    """Collect signals in a list, for the loop to act on between steps: nothing, a save above all, is cut
    short. The third of a kind ends the process. One that is ignored, as SIGHUP under nohup, stays so."""
    signals, before = [], {}

    def notice(number, frame):
        message = f"{signal.Signals(number).name} heard: it ends after the step at hand and a save"
        if number in signals:
            message += "; once more ends it now, unsaved"
            signal.signal(number, signal.SIG_DFL)
        signals.append(number)
        if rank == 0:
            with contextlib.suppress(OSError):  # and no print(): one may be what is interrupted
                os.write(2, f"\n{message}\n".encode())

    for number in signal.Signals:
        if number.name in ("SIGTERM", "SIGINT", "SIGHUP") and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, notice)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------- the run


def main(argv: list[str]):
    rank, world = start_ranks()
    with contextlib.ExitStack() as stack:
        with together():
            config = with_micro_batch(load_config(argv), world)
            device = choose_device(config.device)
            if rank == 0:
                stack.enter_context(locked(Path(config.out_dir)))
                if config.data == "data/stdlib" and not Path(config.data, "meta.json").exists():
                    prepare_data.main(["stdlib"])  # the embedded corpus makes itself, others are made by hand
        status = run(config, device, rank, world, shlex.join(["train.py", *argv]))
    leave_ranks()
    if status:
        sys.exit(status)


def run(config: Config, device: torch.device, rank: int, world: int, command: str) -> int:
    """Train, evaluate, save. Returns the exit status: 0, or 128 + the signal that ended the run early."""
    T, out_dir = config.block_size, Path(config.out_dir)
    with together():  # all that can be refused; nothing is touched before
        shards, val_shards = (Shards(config.data, split, T) for split in ("train", "val"))
        if shards.tokenizer.startswith("hf:"):  # every checkpoint keeps it
            tokenizer_in(config.data, shards.tokenizer)
        config, model, state = begin(config, shards)
    with together():
        mine = (state["step"], shards.digest())
        check(mine == from_rank_0(mine), "the nodes do not see the same out_dir and data")

    # What runs, for the terminal, the log and the checkpoints.
    net, autocast, choices = place(model, config, device, world)
    optimizer = adamw(model, config)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    start = step = state["step"]
    flops, skipped = state["flops"], 0
    made_by = {"command": command, **versions(device), **choices}
    made_by |= {"world": world, "n_params": model.n_params()}
    meta = {
        **vars(model.config), "tokenizer": shards.tokenizer, "data": config.data,
        "data_sha256": shards.digest(), "run": vars(config), "made_by": made_by,
    }  # fmt: skip
    run_tokens = config.max_steps * config.tokens_per_step
    for settings in (vars(config), made_by):
        print(textwrap.fill("  ".join(f"{name}={value}" for name, value in settings.items()), 110))
    print(f"{run_tokens:,} tokens, {run_tokens / T / shards.n_windows:.2f} epochs")
    if step:
        finished = ": it is finished, and its evaluation follows again" if step == config.max_steps else ""
        print(f"from step {step} of {model.meta['ckpt']}{finished}")
    with together():
        log = functools.partial(append, out_dir / "log.jsonl" if rank == 0 else os.devnull)
        if rank == 0:
            set_aside(out_dir, step)
            if (out_dir / "log.jsonl").exists():  # a kill or a full disk may have torn its last line
                os.truncate(out_dir / "log.jsonl", (out_dir / "log.jsonl").read_bytes().rfind(b"\n") + 1)
        log({**meta, "resumed_at": step})

    def validate(iters: list[int], tokens: int):
        # At most a quarter of what the run trains on: a short run is not outlasted by its evaluation.
        n = max(1, min(tokens, run_tokens // 4, val_shards.n_windows * T) // T)
        options = {"batch_size": config.micro_batch, "rank": rank, "world": world, "autocast": autocast}
        losses = eval_icl.evaluate_loss(model, val_shards, iters, n_windows=n, **options)
        text = "  ".join(f"r={r} {value:.4f}" for r, value in losses.items())
        say(f"step {step:>6d} | validation loss, {n * T:,} tokens (nats/token)  {text}")
        log({"step": step, "tokens": n * T, "val_loss": losses})

    def save():
        with together():
            if skipped or not all(p.isfinite().all() for p in model.parameters()):
                diverged = f"step {step}: loss, gradient or weights are not finite any more"
                raise UserError(f"{diverged}\n{newest(out_dir)} is saved: run again with a lower --lr")
            if rank == 0 and not (out_dir / f"step_{step:08d}").exists():
                state = {"optimizer": optimizer.state_dict(), "step": step, "flops": flops}
                save_checkpoint(out_dir, step, model.state_dict(), state, {**meta, "step": step})
                prune(out_dir, config.keep_last, f"step_{decay_start(config):08d}")

    eval_iters, peak = parse_list(config.eval_iters, "eval_iters"), peak_flops(made_by["device"])
    stopped, run_began, printed_at = False, time.perf_counter(), -math.inf
    with noticed_signals(rank) as signals, ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(read_step, shards, config, step, rank, world)
        while step < config.max_steps and skipped < MAX_SKIPS and not stopped:
            due = config.save_every and step % config.save_every == 0
            if (due or step == decay_start(config)) and step > start and not skipped:
                save()
            if config.eval_every and step % config.eval_every == 0:
                validate(eval_iters, config.eval_tokens)

            step_began, lr = time.perf_counter(), lr_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            iters = draw_iters(config.iters, config.seed, step)
            batches = [(x.to(device), y.to(device)) for x, y in upcoming.result()]
            upcoming = reader.submit(read_step, shards, config, step + 1, rank, world)
            loss, norm, stopped = train_step(net, optimizer, batches, iters, config, autocast, bool(signals))

            now = time.perf_counter()
            seconds, pace = now - step_began, (now - run_began) / (step + 1 - start)  # pace: with evaluations
            finite = math.isfinite(loss) and math.isfinite(norm)
            skipped = 0 if finite else skipped + 1
            cost = config.tokens_per_step * model.flops_per_token(iters, backprop_iters=config.backprop_iters)
            flops += cost
            record = {
                "step": step, "iters": iters, "loss": loss, "lr": lr, "grad_norm": norm,
                "tokens_per_s": config.tokens_per_step / seconds, "flops": flops, "skipped": not finite,
                "mfu": cost / seconds / (peak * world) if peak else None,
                "eta_s": pace * (config.max_steps - step - 1),
            }  # fmt: skip
            log(record)
            if now > printed_at + 5 or not finite:
                say(describe(record))
                printed_at = now
            step += 1
        if not (stopped and skipped):
            save()
        stopped = stopped or from_rank_0(bool(signals))  # while it saved
        if not stopped:
            validate(eval_iters, config.eval_tokens)
            validate([model.config.iters], FINAL_EVAL_TOKENS)

    if stopped:
        number = (signals or [signal.SIGTERM])[0]
        say(f"{signal.Signals(number).name}: {newest(out_dir)} is saved; the same command continues")
        return 128 + number
    if world == 1:
        final_report(config)
    return 0


def newest(out_dir: Path) -> str:
    saved = checkpoints(out_dir)
    return saved[-1].name if saved else "nothing"


NEXT_STEPS = """
abbie_d at r > 2 hardly differs from r = 2: it converges by construction, and later iterations refine.
To see iterations compute something, and a loss that falls with r:
    python sample.py --ckpt models/chains_abbie_d --lens --iters 1,2,3,4,6,8 --prompt "a=3;b=a;c=b;d=c;e=d;?e"
    python eval_icl.py --ckpt models/recall_tiny --iters 1,2,4,8 --ppl data/stdlib"""


def final_report(config: Config):
    """What the finished model can do: the built-in tasks at several iters, and a sample; as dear as the run
    at most."""
    n = min(300, max(20, config.max_steps * config.tokens_per_step // config.block_size // 8))
    model = [f"--ckpt={config.out_dir}", f"--device={config.device}"]
    try:
        eval_icl.main([*model, "--iters=1,2,4", f"--limit={n}"])
        print(f"\na sample (python sample.py --ckpt {config.out_dir} makes more):")
        sample.main([*model, f"--max_new_tokens={min(200, n)}"])
    except UserError as error:  # a context or split too small, a tokenizer that is not at hand
        print(f"not shown: {error}")
    if config.rule == "abbie_d" and config.iters == 2:
        print(NEXT_STEPS)


if __name__ == "__main__":
    cli(main)
