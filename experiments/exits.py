"""Early exit and the cache of one slot on text: loss against the iterations that were run.

    python -m experiments.exits --ckpt out/study/recall_p6b3-1         # adds a line to results/exits.jsonl
    python -m experiments.exits                                        # what is there, as tables

Of the same validation windows, in nats per token with standard errors over windows:

- fixed: every token at r, with the full cache, and with one slot for all iterations (--cache last);
- exit: sample.py's --exit, with the full cache (at most 32 iterations) and with one slot (at most 8);
- tasks: the accuracy of the built-in tasks at these r and with these exits;
- signals: what a rule would reach that stops at the first r whose signal is low enough, over all thresholds,
  and an oracle that knows every token's loss at every r. These read predictions at fixed r, so that a token
  which stops changes nothing for the others.

The full cache is read many tokens at a time, which is exact; one slot is read token by token, since then a
token meets the deepest keys and values of all before it."""

import shlex
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import train
from checkpoint import load_model
from config import ArgumentParser, cli
from data import Shards, get_tokenizer
from decode import KVCache, Stats, parse_exit, step
from eval_icl import mean_stderr, run_task, window_losses
from experiments import RESULTS, append, read
from model import check
from tasks import BUILT_IN, load_tasks

FIXED = [1, 2, 3, 4, 6, 8, 32]
EXITS = ["kl:1e-1", "kl:3e-2", "kl:1e-2", "u:1e-1"]
MOST = 8  # iterations of an early exit with one slot, and of what the signals look at
BATCH = 256


def entry(losses: np.ndarray, mean_iters: float) -> dict:
    stderr = mean_stderr(losses)
    return {"loss": round(float(losses.mean()), 5), "stderr": round(stderr, 5), "iters": round(mean_iters, 3)}


@torch.no_grad()
def read_by_token(model, batches: list, rule: int | str) -> dict:
    """Windows read token by token with one cache slot, at a fixed r or with early exit."""
    losses, stats = [], Stats()
    for x, y in tqdm(batches, desc=f"last, {rule}", disable=None):
        most = MOST if isinstance(rule, str) else rule
        cache, nats = KVCache(model, len(x), most, "last"), []
        for t in range(x.shape[1]):
            exit = parse_exit(rule) if isinstance(rule, str) else None
            logits = step(model, x[:, t : t + 1], cache, exit_rule=exit, stats=stats)
            nats.append(F.cross_entropy(logits.float(), y[:, t], reduction="none"))
        losses.append(torch.stack(nats, 1).double().mean(1))
    mean_iters = rule
    if isinstance(rule, str):
        mean_iters = sum(k * n for k, n in stats.iters.items()) / stats.iters.total()
    return entry(torch.cat(losses).numpy(), mean_iters)


