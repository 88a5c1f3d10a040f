"""Train a model at `iters` applications of its Body.

    python train.py config/abbie_tiny.py                                     # a laptop: the main job
    python train.py config/abbie_tiny.py --iters=1-3 --max_steps 1000        # any key of config/ is a flag
    torchrun --nproc_per_node=8 train.py config/abbie_350m.py                # one node
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=N --master_addr=HOST --master_port=29500 \\
        train.py config/abbie_350m.py                                        # two: N = 0 on HOST, else 1
    srun --nodes=2 --ntasks-per-node=1 torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=$(scontrol show hostnames | head -1):29500 train.py config/abbie_350m.py     # Slurm

The same command continues an interrupted run. What a step computes does not depend on the number of
processes: the config fixes tokens per step, data order and iterations are pure functions of (seed, step), and
no other state exists. SIGTERM and SIGINT save and leave. Under torchrun, which then reports a failure,
workers have its grace period (30 s) to finish the save before it kills them; only the step at hand is lost if
they do not.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import prepare_data
from config import Config, cli, load_config, parse_list, show
from eval_icl import evaluate_loss, print_table, run_tasks
from model import AbbIE, UserError, find_checkpoint, load_tensors, parse_iters, save_checkpoint
from prepare_data import Shards, get_tokenizer
from sample import generate

# Dense bf16 peaks in FLOP/s (no sparsity) from the vendors' data sheets; MFU is shown for these devices only.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


# ----------------------------------------------------------- what a step is: pure functions of (config, step)

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
    sigma = 0.5
    rate = rng.lognormal(math.log(low - 1) - sigma ** 2 / 2, sigma)
    return min(1 + int(rng.poisson(rate)), high)


def lr_at(step: int, config: Config, max_steps: int) -> float:
    """Warmup-Stable-Decay: linear up, constant, linear down to min_lr at the last step."""
    warmup = config.warmup_steps if config.warmup_steps >= 0 else max_steps // 100
    decay = max(1, round(config.decay_frac * max_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = min(1.0, (max_steps - step) / decay)
    return config.min_lr + (config.lr - config.min_lr) * left


def windows_at(n_windows: int, order, first: int, count: int) -> np.ndarray:
    """The data windows of sequences first .. first + count - 1 of the run: epoch e shows every window once,
    in the order of the permutation order(e)."""
    epoch, offset = np.divmod(np.arange(first, first + count), n_windows)
    return np.concatenate([order(int(e))[offset[epoch == e]] for e in np.unique(epoch)])


# ------------------------------------------------------------------------------------------------- setting up

def choose_device(config: Config, local_rank: int) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} cannot be used: {reason}\ntry --device=cpu") from None
    return device


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the matrix units have it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX)."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    fast = {"cuda": torch.cuda.is_bf16_supported, "cpu": torch.ops.mkldnn._is_mkldnn_bf16_supported}
    return torch.bfloat16 if device.type in fast and fast[device.type]() else torch.float32


def choose_attention(device: torch.device, dtype: torch.dtype, compiled: bool):
    """On CPUs the backward pass of PyTorch's fused attention is slow in bf16: uncompiled, take its plain
    one."""
    if device.type == "cpu" and dtype == torch.bfloat16 and not compiled:
        torch.backends.cuda.enable_flash_sdp(False)  # of CPUs too, in spite of the name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # without a detour through fp32


def compile_blocks(model: AbbIE, config: Config, device: torch.device) -> bool:
    """torch.compile each block in place (one compilation serves all blocks and iterations) and the loss.
    Returns whether it was done. auto: on CUDA only, since a short run on a CPU does not earn the compilation
    back."""
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return False
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        print(f"torch.compile does not work here ({type(error).__name__}): running without", file=sys.stderr)
        return False
    for block in [*model.head, *model.body, *model.tail]:
        block.compile()
    model.logits_and_loss = torch.compile(model.logits_and_loss)
    return True


def adamw(model: AbbIE, config: Config) -> torch.optim.AdamW:
    """Matrices are decayed, norms are not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def build_model(config: Config, vocab_size: int, tokenizer: str) -> AbbIE:
    """A freshly initialised model, or the weights of `init_from` under this config's rule and iters."""
    torch.manual_seed(config.seed)
    shape = config.model_config(vocab_size)
    if not config.init_from:
        return AbbIE(shape)
    recurrence = {"rule": config.rule, "iters": config.iters, "backprop_iters": config.backprop_iters,
                  "block_size": config.block_size}
    if config.init_from.startswith("hf:"):  # its shape counts, and the config's cut where it fits
        model = AbbIE.from_checkpoint(config.init_from, **recurrence)
        if model.config.n_blocks == config.n_blocks:
            cut = {name: getattr(config, name) for name in ("n_head_blocks", "n_body_blocks")}
            model = AbbIE.from_checkpoint(config.init_from, **recurrence, **cut)
    else:
        cut = {name: getattr(config, name) for name in ("n_head_blocks", "n_body_blocks", "n_tail_blocks")}
        model = AbbIE.from_checkpoint(config.init_from, **recurrence, **cut)
        if model.config != shape:
            raise UserError(f"init_from={config.init_from}: {differences(vars(model.config), vars(shape))}\n"
                            "start from a checkpoint of this config's shape, or set these keys")
    if model.meta["tokenizer"] != tokenizer and not config.force:
        wanted = model.meta["tokenizer"]
        raise UserError(f"init_from={config.init_from} reads {wanted} tokens, the data holds {tokenizer}\n"
                        f"prepare the data with --tokenizer {wanted}, or pass --force=true")
    return model


