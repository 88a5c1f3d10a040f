"""Tokens/s of this machine, measured so that they can be believed. The last line of stdout is one JSON
object.

    python bench.py train config/abbie_tiny.py --iters 1,2,4,8             # tokens/s, FLOPs, MFU, memory
    python bench.py train config/abbie_tiny.py --side "iters=1 n_body_blocks=4"        # is looping free?
    python bench.py decode config/abbie_tiny.py --iters 1,2,4,8 --batch 1,64 --draft_iters 1   # and bandwidth

Any config key is a flag. The config is the first side of a comparison; each --side is the same config with
changes. Every side has a process of its own, and they take turns: a round measures all of them, and the
machine's fastest matrix product and copy beside them. Figures are medians over rounds, and a ratio is the
median of the ratios within a round, so that a machine which is slower for a while is slower for all sides.
"""

import gc
import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import torch

import train
from checkpoint import load_model, write_json
from config import ArgumentParser, Config, choose_device, cli, load_config, parse_list
from data import Shards, read_meta
from decode import Stats, stream
from model import AbbIE, UserError, check

# ------------------------------------------------------------------------------------- sides that take turns

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def begin(side):
    """In a process of its own: start a side -> what it says of itself."""
    global running
    os.dup2(2, 1)  # stdout is for the result
    running = side()
    return next(running)


def go_on():
    """In that process -> a round's measurements."""
    return next(running)


def in_turn(sides: list, rounds: int) -> tuple[list, list]:
    """Run each side (picklable, returns an iterator) in a process of its own -> what each says of itself, and
    for every round the list of what each measured."""
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(["bench"])  # imports once, and starts nothing that a fork would break
    with ExitStack() as stack:
        processes = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in sides]
        try:
            facts = [process.submit(begin, side).result() for process, side in zip(processes, sides)]
            measured = []
            for i in range(rounds):
                print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
                measured.append([process.submit(go_on).result() for process in processes])
        except (BrokenProcessPool, torch.OutOfMemoryError):
            raise UserError("a side's process died: out of memory?\ntry a smaller micro_batch") from None
    return facts, measured


def seconds(run, device: torch.device) -> float:
    """The time that run() takes, the device's work included."""

    def now():
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    began = now()
    run()
    return now() - began


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU since the last reset, else of this process in its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fitting(run, *args):
    """What run(*args) returns, None where it runs out of memory."""
    try:
        return run(*args)
    except torch.OutOfMemoryError:
        return None


def machine(device: torch.device):
    """What the device can do: FLOP/s of large matrix products in fp32 and bf16, and bytes/s of a large copy
    (reads and writes counted), each the best of five."""
    n, size = (8192, 2**30) if device.type == "cuda" else (512, 2**27)  # bf16 can be very slow on a CPU
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(run):
        return min(seconds(run, device) for _ in range(5))

    yield {"matmul": f"{n} x {n} x {n}", "copy_bytes": size}
    while True:
        can = {"bandwidth": 2 * size / best(lambda: target.copy_(source))}
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(n, n, device=device).to(dtype)
            can[str(dtype).removeprefix("torch.")] = 2 * n**3 / best(lambda a=a: a @ a)
        yield can


def settings(config: Config) -> tuple[torch.device, torch.dtype]:
    """Device and precision, as train.py chooses them."""
    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    return device, train.choose_dtype(config, device)


def vocab_size(config: Config) -> int:
    """The data's; where that is not here, that of bytes for data/stdlib, else GPT-2's."""
    if config.vocab_size or not Path(config.data, "meta.json").exists():
        return config.vocab_size or (257 if config.data == "data/stdlib" else 50257)
    return read_meta(config.data)["vocab_size"]


# ----------------------------------------------------------------------------------------------- training


def train_side(config: Config, depths: list[int], steps: int):
    """Training steps on random tokens, as train.py does them: yields the side's facts, then tokens/s and peak
    memory at each of `depths`, over `steps` steps each. What runs out of memory has no figures."""
    device, dtype = settings(config)
    model = AbbIE(config.model_config(vocab_size(config))).to(device).train()
    model.activation_checkpointing = config.activation_checkpointing
    compiled = train.compile_blocks(model, config, device)
    train.choose_attention(device, dtype, compiled)
    cells = [{"iters": iters, "flops_per_token": model.flops_per_token(iters)} for iters in depths]
    facts = {"model": config.rule, "n_params": model.n_params(), "compiled": compiled, "cells": cells}
    yield from measure_training(model, train.adamw(model, config), config, steps, facts)


