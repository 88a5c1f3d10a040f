"""Speed in training beside nanoGPT, and the report of one GPU. Adds lines to results/speed.jsonl.

    python -m experiments.speed loop                                  # is looping free?
    python -m experiments.speed nanogpt --nanogpt PATH                # tokens/s at equal shape
    python -m experiments.speed race --nanogpt PATH --data data/NAME  # loss at equal wall-clock time
    python -m experiments.speed gpu                                   # tokens/s, MFU, memory at 350M

PATH is a clone of github.com/karpathy/nanoGPT. The sides take turns as in bench.py; any further flag is one
of train.py's and changes the config.
"""

import argparse
import importlib.util
import json
import math
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bench
import train
from checkpoint import load_model
from config import ArgumentParser, Config, choose_device, cli, load_config
from data import Shards
from eval_icl import evaluate_loss
from experiments import RESULTS, ROOT, append, read
from model import check

# ---------------------------------------------------------------------------------------------------- nanoGPT


def load_nanogpt(path: str, config: Config, **shape):
    """nanoGPT's model with the width, depth, heads and context of a config, and its AdamW; its other settings
    are the defaults of its train.py: no biases, no dropout."""
    file = Path(path, "model.py")
    check(
        bool(path) and file.is_file(),
        f"{path or 'no path'} holds no nanoGPT\n"
        "git clone https://github.com/karpathy/nanoGPT, and give that folder with --nanogpt",
    )
    spec = importlib.util.spec_from_file_location("nanogpt", file)
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = {"block_size": config.block_size, "n_layer": config.n_blocks, "n_head": config.n_attn_heads}
    ours |= {"n_embd": config.n_embd, "bias": False, "dropout": 0.0}
    model = module.GPT(module.GPTConfig(**{**ours, **shape}))
    device = choose_device(config.device)
    model.to(device).train()
    betas = config.beta1, config.beta2
    return model, model.configure_optimizers(config.weight_decay, config.lr, betas, device.type)


