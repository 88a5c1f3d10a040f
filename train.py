"""Train a model at `iters` applications of its Body.

    python train.py config/abbie_tiny.py                                     # a laptop: the main job
    python train.py config/abbie_tiny.py --iters=1-3 --max_steps 1000        # any key of config/ is a flag
    torchrun --nproc_per_node=8 train.py config/abbie_350m.py                # one node
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=N --master_addr=HOST --master_port=29500 \\
        train.py config/abbie_350m.py                                        # two: N = 0 on HOST, else 1
    srun --nodes=2 --ntasks-per-node=1 torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=$(scontrol show hostnames | head -1):29500 train.py config/abbie_350m.py     # Slurm

The same command continues an interrupted run; MID_RUN and FREE say what may then differ. What a step computes
does not depend on the number of processes: the config fixes the tokens of a step, and data order and
iterations are pure functions of (seed, step); nothing else is random. All nodes need the same out_dir and
data. SIGTERM, SIGINT and SIGHUP end the run after the step at hand, and save it. torchrun passes signals on
and kills its workers 30 s later: a save that takes longer is lost, and the run goes on from the checkpoint
before it."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import shlex
import shutil
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
from tqdm import tqdm

import prepare_data
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
from eval_icl import BUILT_IN, evaluate_loss, load_task, print_table, run_task
from model import AbbIE, UserError, check
from sample import show, stream_text

# Dense bf16 peaks in FLOP/s (no sparsity) from the vendors' data sheets; MFU is shown for these devices only.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
FINAL_EVAL_TOKENS = 2**20  # of validation, for the loss at the model's own iters at the end
MAX_SKIPS = 10  # steps in a row without a finite loss and gradient that end a run
GOES_ON = "make room, then run the same command again: it goes on from the newest checkpoint"

# What may change while a run goes on, until it is finished.
MID_RUN = ("lr", "min_lr", "warmup_steps", "decay_frac", "iters", "backprop_iters")
# What may always change: results differ by rounding, or in length. Data may move.
FREE = (
    "data", "out_dir", "resume", "device", "dtype", "compile", "micro_batch", "activation_checkpointing",
    "eval_every", "eval_iters", "eval_tokens", "save_every", "keep_last", "max_steps", "tokens_per_param",
)  # fmt: skip


# --------------------------------------------------------- what a step is: pure functions of (config, step)


def draw_iters(spec: int | str, seed: int, step: int) -> int:
    """The iterations of a step: the same on every rank, a pure function of (seed, step). "poisson:m" is r = 1
    + Poisson(t) with t log-normal, sigma 0.5, of mean m - 1, cut at 128 (after arXiv 2502.05171, section
    3.3)."""
    kind, low, high = parse_iters(spec)
    if kind == "fixed":
        return high
    rng = np.random.default_rng([seed, step, 1])  # [.., 1]: apart from the data order's stream
    if kind == "uniform":
        return int(rng.integers(low, high + 1))
    mean, sigma = low, 0.5
    rate = rng.lognormal(math.log(mean - 1) - sigma**2 / 2, sigma)
    return min(1 + int(rng.poisson(rate)), high)


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


def share_of(windows: np.ndarray, rank: int, world: int, micro_batch: int) -> np.ndarray:
    """A rank's part of a step's windows, (micro-batches, micro_batch): the ranks take turns."""
    return windows.reshape(-1, world, micro_batch)[:, rank]


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


def divide_step(config: Config, world: int) -> tuple[int, int]:
    """-> sequences of a step, over all processes and micro-batches, and the size of a micro-batch."""
    sequences = config.tokens_per_step // config.block_size
    micro_batch = min(config.micro_batch, max(1, sequences // world))
    check(
        sequences % (micro_batch * world) == 0,
        f"tokens_per_step={config.tokens_per_step} is {sequences} sequences of {config.block_size}, "
        f"no multiple of {world} process(es) x micro_batch {micro_batch}\nset micro_batch or tokens_per_step",
    )
    return sequences, micro_batch


def choose_attention(device: torch.device, dtype: torch.dtype, compiled: bool):
    """On CPUs the backward pass of PyTorch's fused attention is slow in bf16: uncompiled, take its plain
    one."""
    if device.type == "cpu" and dtype == torch.bfloat16 and not compiled:
        torch.backends.cuda.enable_flash_sdp(False)  # of CPUs too, in spite of the name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # without a detour through fp32


def compile_blocks(model: AbbIE, setting: str, device: torch.device, **options) -> bool:
    """torch.compile each block in place, and the loss; all blocks share one compilation, which serves any
    number of iterations. Returns whether it was done. auto: on CUDA only, since a short run on a CPU does not
    earn the compilation back."""
    if setting == "off" or (setting == "auto" and device.type != "cuda"):
        return False
    # dynamic=False: a smaller last batch of an evaluation has graphs of its own and does not make training's
    # symbolic. DDP would cut the graphs of wide blocks, and breaks those with a number among their inputs
    # (pytorch #196227); ours are small anyway.
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
    decay = config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


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
    names = ("rule", "iters", "block_size", "n_head_blocks", "n_body_blocks", "n_tail_blocks")
    model = load_model(source, **{name: getattr(shape, name) for name in names})
    if not source.startswith("hf:"):  # whose shape counts
        changed = differences(vars(model.config), vars(shape), vars(shape))
        check(not changed, f"init_from={source}: {changed}\nset these keys as they are there")
    check_tokenizer(model, shards)
    return model


def check_tokenizer(model: AbbIE, shards: Shards):
    theirs = model.meta["tokenizer"]
    other = f"{model.meta['ckpt']} reads {theirs} tokens, {shards.folder} holds {shards.tokenizer}"
    check(theirs == shards.tokenizer, f"{other}\nprepare the data with --tokenizer {theirs}")


def begin(config: Config, shards: Shards) -> tuple[AbbIE, dict]:
    """The model, fresh or continued, and the train.pt that goes with it. Nothing is touched, and what would
    lose something that is in out_dir is refused."""
    out_dir, resume = Path(config.out_dir), Path(config.resume)
    saved = checkpoints(out_dir)
    continues = config.resume == "auto" or resume.resolve() in (
        out_dir.resolve(), *[path.resolve() for path in saved[-1:]],
    )  # fmt: skip
    advice = "choose another --out_dir, or leave out --resume to continue the run"
    check(continues or not saved, f"{out_dir} holds a run, which would lose checkpoints\n{advice}")
    if config.resume == "never" or (config.resume == "auto" and not saved):
        return new_model(config, shards), {"step": 0, "flops": 0.0}
    source = out_dir if config.resume == "auto" else resume
    model, state = load_newest(source, lambda folder: load_run(folder, config))
    check_continues(with_length(config, model), model, state, shards)
    return model, state


def load_run(folder: Path, config: Config) -> tuple[AbbIE, dict]:
    """A checkpoint -> its model and train.pt. Raises UserError for one that does not load, and for one whose
    learning rate has decayed, if the run is to go on: then it goes on from the one before the decay."""
    model = load_model(folder, iters=mean_iters(config.iters))
    config, weights = with_length(config, model), f"its weights: --init_from={folder} --out_dir=ANOTHER"
    try:
        state = read_tensors(folder / "train.pt")
    except UserError as error:
        raise UserError(f"{error}\n{weights}") from None
    tells = isinstance(model.meta.get("run"), dict) and "data_sha256" in model.meta
    check(tells, f"{folder}/config.json tells of no run\n{weights}")
    complete = {"optimizer", "step", "flops", "max_steps", "decay_start"} <= state.keys()
    check(complete, f"{folder}/train.pt is damaged\n{weights}")
    decays_on = state["decay_start"] < state["step"] < config.max_steps
    same = (state["max_steps"], state["decay_start"]) == (config.max_steps, decay_start(config))
    check(same or not decays_on, f"{folder}: its learning rate has decayed, on another schedule\n{weights}")
    return model, state


def check_continues(config: Config, model: AbbIE, state: dict, shards: Shards):
    """Raises UserError for settings that are not those of the run that is continued."""
    here, there, source = dataclasses.asdict(config), model.meta["run"], model.meta["ckpt"]
    check_tokenizer(model, shards)
    other_data = f"{source} was trained on other data than {config.data} holds"
    check(model.meta["data_sha256"] == shards.digest(), f"{other_data}\nchoose another --out_dir")
    changed = differences(there, here, [name for name in here if name not in (*MID_RUN, *FREE)])
    if not config.init_from.startswith("hf:"):  # whose shape counts
        shape = vars(config.model_config(shards.vocab_size))
        changed = changed or differences(vars(model.config), shape, shape)
    as_before = "set these keys as they were, or choose another --out_dir"
    check(not changed, f"{source} cannot be continued: {changed}\n{as_before}")
    longer = f"nothing was trained: give a --max_steps above {state['step']}, or choose another --out_dir"
    check(config.max_steps >= state["step"], f"{source} is beyond max_steps={config.max_steps}\n{longer}")
    changed = differences(there, here, MID_RUN)
    goes_on = config.max_steps > state["step"]
    check(goes_on or not changed, f"{source} ended its run, and {changed}\n{longer}")


# ---------------------------------------------------------------------------------------------------- the log


def open_log(path: Path):
    """log.jsonl of the run: a header for every start, then a line per step and per evaluation. A resumed run
    appends: a step that stands there twice counts as its last line says. Returns write(record)."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a kill
    file = open(path, "a", buffering=1)
    if torn:
        file.write("\n")

    def null_for_nan(value):
        """JSON knows no NaN: null."""
        if isinstance(value, dict):
            return {key: null_for_nan(one) for key, one in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def write(record: dict):
        try:
            file.write(json.dumps(null_for_nan(record)) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}\n{GOES_ON}") from None

    return write


def key_values(values: dict) -> str:
    """key=value, a few a line."""
    return textwrap.fill("  ".join(f"{name}={value}" for name, value in values.items()), 110)


def describe(record: dict) -> str:
    """A log record as the fixed fields of a terminal line."""
    mfu = "-" if record["mfu"] is None else f"{record['mfu']:.1%}"
    eta = tqdm.format_interval(record["eta_s"])
    skipped = " | skipped: not finite" if record["skipped"] else ""
    return (
        f"loss {record['loss']:.4f} | lr {record['lr']:.2e} | norm {record['grad_norm']:.3f} | "
        f"iters {record['iters']} | {record['tokens_per_s']:,.0f} tok/s | mfu {mfu} | "
        f"{record['flops']:.2e} flops | eta {eta}{skipped}"
    )


def versions(device: torch.device) -> dict:
    """What a reader of a log wants to know of where it ran; of a CPU also the instruction set, since the
    fastest way to compute depends on it."""
    name, cpu, commit = platform.machine(), Path("/proc/cpuinfo"), None
    if cpu.exists():
        name = cpu.read_text().partition("model name\t: ")[2].partition("\n")[0] or name
    name += f", {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    if shutil.which("git"):
        command, folder = ["git", "rev-parse", "HEAD"], Path(__file__).parent
        commit = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip() or None
    return {
        "device": f"{device.type}: {name}", "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "threads": torch.get_num_threads(), "commit": commit,
    }  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


# ---------------------------------------------------------------------------------------------------- signals

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def noticed_signals(rank: int):
    """Collect signals in a list, for the loop to act on between steps: nothing, a save above all, is cut
    short. The third of a kind ends the process. One that is ignored, as SIGHUP under nohup, stays so."""
    asked, terminals = [], [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def silence(descriptors):
        for descriptor in descriptors:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    def notice(number, frame):
        then = "it ends after the step at hand and a save"
        if number in asked:
            then += "; once more ends it now, unsaved"
            signal.signal(number, signal.SIG_DFL)
        asked.append(number)
        if number == getattr(signal, "SIGHUP", None):  # the terminal is gone
            silence(terminals)
        try:
            if rank == 0:
                os.write(2, f"\n{signal.Signals(number).name} heard: {then}\n".encode())
        except OSError:  # and so is who was reading, as in `train.py 2>&1 | tee log`
            silence((1, 2))

    before = {s: signal.getsignal(s) for s in SIGNALS}
    for s in SIGNALS:
        if before[s] != signal.SIG_IGN:
            signal.signal(s, notice)
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------- the run


def main(argv: list[str]):
    rank, world = start_ranks()
    with contextlib.ExitStack() as stack:
        with together():
            config = load_config(argv)
            if rank == 0:
                stack.enter_context(locked(Path(config.out_dir)))
        status = run(config, rank, world, shlex.join(["train.py", *argv]))
    leave_ranks()
    if status:
        sys.exit(status)


def run(config: Config, rank: int, world: int, command: str) -> int:
    """Train, evaluate, save. Returns the exit status: 0, or 128 + the signal that ended the run early."""
    print(key_values(dataclasses.asdict(config)))
    T, out_dir = config.block_size, Path(config.out_dir)

    # The data, the model, fresh or from a checkpoint, and its optimizer: all that can be refused.
    with together():
        sequences, micro_batch = divide_step(config, world)
        device = choose_device(config.device)
        if rank == 0 and config.data == "data/stdlib" and not Path(config.data, "meta.json").exists():
            prepare_data.main(["stdlib"])  # the embedded corpus makes itself, every other one is made by hand
    with together():
        shards, val_shards = (Shards(config.data, split, T) for split in ("train", "val"))
        if shards.tokenizer.startswith("hf:"):  # every checkpoint keeps it: refused here, if at all
            tokenizer_in(config.data, shards.tokenizer)
        model, state = begin(config, shards)
    with together():
        mine = (state["step"], shards.digest())
        same = mine == from_rank_0(mine)
        check(same, "the nodes see other checkpoints or other data\nthey need the same out_dir and data")
    config = with_length(config, model)
    start = step = state["step"]
    model.to(device).train()
    model.activation_checkpointing = config.activation_checkpointing
    optimizer = adamw(model, config)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    dtype = choose_dtype(config.dtype, device, training=True)
    compiled = compile_blocks(model, config.compile, device)
    choose_attention(device, dtype, compiled)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    net = model
    if world > 1:
        cards = [device] if device.type == "cuda" else None
        net = DistributedDataParallel(model, device_ids=cards, gradient_as_bucket_view=True)

    # What runs, for the terminal, the log and the checkpoints.
    facts = {**versions(device), "dtype": str(dtype).removeprefix("torch."), "compiled": compiled}
    facts |= {"world": world, "n_params": model.n_params(), "max_steps": config.max_steps}
    about = {
        **dataclasses.asdict(model.config), "tokenizer": shards.tokenizer, "data": config.data,
        "data_sha256": shards.digest(), "run": dataclasses.asdict(config),
        "made_by": {"command": command, **facts},
    }  # fmt: skip
    print(key_values(facts))
    accumulation, run_tokens = sequences // micro_batch // world, config.max_steps * config.tokens_per_step
    print(f"{sequences} sequences of {T} per step = {world} x {accumulation} x {micro_batch}")
    print(f"{run_tokens:,} tokens, {config.max_steps * sequences / shards.n_windows:.2f} epochs")
    if step:
        print(f"from step {step} of {model.meta['ckpt']}")
    if step == config.max_steps:
        print("the run is finished: nothing is trained, its evaluation follows again")
    with together():
        if rank == 0:
            set_aside(out_dir, step)
        log = open_log(out_dir / "log.jsonl" if rank == 0 else Path(os.devnull))
    log({**about, "resumed_at": step})

    def read_step(step: int) -> list[tuple[Tensor, Tensor]]:
        windows = shards.windows(config.seed, step * sequences, sequences)
        return [shards.batch(numbers) for numbers in share_of(windows, rank, world, micro_batch)]

    def validate(iters: list[int], tokens: int):
        # At most a quarter of what the run trains on: a short run is not outlasted by its evaluation.
        n = max(1, min(tokens, run_tokens // 4, val_shards.n_windows * T) // T)
        options = {"batch_size": micro_batch, "rank": rank, "world": world, "autocast": autocast}
        losses = evaluate_loss(model, val_shards, iters, n_windows=n, **options)
        text = "  ".join(f"r={r} {value:.4f}" for r, value in losses.items())
        tqdm.write(f"step {step:>6d} | validation loss, {n * T:,} tokens (nats/token)  {text}")
        log({"step": step, "tokens": n * T, "val_loss": {str(r): value for r, value in losses.items()}})

    def save():
        with together():
            if rank == 0 and not (out_dir / f"step_{step:08d}").exists():
                finite = all(p.isfinite().all() for p in model.parameters())
                check(finite, "the weights are not finite any more\n" + what_is_saved(out_dir))
                state = {"optimizer": optimizer.state_dict(), "step": step, "flops": flops}
                state |= {"max_steps": config.max_steps, "decay_start": decay_start(config)}
                save_checkpoint(out_dir, step, model.state_dict(), state, {**about, "step": step})
                prune(out_dir, config.keep_last, f"step_{decay_start(config):08d}")

    eval_iters, peak = parse_list(config.eval_iters, "eval_iters"), peak_flops(facts["device"])
    flops, skipped, stopped, run_began = state["flops"], 0, False, time.perf_counter()
    bar = tqdm(total=config.max_steps, initial=step, disable=None if rank == 0 else True, dynamic_ncols=True)
    with noticed_signals(rank) as asked, ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(read_step, step)
        while step < config.max_steps and not stopped:
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
            upcoming = reader.submit(read_step, step + 1)
            loss, norm, stopped = train_step(net, optimizer, batches, iters, config, autocast, bool(asked))
            seconds = time.perf_counter() - step_began
            finite = math.isfinite(loss) and math.isfinite(norm)
            skipped = 0 if finite else skipped + 1
            cost = config.tokens_per_step * model.flops_per_token(iters, backprop_iters=config.backprop_iters)
            flops += cost
            pace = (time.perf_counter() - run_began) / (step + 1 - start)  # evaluations and saves included
            record = {
                "step": step, "iters": iters, "loss": loss, "lr": lr, "grad_norm": norm,
                "tokens_per_s": config.tokens_per_step / seconds,
                "mfu": cost / seconds / (peak * world) if peak else None, "flops": flops,
                "eta_s": pace * (config.max_steps - step - 1), "skipped": not finite,
            }  # fmt: skip
            log(record)
            bar.update()
            bar.set_postfix_str(describe(record))
            if not finite or step % max(1, config.max_steps // 50) == 0:
                tqdm.write(f"step {step:>6d} | {describe(record)}")
            step += 1
            if skipped == MAX_SKIPS or (skipped and step == config.max_steps):
                with together():
                    bad = f"{skipped} steps in a row had no finite loss and gradient"
                    raise UserError(f"{bad}\n{what_is_saved(out_dir)}")
        if not skipped:
            save()
        stopped = stopped or from_rank_0(bool(asked))  # while it saved
        if not stopped:
            validate(eval_iters, config.eval_tokens)
            validate([model.config.iters], FINAL_EVAL_TOKENS)
    bar.close()

    if stopped:
        number, newest = (asked or [signal.SIGTERM])[0], [path.name for path in checkpoints(out_dir)[-1:]]
        same = "the same command" + ("" if config.resume == "auto" else f" without --resume={config.resume}")
        print(f"{signal.Signals(number).name}: {', '.join(newest) or 'nothing'} is saved; {same} continues")
        return 128 + number
    with together():
        if rank == 0:
            show_off(model, config, shards, n_examples=min(300, max(20, config.max_steps * sequences // 8)))
    return 0


def what_is_saved(out_dir: Path) -> str:
    """What to do about a run that has diverged, of which nothing is saved."""
    if not checkpoints(out_dir):
        return "nothing is saved: run again with a lower --lr"
    name = checkpoints(out_dir)[-1].name
    return f"{name} is saved: run again with a lower --lr, and it goes on from there"


LOOK = """
abbie_d at r > 2 hardly differs from r = 2: it converges by construction, and later iterations refine.
To see iterations compute something, and a loss that falls with r:
    python sample.py --ckpt models/chains_abbie_d --lens --iters 1,2,3,4,6,8 --prompt "a=3;b=a;c=b;d=c;e=d;?e"
    python eval_icl.py --ckpt models/recall_tiny --iters 1,2,4,8 --ppl data/stdlib"""


def show_off(model: AbbIE, config: Config, shards: Shards, n_examples: int):
    """What the finished model can do: the built-in tasks at several iters, and a sample. n_examples keeps
    its cost below the run's."""
    model.eval()
    try:
        tokenizer = tokenizer_in(config.data, shards.tokenizer)
        prompt = "def " if shards.tokenizer == "bytes" else "The "
        with torch.compiler.set_stance("force_eager"):  # shapes vary from here on
            tasks = {}
            for name in BUILT_IN:
                examples = load_task(name, config.data, None, config.block_size, n_examples)
                tasks[name], _ = run_task(model, tokenizer, name, examples, [1, 2, 4])
            print_table({"tasks": tasks})
            ids, n = tokenizer.encode_ordinary(prompt), min(200, n_examples)
            options = {"temperature": 0.8, "top_k": 50, "seed": config.seed}
            pieces = stream_text(model, tokenizer, ids, n, None, **options)
            print(f"\na sample at iters {model.config.iters} (python sample.py makes more):")
            show(prompt + "".join(pieces))
    except UserError as error:  # a context or split too small, a tokenizer that is not at hand
        print(f"not shown: {error}")
    if config.rule == "abbie_d" and config.iters == 2:
        print(LOOK)


if __name__ == "__main__":
    cli(main)
