"""The study: every rule trained on the same batches, read at many r, beside baselines of equal FLOPs.

    python -m experiments.study                                # the table of all records
    python -m experiments.study --row abbie_d --seed 1         # train a row, add its record
    python -m experiments.study --row std_8k --out out/again --results out/again/results

A row is flags of train.py, and any further flag is one too. The seed fixes the initial weights, the batches
and the draws of r, so rows of one seed and length see the same batches. The same command continues an
interrupted row.
"""

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import eval_icl
import prepare_data
import train
from checkpoint import load_model
from config import ArgumentParser, choose_device, cli, load_config, nearest
from data import Shards
from experiments import RESULTS, ROOT, append, read
from model import AbbIE, check

# The recipe of config/abbie_tiny.py, written out; dtype too, so that a row means the same on every machine.
# Loss is read once, at the end.
SHARED = """--block_size=256 --n_embd=128 --ffn_dim=352 --n_attn_heads=2 --n_head_blocks=1 --n_body_blocks=2
    --n_tail_blocks=1 --lr=1e-3 --warmup_steps=100 --decay_frac=0.5 --tokens_per_step=1024 --micro_batch=4
    --max_steps=2000 --dtype=bfloat16 --eval_every=0 --eval_iters=1,2,3,4,6,8,16,32 --eval_tokens=262144
    --save_every=1000"""
STD, RECALL = "--iters=1", "--rule=recall"
RANDOM_R = "--rule=recall --iters=poisson:6 --backprop_iters=3"  # r is drawn per step
SIX, TEN = "--iters=1 --n_body_blocks=4", "--iters=1 --n_body_blocks=8"  # blocks in all
WIDE = "--n_embd=256 --ffn_dim=704 --n_attn_heads=4"
LONG = "--dtype=float32 --max_steps"
QUARTER = "--data=data/stdlib_4th --dtype=float32"
BOOKS = "--data=data/books_bytes --dtype=float32"


class Row(NamedTuple):
    title: str
    r: int  # at which it is compared with others: that of its training, or its rounded mean
    flags: str
    std: str  # the plain model of as many tokens that it is compared with


