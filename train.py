"""Train a model at `iters` applications of its Body.

    python train.py config/abbie_tiny.py                                     # a laptop: the main job
    python train.py config/abbie_tiny.py --iters=1-3 --max_steps 1000        # any key of config/ is a flag
    torchrun --nproc_per_node=8 train.py config/abbie_350m.py                # one node
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=N --master_addr=HOST --master_port=29500 \\
        train.py config/abbie_350m.py                                        # two: N = 0 on HOST, else 1
    srun --nodes=2 --ntasks-per-node=1 torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=$(scontrol show hostnames | head -1):29500 train.py config/abbie_350m.py     # Slurm

The same command continues an interrupted run. What a step computes does not depend on the number of
processes: the config fixes the tokens of a step, and data order and iterations are pure functions of (seed,
step); nothing else is random. SIGTERM and SIGINT end the run after the step at hand, and save it. torchrun
passes them on and kills its workers 30 s later: a save that takes longer is lost, and the run goes on from
the checkpoint before it. In either case torchrun reports a failure."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import prepare_data
from checkpoint import FILES, checkpoints, find_checkpoint, load_model, load_tensors, save_checkpoint
from config import (
    Config,
    choose_device,
    cli,
    is_out_of_memory,
    leave_ranks,
    load_config,
    on_rank_0,
    parse_list,
    start_ranks,
    together,
)
from data import Shards, get_tokenizer
from eval_icl import evaluate_loss, print_table, run_tasks
from model import AbbIE, UserError, check, parse_iters
from sample import stream_text

# Dense bf16 peaks in FLOP/s (no sparsity) from the vendors' data sheets; MFU is shown for these devices only.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
FINAL_EVAL_TOKENS = 2**20  # of validation, for the loss at the model's own iters at the end


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


def lr_at(step: int, config: Config, max_steps: int) -> float:
    """Warmup-Stable-Decay: up linearly, constant, down linearly over the last decay_frac of the run, so that
    the step after the last would have min_lr. The lower of the two where a short run does both at once."""
    warmup = config.warmup_steps if config.warmup_steps >= 0 else max_steps // 100
    decay = max(1, round(config.decay_frac * max_steps))
    left = min(1.0, (max_steps - step) / decay)
    decayed = config.min_lr + (config.lr - config.min_lr) * left
    return min(config.lr * (step + 1) / warmup, decayed) if step < warmup else decayed


def windows_at(n_windows: int, order, first: int, count: int) -> np.ndarray:
    """The data windows of sequences first .. first + count - 1 of the run: epoch e shows every window once,
    in the order of the permutation order(e)."""
    epoch, offset = np.divmod(np.arange(first, first + count), n_windows)
    return np.concatenate([order(int(e))[offset[epoch == e]] for e in np.unique(epoch)])


def share_of(windows: np.ndarray, rank: int, world: int, micro_batch: int) -> np.ndarray:
    """A rank's part of a step's windows, (micro-batches, micro_batch): the ranks take turns."""
    return windows.reshape(-1, world, micro_batch)[:, rank]


def train_step(net, optimizer, batches: list[tuple[Tensor, Tensor]], iters: int, grad_clip: float, autocast):
    """One optimizer step of a model or its DDP, over this process's micro-batches of (x, y) -> the loss and
    the gradient's norm over all processes. A step of which either is not finite leaves the weights as they
    are."""
    ddp, device = isinstance(net, DistributedDataParallel), batches[0][0].device
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for i, (x, y) in enumerate(batches):
        waits = ddp and i < len(batches) - 1  # gradients are averaged over processes with the last one only
        with net.no_sync() if waits else contextlib.nullcontext():
            with autocast():
                loss = net(x, y, iters)[1] / len(batches)
            loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
    if ddp:
        dist.all_reduce(total)
        total /= dist.get_world_size()
    loss, norm = total.item(), norm.item()
    if math.isfinite(loss) and math.isfinite(norm):  # the same everywhere: all processes step, or none does
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


# ------------------------------------------------------------------------------------------------- setting up


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the matrix units have it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX)."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and torch.backends.mkldnn.is_available():  # not in every build for a Mac
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def choose_attention(device: torch.device, dtype: torch.dtype, compiled: bool):
    """On CPUs the backward pass of PyTorch's fused attention is slow in bf16: uncompiled, take its plain
    one."""
    if device.type == "cpu" and dtype == torch.bfloat16 and not compiled:
        torch.backends.cuda.enable_flash_sdp(False)  # of CPUs too, in spite of the name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # without a detour through fp32


def compile_blocks(model: AbbIE, config: Config, device: torch.device, **how) -> bool:
    """torch.compile each block in place, and the loss. Head and Tail share one compilation, the Body has
    another, and both serve any number of blocks and iterations. Returns whether it was done. auto: on CUDA
    only, since a short run on a CPU does not earn the compilation back. how: options of torch.compile."""
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return False
    try:
        torch.compile(torch.sin, **how)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        print(f"torch.compile does not work here ({type(error).__name__}): running without", file=sys.stderr)
        return False
    # DDP's own cuts of a graph break blocks with a number among their inputs (pytorch #196227); blocks are
    # small graphs anyway. dynamic=False: a smaller last batch of an evaluation compiles its own graphs and
    # does not make training's symbolic.
    torch._dynamo.config.optimize_ddp = False
    how = {"dynamic": False, **how}
    for block in [*model.head, *model.body, *model.tail]:
        block.compile(**how)
    model.logits_and_loss = torch.compile(model.logits_and_loss, **how)
    return True


def adamw(model: AbbIE, config: Config) -> torch.optim.AdamW:
    """Matrices are decayed, norms are not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    decay = config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def differences(old: dict, new: dict) -> str:
    changed = [name for name in new if old.get(name) != new[name]]
    return ", ".join(f"{name} is {old.get(name)!r} there, {new[name]!r} here" for name in changed)


