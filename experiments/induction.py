"""Does a model find again what it has read? Adds a line to results/induction.jsonl.

    python -m experiments.induction --ckpt out/study/std_8k-3
    python -m experiments.induction                           # what is there, as tables

A string of random letters, twice in a row: a model that looks up what followed last time (an "induction
head", which takes two layers of attention: arXiv 2209.11895) predicts the second copy, any other predicts
neither. And validation loss by place in the context, which falls further for a model that can; and by what a
look-up would find there: where the last bytes (4 to 11, 12 or more) stood in the context before, and what
followed them is the next byte (right) or is not (wrong). For models of bytes."""

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
from model import AbbIEConfig, check

STRINGS, LENGTH, WINDOWS = 256, 100, 512  # of letters; of the validation split
MATCH, LONG_MATCH = 4, 12  # bytes


@torch.no_grad()
def nats_of(model, x, y, iters: list[int], batch_size: int = 32) -> dict[int, torch.Tensor]:
    """{r: nats of every token, (B, T)} of x, y (B, T)."""
    found = {r: [] for r in iters}
    for xs, ys in zip(x.split(batch_size), y.split(batch_size)):
        for r, logits in zip(iters, model.logits_at(xs, iters)):
            found[r].append(F.cross_entropy(logits.transpose(1, 2), ys, reduction="none"))
    return {r: torch.cat(nats) for r, nats in found.items()}


def longest_matches(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x, y (B, T) -> how many of the bytes up to each x[t] stood in the window before, at most, and whether
    what followed them there (the last time, of several) is y[t]; (B, T) each."""
    (B, T), rows = x.shape, np.arange(len(x))
    lengths, right = np.zeros((B, T), int), np.zeros((B, T), bool)
    common = np.zeros((B, T), int)  # at s: how many bytes up to x[s] are those up to x[t], for the t at hand
    for t in range(1, T):
        one_before = np.pad(common, ((0, 0), (1, 0)))[:, :t]
        common[:, :t] = np.where(x[:, :t] == x[:, t : t + 1], one_before + 1, 0)
        best = t - 1 - common[:, t - 1 :: -1].argmax(axis=1)
        lengths[:, t] = common[rows, best]
        right[:, t] = (lengths[:, t] > 0) & (y[rows, best] == y[:, t])
    return lengths, right


def kinds_of_text(x: np.ndarray, y: np.ndarray) -> dict[str, torch.Tensor]:
    """{what a look-up would find: where that is so, (B, T)}."""
    lengths, right = longest_matches(x, y)
    long, short = lengths >= LONG_MATCH, (lengths >= MATCH) & (lengths < LONG_MATCH)
    kinds = {"no_match": lengths < MATCH, "short_wrong": short & ~right, "short_right": short & right}
    kinds |= {"long_wrong": long & ~right, "long_right": long & right}
    return {kind: torch.from_numpy(where) for kind, where in kinds.items()}


def measure(args) -> dict:
    model = load_model(args.ckpt).eval()
    check(model.meta["tokenizer"] == "bytes", f"{args.ckpt} does not read bytes")
    iters = parse_list(args.iters, "iters")
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(ord("a"), ord("z") + 1, (STRINGS, LENGTH), generator=rng)
    twice = torch.cat([letters, letters], dim=1)
    shards = Shards(model.meta["data"], "val", model.config.block_size)
    x, y = shards.batch(np.arange(WINDOWS) * shards.n_windows // WINDOWS)
    kinds = kinds_of_text(x.numpy(), y.numpy())
    result = {"ckpt": args.ckpt, "rule": model.config.rule, "trained_iters": model.config.iters, "iters": {}}
    result["share_of_text"] = {kind: round(where.float().mean().item(), 4) for kind, where in kinds.items()}
    copies, text = nats_of(model, twice[:, :-1], twice[:, 1:], iters), nats_of(model, x, y, iters)
    for r in iters:
        first, second = copies[r][:, : LENGTH - 1].mean(), copies[r][:, LENGTH:].mean()
        quarters = [round(quarter.mean().item(), 4) for quarter in text[r].chunk(4, dim=1)]
        entry = {"first_copy": round(first.item(), 4), "second_copy": round(second.item(), 4)}
        by_match = {kind: round(text[r][where].mean().item(), 4) for kind, where in kinds.items()}
        result["iters"][str(r)] = {**entry, "text_by_quarter": quarters, "text_by_match": by_match}
    return {**result, **train.versions(torch.device("cpu"))}


def tested(folder: Path) -> list[dict]:
    """The newest record of every model, in the order of their names."""
    return sorted(
        {run["ckpt"]: run for run in read("induction", folder)}.values(), key=lambda run: run["ckpt"]
    )


def trained_at(run: dict) -> str:
    """Of the r that a run was read at, the nearest to the mean of its training."""
    mean = AbbIEConfig(iters=run["trained_iters"]).mean_iters
    return min(run["iters"], key=lambda r: abs(int(r) - mean))


def looks_up(run: dict, r: str) -> bool:
    """We chose 0.2 nats: of most models the copies differ by less than 0.12 or by more than 0.5."""
    return run["iters"][r]["first_copy"] - run["iters"][r]["second_copy"] > 0.2


def where_a_look_up(run: dict, r: str) -> dict[str, float]:
    """{"finds nothing", "is wrong", "is right": nats per byte there} of text, matches of any length; {} in
    records that are older than this."""
    nats, share = run["iters"][r].get("text_by_match"), run.get("share_of_text")
    if nats is None or share is None:
        return {}
    found = {"finds nothing": nats["no_match"]}
    for what in ("wrong", "right"):
        kinds = (f"short_{what}", f"long_{what}")
        total = sum(share[kind] for kind in kinds)
        found[f"is {what}"] = sum(share[kind] * nats[kind] for kind in kinds) / total
    return found


def print_table(folder: Path):
    """Every model at the r that it was trained at."""
    columns = ["model", "r", "first copy", "second copy", "text, quarters of the context"]
    columns += ["look-up finds nothing", "is wrong", "is right"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for run in tested(folder):
        r = trained_at(run)
        entry = run["iters"][r]
        copies = [f"{entry[copy]:.2f}" for copy in ("first_copy", "second_copy")]
        quarters = " ".join(f"{loss:.3f}" for loss in entry["text_by_quarter"])
        by_look_up = [f"{nats:.3f}" for nats in where_a_look_up(run, r).values()] or [""] * 3
        name = f"`{Path(run['ckpt']).name}`"
        print(f"| {' | '.join([name, r, *copies, quarters, *by_look_up])} |")


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.induction", description=__doc__)
    parser.add_argument("--ckpt", help="a run of train.py on bytes")
    parser.add_argument("--iters", default="1,2,4,6", help="where it is read (1,2,4,6)")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    if args.ckpt:
        command = f"python -m experiments.induction {shlex.join(argv)}"
        append("induction", {"command": command, **measure(args)}, args.results)
    print_table(args.results)


if __name__ == "__main__":
    cli(main)