class OnlyLoss(torch.nn.Module):
    """nanoGPT as our training step calls a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, iters):
        return self.model(x, y)


def nanogpt_side(config: Config, path: str, steps: int):
    """As bench.train_side, of nanoGPT. Two matrices of 4 D^2 per MLP, no gate; attention counted as ours."""
    vocab_size = config.model_config(bench.vocab_size(config)).padded_vocab_size
    model, optimizer = load_nanogpt(path, config, vocab_size=vocab_size)
    n_params, compiled = sum(p.numel() for p in model.parameters()), config.compile == "on"
    D, L = config.n_embd, config.n_blocks
    flops = 6 * (12 * L * D * D + D * vocab_size) + 6 * L * D * config.block_size
    net = OnlyLoss(torch.compile(model) if compiled else model)
    facts = {"model": "nanoGPT", "n_params": n_params, "compiled": compiled}
    facts["cells"] = [{"iters": 1, "flops_per_token": flops}]
    yield from bench.measure_training(net, optimizer, config, steps, facts)


def train_nanogpt(config: Config, path: str, max_steps: int, val: Shards) -> dict:
    """Train nanoGPT by its recipe: random windows, 100 steps of warmup, cosine to a tenth."""
    torch.manual_seed(config.seed)
    torch.backends.cuda.enable_flash_sdp(True)  # as PyTorch is without us
    model, optimizer = load_nanogpt(path, config, vocab_size=val.vocab_size)
    paths = Shards(config.data, "train", config.block_size).paths
    data = torch.cat([torch.from_numpy(np.fromfile(p, val.dtype).astype(np.int64)) for p in paths])
    began, T = time.perf_counter(), config.block_size
    for step in range(max_steps + 1):
        progress = (step - 100) / max(1, max_steps - 100)
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        lr = config.lr * ((step + 1) / 101 if step < 100 else cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(data) - T, (config.micro_batch,))
        windows = torch.stack([data[i : i + T + 1] for i in starts])
        model(windows[:, :-1], windows[:, 1:].contiguous())[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    took = time.perf_counter() - began
    model.eval()
    total = 0.0
    with torch.no_grad():
        for first in range(0, val.n_windows, 64):
            x, y = val.batch(range(first, min(first + 64, val.n_windows)))
            total += model(x, y)[1].item() * len(x)
    return {
        "steps": max_steps,
        "tokens": max_steps * config.tokens_per_step,
        "seconds": took,
        "val_loss": {f"context {T}": total / val.n_windows},
        "n_params": sum(p.numel() for p in model.parameters()),
    }


# --------------------------------------------------------------------------------------------------- measures


def measure_loop(args) -> dict:
    """r = 2 beside an unlooped model of the same depth, and beside r = 1."""
    sides = ["iters=1 n_body_blocks=4", "iters=1"]
    config = [f"{ROOT}/config/abbie_tiny.py", *args.config]
    options = {"config": config, "iters": "2", "side": sides, "steps": args.steps, "rounds": args.rounds}
    return bench.bench_train(argparse.Namespace(**options))


def measure_nanogpt(args) -> dict:
    """std_tiny beside nanoGPT at equal width, depth, heads, context and batch, eager and compiled; in bf16
    too where the CPU has units for it."""
    names, sides, cpu = [], [], torch.device("cpu")
    own = train.choose_dtype(load_config([f"{ROOT}/config/std_tiny.py", "--dtype=auto"]), cpu)
    for dtype in dict.fromkeys(("float32", str(own)[6:])):
        for how in ("off", "on"):
            flags = [*args.config, f"--dtype={dtype}", f"--compile={how}", "--device=cpu"]
            config = load_config([f"{ROOT}/config/std_tiny.py", *flags])
            names += [f"ours dtype={dtype} compile={how}", f"nanoGPT dtype={dtype} compile={how}"]
            sides.append(partial(bench.train_side, config, [1], args.steps))
            sides.append(partial(nanogpt_side, config, args.nanogpt, args.steps))
    return bench.compare(names, sides, cpu, args.rounds)


def measure_race(args) -> dict:
    """Validation loss at equal time: nanoGPT's recipe for CPUs (its README: 4 layers, 4 heads, width 128,
    context 64, batch 12, 2000 steps, not compiled; fp32, as its train.py takes on CPUs) against std_tiny,
    which gets the tokens that its measured speed buys in nanoGPT's time. Both read the same shards. Losses
    are over the whole validation split, in windows of 64 tokens; ours also in windows of its context."""
    argv = [f"{ROOT}/config/std_tiny.py", f"--data={args.data}", *args.config, "--device=cpu"]
    config = load_config(argv)
    shape = {"n_embd": 128, "n_attn_heads": 4, "n_kv_heads": 4, "iters": 1, "block_size": 64}
    blocks = {"n_head_blocks": 1, "n_body_blocks": 2, "n_tail_blocks": 1}
    batch = {"micro_batch": 12, "tokens_per_step": 12 * 64, "dtype": "float32", "compile": "off"}
    optimizer = {"lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99}
    recipe = replace(config, **shape, **blocks, **batch, **optimizer)
    as_many = -(-args.steps * config.tokens_per_step // recipe.tokens_per_step)
    sides = [
        partial(bench.train_side, config, [1], args.steps),
        partial(nanogpt_side, recipe, args.nanogpt, as_many),
    ]
    result = bench.compare(["ours", "nanoGPT"], sides, torch.device("cpu"), args.rounds)
    faster = 1 / result["cells"][1]["tokens_per_s_to_first"]
    steps = round(faster * args.nanogpt_steps * recipe.tokens_per_step / config.tokens_per_step)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        once = ["--eval_every=0", "--save_every=0"]
        train.main([*argv, f"--out_dir={folder}/run", f"--max_steps={steps}", *once])
        took = time.perf_counter() - began
        model = load_model(f"{folder}/run").eval()
        n_params = model.n_params()
        losses = {}
        for T in sorted({recipe.block_size, config.block_size}):
            losses[f"context {T}"] = evaluate_loss(model, Shards(config.data, "val", T), [1])[1]
    ours = {"steps": steps, "tokens": steps * config.tokens_per_step, "val_loss": losses}
    ours |= {"seconds_with_evaluation_and_save": took, "n_params": n_params}
    val = Shards(config.data, "val", recipe.block_size)
    result["race"] = {"ours": ours, "nanoGPT": train_nanogpt(recipe, args.nanogpt, args.nanogpt_steps, val)}
    return result


# The report of one GPU at 350M parameters, in stages; r = 1 is Std. A step is one GPU's share of eight.
OPTIONS = ["activation_checkpointing=true", "micro_batch=8", "compile=off"]
GPU_STAGES = {
    "gpu train": (bench.bench_train, {"iters": "1,2,4,8", "side": []}),
    "gpu options": (bench.bench_train, {"iters": "2", "side": OPTIONS}),
    "gpu decode": (
        bench.bench_decode,
        {"iters": "1,2,4,8", "batch": "1,64", "draft_iters": 1, "ckpt": "", "new_tokens": 128},
    ),
}


def measure_gpu(args):
    """Each stage is a record as soon as it is done; the same command goes on after the last."""
    done = [record["what"] for record in read("speed", args.results)]
    shared = {"config": [f"{ROOT}/config/abbie_350m.py", "--tokens_per_step=65536", *args.config]}
    shared |= {"steps": args.steps, "rounds": args.rounds}
    for name, (run, options) in GPU_STAGES.items():
        if name not in done:
            result = run(argparse.Namespace(**shared, **options))
            bench.show(result)
            append("speed", {"what": name, "command": args.command, **result}, args.results)


MEASURES = {"loop": measure_loop, "nanogpt": measure_nanogpt, "race": measure_race, "gpu": measure_gpu}


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.speed", description=__doc__)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--nanogpt", default="", help="a clone of nanoGPT")
    parser.add_argument("--nanogpt_steps", type=int, default=2000, help="race: steps of nanoGPT (2000)")
    parser.add_argument("--data", default="data/stdlib", help="race: shards of bytes (data/stdlib)")
    parser.add_argument("--steps", type=int, default=4, help="training steps of a measurement (4)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of every side (7)")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args, args.config = parser.parse_known_args(argv)
    args.command = "python -m experiments.speed " + shlex.join(argv)
    result = MEASURES[args.what](args)
    if result:
        bench.show(result)
        append("speed", {"what": args.what, "command": args.command, **result}, args.results)
        if "race" in result:
            print(json.dumps(result["race"]))


if __name__ == "__main__":
    cli(main)