def measure_training(model, optimizer, config: Config, steps: int, facts: dict):
    """What `train_side` yields, of any model(x, y, iters) -> (logits, loss)."""
    device, dtype = settings(config)
    T, depths = config.block_size, [cell["iters"] for cell in facts["cells"]]
    sequences, micro_batch = train.divide_step(config, world=1)
    x, y = torch.randint(vocab_size(config), (2, micro_batch, T), device=device)
    batches = [(x, y)] * (sequences // micro_batch)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    def measure(iters, steps):
        """None where memory does not suffice."""

        def run():
            for _ in range(steps):
                train.train_step(model, optimizer, batches, iters, 1.0, autocast)

        took = fitting(seconds, run, device)
        peak = peak_memory(device)
        optimizer.zero_grad(set_to_none=True)  # the other sides need memory too
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        n_tokens = steps * config.tokens_per_step
        return took and {"tokens_per_s": n_tokens / took, "peak_memory_bytes": peak}

    graphs = torch._dynamo.utils.counters["stats"]
    began = time.perf_counter()
    measure(depths[0], 1)
    compiling, seen = time.perf_counter() - began, graphs["unique_graphs"]
    for iters in depths:
        measure(iters, 1)
    yield {
        **facts,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_per_step": config.tokens_per_step,
        "micro_batch": micro_batch,
        "block_size": T,
        "first_step_seconds": compiling,
        "recompilations": graphs["unique_graphs"] - seen,
    }
    while True:
        yield [measure(iters, steps) for iters in depths]


# ----------------------------------------------------------------------------------------------- decoding


def decode_side(config: Config, ckpt: str, batches: list[int], depths: list[int], draft: int, tokens: int):
    """Greedy decoding after prompts of a quarter of the context: yields the side's facts, then tokens/s of
    all rows together for every batch size and iters; at batch 1 also drafted at `draft` iterations. Weights
    and cache have the run's precision. Bytes are those of the weights, and of the cache at half of the
    tokens."""
    device, dtype = settings(config)
    model = load_model(ckpt) if ckpt else AbbIE(config.model_config(vocab_size(config)))
    model = model.to(device, dtype).eval()
    shape = model.config
    prompt = shape.block_size // 4
    tokens = min(tokens, shape.block_size - prompt)
    prompts = torch.randint(shape.vocab_size, (max(batches), prompt)).tolist()
    data = model.meta.get("data", "")
    if data and Path(data, "meta.json").exists():  # how many drafts are accepted depends on the text
        shards = Shards(data, "val", prompt)
        prompts = shards.batch([i % shards.n_windows for i in range(max(batches))])[0].tolist()
    block = sum(p.numel() for p in model.body[0].parameters())
    cells = []
    for batch, iters in itertools.product(batches, depths):
        blocks = shape.n_head_blocks + iters * shape.n_body_blocks + shape.n_tail_blocks
        weights = blocks * block + model.unembed.weight.numel()
        weights += iters * model.project.weight.numel() if shape.rule == "zero_pt" else 0
        cached = 2 * shape.n_kv_heads * shape.attn_head_dim * blocks  # keys and values of a token
        traffic = dtype.itemsize * (weights / batch + cached * (prompt + tokens // 2))
        flops = model.flops_per_token(iters, 2 * prompt + tokens, training=False)  # context: twice the mean
        cell = {"batch": batch, "iters": iters, "draft_iters": 0, "flops_per_token": flops}
        cells.append({**cell, "bytes_per_token": traffic})
        if batch == 1 and 0 < draft < iters:
            cells.append({**cell, "draft_iters": draft})

    def measure(cell):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batch, iters, draft_iters = cell["batch"], cell["iters"], cell["draft_iters"]
        stats = Stats()
        run = stream(model, prompts[:batch], tokens, iters, draft_iters=draft_iters, stats=stats)
        for _ in islice(run, batch):  # the first token of every row: the prompts are done
            pass
        took = seconds(lambda: [None for _ in run], device)
        found = {"tokens_per_s": (stats.tokens - batch) / took, "peak_memory_bytes": peak_memory(device)}
        return {**found, "accepted": stats.accepted / stats.drafted} if stats.drafted else found

    def measure_all():
        return [fitting(measure, cell) for cell in cells]

    measure_all()  # warms up
    yield {
        "ckpt": ckpt or None,
        "n_params": model.n_params(),
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_tokens": prompt,
        "new_tokens": tokens,
        "cells": cells,
    }
    while True:
        yield measure_all()


# ------------------------------------------------------------------------------------------------ the result


def compare(names: list[str], sides: list, device: torch.device, rounds: int) -> dict:
    """Measure the sides in turn -> the result: what the machine can do, the sides, and a cell per iters (and
    batch) with medians, their share of the machine, and the ratio to the first cell."""
    facts, measured = in_turn([partial(machine, device), *sides], rounds)
    about, *facts = facts
    of_machine, *of_sides = zip(*measured)  # what each has measured, round by round
    can = {key: statistics.median(found[key] for found in of_machine) for key in of_machine[0]}
    versions = train.versions(device)
    can["peak_flops"] = train.peak_flops(versions["device"])
    cells = []
    for name, fact, of_side in zip(names, facts, of_sides):
        for cell, found in zip(fact.pop("cells"), zip(*of_side)):
            if None in found:
                result = {"error": "out of memory"}
            else:
                result = summary(cell, found, fact["dtype"], can)
            cells.append({"side": name, **cell, **result})
    complete = [cell for cell in cells if "error" not in cell]
    for cell in complete:
        pairs = zip(cell["tokens_per_s_rounds"], complete[0]["tokens_per_s_rounds"])
        cell["tokens_per_s_to_first"] = statistics.median(a / b for a, b in pairs)
    return {
        "machine": {**about, **can},
        "versions": versions,
        "rounds": rounds,
        "sides": dict(zip(names, facts)),
        "cells": cells,
    }


def summary(cell: dict, found: tuple[dict], dtype: str, can: dict) -> dict:
    """Of what one cell measured in every round: medians, and their share of what the machine can do."""
    rates = [f["tokens_per_s"] for f in found]
    rate = statistics.median(rates)
    peak, source = can[dtype], "measured matmul"
    if can["peak_flops"] and dtype == "bfloat16":
        peak, source = can["peak_flops"], "data sheet"
    result = {
        **found[-1],
        "tokens_per_s": rate,
        "tokens_per_s_rounds": rates,
        "mfu": rate * cell["flops_per_token"] / peak,
        "mfu_of": source,
    }
    if "bytes_per_token" in cell:
        result["bandwidth_share"] = rate * cell["bytes_per_token"] / can["bandwidth"]
    return result


def show(result: dict):
    """A line per cell."""
    can, device = result["machine"], result["versions"]["device"]
    fp32, bf16, copy = (can[key] / 1e9 for key in ("float32", "bfloat16", "bandwidth"))
    print(f"{device}: matmul {fp32:,.0f} GFLOP/s fp32, {bf16:,.0f} bf16; copy {copy:.1f} GB/s")
    for cell in result["cells"]:
        what = " ".join(f"{key}={cell[key]}" for key in ("batch", "iters", "draft_iters") if cell.get(key))
        if "error" in cell:
            print(f"{what:28s} {cell['error']} | {cell['side']}")
            continue
        line = f"{what:28s} {cell['tokens_per_s']:11,.0f} tok/s  {cell['tokens_per_s_to_first']:6.3f} x  "
        line += f"{cell['mfu']:6.1%} mfu  {(cell['peak_memory_bytes'] or 0) / 2**30:6.2f} GiB  "
        if "bandwidth_share" in cell:
            line += f"{cell['bandwidth_share']:6.1%} bandwidth  "
        print(f"{line}| {cell['side']}")


# ------------------------------------------------------------------------------------------------- commands


def bench_train(args) -> dict:
    """The config, and every --side, in turn."""
    names, sides, base = [], [], load_config(args.config)
    for text in ["", *args.side]:
        changes = dict(word.partition("=")[::2] for word in text.split())
        depths = changes.pop("iters", args.iters)
        config = load_config([*args.config, *(f"--{key}={value}" for key, value in changes.items())])
        depths = parse_list(depths, "iters") if depths else [config.mean_iters]
        names.append(text or "as given")
        sides.append(partial(train_side, config, depths, args.steps))
    return compare(names, sides, choose_device(base.device), args.rounds)


def bench_decode(args) -> dict:
    config = load_config(args.config)
    depths = parse_list(args.iters, "iters") if args.iters else [config.mean_iters]
    batches = parse_list(args.batch, "batch", most=1 << 16)
    side = partial(decode_side, config, args.ckpt, batches, depths, args.draft_iters, args.new_tokens)
    return compare(["as given"], [side], choose_device(config.device), args.rounds)


COMMANDS = {"train": bench_train, "decode": bench_decode}


def main(argv: list[str]):
    parser = ArgumentParser(prog="bench.py", description=__doc__)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--iters", default="", help="1,2,4,8: measure at each (default: what the config trains at)")
    add("--steps", type=int, default=4, help="training steps of a measurement (4)")
    add("--rounds", type=int, default=7, help="measurements of every side (7)")
    add("--side", action="append", default=[], help="one more side: 'iters=1 n_body_blocks=4'")
    add("--ckpt", default="", help="decode this model (default: the config's shape with random weights)")
    add("--batch", default="1", help="1,64: decode so many rows at a time (1)")
    add("--new_tokens", type=int, default=128, help="tokens decoded per row (128)")
    add("--draft_iters", type=int, default=0, help="also decode batch 1 with drafts at so many iterations")
    add("--out", default="", help="write the result to this file too")
    args, args.config = parser.parse_known_args(argv)
    check(args.rounds >= 1 and args.steps >= 1, "--rounds and --steps must be at least 1")
    check(args.new_tokens >= 2, "--new_tokens must be at least 2: the first one belongs to the prompt")
    for name, command in {"side": "train", "ckpt": "decode", "draft_iters": "decode"}.items():
        check(args.command == command or not getattr(args, name), f"--{name} is for {command}")
    result = {"command": "python bench.py " + shlex.join(argv), **COMMANDS[args.command](args)}
    show(result)
    print(json.dumps(result))
    if args.out:
        write_json(Path(args.out), result)


if __name__ == "__main__":
    cli(main)
