"""Which blocks to repeat? Every way to cut an untouched Std model into Head, Body and Tail, run at r = 2.

    python -m experiments.study --row std_deep --seed 1                   # six blocks, trained at r = 1
    python -m experiments.partition --ckpt out/study/std_deep-1           # -> results/partition.jsonl

The paper leaves open how to choose the partition. At r = 1 every cut is the same function; what differs is
how much validation loss a second iteration costs a model that was never trained for it.
"""

import shlex
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import load_model
from config import ArgumentParser, cli
from data import Shards
from eval_icl import evaluate_loss
from experiments import RESULTS, append


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.partition", description=__doc__)
    parser.add_argument("--ckpt", required=True, help="a model trained at r = 1")
    parser.add_argument("--rules", default="abbie_d,recall,abbie_c")
    parser.add_argument("--iters", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2**15, help="of the validation split (32768)")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    model = load_model(args.ckpt)
    n, T = model.config.n_blocks, model.config.block_size
    shards = Shards(model.meta["data"], "val", T)

    def loss(iters, **cut):
        model = load_model(args.ckpt, **cut).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return evaluate_loss(model, shards, [iters], n_windows=args.tokens // T)[iters]

    untouched, rows, cuts = loss(1), [], []
    for rule in args.rules.split(","):
        for body in range(1, n + 1):
            for head in range(n - body + 1):
                blocks = {"n_head_blocks": head, "n_body_blocks": body, "n_tail_blocks": n - head - body}
                cuts.append({"rule": rule, **blocks})
    for cut in tqdm(cuts, unit="cut"):
        rows.append({**cut, "cost": round(loss(args.iters, **cut) - untouched, 5)})
    rows.sort(key=lambda row: row["cost"])
    record = {
        "command": "python -m experiments.partition " + shlex.join(argv),
        "steps": model.meta["step"],
        "val_tokens": args.tokens // T * T,
        "iters": args.iters,
        "loss_at_1": untouched,
        "cuts": rows,
    }
    append("partition", record, args.results)
    for row in rows:
        cut = "+".join(str(row[f"n_{part}_blocks"]) for part in ("head", "body", "tail"))
        print(f"{row['cost']:+.4f}  {cut}  {row['rule']}")


if __name__ == "__main__":
    cli(main)