def differences(old: dict, new: dict) -> str:
    return ", ".join(f"{name} is {old.get(name)!r} there, {new[name]!r} here" for name in new
                     if old.get(name) != new[name])


def find_resume(config: Config, out_dir: Path) -> Path | None:
    """The checkpoint to continue from, if there is one. With resume=never an earlier run is moved aside."""
    if config.resume not in ("auto", "never"):
        return find_checkpoint(config.resume)
    if not any(out_dir.glob("step_*")):
        return None
    if config.resume == "auto":
        return find_checkpoint(out_dir)
    names = (out_dir.with_name(f"{out_dir.name}.{n}") for n in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    out_dir.rename(aside)
    print(f"the earlier run in {out_dir} is now {aside}")
    return None


def open_log(path: Path, header: dict, start: int):
    """log.jsonl of the run: a header for every start, then a line per step and per evaluation. A resumed run
    first drops the lines of what it will do again, so that every step stands there once. Returns
    write(record)."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() and start else []:
        with contextlib.suppress(ValueError):  # a line cut short by a kill
            if json.loads(line).get("step", -1) < start:
                kept.append(line + "\n")
    temp = path.with_suffix(".tmp")
    temp.write_text("".join(kept))
    os.replace(temp, path)
    file = open(path, "a", buffering=1)

    def write(record: dict):
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        file.write(json.dumps(finite) + "\n")

    write({**header, "resumed_at": start})
    return write


def describe(record: dict) -> str:
    """A log record as the fixed fields of a terminal line."""
    mfu = "-" if record["mfu"] is None else f"{record['mfu']:.1%}"
    eta = tqdm.format_interval(record["eta_s"])
    return (f"loss {record['loss']:.4f} | lr {record['lr']:.2e} | norm {record['grad_norm']:.3f} | "
            f"iters {record['iters']} | {record['tokens_per_s']:,.0f} tok/s | mfu {mfu} | "
            f"{record['flops']:.2e} flops | eta {eta}"
            + (" | skipped: not finite" if record["skipped"] else ""))


def versions(device: torch.device) -> dict:
    """What a reader of a log wants to know of where it ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    commit = None
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                             capture_output=True, text=True)
        commit = git.stdout.strip() or None
    return {"device": f"{device.type}: {name}", "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "threads": torch.get_num_threads(),
            "commit": commit}


# ---------------------------------------------------------------------------------------------------- the run

SIGNALS, DIVERGED = (signal.SIGTERM, signal.SIGINT), -1


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