ROWS = {
    # 2000 steps
    "std": Row("Std", 1, STD, "std"),
    "std_deep": Row("Std of six blocks", 1, SIX, "std"),
    "abbie_d": Row("`abbie_d`", 2, "", "std"),
    "recall": Row("`recall`", 2, RECALL, "std"),
    "abbie_c": Row("`abbie_c`", 2, "--rule=abbie_c", "std"),
    "zero_pt": Row("`zero_pt`", 2, "--rule=zero_pt", "std"),
    "abbie_d_literal": Row("`abbie_d_literal`", 2, "--rule=abbie_d_literal", "std"),
    "std_wide": Row("Std, twice as wide", 1, f"{STD} {WIDE}", "std_wide"),
    "abbie_d_wide": Row("`abbie_d`, twice as wide", 2, WIDE, "std_wide"),
    "recall_wide": Row("`recall`, twice as wide", 2, f"{RECALL} {WIDE}", "std_wide"),
    # 8000 steps, or the FLOPs of a row of 8000 steps; each at its best learning rate of three or more, but
    # abbie_d at the only one that was tried
    "std_8k": Row("Std", 1, f"{STD} {LONG}=8000", "std_8k"),
    "abbie_d_2_8k": Row("`abbie_d`", 2, f"{LONG}=8000", "std_8k"),
    "recall_2_8k": Row("`recall`", 2, f"{RECALL} {LONG}=8000", "std_8k"),
    "std_six_5e-4": Row("deeper: Std of six blocks", 1, f"{SIX} {LONG}=8000 --lr=5e-4", "std_8k"),
    "std_more_2_2e-3": Row("longer: Std, 1.48x tokens", 1, f"{STD} {LONG}=11840 --lr=2e-3", "std_8k"),
    "recall_p6b3_2e-3": Row("`recall`, r drawn per step", 6, f"{RANDOM_R} {LONG}=8000 --lr=2e-3", "std_8k"),
    "std_ten": Row("deeper: Std of ten blocks", 1, f"{TEN} {LONG}=8000", "std_8k"),
    "std_more_2e-3": Row("longer: Std, 2.4x tokens", 1, f"{STD} {LONG}=19000 --lr=2e-3", "std_8k"),
    "abbie_d_p6b3": Row(
        "`abbie_d`, r drawn per step", 6, f"--iters=poisson:6 --backprop_iters=3 {LONG}=8000", "std_8k"
    ),
    # the same at 1e-3, and with gradients through other numbers of iterations (0: all)
    "recall_p6b3": Row("`recall`, r drawn, lr 1e-3", 6, f"{RANDOM_R} {LONG}=8000", "std_8k"),
    "std_more": Row("longer: Std, 2.4x tokens, lr 1e-3", 1, f"{STD} {LONG}=19000", "std_8k"),
    "recall_p6b2": Row("gradients of 2", 6, f"{RANDOM_R} {LONG}=8000 --backprop_iters=2", "std_8k"),
    "recall_p6b1": Row("gradients of 1", 6, f"{RANDOM_R} {LONG}=8000 --backprop_iters=1", "std_8k"),
    "recall_p6": Row("all gradients", 6, f"{RANDOM_R} {LONG}=8000 --backprop_iters=0", "std_8k"),
    # on a quarter of the text
    "std_quarter": Row("Std, 1/4 text", 1, f"{STD} {QUARTER} --max_steps=8000 --lr=2e-3", "std_quarter"),
    "recall_quarter": Row(
        "`recall`, r drawn, 1/4 text", 6, f"{RANDOM_R} {QUARTER} --max_steps=8000 --lr=2e-3", "std_quarter"
    ),
    "std_ten_quarter": Row("deeper, 1/4 text", 1, f"{TEN} {QUARTER} --max_steps=8000", "std_quarter"),
    "std_more_quarter": Row(
        "longer, 1/4 text", 1, f"{STD} {QUARTER} --max_steps=19000 --lr=2e-3", "std_quarter"
    ),
    # twice and four times as long
    "std_16k_2e-3": Row("Std", 1, f"{STD} {LONG}=16000 --lr=2e-3", "std_16k_2e-3"),
    "recall_p6b3_16k_2e-3": Row(
        "`recall`, r drawn per step", 6, f"{RANDOM_R} {LONG}=16000 --lr=2e-3", "std_16k_2e-3"
    ),
    "std_ten_16k": Row("deeper: Std of ten blocks", 1, f"{TEN} {LONG}=16000", "std_16k_2e-3"),
    "std_more_16k_2e-3": Row("longer: Std, 2.4x tokens", 1, f"{STD} {LONG}=38000 --lr=2e-3", "std_16k_2e-3"),
    "std_32k_2e-3": Row("Std", 1, f"{STD} {LONG}=32000 --lr=2e-3", "std_32k_2e-3"),
    "recall_p6b3_32k_2e-3": Row(
        "`recall`, r drawn per step", 6, f"{RANDOM_R} {LONG}=32000 --lr=2e-3", "std_32k_2e-3"
    ),
    "std_more_32k_2e-3": Row("longer: Std, 2.4x tokens", 1, f"{STD} {LONG}=76000 --lr=2e-3", "std_32k_2e-3"),
    # English
    "std_books": Row("Std, books", 1, f"{STD} {BOOKS} --max_steps=8000", "std_books"),
    "recall_books": Row("`recall`, r drawn, books", 6, f"{RANDOM_R} {BOOKS} --max_steps=8000", "std_books"),
    "std_more_books": Row(
        "longer: Std, 2.4x tokens, books", 1, f"{STD} {BOOKS} --max_steps=19000", "std_books"
    ),
}

# --------------------------------------------------------------------------------------------------- a record


def write_quarter(folder: str):
    """Every 4th training document of data/stdlib, and its whole validation split."""
    with TemporaryDirectory() as texts:
        for split, every in (("train", 4), ("val", 1)):
            with open(f"{texts}/{split}.jsonl", "w") as file:
                shard = np.fromfile(f"data/stdlib/{split}_00000.bin", "<u2")
                documents = np.split(shard, np.flatnonzero(shard == 256))  # each after the first with its 256
                for tokens in documents[:-1:every]:
                    text = bytes(tokens[tokens < 256].tolist()).decode()
                    file.write(json.dumps({"text": text}) + "\n")
        inputs = ["--input", f"{texts}/train.jsonl", "--val_input", f"{texts}/val.jsonl"]
        prepare_data.main(["text", *inputs, "--tokenizer", "bytes", "--out", folder])


