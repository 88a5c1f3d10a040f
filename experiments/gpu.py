"""What only a card can show, in at most 12 minutes on one H200. Adds to results/gpu.jsonl.

    python -m experiments.gpu                      # all parts
    python -m experiments.gpu --parts steps,decode
    python -m experiments.gpu --tiny --device cpu --dtype float32 --results /tmp      # the dry run, anywhere

A part prints one line of JSON each time that it has measured something, and the next one follows whatever
becomes of it. The data is the standard library as bytes, so nothing is downloaded; models keep the vocabulary
and the shape of their config.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import prepare_data
import train
from config import ArgumentParser, choose_device, choose_dtype, cli, load_config
from experiments import RESULTS, ROOT, append
from model import AbbIE, check
from sample import generate

TINY = [
    "--n_embd=64", "--ffn_dim=96", "--n_attn_heads=2", "--block_size=64", "--n_head_blocks=1",
    "--n_body_blocks=1", "--n_tail_blocks=1", "--tokens_per_step=256", "--micro_batch=2", "--vocab_size=512",
]  # fmt: skip


def config_of(args, name: str, *flags: str):
    """The config of this name with a GPT-2 vocabulary, or a tiny one."""
    size = TINY if args.tiny else ["--vocab_size=50257"]
    return load_config([f"{ROOT}/config/{name}.py", *size, *flags])


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_steps(args, config, iters: int, wrap=lambda model: model) -> dict:
    """Training steps of a compiled model on random tokens: the first one, then the rest timed."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device, training=True)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    model = AbbIE(config.model_config(config.vocab_size)).to(device)
    compiled = train.compile_blocks(model, "auto", device)
    net, optimizer = wrap(model), train.adamw(model, config)
    shape = (2, config.micro_batch, config.block_size)
    batches = [tuple(torch.randint(config.vocab_size, shape, device=device)) for _ in range(2)]
    torch._dynamo.utils.counters.clear()
    losses = [train.train_step(net, optimizer, batches, iters, config, autocast)[0] for _ in range(2)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    synchronize(device)
    began, n = time.perf_counter(), 2 if args.tiny else 8
    losses += [train.train_step(net, optimizer, batches, iters, config, autocast)[0] for _ in range(n)]
    synchronize(device)
    seconds = (time.perf_counter() - began) / n
    tokens = 2 * config.micro_batch * config.block_size
    peak = train.peak_flops(train.versions(device)["device"])
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {
        "iters": iters, "tokens_per_s": round(tokens / seconds), "memory_gb": memory,
        "mfu": peak and round(model.flops_per_token(iters) * tokens / seconds / peak, 4),
        "compiled": compiled, "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "recompilations": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
    }  # fmt: skip


def steps(args):
    """abbie_350m at r = 1, 2, 4, 8. On a card FlashAttention alone is allowed: else this fails."""
    flash = choose_device(args.device).type == "cuda"
    for iters in (1, 2, 4, 8):
        if flash:
            torch.cuda.reset_peak_memory_stats()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext():
            yield {"flash": flash, **measured_steps(args, config_of(args, "abbie_350m"), iters)}


def world_of_one(args):
    """DDP over the backends that torchrun would start, in a world of this process."""
    nccl = choose_device(args.device).type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield {
            "backend": backend,
            **measured_steps(args, config_of(args, "abbie_124m"), 2, DistributedDataParallel),
        }
    finally:
        dist.destroy_process_group()


def decode(args):
    """Tokens per second of 64 new tokens at r = 1, 2, 8, one row and sixteen, in sample.py's dtype."""
    device = choose_device(args.device)
    config = config_of(args, "abbie_350m")
    model = AbbIE(config.model_config(config.vocab_size)).to(device, choose_dtype(args.dtype, device))
    n = 8 if args.tiny else 64
    for iters in (1, 2, 8):
        for rows in (1, 16):
            generate(model, [[1, 2, 3]] * rows, 4, iters)
            synchronize(device)
            began = time.perf_counter()
            generate(model, [[1, 2, 3]] * rows, n, iters)
            synchronize(device)
            yield {
                "iters": iters,
                "rows": rows,
                "tokens_per_s": round(rows * n / (time.perf_counter() - began), 1),
            }


def script(args, *command: str) -> dict:
    """A script in a process of its own -> its seconds and status, and the last lines that it printed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=240)
    printed = (done.stdout + done.stderr).strip().splitlines()
    seconds = round(time.perf_counter() - began, 1)
    return {
        "command": " ".join(command),
        "status": done.returncode,
        "seconds": seconds,
        "printed": printed[-4:],
    }


def scripts(args):
    """Six steps of train.py, resumed; a sample at r = 8; an evaluation in both dtypes."""
    with tempfile.TemporaryDirectory() as folder:
        device, size = (
            f"--device={args.device}",
            TINY if args.tiny else ["--tokens_per_step=65536", "--vocab_size=50257"],
        )
        run = [f"--out_dir={folder}/run", f"--dtype={args.dtype}", "--eval_tokens=4096"]
        run += ["--data=data/stdlib", "--eval_every=3", device, *size]
        for steps in (3, 6):
            yield script(
                args, "train.py", "config/abbie_350m.py", "--decay_frac=0", f"--max_steps={steps}", *run
            )
        yield script(args, "sample.py", "--iters=8", f"--ckpt={folder}/run", "--max_new_tokens=64", device)
        for dtype in ("float32", "bfloat16"):
            limited = ["--limit=5" if args.tiny else "--limit=50", f"--dtype={dtype}", device]
            yield script(args, "eval_icl.py", f"--ckpt={folder}/run", "--iters=1,2,4,8", *limited)


def two_ranks(args):
    """abbie_124m by two ranks on one device, which is what gloo allows: see as_rank."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "experiments.gpu",
        ]
        flags = [f"--device={args.device}", f"--dtype={args.dtype}", *(["--tiny"] if args.tiny else [])]
        yield script(args, *launch, f"--rank_of={folder}/run", *flags)