@torch.no_grad()
def look(model, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows (B, T) -> the loss of every token after 1 to MOST iterations, (MOST, B, T), and what could be
    looked at after each, low where a token seems to be done: infinite where it cannot be known yet."""
    nats, signals, before = [], {name: [] for name in ("kl", "kl twice", "entropy", "margin")}, None
    quiet = torch.full(x.shape, torch.inf)
    for z in model.states_at(x, list(range(1, MOST + 1))):
        logits = model.logits(z).float()
        nats.append(F.cross_entropy(logits.transpose(1, 2), y, reduction="none"))
        now = logits.log_softmax(-1)
        change = torch.full(x.shape, torch.inf)
        if before is not None:
            change = F.kl_div(before, now, log_target=True, reduction="none").sum(-1)
        best = now.exp().topk(2).values
        signals["kl"].append(change)
        signals["kl twice"].append(torch.maximum(change, quiet))
        signals["entropy"].append(-(now.exp() * now).sum(-1))
        signals["margin"].append(1 - (best[..., 0] - best[..., 1]))
        before, quiet = now, change
    return torch.stack(nats), {name: torch.stack(found) for name, found in signals.items()}


def frontier(nats: Tensor, signal: Tensor) -> list[tuple[float, float]]:
    """Of losses (r, tokens): (mean iterations, mean loss) where each token stops at the first r at which the
    signal is below a threshold, over thresholds."""
    found, flat = [], signal[:-1].flatten()
    for threshold in torch.quantile(flat[flat.isfinite()][::7], torch.linspace(0, 1, 101)):
        stops = signal < threshold
        stops[-1] = True
        r = stops.byte().argmax(0)
        found.append((float(r.double().mean()) + 1, float(nats.gather(0, r[None]).mean())))
    return found


def oracle(nats: Tensor) -> list[tuple[float, float]]:
    """The same of one who knows all losses, and pays a price for an iteration."""
    found, cost = [], torch.arange(len(nats), dtype=nats.dtype)[:, None]
    for price in torch.logspace(-4, 0, 101):
        r = (nats + price * cost).argmin(0)
        found.append((float(r.double().mean()) + 1, float(nats.gather(0, r[None]).mean())))
    return found


def at_mean(points: list[tuple[float, float]], mean: float) -> float | None:
    """The loss at a mean number of iterations, between the two nearest points; None beyond them."""
    points = sorted(points)
    iters, losses = zip(*points)
    return round(float(np.interp(mean, iters, losses)), 5) if iters[0] <= mean <= iters[-1] else None


def measure(args) -> dict:
    model = load_model(args.ckpt).eval()
    shards = Shards(args.data or model.meta["data"], "val", model.config.block_size)
    n = min(args.tokens // shards.block_size, shards.n_windows)
    check(n > 0, f"--tokens={args.tokens} is less than one window of {shards.block_size}")
    chosen = np.arange(n) * shards.n_windows // n
    batches = [shards.batch(chosen[first : first + BATCH]) for first in range(0, n, BATCH)]
    result = {"ckpt": args.ckpt, "rule": model.config.rule, "trained_iters": model.config.iters}
    result |= {"data": str(shards.folder), "tokens": n * shards.block_size}

    losses, ran = window_losses(model, shards, [*FIXED, *EXITS], n, bar="full")
    columns = zip([*FIXED, *EXITS], losses.numpy().T, ran.mean(0).tolist())
    result["full"] = {str(name): entry(loss, mean_iters) for name, loss, mean_iters in columns}
    result["last"] = {str(name): read_by_token(model, batches, name) for name in [*FIXED, *EXITS]}

    result["tasks"] = {}
    tokenizer, columns = get_tokenizer(model.meta["tokenizer"]), [*FIXED, *EXITS]
    examples = load_tasks(BUILT_IN, shards.folder, None, shards.block_size, args.limit)
    for name in examples:
        scores = run_task(model, tokenizer, name, examples[name], columns, bootstrap_iters=0)["iters"]
        result["tasks"][name] = {
            column: {
                "acc": round(score["acc"], 5),
                "stderr": round(score["acc_stderr"], 5),
                "iters": round(score["mean_iters"], 3),
            }
            for column, score in scores.items()
        }

    looks = [look(model, x[i : i + 16], y[i : i + 16]) for x, y in batches for i in range(0, len(x), 16)]
    nats = torch.cat([nats for nats, _ in looks], 1).flatten(1)
    points = {}
    for name in looks[0][1]:
        points[name] = frontier(nats, torch.cat([signals[name] for _, signals in looks], 1).flatten(1))
    points["oracle"] = oracle(nats)
    result["signals"] = {
        name: {str(mean): at_mean(found, mean) for mean in (1.5, 2, 2.5, 3, 4)}
        for name, found in points.items()
    }
    return {**result, **train.versions(torch.device("cpu"))}


def print_table(folder: Path):
    for found in read("exits", folder):
        print(f"\n{found['ckpt']}, {found['data']}, {found['tokens']} tokens\n")
        print("| cache | " + " | ".join([f"r={r}" for r in FIXED] + EXITS))
        print("|---" * (1 + len(FIXED) + len(EXITS)) + "|")
        for cache in ("full", "last"):
            cells = [f"{found[cache][str(r)]['loss']:.4f}" for r in FIXED]
            for name in EXITS:
                cell = found[cache][name]
                cells.append(f"{cell['loss']:.4f} at {cell['iters']:.2f}")
            print(f"| {cache} | " + " | ".join(cells) + " |")
        for task, scores in found.get("tasks", {}).items():
            cells = [f"{100 * scores[str(r)]['acc']:.1f}" for r in FIXED]
            cells += [f"{100 * scores[name]['acc']:.1f} at {scores[name]['iters']:.2f}" for name in EXITS]
            print(f"| {task}, acc in % | " + " | ".join(cells) + " |")
        print("\n| signal, loss at a mean of | 1.5 | 2 | 2.5 | 3 | 4 |")
        print("|---" * 6 + "|")
        for name, losses in found["signals"].items():
            print(
                f"| {name} | " + " | ".join("" if v is None else f"{v:.4f}" for v in losses.values()) + " |"
            )


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.exits", description=__doc__)
    parser.add_argument("--ckpt", help="a run of train.py")
    parser.add_argument("--data", help="folder of shards (default: the run's)")
    parser.add_argument("--tokens", type=int, default=2**17, help="of the validation split (131072)")
    parser.add_argument("--limit", type=int, default=2000, help="examples of each task (2000)")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    if args.ckpt:
        append(
            "exits",
            {"command": f"python -m experiments.exits {shlex.join(argv)}", **measure(args)},
            args.results,
        )
    print_table(args.results)


if __name__ == "__main__":
    cli(main)