def new_model(config: Config, shards: Shards, model_class=AbbIE) -> AbbIE:
    """A freshly initialised model, or the weights of `init_from` under this config's rule, iters and cut."""
    torch.manual_seed(config.seed)
    shape = config.model_config(shards.vocab_size)
    if not config.init_from:
        return model_class(shape)
    changes = {name: getattr(config, name) for name in ("rule", "iters", "backprop_iters", "block_size")}
    cut = {name: getattr(config, name) for name in ("n_head_blocks", "n_body_blocks", "n_tail_blocks")}
    if config.init_from.startswith("hf:"):  # its shape counts, and the config's cut where it fits
        model = load_model(config.init_from, model_class=model_class, **changes)
        if model.config.n_blocks == config.n_blocks:  # only now is that known
            model = load_model(config.init_from, model_class=model_class, **changes, **cut)
        else:
            print(f"{config.init_from}: {model.config.n_blocks} blocks, which are not cut as configured")
    else:
        model = load_model(config.init_from, model_class=model_class, **changes, **cut)
        changed = differences(vars(model.config), vars(shape))
        check(not changed, f"init_from={config.init_from}: {changed}\nset these keys as they are there")
    theirs = model.meta["tokenizer"]
    check(
        theirs == shards.tokenizer or config.force,
        f"init_from={config.init_from} reads {theirs} tokens, the data holds {shards.tokenizer}\n"
        f"prepare the data with --tokenizer {theirs}, or pass --force=true",
    )
    return model


def continued_model(config: Config, folder: Path, shards: Shards, model_class=AbbIE) -> AbbIE:
    """The model of a checkpoint, if its data, tokenizer, rule and shape are this run's."""
    may_change = {"iters": config.iters, "backprop_iters": config.backprop_iters}  # in mid-run
    model = load_model(folder, model_class=model_class, **may_change)
    here = {"rule": config.rule, "model_class": model_class.__name__, **identity(shards)}
    if config.init_from:
        here["init_from"] = config.init_from
    if not config.init_from.startswith("hf:"):  # whose shape is not the config's
        here |= dataclasses.asdict(config.model_config(shards.vocab_size))
    changed = differences(model.meta, {name: here[name] for name in here if name not in may_change})
    check(
        not changed or config.force,
        f"{folder} cannot be continued: {changed}\n"
        "set these keys as they were or choose another out_dir; or pass --resume=never or --force=true",
    )
    return model


