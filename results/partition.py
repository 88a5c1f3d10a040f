"""Which blocks to repeat? Every way to cut an untouched Std model into Head, Body and Tail, run at r = 2.

    python results/study.py --row std_deep --seed 1                 # the model: six blocks, trained at r = 1
    python results/partition.py --ckpt out/study/std_deep-1         # -> results/partition.json

The paper leaves open how to choose the partition. At r = 1 every cut is the same function; what differs is
how much validation loss a second iteration costs a model that was never trained for it.
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from config import ArgumentParser, cli  # noqa: E402
from eval_icl import evaluate_loss  # noqa: E402
from model import AbbIE  # noqa: E402
from prepare_data import Shards  # noqa: E402


def main(argv: list[str]):
    parser = ArgumentParser(prog="results/partition.py", description=__doc__)
    parser.add_argument("--ckpt", required=True, help="a model trained at r = 1")
    parser.add_argument("--rules", default="abbie_d,recall,abbie_c")
    parser.add_argument("--iters", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2 ** 15, help="of the validation split (32768)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "partition.json")
    args = parser.parse_args(argv)
    model = AbbIE.from_checkpoint(args.ckpt)
    n, T = model.config.n_blocks, model.config.block_size
    shards = Shards(model.meta["data"], "val", T)

    def loss(iters, **cut):
        model = AbbIE.from_checkpoint(args.ckpt, **cut).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return evaluate_loss(model, shards, [iters], n_windows=args.tokens // T)[iters]

    untouched = loss(1)
    cuts = [(rule, head, body) for rule in args.rules.split(",") for body in range(1, n + 1)
            for head in range(n - body + 1)]
    rows = []
    for rule, head, body in tqdm(cuts, unit="cut"):
        cut = {"n_head_blocks": head, "n_body_blocks": body, "n_tail_blocks": n - head - body}
        cost = loss(args.iters, rule=rule, **cut) - untouched
        rows.append({"rule": rule, **cut, "cost": round(cost, 5)})
    rows.sort(key=lambda row: row["cost"])
    found = {"command": "python results/partition.py " + " ".join(argv), "steps": model.meta["step"],
             "val_tokens": args.tokens // T * T, "iters": args.iters, "loss_at_1": untouched, "cuts": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        cut = "+".join(str(row[f"n_{part}_blocks"]) for part in ("head", "body", "tail"))
        print(f"{row['cost']:+.4f}  {cut}  {row['rule']}")


if __name__ == "__main__":
    cli(main)