@torch.no_grad()
def changes(model: AbbIE, idx: Tensor, iters: int) -> dict[str, dict]:
    """idx (B, T) -> {r: {"change": mean over tokens of |u_r - u_(r-1)| / |u_(r-1)|}} for r = 2 .. iters. u is
    what the Tail reads, brought to unit RMS; the Tail has to have a block."""
    states = []
    hook = model.tail[0].register_forward_pre_hook(
        lambda _, args: states.append(F.rms_norm(args[0].float(), args[0].shape[-1:]))
    )
    for _ in model.states_at(idx, list(range(1, iters + 1))):
        pass
    hook.remove()
    result = {}
    for r, (before, now) in enumerate(zip(states, states[1:]), 2):
        result[str(r)] = {"change": ((now - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()}
    return result


def run_row(name: str, seed: int, args, flags: list[str]):
    """Train (or go on), evaluate, and append the record."""
    row, run = ROWS[name], args.out / f"{name}-{seed}"
    argv = [str(ROOT / "config/abbie_tiny.py"), *SHARED.split(), *row.flags.split()]
    argv += [f"--seed={seed}", f"--out_dir={run}", *flags]
    config = load_config(argv)
    if config.data == "data/stdlib_4th" and not Path(config.data, "meta.json").exists():
        write_quarter(config.data)
    train.main(argv)
    tasks = ["--tasks=cloze,lastword", f"--limit={args.limit}", "--iters=1,2,4,8"]
    eval_icl.main([f"--ckpt={run}", *tasks, f"--device={config.device}", f"--out={run}/tasks.json"])

    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last_step = [line for line in log if "flops" in line][-1]
    losses = [line["val_loss"] for line in log if len(line.get("val_loss", "")) > 1][-1]  # of several r

    device = choose_device(config.device)
    model = load_model(run, device=device).eval()
    shards = Shards(config.data, "val", config.block_size)
    n = min(8, shards.n_windows)
    idx = shards.batch([i * shards.n_windows // n for i in range(n)])[0].to(device)
    torch.manual_seed(0)
    untrained = AbbIE(model.config).to(device).eval()
    record = {
        "command": f"python -m experiments.study --row {name} --seed {seed}",
        "row": name, "seed": seed, "flags": [*row.flags.split(), *flags], "n_params": model.n_params(),
        "steps": last_step["step"] + 1, "flops": last_step["flops"],
        "val_tokens": min(config.eval_tokens // config.block_size, shards.n_windows) * config.block_size,
        "val_loss": {r: round(loss, 5) for r, loss in losses.items()},
        "tasks": json.loads((run / "tasks.json").read_text())["tasks"],
        "convergence": {"trained": changes(model, idx, 16), "untrained": changes(untrained, idx, 16)},
        **train.versions(device), "dtype": config.dtype,
    }  # fmt: skip
    append("study", record, args.results)


# -------------------------------------------------------------------------------------------------- the table


def runs_by_row(records: list[dict]) -> dict[str, dict[int, dict]]:
    """{row: {seed: its record}}: the rows above in their order, then those that are no longer trained."""
    rows = {name: {} for name in ROWS}
    for record in records:
        rows.setdefault(record["row"], {})[record["seed"]] = record
    return {name: seeds for name, seeds in rows.items() if seeds}


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """'1.437'; of several '1.437 ± 0.004', the standard deviation; '' of none."""
    if not values:
        return ""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(records: list[dict]) -> list[str]:
    """Lines of Markdown. FLOPs are those of training, the row's Std = 1; `less Std` is the loss at the row's
    own r less its Std's at r = 1, seed by seed."""
    columns, rows = ("1", "2", "4", "6", "8", "32"), runs_by_row(records)
    titles = ["row", "", "steps", "seeds", "FLOPs", *(f"r={r}" for r in columns), "less Std", "cloze, %"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, seeds in rows.items():
        runs = list(seeds.values())
        row = ROWS.get(name, Row("no longer trained", 0, "", ""))
        std = rows.get(row.std, {})
        flops = f"{runs[0]['flops'] / next(iter(std.values()))['flops']:.2f}" if std else ""
        cells = [f"`{name}`", row.title, str(runs[0]["steps"]), str(len(runs)), flops]
        cells += [spread([run["val_loss"][r] for run in runs if r in run["val_loss"]]) for r in columns]
        gaps = []
        for seed in seeds.keys() & std.keys() if name != row.std else ():
            gaps.append(seeds[seed]["val_loss"][str(row.r)] - std[seed]["val_loss"]["1"])
        cells.append(spread(gaps, sign="+"))
        r = str(min(row.r, 4)) if row.r else "2"
        accuracies = [run["tasks"]["cloze"]["iters"] for run in runs]
        cells.append(spread([100 * task[r]["acc"] for task in accuracies if r in task], digits=1))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.study", description=__doc__)
    parser.add_argument("--row", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, default=2000, help="examples of each task (2000)")
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="folder of the runs (out/study)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    args, flags = parser.parse_known_args(argv)
    if not args.row:
        check(not flags, f"{' '.join(flags)}: flags of train.py need --row ROW")
        print("\n".join(table(read("study", args.results))))
        return
    if args.row not in ROWS:
        check(False, f"no row {args.row}{nearest(args.row, ROWS)}\nrows: {', '.join(ROWS)}")
    if (args.row, args.seed) in [(run["row"], run["seed"]) for run in read("study", args.results)]:
        print(f"{args.row}, seed {args.seed}, is in {args.results} already: --results FOLDER makes another")
        return
    run_row(args.row, args.seed, args, flags)


if __name__ == "__main__":
    cli(main)
