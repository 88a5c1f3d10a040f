"""Does a model find again what it has read? Adds a line to results/induction.jsonl.

    python -m experiments.induction --ckpt out/study/std_8k-3
    python -m experiments.induction --table

A string of random letters, twice in a row: a model that looks up what followed last time (an "induction
head", which takes two layers of attention: arXiv 2209.11895) predicts the second copy, any other predicts
neither. And validation loss by place in the context, which falls further for a model that can. For models
of bytes."""

import shlex
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import train
from checkpoint import load_model
from config import ArgumentParser, cli, parse_list
from data import Shards
from experiments import RESULTS, append, read
from model import check

STRINGS, LENGTH, WINDOWS = 256, 100, 512  # of letters; of the validation split


@torch.no_grad()
def nats_of(model, x, y, iters: list[int], batch_size: int = 32) -> dict[int, torch.Tensor]:
    """{r: nats of every token, (B, T)} of x, y (B, T)."""
    found = {r: [] for r in iters}
    for xs, ys in zip(x.split(batch_size), y.split(batch_size)):
        for r, logits in zip(iters, model.logits_at(xs, iters)):
            found[r].append(F.cross_entropy(logits.transpose(1, 2), ys, reduction="none"))
    return {r: torch.cat(nats) for r, nats in found.items()}


def measure(args) -> dict:
    model = load_model(args.ckpt).eval()
    check(model.meta["tokenizer"] == "bytes", f"{args.ckpt} does not read bytes")
    iters = parse_list(args.iters, "iters")
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(ord("a"), ord("z") + 1, (STRINGS, LENGTH), generator=rng)
    twice = torch.cat([letters, letters], dim=1)
    shards = Shards(model.meta["data"], "val", model.config.block_size)
    x, y = shards.batch(np.arange(WINDOWS) * shards.n_windows // WINDOWS)
    result = {"ckpt": args.ckpt, "rule": model.config.rule, "trained_iters": model.config.iters, "iters": {}}
    copies, text = nats_of(model, twice[:, :-1], twice[:, 1:], iters), nats_of(model, x, y, iters)
    for r in iters:
        first, second = copies[r][:, : LENGTH - 1].mean(), copies[r][:, LENGTH:].mean()
        quarters = [round(quarter.mean().item(), 4) for quarter in text[r].chunk(4, dim=1)]
        entry = {"first_copy": round(first.item(), 4), "second_copy": round(second.item(), 4)}
        result["iters"][str(r)] = {**entry, "text_by_quarter": quarters}
    return {**result, **train.versions(torch.device("cpu"))}


def print_table(folder: Path):
    print("| model | r | first copy | second copy | text, quarters of the context |")
    print("|---|---|---|---|---|")
    for found in read("induction", folder):
        for r, entry in found["iters"].items():
            quarters = " ".join(f"{loss:.3f}" for loss in entry["text_by_quarter"])
            copies = f"{entry['first_copy']:.2f} | {entry['second_copy']:.2f}"
            print(f"| `{Path(found['ckpt']).name}` | {r} | {copies} | {quarters} |")


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.induction", description=__doc__)
    parser.add_argument("--ckpt", help="a run of train.py on bytes")
    parser.add_argument("--iters", default="1,2,4,6", help="where it is read (1,2,4,6)")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    parser.add_argument("--table", action="store_true", help="print the results")
    args = parser.parse_args(argv)
    if args.ckpt:
        command = f"python -m experiments.induction {shlex.join(argv)}"
        append("induction", {"command": command, **measure(args)}, args.results)
    print_table(args.results)


if __name__ == "__main__":
    cli(main)