def prune(run: Path, keep_last: int, newest: Path):
    """Delete all checkpoints but the last ones up to `newest`, and what a killed save left. Later ones can
    only be damaged or of an abandoned future: the run has just passed them by."""
    kept = sorted(path for path in run.glob("step_*") if path.name <= newest.name)[-keep_last:]
    for path in [*run.glob("step_*"), *run.glob(".step_*.tmp")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def barrier(world: int):
    if world > 1:
        dist.barrier()


def continue_model(config: Config, folder: Path, shards: Shards, data_sha256: str) -> AbbIE:
    """The model of a checkpoint, if its data, tokenizer, rule and shape are this run's."""
    model = AbbIE.from_checkpoint(folder, iters=config.iters, backprop_iters=config.backprop_iters)
    here = {"rule": config.rule, "tokenizer": shards.tokenizer, "data_sha256": data_sha256}
    if not config.init_from.startswith("hf:"):  # whose shape is not the config's
        here.update(dataclasses.asdict(config.model_config(shards.vocab_size)))
        here.update({name: model.meta[name] for name in ("iters", "backprop_iters")})  # may change in mid-run
    changed = differences(model.meta, here)
    if changed and not config.force:
        raise UserError(f"{folder} cannot be continued: {changed}\n"
                        "set these keys as they were or choose another out_dir;"
                        " or pass --resume=never or --force=true")
    return model


def main(argv: list[str]):
    config = load_config(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:  # one voice
        sys.stdout = open(os.devnull, "w")
    device = choose_device(config, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Apart from what the store may still hold of ranks that died before a restart: their addresses.
        attempt, [store, *_] = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(dist.rendezvous("env://"))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world,
                                store=dist.PrefixStore(attempt, store))
    try:
        status = run(config, device, rank, world)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error).lower()
        signs = ("out of memory", "not enough memory", "can't allocate memory")  # CUDA's, the CPU's
        if isinstance(error, RuntimeError) and not any(sign in text for sign in signs):
            raise
        half = max(1, config.micro_batch // 2)
        raise UserError(f"rank {rank} is out of memory at micro_batch={config.micro_batch} on {device.type}\n"
                        f"try --micro_batch={half} or --activation_checkpointing=true") from None
    if world > 1:
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def run(config: Config, device: torch.device, rank: int, world: int) -> int:
    """Train, evaluate, save. Returns the exit status: 0, or 128 + the signal that ended the run early."""
    print(show(config))
    T, out_dir = config.block_size, Path(config.out_dir)
    sequences = config.tokens_per_step // T  # of a step, over all processes and micro-batches
    micro_batch = min(config.micro_batch, max(1, sequences // world))
    if sequences % (micro_batch * world):
        raise UserError(f"tokens_per_step={config.tokens_per_step} is {sequences} sequences of {T}, no "
                        f"multiple of {world} process(es) x micro_batch {micro_batch}\n"
                        "set micro_batch or tokens_per_step")
    accumulation = sequences // (micro_batch * world)

    # Data: the embedded corpus makes itself, every other one is made by prepare_data.py.
    if config.data == "data/stdlib" and not Path(config.data, "meta.json").exists() and rank == 0:
        prepare_data.main(["stdlib"])
    if rank:
        barrier(world)  # rank 0 checks the hashes, which are remembered beside the data
    shards, val_shards = Shards(config.data, "train", T), Shards(config.data, "val", T)
    if not rank:
        barrier(world)
    order = functools.lru_cache(maxsize=1)(lambda epoch: shards.window_order(config.seed, epoch))
    data_sha256 = hashlib.sha256(json.dumps(shards.meta["splits"], sort_keys=True).encode()).hexdigest()

    # The model, fresh or from a checkpoint, and its optimizer.
    resume_from = find_resume(config, out_dir) if rank == 0 else None
    if world > 1:
        found = [resume_from]
        dist.broadcast_object_list(found, src=0)
        resume_from = found[0]
    if resume_from is None:
        model = build_model(config, shards.vocab_size, shards.tokenizer)
    else:
        model = continue_model(config, resume_from, shards, data_sha256)
    model.to(device).train()
    model.activation_checkpointing = config.activation_checkpointing
    optimizer = adamw(model, config)
    start, skipped, flops = 0, 0, 0.0
    if resume_from is not None:
        saved = load_tensors(resume_from / "train.pt")
        optimizer.load_state_dict(saved["optimizer"])
        start, skipped, flops = saved["step"], saved["skipped"], saved["flops"]
    max_steps = config.max_steps or round(config.tokens_per_param * model.n_params() / config.tokens_per_step)
    max_steps = max(max_steps, start)
    dtype = choose_dtype(config, device)
    compiled = compile_blocks(model, config, device)
    choose_attention(device, dtype, compiled)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    net = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    facts = versions(device)
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in facts["device"]), None)
    print(f"{facts['device']}, {str(dtype)[6:]}{', compiled' if compiled else ''}, {world} process(es), "
          f"{sequences} sequences of {T} per step = {world} x {accumulation} x {micro_batch}")
    cut = "+".join(str(getattr(model.config, f"n_{part}_blocks")) for part in ("head", "body", "tail"))
    print(f"{model.n_params():,} parameters, blocks {cut}, rule {config.rule}, iters {config.iters}; "
          f"{max_steps:,} steps, {max_steps * config.tokens_per_step:,} tokens, "
          f"{max_steps * sequences / shards.n_windows:.2f} epochs"
          + (f"; from step {start} of {resume_from}" if resume_from else ""))
    saved_config = {**dataclasses.asdict(config), **dataclasses.asdict(model.config),
                    "tokenizer": shards.tokenizer, "data_sha256": data_sha256}
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        header = {"config": saved_config, "n_params": model.n_params(), "max_steps": max_steps,
                  "world": world, "dtype": str(dtype)[6:], "compiled": compiled, **facts}
        log = open_log(out_dir / "log.jsonl", header, start)

    eval_iters, n_eval = parse_list(config.eval_iters, "eval_iters"), max(1, config.eval_tokens // T)
    stop, saved_at, started = 0, start if resume_from else None, time.perf_counter()
    precise = torch.float32 if device.type == "mps" else torch.float64
    hidden = rank > 0 or not sys.stderr.isatty()
    bar = tqdm(total=max_steps, initial=start, disable=hidden, dynamic_ncols=True)
    with noticed_signals() as asked:
        for step in range(start, max_steps + 1):
            last = step == max_steps

            if last or (config.eval_every and step % config.eval_every == 0 and not stop):
                losses = evaluate_loss(model, val_shards, eval_iters, n_windows=n_eval,
                                       batch_size=micro_batch, rank=rank, world=world, autocast=autocast)
                text = "  ".join(f"r={r} {value:.4f}" for r, value in losses.items())
                tqdm.write(f"step {step:>6d} | validation loss (nats/token)  {text}")
                if rank == 0:
                    log({"step": step, "val_loss": {str(r): value for r, value in losses.items()}})

            due = last or stop or (config.save_every and step and step % config.save_every == 0)
            if due and saved_at != step:
                if rank == 0:
                    state = {"optimizer": optimizer.state_dict(), "step": step, "skipped": skipped,
                             "flops": flops}
                    newest = save_checkpoint(out_dir, step, model.state_dict(), state,
                                             {**saved_config, "step": step})
                    prune(out_dir, config.keep_last, newest)
                barrier(world)
            if last or stop:
                break

            # One step: this rank's micro-batches; gradients are averaged over ranks with the last one only.
            began, lr = time.perf_counter(), lr_at(step, config, max_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            iters = draw_iters(model.config.iters, config.seed, step)
            windows = windows_at(shards.n_windows, order, step * sequences, sequences)
            loss = torch.zeros((), dtype=precise, device=device)
            for i, chosen in enumerate(windows.reshape(accumulation, world, micro_batch)[:, rank]):
                x, y = (t.to(device, non_blocking=True) for t in shards.batch(chosen))
                with contextlib.nullcontext() if world == 1 or i == accumulation - 1 else net.no_sync():
                    with autocast():
                        micro_loss = net(x, y, iters)[1] / accumulation
                    micro_loss.backward()
                loss += micro_loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            flags = [torch.tensor(s in asked, dtype=precise, device=device) for s in SIGNALS]
            shared = torch.stack([loss / world, *flags])
            if world > 1:  # the loss, and whether a rank was asked to stop
                dist.all_reduce(shared)
            (loss, *flags), norm = shared.tolist(), norm.item()
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:  # loss and norm are the same on every rank: all of them step, or none does
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            skipped = 0 if finite else skipped + 1
            diverged = DIVERGED if skipped >= config.max_skips else 0
            stop = next((s for s, flag in zip(SIGNALS, flags) if flag), diverged)

            # What happened, for the log, the bar and the terminal.
            seconds = time.perf_counter() - began
            step_flops = model.flops_per_token(iters, T) * config.tokens_per_step
            flops += step_flops
            rate = step_flops / seconds / (peak * world) if peak else None
            pace = (time.perf_counter() - started) / (step + 1 - start)  # evaluations and saves included
            record = {"step": step, "iters": iters, "loss": loss, "lr": lr, "grad_norm": norm,
                      "tokens_per_s": config.tokens_per_step / seconds, "mfu": rate, "flops": flops,
                      "eta_s": pace * (max_steps - step - 1), "skipped": not finite}
            if rank == 0:
                log(record)
            bar.update()
            bar.set_postfix_str(line := describe(record))
            if not finite or step % max(1, max_steps // 50) == 0:
                tqdm.write(f"step {step:>6d} | {line}")
    bar.close()

    if stop == DIVERGED:
        raise UserError(f"{skipped} steps in a row had no finite loss and gradient;"
                        f" the weights from before are saved in {out_dir}\ntry a lower lr, then run again")
    if stop:
        print(f"{signal.Signals(stop).name}: step {step} is saved; the same command continues from there")
        return 128 + stop
    if rank == 0:
        show_off(model, config, shards)
    barrier(world)
    return 0


def show_off(model: AbbIE, config: Config, shards: Shards):
    """What the finished model can do: the built-in tasks at several iters, and a sample."""
    model.eval()
    tokenizer = get_tokenizer(shards.tokenizer)
    with torch.compiler.set_stance("force_eager"):  # shapes vary from here on
        try:
            print_table(run_tasks(model, tokenizer, ["cloze", "lastword"], [1, 2, 4, 8], config.data))
        except UserError as error:  # a context or validation split too small for them
            print(f"no tasks: {error}")
        prompt = "def " if shards.tokenizer == "bytes" else "The "
        ids = generate(model, [tokenizer.encode_ordinary(prompt)], 200, temperature=0.8, top_k=50,
                       seed=config.seed, stop_token=tokenizer.eot_token)[0]
    print(f"\na sample at iters {model.config.mean_iters} (python sample.py makes more):\n"
          f"{prompt}{tokenizer.decode(ids)}")


if __name__ == "__main__":
    cli(main)
