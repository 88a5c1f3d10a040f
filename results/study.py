"""The study behind the README's results: every rule trained on the same batches, read at many r.

    python results/study.py --row abbie_d --seed 1    # one row: train, evaluate, add to results/study.json
    python results/study.py --all                     # every row and seed that results/study.json lacks
    python results/study.py --gpu --all               # 52M parameters, one GPU: results/study_gpu.json
    python results/study.py --table                   # what is there, as tables

A row is a config and flags of train.py; what is not a config key is one of the two subclasses below. The
same command continues an interrupted row; a row that is in the results is not run again. --gpu reads
data/books and the tasks in data/icl (REPRODUCE.md says how to make them).
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import eval_icl  # noqa: E402
import train  # noqa: E402
from config import ArgumentParser, cli, load_config, nearest, parse_list  # noqa: E402
from model import AbbIE, UserError  # noqa: E402
from prepare_data import Shards  # noqa: E402


class RawTail(AbbIE):
    """abbie_d whose Tail reads the raw state 2^(r-1) u: what differs from abbie_d is scale alone."""

    def iterate(self, x, h, k, *args, **kwargs):
        u, x = super().iterate(x, h, k, *args, **kwargs)
        return u * 2.0 ** k, x


class HalfTail(AbbIE):
    """abbie_d whose Tail starts from output projections of half the size, so with smaller updates."""

    @torch.no_grad()
    def init_weights(self):
        super().init_weights()
        for block in self.tail:
            block.attn.proj.weight.mul_(0.5)
            block.mlp.down.weight.mul_(0.5)


VARIANTS = {"abbie_d_raw_tail": RawTail, "abbie_d_half_tail": HalfTail}

WIDE = ["--n_embd=256", "--ffn_dim=704", "--n_attn_heads=4"]  # 3.3M parameters
LONG, LONGER = ["--max_steps=4000"], ["--max_steps=8000"]
STD, DEEP = ["--iters=1"], ["--iters=1", "--n_body_blocks=4"]  # DEEP: the training FLOPs of r = 2
RECALL = ["--rule=recall"]
# row: (rule and training r, flags, seeds in the small study), the most telling first
ROWS = {
    "std": ("Std, 1", STD, 3),
    "std_deep": ("Std of six blocks, 1", DEEP, 3),
    "abbie_d": ("`abbie_d`, 2", [], 3),
    "recall": ("`recall`, 2", RECALL, 3),
    "abbie_c": ("`abbie_c`, 2", ["--rule=abbie_c"], 3),
    "zero_pt": ("`zero_pt`, 2", ["--rule=zero_pt"], 1),
    "abbie_d_literal": ("`abbie_d_literal`, 2", ["--rule=abbie_d_literal"], 1),
    "abbie_d_1to3": ("`abbie_d`, 1-3", ["--iters=1-3"], 1),
    "recall_1to3": ("`recall`, 1-3", [*RECALL, "--iters=1-3"], 1),
    "recall_1to7": ("`recall`, 1-7", [*RECALL, "--iters=1-7"], 1),
    "abbie_d_raw_tail": ("`abbie_d`, raw state to the Tail, 2", [], 1),
    "abbie_d_half_tail": ("`abbie_d`, half-sized Tail projections, 2", [], 1),
    "abbie_d_body_1": ("`abbie_d` cut 2+1+1, 2", ["--n_head_blocks=2", "--n_body_blocks=1"], 1),
    "abbie_d_body_4": ("`abbie_d` cut 0+4+0, 2",
                       ["--n_head_blocks=0", "--n_body_blocks=4", "--n_tail_blocks=0"], 1),
    "std_long": ("Std, 1, twice as long", [*STD, *LONG], 1),
    "abbie_d_long": ("`abbie_d`, 2, twice as long", LONG, 1),
    "recall_long": ("`recall`, 2, twice as long", [*RECALL, *LONG], 1),
    "std_longer": ("Std, 1, four times as long", [*STD, *LONGER], 1),
    "std_deep_longer": ("Std of six blocks, 1, four times as long", [*DEEP, *LONGER], 1),
    "abbie_d_longer": ("`abbie_d`, 2, four times as long", LONGER, 1),
    "recall_longer": ("`recall`, 2, four times as long", [*RECALL, *LONGER], 1),
    "std_wide": ("Std, 1, twice as wide", [*STD, *WIDE], 3),
    "std_deep_wide": ("Std of six blocks, 1, twice as wide", [*DEEP, *WIDE], 1),
    "abbie_d_wide": ("`abbie_d`, 2, twice as wide", WIDE, 3),
    "recall_wide": ("`recall`, 2, twice as wide", [*RECALL, *WIDE], 3),
}
SIZES = ("_longer", "_long", "_wide")  # ends of names: such a row is compared with the Std of its own

# Both studies hold everything fixed but the row; dtype too, so that a row means the same on every machine.
SMALL = ["config/abbie_tiny.py", "--block_size=256", "--n_embd=128", "--ffn_dim=352", "--n_attn_heads=2",
         "--n_head_blocks=1", "--n_body_blocks=2", "--n_tail_blocks=1", "--dtype=bfloat16", "--lr=1e-3",
         "--warmup_steps=100", "--decay_frac=0.5", "--tokens_per_step=1024", "--micro_batch=4",
         "--max_steps=2000", "--eval_every=400", "--eval_iters=1,2", "--eval_tokens=32768",
         "--save_every=400"]
SMALL_ITERS, SHOWN_ITERS, SMALL_TASKS = "1,2,3,4,6,8,16,32", "1,2,3,4,8,32", "cloze,lastword"
GPU = ["config/abbie_124m.py", "--data=data/books", "--block_size=512", "--n_embd=512", "--ffn_dim=1408",
       "--n_attn_heads=8", "--n_head_blocks=2", "--n_body_blocks=4", "--n_tail_blocks=2", "--dtype=bfloat16",
       "--tokens_per_step=65536", "--micro_batch=64", "--max_steps=2400", "--lr=1e-3", "--eval_every=300",
       "--eval_iters=1,2,4", "--save_every=300"]
GPU_ITERS, GPU_TASKS = "1,2,3,4,6,8", "lambada_openai,arc_easy,piqa,commonsense_qa,hellaswag"
GPU_ROWS = ["std", "abbie_d", "recall", "zero_pt", "abbie_c"]
TASK_ITERS, VAL_TOKENS = "1,2,4,8", 2 ** 16


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def run_row(row: str, seed: int, small: bool, path: Path, out: str, data_dir: str, flags: list[str]):
    """Train (or go on), evaluate, and add {"row-seed": record} to the results."""
    name = f"{row}-{seed}"
    argv = [*(SMALL if small else GPU), *ROWS[row][1], f"--seed={seed}", f"--out_dir={out}/{name}", *flags]
    config, iters = load_config(argv), SMALL_ITERS if small else GPU_ITERS
    train.AbbIE = eval_icl.AbbIE = VARIANTS.get(row, AbbIE)
    train.main(argv)

    device = train.choose_device(config, 0)
    model = train.AbbIE.from_checkpoint(config.out_dir, device=str(device)).eval()
    shards = Shards(config.data, "val", config.block_size)
    n_windows = min(VAL_TOKENS // config.block_size, shards.n_windows)
    with torch.autocast(device.type, dtype=torch.bfloat16):  # as in training
        losses = eval_icl.evaluate_loss(model, shards, parse_list(iters, "iters"), n_windows)
    log = [json.loads(line) for line in open(Path(config.out_dir) / "log.jsonl")]
    header, steps = next(line for line in log if "config" in line), [line for line in log if "loss" in line]
    flops = {line["step"]: line["flops"] for line in steps}  # after that step
    with tempfile.TemporaryDirectory() as temp:
        ask = ["--ckpt", config.out_dir, "--out", f"{temp}/found.json"]
        tasks = SMALL_TASKS if small else GPU_TASKS
        whole = [] if small else ["--ppl"]  # perplexity of the whole validation split, with its error
        eval_icl.main([*ask, "--iters", TASK_ITERS, "--tasks", tasks, "--data_dir", data_dir, *whole])
        found = read(Path(temp, "found.json"))
        eval_icl.main([*ask, "--iters", "16", "--convergence"])
        found["convergence"] = read(Path(temp, "found.json"))["convergence"]
    record = {
        "command": f"python results/study.py {'' if small else '--gpu '}--row {row} --seed {seed}",
        "row": row, "seed": seed, "flags": ROWS[row][1] + flags, "n_params": header["n_params"],
        "steps": len(steps), "tokens": len(steps) * config.tokens_per_step, "flops": steps[-1]["flops"],
        "val_tokens": n_windows * config.block_size,
        "val_loss": {str(r): round(loss, 5) for r, loss in losses.items()},
        "curve": [{"step": line["step"], "flops": flops.get(line["step"] - 1, 0),
                   "val_loss": line["val_loss"]} for line in log if "val_loss" in line],
        **{key: found[key] for key in ("tasks", "ppl", "convergence") if key in found},
        **{key: header[key] for key in ("device", "dtype", "torch", "commit")}}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({**read(path), name: record}, indent=1))
    os.replace(temporary, path)


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """'1.437', or '1.437 ± 0.004' (the standard deviation) for several."""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def accuracy(found: list[dict], r: str) -> str:
    """A task at one r over seeds; of one seed with its standard error, and the p of McNemar's test of whether
    it differs from the trained r."""
    scores = [task["iters"][r] for task in found]
    if len(found) > 1:
        return spread([100 * score["acc"] for score in scores], 1)
    text = f"{100 * scores[0]['acc']:.1f} ± {100 * scores[0]['acc_stderr']:.1f}"
    test = found[0]["paired"].get(r, {}).get("acc")
    return text + (f" (p {test['p']:.2g})" if test else "")


def against_std(row: str, results: dict) -> list[float]:
    """Validation loss less that of the Std of the same size and seed, each at the r that it was trained at;
    a seed has the same batches in both, and at equal shape the same initial weights."""
    std = "std" + next((size for size in SIZES if row.endswith(size)), "")
    if row == std:
        return []
    r = str(load_config([SMALL[0], *ROWS[row][1]]).mean_iters)
    runs = [run for run in results.values() if run["row"] == row]
    return [run["val_loss"][r] - results[f"{std}-{run['seed']}"]["val_loss"]["1"] for run in runs
            if f"{std}-{run['seed']}" in results]


def table(path: Path, small: bool):
    """Markdown tables: loss at every r, the tasks, and how the state changes."""
    results, iters = read(path), (SHOWN_ITERS if small else GPU_ITERS).split(",")
    rows = {row: [run for run in results.values() if run["row"] == row] for row in ROWS}
    rows = {row: runs for row, runs in rows.items() if runs}
    print(f"| rule, trained at r | seeds | FLOPs | {' | '.join(f'r={r}' for r in iters)} | against Std |")
    print("|---" * (len(iters) + 4) + "|")
    for row, runs in rows.items():
        cells = [spread([run["val_loss"][r] for run in runs]) for r in iters]
        gaps, flops = against_std(row, results), runs[0]["flops"] / rows.get("std", runs)[0]["flops"]
        cells.append(spread(gaps, sign="+") if gaps else "")
        print(f"| {ROWS[row][0]} | {len(runs)} | {flops:.2f} | {' | '.join(cells)} |")
    for task in dict.fromkeys(name for runs in rows.values() for name in runs[0]["tasks"]):
        print(f"\n{task}, acc in % | " + " | ".join(f"r={r}" for r in TASK_ITERS.split(",")))
        for row, runs in rows.items():
            found = [run["tasks"][task] for run in runs]
            print(f"`{row}` | " + " | ".join(accuracy(found, r) for r in TASK_ITERS.split(",")))
    if not small:
        print("\nperplexity, whole validation split | " + " | ".join(f"r={r}" for r in TASK_ITERS.split(",")))
        for row, runs in rows.items():
            found = [runs[0]["ppl"]["iters"][r] for r in TASK_ITERS.split(",")]
            cells = [f"{f['perplexity']:.2f} ± {f['perplexity'] * f['loss_stderr']:.2f}" for f in found]
            print(f"`{row}` | " + " | ".join(cells))
    print("\nrelative change of the Tail's input at iteration r | 2 | 4 | 8 | 16 | untrained: 2 | 4 | 8 | 16")
    for row, runs in rows.items():
        cells = [statistics.mean(run["convergence"][which][r]["change"] for run in runs)
                 for which in ("trained", "untrained") for r in ("2", "4", "8", "16")]
        print(f"`{row}` | " + " | ".join(f"{cell:.1e}" for cell in cells))


def main(argv: list[str]):
    parser = ArgumentParser(prog="results/study.py", description=__doc__)
    parser.add_argument("--row", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="every row and seed that the results lack")
    parser.add_argument("--gpu", action="store_true", help="the study at 52M parameters on data/books")
    parser.add_argument("--data_dir", default="data/icl", help="of the zero-shot tasks (data/icl)")
    parser.add_argument("--out", default="out/study", help="folder of the runs (out/study)")
    parser.add_argument("--results", help="results/study.json or results/study_gpu.json")
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--flags", default="", help="more flags for train.py: --flags='--max_steps=10'")
    args = parser.parse_args(argv)
    path = Path(args.results or ROOT / "results" / ("study_gpu.json" if args.gpu else "study.json"))
    rows = GPU_ROWS if args.gpu else list(ROWS)
    if args.row and args.row not in ROWS:
        raise UserError(f"no row {args.row}{nearest(args.row, ROWS)}\nrows: {', '.join(ROWS)}")
    todo = [(row, seed) for seed in (1, 2, 3) for row in rows if seed <= (1 if args.gpu else ROWS[row][2])]
    for row, seed in [(args.row, args.seed)] if args.row else todo if args.all else []:
        if f"{row}-{seed}" not in read(path):
            out = args.out + ("_gpu" if args.gpu else "")
            run_row(row, seed, not args.gpu, path, out, args.data_dir, args.flags.split())
    if args.table or args.row or args.all:
        table(path, not args.gpu)
    else:
        raise UserError("say what to run: --row ROW, --all, or --table\npython results/study.py --help")


if __name__ == "__main__":
    cli(main)