def as_rank(args):
    """One of two_ranks: train.py as it is, on a machine where NCCL is said to be missing."""
    dist.is_nccl_available = lambda: False
    device = "cuda:0" if args.device.startswith("cuda") else args.device
    run = [f"--out_dir={args.rank_of}", f"--dtype={args.dtype}", "--eval_tokens=4096"]
    run += ["--data=data/stdlib", "--max_steps=3", f"--device={device}"]
    run += TINY if args.tiny else ["--tokens_per_step=65536", "--micro_batch=8", "--vocab_size=50257"]
    train.main([f"{ROOT}/config/abbie_124m.py", *run])


PARTS = {part.__name__: part for part in (steps, world_of_one, scripts, two_ranks, decode)}


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.gpu", description=__doc__)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (all)")
    add("--device", default="cuda", help="cuda, or cpu for a dry run")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--tiny", action="store_true", help="a model of 0.2M parameters beside its embedding")
    add("--results", type=Path, default=RESULTS, help="folder of the records")
    add("--rank_of", default="", help="(what two_ranks starts)")
    args = parser.parse_args(argv)
    if args.rank_of:
        return as_rank(args)
    for name in args.parts.split(","):
        check(name in PARTS, f"no part {name}\nparts: {', '.join(PARTS)}")
    if not (ROOT / "data/stdlib/meta.json").exists():
        prepare_data.main(["stdlib", "--out", str(ROOT / "data/stdlib")])
    about = train.versions(choose_device(args.device))
    for name in args.parts.split(","):
        try:
            for record in PARTS[name](args):
                print(json.dumps({"part": name, **record}), flush=True)
                append("gpu", {"part": name, **record, **about}, args.results)
        except Exception as error:  # whatever it is, the next part is worth its minutes
            traceback.print_exc()
            print(json.dumps({"part": name, "error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    cli(main)
