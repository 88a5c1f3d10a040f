"""A trained standard model becomes a looped one: after how many further steps does it pay?

    python -m experiments.study --row std_8k --seed 1                       # the model
    python -m experiments.retrofit --ckpt out/study/std_8k-1 --steps 500,1500
    python -m experiments.retrofit                                          # what is there, as a table

Its blocks are cut 1+2+1 and run by the rule `recall`, with an r that grows: a quarter of the steps at r = 1
or 2, the others at --iters, where gradients reach --backprop_iters iterations. The control is the same Std
trained on for as many FLOPs, on more tokens. Both have the same learning rate, its warmup and its fall to 0
over the last half."""

import json
import shlex
from pathlib import Path

import train
from checkpoint import load_model
from config import ArgumentParser, cli
from data import Shards
from eval_icl import mean_stderr, window_losses
from experiments import RESULTS, append, read
from model import check

ITERS = [1, 2, 3, 4, 6, 8]


def run(out: str, init_from: str, seed: int, *flags: str) -> str:
    """Train on from a checkpoint -> the new run's folder."""
    common = [
        f"--init_from={init_from}",
        f"--seed={seed}",
        f"--out_dir={out}",
        "--eval_every=0",
        "--eval_tokens=4096",
    ]
    train.main(["config/abbie_tiny.py", *common, "--dtype=float32", *flags])
    return out


def flops_of(run: str) -> float:
    lines = [json.loads(line) for line in open(Path(run, "log.jsonl"))]
    return [line["flops"] for line in lines if "loss" in line][-1]


def losses(run: str, iters: list[int], tokens: int) -> dict:
    """{r: loss, its standard error} on validation tokens, the same ones for every run."""
    model = load_model(run).eval()
    shards = Shards(model.meta["data"], "val", model.config.block_size)
    found, _ = window_losses(model, shards, iters, tokens // model.config.block_size)
    return {
        str(r): [round(float(column.mean()), 5), round(mean_stderr(column), 5)]
        for r, column in zip(iters, found.numpy().T)
    }


def measure(ckpt: str, steps: int, args) -> dict:
    """One looped model and its control."""
    seed, tokens, lr = args.seed, args.tokens, f"--lr={args.lr}"
    name, first = f"{steps}-{args.iters}-{args.backprop_iters}-{args.lr}-{seed}", steps // 4
    name = f"{args.out}/{Path(ckpt).name}-{name}"
    flags = ["--rule=recall", f"--backprop_iters={args.backprop_iters}", lr]
    warm = run(f"{name}-warm", ckpt, seed, *flags, "--iters=1-2", f"--max_steps={first}", "--decay_frac=0")
    flags += [f"--iters={args.iters}", f"--max_steps={steps - first}", "--warmup_steps=0"]
    looped = run(f"{name}-looped", warm, seed + 100, *flags, "--decay_frac=0.667")
    flops = flops_of(warm) + flops_of(looped)
    std = load_model(ckpt, iters=1)
    more = round(flops / (std.flops_per_token(1) * 1024))
    control = run(f"{name}-std", ckpt, seed, "--iters=1", f"--max_steps={more}", lr)
    record = {"seed": seed, "lr": args.lr, "iters": args.iters}
    record |= {"backprop_iters": args.backprop_iters, "std_steps": std.meta["step"]}
    record |= {"steps": steps, "flops": flops, "control_steps": more}
    record |= {"val_tokens": tokens, "before": losses(ckpt, [1], tokens)}
    return {**record, "looped": losses(looped, ITERS, tokens), "control": losses(control, [1], tokens)}


def print_table(folder: Path):
    columns = " | ".join(f"r={r}" for r in ITERS)
    print(
        f"| further steps | trained at r | lr | seed | {columns} | Std, as many FLOPs (steps) | Std before |"
    )
    print("|---" * (len(ITERS) + 6) + "|")
    for found in read("retrofit", folder):
        cells = " | ".join(f"{found['looped'][str(r)][0]:.3f}" for r in ITERS)
        control = f"{found['control']['1'][0]:.3f} ({found['control_steps']})"
        row = f"{found['steps']} | {found['iters']} | {found['lr']:g} | {found['seed']}"
        print(f"| {row} | {cells} | {control} | {found['before']['1'][0]:.3f} |")


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.retrofit", description=__doc__)
    parser.add_argument("--ckpt", help="a run of config/abbie_tiny.py trained at r = 1")
    parser.add_argument("--seed", type=int, default=1, help="of the further steps' data order and r")
    parser.add_argument("--steps", default="500,1500", help="further steps, a pair of runs for each")
    parser.add_argument("--iters", default="poisson:6", help="that the looped model is trained at in the end")
    parser.add_argument("--backprop_iters", type=int, default=3, help="as in train.py (3)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of both (0.0005)")
    parser.add_argument("--out", default="out/retrofit", help="folder of the runs")
    parser.add_argument("--tokens", type=int, default=2**17, help="of the validation split (131072)")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    numbers = args.steps.split(",")
    enough = all(n.isdecimal() and int(n) >= 4 for n in numbers)
    check(enough, f"--steps={args.steps}: give numbers from 4, such as 500,1500")
    for steps in map(int, numbers) if args.ckpt else []:
        found = measure(args.ckpt, steps, args)
        record = {"command": f"python -m experiments.retrofit {shlex.join(argv)}", **found}
        append("retrofit", record, args.results)
    print_table(args.results)


if __name__ == "__main__":
    cli(main)