def identity(shards: Shards) -> dict:
    """What makes two runs' data the same."""
    digest = hashlib.sha256(json.dumps(shards.meta["splits"], sort_keys=True).encode()).hexdigest()
    return {"tokenizer": shards.tokenizer, "data_sha256": digest}


def find_resume(config: Config, out_dir: Path) -> Path | None:
    """The checkpoint to continue from, if there is one. A run that is in out_dir and not continued is moved
    aside."""
    found = None
    if config.resume == "auto":
        found = find_checkpoint(out_dir, FILES) if checkpoints(out_dir) else None
    elif config.resume != "never":
        found = find_checkpoint(config.resume, FILES)
    if not checkpoints(out_dir) or (found and found.resolve().parent == out_dir.resolve()):
        return found
    names = (out_dir.with_name(f"{out_dir.name}.{n}") for n in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    out_dir.rename(aside)
    print(f"the earlier run in {out_dir} is now {aside}")
    return found


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


def prepare_run(config: Config, world: int) -> Path | None:
    """What one process checks and does for all -> the checkpoint to continue from, or None."""
    divide_step(config, world)
    data, out_dir = Path(config.data), Path(config.out_dir)
    if config.data == "data/stdlib" and not (data / "meta.json").exists():
        prepare_data.main(["stdlib"])  # the embedded corpus makes itself, every other one is made by hand
    for split in ("train", "val"):
        Shards(data, split, config.block_size)  # verifies its hashes and remembers that it has
    resume_from = find_resume(config, out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    return resume_from


# ---------------------------------------------------------------------------------------------------- the log


def open_log(path: Path, header: dict, start: int, rank: int):
    """log.jsonl of the run: a header for every start, then a line per step and per evaluation. A resumed run
    first cuts off what it will do again, so that every step stands there once. Returns write(record), which
    does nothing on other ranks than 0."""
    if rank:
        return lambda record: None
    kept = 0
    if start and path.exists():
        with open(path, "rb") as old, contextlib.suppress(ValueError):  # a line cut short by a kill
            for line in old:
                if json.loads(line).get("step", -1) >= start:
                    break
                kept += len(line)
    file = open(path, "a", buffering=1)
    file.truncate(kept)

    def null_for_nan(value):
        """JSON knows no NaN: null."""
        if isinstance(value, dict):
            return {key: null_for_nan(one) for key, one in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def write(record: dict):
        file.write(json.dumps(null_for_nan(record)) + "\n")

    write({**header, "resumed_at": start})
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


# ---------------------------------------------------------------------------------------------------- the run

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DIVERGED = -1  # in place of a signal: what stopped the run


@contextlib.contextmanager
def noticed_signals():
    """Collect SIGTERM and SIGINT in a list, for the loop to act on between steps: nothing, a save above all,
    is cut short."""
    asked = []
    before = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in SIGNALS}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def agreed_signal(asked: list, device: torch.device, world: int) -> int:
    """The signal that any process was sent, on every one of them; or 0."""
    flags = torch.tensor([float(s in asked) for s in SIGNALS], device=device)
    if world > 1:
        dist.all_reduce(flags)
    return next((s for s, flag in zip(SIGNALS, flags.tolist()) if flag), 0)


def prune(run: Path, keep_last: int, newest: Path):
    """Delete all checkpoints but the last ones up to `newest`, and what a killed save left. Later ones can
    only be damaged or of an abandoned future: the run has just passed them by."""
    kept = [path for path in checkpoints(run) if path.name <= newest.name][-keep_last:]
    for path in [*checkpoints(run), *run.glob(".step_*.tmp")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def main(argv: list[str], model_class=AbbIE):
    rank, world = start_ranks()
    config = together(lambda: load_config(argv))
    try:
        status = run(config, rank, world, model_class)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _, micro_batch = divide_step(config, world)
        smaller = f"--micro_batch={micro_batch // 2} or " if micro_batch > 1 else ""
        raise UserError(
            f"rank {rank} is out of memory at micro_batch={micro_batch}\n"
            f"try {smaller}--activation_checkpointing=true"
        ) from None
    leave_ranks()
    if status:
        sys.exit(status)


def run(config: Config, rank: int, world: int, model_class=AbbIE) -> int:
    """Train, evaluate, save. Returns the exit status: 0, or 128 + the signal that ended the run early."""
    print(key_values(dataclasses.asdict(config)))
    resume_from = on_rank_0(lambda: prepare_run(config, world))
    device = together(lambda: choose_device(config.device))
    T, out_dir = config.block_size, Path(config.out_dir)
    sequences, micro_batch = divide_step(config, world)

    # The data, the model, fresh or from a checkpoint, and its optimizer.
    splits = ("train", "val")
    shards, val_shards = together(lambda: [Shards(config.data, s, T, verify=False) for s in splits])

    @functools.lru_cache(maxsize=1)  # a permutation is as long as the data: of one epoch at a time
    def order(epoch: int) -> np.ndarray:
        return shards.window_order(config.seed, epoch)

    if resume_from is None:
        model = together(lambda: new_model(config, shards, model_class))
    else:
        model = together(lambda: continued_model(config, resume_from, shards, model_class))
    model.to(device).train()
    model.activation_checkpointing = config.activation_checkpointing
    optimizer = adamw(model, config)
    start, skipped, flops = 0, 0, 0.0
    if resume_from is not None:
        saved = load_tensors(resume_from / "train.pt")
        groups = optimizer.state_dict()["param_groups"]  # decay and betas are the config's
        optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
        start, skipped, flops = saved["step"], saved["skipped"], saved["flops"]
    max_steps = config.max_steps
    if not max_steps:
        max_steps = round(config.tokens_per_param * model.n_params() / config.tokens_per_step)
    max_steps = max(start, max_steps)
    dtype = choose_dtype(config, device)
    compiled = compile_blocks(model, config, device)
    choose_attention(device, dtype, compiled)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    net = model
    if world > 1:
        cards = [device] if device.type == "cuda" else None
        net = DistributedDataParallel(model, device_ids=cards, gradient_as_bucket_view=True)

    # What runs, for the terminal, the log and the checkpoints.
    run_config = {**dataclasses.asdict(config), **dataclasses.asdict(model.config), **identity(shards)}
    run_config["model_class"] = type(model).__name__
    facts = {**versions(device), "dtype": str(dtype).removeprefix("torch."), "compiled": compiled}
    facts |= {"world": world, "n_params": model.n_params(), "max_steps": max_steps}
    print(key_values(facts))
    accumulation, epochs = sequences // micro_batch // world, max_steps * sequences / shards.n_windows
    print(f"{sequences} sequences of {T} per step = {world} x {accumulation} x {micro_batch}")
    print(f"{max_steps * config.tokens_per_step:,} tokens, {epochs:.2f} epochs")
    if resume_from:
        print(f"from step {start} of {resume_from}")
    log = open_log(out_dir / "log.jsonl", {"config": run_config, **facts}, start, rank)
    peak = peak_flops(facts["device"])

    def evaluate(iters: list[int], tokens: int) -> dict[int, float]:
        options = {"batch_size": micro_batch, "rank": rank, "world": world, "autocast": autocast}
        return evaluate_loss(model, val_shards, iters, n_windows=max(1, tokens // T), **options)

    def save(step: int):
        state = {"optimizer": optimizer.state_dict(), "step": step, "skipped": skipped, "flops": flops}
        newest = save_checkpoint(out_dir, step, model.state_dict(), state, {**run_config, "step": step})
        prune(out_dir, config.keep_last, newest)

    stop, started = 0, time.perf_counter()
    start_is_saved = resume_from is not None and resume_from.resolve().parent == out_dir.resolve()
    hidden = True if rank > 0 else None  # None: where stderr is no terminal
    bar = tqdm(total=max_steps, initial=start, disable=hidden, dynamic_ncols=True)
    with noticed_signals() as asked:
        for step in range(start, max_steps + 1):  # once more than there are steps: to evaluate and save
            last = step == max_steps
            if last or (config.eval_every and step % config.eval_every == 0 and not stop):
                losses = evaluate(parse_list(config.eval_iters, "eval_iters"), config.eval_tokens)
                text = "  ".join(f"r={r} {value:.4f}" for r, value in losses.items())
                tqdm.write(f"step {step:>6d} | validation loss (nats/token)  {text}")
                log({"step": step, "val_loss": {str(r): value for r, value in losses.items()}})
            due = last or stop or (config.save_every and step and step % config.save_every == 0)
            if due and not (step == start and start_is_saved):
                on_rank_0(functools.partial(save, step))
            if last or stop:
                stop = stop or agreed_signal(asked, device, world)  # sent while it saved
                break

            began, lr = time.perf_counter(), lr_at(step, config, max_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            iters = draw_iters(model.config.iters, config.seed, step)
            windows = windows_at(shards.n_windows, order, step * sequences, sequences)
            chosen = share_of(windows, rank, world, micro_batch)
            batches = [shards.batch(numbers) for numbers in chosen]
            batches = [(x.to(device), y.to(device)) for x, y in batches]
            loss, norm = train_step(net, optimizer, batches, iters, config.grad_clip, autocast)
            finite = math.isfinite(loss) and math.isfinite(norm)
            skipped = 0 if finite else skipped + 1
            stop = agreed_signal(asked, device, world)
            if skipped >= config.max_skips:
                stop = stop or DIVERGED

            seconds = time.perf_counter() - began
            step_flops = model.flops_per_token(iters, T) * config.tokens_per_step
            flops += step_flops
            pace = (time.perf_counter() - started) / (step + 1 - start)  # evaluations and saves included
            record = {
                "step": step, "iters": iters, "loss": loss, "lr": lr, "grad_norm": norm,
                "tokens_per_s": config.tokens_per_step / seconds,
                "mfu": step_flops / seconds / (peak * world) if peak else None,
                "flops": flops, "eta_s": pace * (max_steps - step - 1), "skipped": not finite,
            }  # fmt: skip
            log(record)
            bar.update()
            bar.set_postfix_str(describe(record))
            if not finite or step % max(1, max_steps // 50) == 0:
                tqdm.write(f"step {step:>6d} | {describe(record)}")
    bar.close()

    diverged = f"{skipped} steps in a row had no finite loss and gradient"
    advice = f"the weights from before are saved in {out_dir}: try a lower lr, then run again"
    on_rank_0(lambda: check(stop != DIVERGED, f"{diverged}\n{advice}"))
    if stop:
        same = "the same command" + ("" if config.resume == "auto" else f" without --resume={config.resume}")
        print(f"{signal.Signals(stop).name}: step {step} is saved; {same} continues from there")
        return 128 + stop
    own, n_tokens = model.config.mean_iters, min(FINAL_EVAL_TOKENS, val_shards.n_windows * T)
    loss = evaluate([own], n_tokens)[own]
    print(f"validation loss at iters {own} on {n_tokens:,} tokens: {loss:.4f} nats/token")
    log({"step": max_steps, "final_val_loss": loss, "iters": own, "tokens": n_tokens})
    on_rank_0(lambda: show_off(model, config, shards))
    return 0


def show_off(model: AbbIE, config: Config, shards: Shards):
    """What the finished model can do: the built-in tasks at several iters, and a sample."""

    def show_tasks():
        tokenizer = get_tokenizer(shards.tokenizer)
        print_table(run_tasks(model, tokenizer, ["cloze", "lastword"], [1, 2, 4, 8], config.data))

    def show_sample():
        tokenizer, prompt = get_tokenizer(shards.tokenizer), "def " if shards.tokenizer == "bytes" else "The "
        options = {"temperature": 0.8, "top_k": 50, "seed": config.seed}
        pieces = stream_text(model, tokenizer, [tokenizer.encode_ordinary(prompt)], 200, None, **options)
        print(f"\na sample at iters {model.config.mean_iters} (python sample.py makes more):")
        print(prompt + "".join(piece for _, piece in pieces))

    model.eval()
    with torch.compiler.set_stance("force_eager"):  # shapes vary from here on
        for show in (show_tasks, show_sample):
            try:
                show()
            except UserError as error:  # a context or split too small, a tokenizer that is not at hand
                print(f"not shown: {error}")


if __name__ == "__main__":
    cli(main)
