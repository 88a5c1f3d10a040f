"""Which tiny config buys the lowest loss in a fixed time? -> results/recipe.jsonl, with every try.

    python -m experiments.recipe speed                                # tokens/s of the shapes, quiet machine
    python -m experiments.recipe train [TRY ...] [--seconds 150]      # the steps that so many seconds buy
    python -m experiments.recipe table

A try is config/abbie_tiny.py under flags of train.py. Its steps come from its measured speed, less the time
of compilation, so the training itself may share the machine with others. Tries that are there are skipped.
"""

import os
from functools import partial
from pathlib import Path

import torch

import bench
import train
from checkpoint import load_model
from config import ArgumentParser, cli, load_config
from data import Shards
from eval_icl import evaluate_loss
from experiments import RESULTS, ROOT, append, read
from model import check

SHAPE = f"""{ROOT}/config/abbie_tiny.py --n_embd=128 --ffn_dim=352 --n_attn_heads=4 --n_head_blocks=1
    --n_body_blocks=2 --n_tail_blocks=1 --block_size=256 --dtype=bfloat16 --weight_decay=0.1 --warmup_steps=-1
    --decay_frac=0.5"""
EAGER = {n: f"--tokens_per_step={n} --micro_batch={n // 256} --compile=off" for n in (4096, 2048, 1024, 512)}
COMPILED = {n: flags.replace("off", "on") for n, flags in EAGER.items()}
# name: (flags that its speed depends on, other flags), in the order in which they were thought of
TRIES = {
    "first": (EAGER[4096], "--lr=2e-3 --decay_frac=0.2"),
    "compiled": (COMPILED[4096], "--lr=2e-3 --decay_frac=0.2"),
    "decay": (COMPILED[4096], "--lr=2e-3"),
    "decay, warmup": (COMPILED[4096], "--lr=2e-3 --warmup_steps=100"),
    "4096, 1e-3": (COMPILED[4096], "--lr=1e-3 --warmup_steps=100"),
    "2048, 2e-3": (COMPILED[2048], "--lr=2e-3 --warmup_steps=100"),
    "2048, 1e-3": (COMPILED[2048], "--lr=1e-3 --warmup_steps=100"),
    "1024, 1e-3": (COMPILED[1024], "--lr=1e-3 --warmup_steps=100"),
    "1024, eager": (EAGER[1024], "--lr=1e-3 --warmup_steps=100"),
    "1024, eager, 2e-3": (EAGER[1024], "--lr=2e-3 --warmup_steps=100"),
    "512, eager": (EAGER[512], "--lr=1e-3 --warmup_steps=100"),
    "512, eager, 2e-3": (EAGER[512], "--lr=2e-3 --warmup_steps=100"),
    "context 128": (f"{EAGER[1024]} --block_size=128 --micro_batch=8", "--lr=1e-3 --warmup_steps=100"),
    "width 192": (f"{EAGER[1024]} --n_embd=192 --ffn_dim=512", "--lr=1e-3 --warmup_steps=100"),
    "width 96": (f"{EAGER[1024]} --n_embd=96 --ffn_dim=256", "--lr=1e-3 --warmup_steps=100"),
    "2 heads": (f"{EAGER[1024]} --n_attn_heads=2", "--lr=1e-3 --warmup_steps=100"),
    "1+1+1": (f"{EAGER[1024]} --n_body_blocks=1", "--lr=1e-3 --warmup_steps=100"),
    "fp32": (f"{EAGER[1024]} --dtype=float32", "--lr=1e-3 --warmup_steps=100"),
}


def records(what: str, folder: Path) -> list[dict]:
    return [record for record in read("recipe", folder) if record["what"] == what]


def speed(rounds: int, folder: Path):
    """Tokens/s of the shapes that have none yet, beside the first one; and what compiling costs uncached."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    known = [record["flags"] for record in records("speed", folder)]
    shapes = [TRIES["first"][0]]
    for shape, _ in TRIES.values():
        if shape not in known and shape not in shapes:
            shapes.append(shape)
    configs = [load_config([*SHAPE.split(), *shape.split()]) for shape in shapes]
    sides = [partial(bench.train_side, config, [2], 2) for config in configs]
    result = bench.compare(shapes, sides, torch.device("cpu"), rounds)
    bench.show(result)
    append("recipe", {"what": "machine", **{key: result[key] for key in ("machine", "versions")}}, folder)
    for cell in result["cells"]:
        if cell["side"] not in known:
            record = {
                "what": "speed",
                "flags": cell["side"],
                "tokens_per_s": cell["tokens_per_s"],
                "to_first": cell["tokens_per_s_to_first"],
                "first_step_seconds": result["sides"][cell["side"]]["first_step_seconds"],
            }
            append("recipe", record, folder)


def train_one(name: str, seconds: float, folder: Path):
    measured = {record["flags"]: record for record in records("speed", folder)}
    check(TRIES[name][0] in measured, f"{name} has no speed yet\npython -m experiments.recipe speed")
    measured = measured[TRIES[name][0]]
    flags = [*SHAPE.split(), *" ".join(TRIES[name]).split()]
    config = load_config(flags)
    left = seconds - measured["first_step_seconds"]
    steps = int(left * measured["tokens_per_s"] / config.tokens_per_step)
    out = f"out/recipe/{seconds:g}_{name.replace(' ', '_')}"
    once = ["--eval_every=0", "--save_every=0", "--eval_iters=2", "--eval_tokens=16384"]
    train.main([*flags, f"--max_steps={steps}", f"--out_dir={out}", *once])
    model = load_model(out).eval()
    shards = Shards(config.data, "val", config.block_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = evaluate_loss(model, shards, [1, 2, 4, 8], n_windows=2**17 // config.block_size)
    record = {
        "what": "try",
        "name": name,
        "seconds": seconds,
        "flags": " ".join(TRIES[name]),
        "n_params": model.n_params(),
        "steps": steps,
        "tokens": steps * config.tokens_per_step,
        "val_loss": {str(r): round(loss, 5) for r, loss in losses.items()},
    }
    append("recipe", record, folder)


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.recipe", description=__doc__)
    parser.add_argument("command", choices=("speed", "train", "table"))
    parser.add_argument("tries", nargs="*", help="names (default: all)")
    parser.add_argument("--seconds", type=float, default=150, help="time that a try may train for (150)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    if args.command == "speed":
        speed(args.rounds, args.results)
    if args.command == "train":
        done = [(record["name"], record["seconds"]) for record in records("try", args.results)]
        for name in args.tries or TRIES:
            check(name in TRIES, f"no try {name!r}\ntries: {'; '.join(TRIES)}")
            if (name, args.seconds) not in done:
                train_one(name, args.seconds, args.results)
    tries = records("try", args.results)
    for record in sorted(tries, key=lambda record: (record["seconds"], record["val_loss"]["2"])):
        losses = "  ".join(f"r={r} {loss:.3f}" for r, loss in record["val_loss"].items())
        tokens = record["tokens"] / 1e6
        print(f"{record['seconds']:5g} s  {tokens:.2f}M tokens  {losses}  {record['name']}")


if __name__ == "__main__":
    cli(main)
