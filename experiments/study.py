"""The study behind the README's results: every rule trained on the same batches, read at many r.

    python -m experiments.study --row abbie_d --seed 1                 # one row -> results/study.jsonl
    python -m experiments.study --row std --seed 1 --evaluate FOLDER   # a row that is trained already
    python -m experiments.study --all                                  # all rows and seeds that are missing
    python -m experiments.study --table                                # what is there, as tables
    python -m experiments.study --pair recall_p6b3,std_8k              # two rows -> study_pairs.jsonl
    python -m experiments.study --gpu --all                            # 52M parameters, on one GPU

The rows are those of experiments/rows.py. The same command continues an interrupted row; one that is in the
results is not run again, but --results FOLDER makes others. --gpu writes results/study_gpu.jsonl, and reads
data/books and the tasks in data/icl (REPRODUCE.md says how to make them).
"""

import json
import statistics
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import prepare_data
import train
from checkpoint import checkpoints, load_model
from config import ArgumentParser, choose_device, cli, load_config, nearest, parse_list
from data import Shards, documents, get_tokenizer
from eval_icl import mcnemar, mean_stderr, perplexity, run_tasks, window_losses
from experiments import RESULTS, append, read
from experiments.evaluation import convergence_of
from experiments.rows import GPU, OTHER_RATES, RATED, RATES, SMALL, THIN_DATA, Study
from model import AbbIE, check, parse_iters

TASK_ITERS, VAL_TOKENS = "1,2,4,8", 2**18  # r that tasks are read at; validation tokens

# -------------------------------------------------------------------------------------------- making a record


def write_thin_data(folder: str):
    """One of so many training documents of data/stdlib (THIN_DATA), and its whole validation split."""
    with TemporaryDirectory() as texts:
        for split, every in (("train", THIN_DATA[folder]), ("val", 1)):
            with open(f"{texts}/{split}.jsonl", "w") as file:
                for tokens in islice(documents("data/stdlib", split), 0, None, every):
                    file.write(json.dumps({"text": bytes(tokens.tolist()).decode()}) + "\n")
        inputs = ["--input", f"{texts}/train.jsonl", "--val_input", f"{texts}/val.jsonl"]
        prepare_data.main(["text", *inputs, "--out", folder])


def run_row(study: Study, name: str, seed: int, args):
    """Train (or go on, or take the run in --evaluate), evaluate, and add the record to the results."""
    row, run = study.rows[name], Path(args.evaluate or f"{args.out}/{study.name}/{name}-{seed}")
    joined = all("=" in flag for flag in args.flags.split())
    check(joined, f"--flags='{args.flags}': write --KEY=VALUE, with no space")
    argv = [*study.base, *row.flags, f"--seed={seed}", f"--out_dir={run}", *args.flags.split()]
    config = load_config(argv)
    if config.data in THIN_DATA and not Path(config.data, "meta.json").exists():
        write_thin_data(config.data)
    if row.start and not checkpoints(run):
        other, step = row.start
        argv.append(f"--resume={args.out}/{study.name}/{other}-{seed}/step_{step:08}")
    if not args.evaluate:
        train.main(argv, model_class=row.model_class)
    model = load_model(run, device=choose_device(config.device), model_class=row.model_class).eval()
    for flag in [*row.flags, *args.flags.split(), "--seed"]:
        key = flag[2:].partition("=")[0]
        asked, found = getattr(config, key), model.meta[key]
        check(asked == found, f"{run} is no run of {name}: {key} is {found!r} there, not {asked!r}")

    # Loss as it was trained, in bfloat16 or not, on the same windows for every row.
    shards, iters = Shards(config.data, "val", config.block_size), read_at(study.iters, config)
    n_windows = min(VAL_TOKENS // config.block_size, shards.n_windows)
    device = model.embed.weight.device.type
    autocast = partial(torch.autocast, device, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")
    losses, _ = window_losses(model, shards, iters, n_windows, autocast=autocast, bar="loss")
    losses = losses.numpy()
    windows = {str(r): [round(loss, 5) for loss in losses[:, i].tolist()] for i, r in enumerate(iters)}
    path = windows_file(args.out, study, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(windows))

    found = tasks_of(study, name, seed, model, args)
    if study is GPU:
        found["ppl"] = perplexity(model, shards, read_at(TASK_ITERS, config))
    log = [json.loads(line) for line in open(run / "log.jsonl")]
    header, steps = next(line for line in log if "config" in line), [line for line in log if "loss" in line]
    flops = {line["step"] + 1: line["flops"] for line in steps}  # spent before that step
    n_steps = steps[-1]["step"] + 1
    record = {
        "command": f"python -m experiments.study{' --gpu' * (study is GPU)} --row {name} --seed {seed}",
        "row": name, "seed": seed, "flags": row.flags + args.flags.split(), "n_params": header["n_params"],
        "steps": n_steps, "tokens": n_steps * config.tokens_per_step, "flops": steps[-1]["flops"],
        "val_tokens": losses.shape[0] * config.block_size,
        "val_loss": {str(r): round(float(losses[:, i].mean()), 5) for i, r in enumerate(iters)},
        "val_stderr": {str(r): round(mean_stderr(losses[:, i]), 5) for i, r in enumerate(iters)},
        "curve": [
            {"step": line["step"], "flops": flops.get(line["step"], 0), "val_loss": line["val_loss"]}
            for line in log if "val_loss" in line
        ],
        **found, "convergence": convergence_of(model, shards, 16, row.model_class),
        **{key: header[key] for key in ("device", "dtype", "torch", "commit")},
    }  # fmt: skip
    append(study.name, record, args.results)


def read_at(iters: str, config) -> list[int]:
    """A list of r, of which a Std is read at 1 and 2 only: its loss beyond is of no interest."""
    return [r for r in parse_list(iters, "iters") if r <= 2 or parse_iters(config.iters)[2] > 1]


def tasks_of(study: Study, name: str, seed: int, model: AbbIE, args) -> dict:
    """Score the tasks, and keep what pairs two rows, every example's scores, beside the losses of windows."""
    path = windows_file(args.out, study, name, seed).with_suffix(".samples")
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer, tasks = get_tokenizer(model.meta["tokenizer"]), study.tasks.split(",")
    how = {"data": model.meta["data"], "data_dir": args.data_dir, "limit": args.limit or study.limit}
    with open(path, "w") as log:
        return run_tasks(model, tokenizer, tasks, read_at(TASK_ITERS, model.config), log=log, **how)


def right_answers(study: Study, name: str, seed: int, args) -> dict[tuple[str, str], np.ndarray]:
    """{(task, r): whether each example's best-scored choice, or its whole word, is right}."""
    path, right = windows_file(args.out, study, name, seed).with_suffix(".samples"), {}
    if not path.exists():  # a row of before
        model = load_model(f"{args.out}/{study.name}/{name}-{seed}", model_class=study.rows[name].model_class)
        tasks_of(study, name, seed, model.eval(), args)
    for line in map(json.loads, open(path)):
        scores = line["loglikelihoods"]
        hit = line["is_greedy"][0] if len(scores) == 1 else scores.index(max(scores)) == line["gold"]
        right.setdefault((line["task"], str(line["iters"])), []).append(hit)
    return {key: np.array(hits) for key, hits in right.items()}


def windows_file(out: str, study: Study, row: str, seed: int) -> Path:
    """Where the losses of every window are kept: they pair two rows, and are too many for the results."""
    return Path(out, study.name, "windows", f"{row}-{seed}.json")


# ---------------------------------------------------------------------------------------- reading the results


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """'1.437', '1.437 ± 0.004' (the standard deviation) for several, '' for none."""
    if not values:
        return ""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def trained_r(study: Study, row: str) -> str:
    """The r that a row is compared at: of those that are read, the nearest to the mean of its training."""
    mean = load_config([study.base[0], *study.rows[row].flags]).mean_iters
    return str(min(parse_list(study.iters, "iters"), key=lambda r: abs(r - mean)))


def against_std(study: Study, row: str, runs: list[dict]) -> list[float]:
    """Validation loss less that of the row's Std of the same seed, each at the r that it was trained at; a
    seed has the same batches in both, and at equal shape the same initial weights."""
    std, r = study.rows[row].std, trained_r(study, row)
    losses = {run["seed"]: run["val_loss"]["1"] for run in runs if run["row"] == std}
    mine = [run for run in runs if run["row"] == row and run["seed"] in losses]
    return [run["val_loss"][r] - losses[run["seed"]] for run in mine] if row != std else []


def runs_by_row(study: Study, names, runs: list[dict]) -> dict[str, list[dict]]:
    """{row: its runs}, in the order of names, without those that have none."""
    found = {name: [run for run in runs if run["row"] == name] for name in names}
    return {name: mine for name, mine in found.items() if mine}


def print_losses(study: Study, rows: dict[str, list[dict]], runs: list[dict]):
    """A Markdown table of loss at every r; FLOPs of training are in units of the first row's."""
    columns, unit = study.iters.split(","), None
    print(
        f"| row: rule, trained at r | seeds | FLOPs | {' | '.join(f'r={r}' for r in columns)} | against Std |"
    )
    print("|---" * (len(columns) + 4) + "|")
    for name, mine in rows.items():
        unit = unit or mine[0]["flops"]
        cells = [spread([run["val_loss"][r] for run in mine if r in run["val_loss"]]) for r in columns]
        gaps = against_std(study, name, runs)
        cells.append(spread(gaps, sign="+"))
        flops = mine[0]["flops"] / unit
        print(f"| `{name}`: {study.rows[name].title} | {len(mine)} | {flops:.2f} | {' | '.join(cells)} |")


def print_seeds(study: Study, rows: dict[str, list[dict]]):
    """The loss of every seed of the rows that have several, at the r that they were trained at."""
    several = {name: {run["seed"]: run for run in mine} for name, mine in rows.items() if len(mine) > 1}
    if not several:
        return
    seeds = sorted({seed for runs in several.values() for seed in runs})
    print(f"\n| loss of each seed | at | {' | '.join(f'seed {seed}' for seed in seeds)} |")
    print("|---" * (len(seeds) + 2) + "|")
    for name, runs in several.items():
        r = trained_r(study, name)
        cells = [f"{runs[seed]['val_loss'][r]:.3f}" if seed in runs else "" for seed in seeds]
        print(f"| `{name}` | r={r} | {' | '.join(cells)} |")


def losses_by_rate(study: Study, runs: list[dict], seed: int = 1) -> dict[str, dict[str, float]]:
    """{row: {learning rate: a seed's loss at the r that the row was trained at}}, high rates first."""
    losses = {
        run["row"]: run["val_loss"][trained_r(study, run["row"])] for run in runs if run["seed"] == seed
    }
    found = {row: {} for row in RATED}
    for row in RATED:
        for lr in sorted(("1e-3", *OTHER_RATES), key=float, reverse=True):
            name = row if lr == "1e-3" else f"{row}_{lr}"
            if name in losses:
                found[row][lr] = losses[name]
    return found


def print_rates(study: Study, found: dict[str, dict[str, float]]):
    rates = sorted({lr for losses in found.values() for lr in losses}, key=float, reverse=True)
    print(f"\n| loss by learning rate | at | {' | '.join(rates)} |")
    print("|---" * (len(rates) + 2) + "|")
    for row, losses in found.items():
        cells = [f"{losses[lr]:.3f}" if lr in losses else "" for lr in rates]
        print(f"| `{row}` | r={trained_r(study, row)} | {' | '.join(cells)} |")


def accuracy(found: list[dict], r: str) -> str:
    """A task at one r over seeds; of one seed with its standard error, and the p of McNemar's test of whether
    it differs from the reference: the trained r, or r = 1 where that is no column. The one without a p."""
    scores = [task["iters"][r] for task in found if r in task["iters"]]
    if len(scores) != 1:
        return spread([100 * score["acc"] for score in scores], 1)
    text = f"{100 * scores[0]['acc']:.1f} ± {100 * scores[0]['acc_stderr']:.1f}"
    test = found[0]["paired"].get(r, {}).get("acc")
    return text + (f" (p {test['p']:.2g})" if test else "")


def print_tasks(rows: dict[str, list[dict]]):
    columns = TASK_ITERS.split(",")
    for task in dict.fromkeys(task for mine in rows.values() for task in mine[0]["tasks"]):
        print(f"\n| {task}, acc in % | {' | '.join(f'r={r}' for r in columns)} |")
        print("|---" * (len(columns) + 1) + "|")
        for name, mine in rows.items():
            found = [run["tasks"][task] for run in mine]
            print(f"| `{name}` | {' | '.join(accuracy(found, r) for r in columns)} |")


def print_pairs(study: Study, pairs: list[dict], runs: list[dict]):
    """What print_pair found, at the r that the first row was trained at (of tasks: at 4, where that is 6)."""
    tasks = study.tasks.split(",")
    print("\n**Two rows on the same windows and examples**\n")
    print(f"| first less second | seed | loss | {' | '.join(f'{task}, points' for task in tasks)} |")
    print("|---" * (len(tasks) + 3) + "|")
    for record in pairs:
        first, second = record["pair"].split(",")
        r, cells = trained_r(study, first), []
        for task in tasks:
            tests = record.get("tasks", {}).get(task)
            if tests:
                test = tests[r if r in tests else "4"]
                n = next(run["tasks"][task]["n"] for run in runs if run["row"] == first)
                cells.append(f"{100 * (test['gained'] - test['lost']) / n:+.1f} (p {test['p']:.2g})")
        name = f"`{first}` at r = {r}, `{second}` at {record['second_at']}"
        loss = f"{record['gap'][r]:+.3f} ± {record['gap_stderr'][r]:.3f}"
        print(f"| {name} | {record['seed']} | {loss} | {' | '.join(cells or [''] * len(tasks))} |")


def print_table(study: Study, folder):
    """The records as Markdown."""
    runs = read(study.name, folder)
    for title, names in study.groups.items():
        rows = runs_by_row(study, names, runs)
        if rows:
            print(f"\n**{title}**\n")
            print_losses(study, rows, runs)
            print_seeds(study, rows)
            if names is RATES:
                print_rates(study, losses_by_rate(study, runs))
            print_tasks(rows)
    known = {run["row"] for run in runs}  # those of rows in another folder are left out
    pairs = [pair for pair in read(f"{study.name}_pairs", folder) if pair["pair"].split(",")[0] in known]
    pairs.sort(key=lambda pair: (pair["pair"], pair["seed"]))
    if pairs:
        print_pairs(study, pairs, runs)


def print_pair(study: Study, pair: str, args):
    """The first row's loss at every r less the second's at its trained r, on the same windows, seed by
    seed, with the standard error over windows; and McNemar's test of their answers."""
    rows = pair.split(",")
    two = len(rows) == 2 and set(rows) <= set(study.rows)
    check(two, f"--pair={pair}: give two rows with a comma between them\nrows: {', '.join(study.rows)}")
    (first, second), r_second = rows, trained_r(study, rows[1])
    files = {seed: [windows_file(args.out, study, row, seed) for row in rows] for seed in (1, 2, 3)}
    files = {seed: both for seed, both in files.items() if all(file.exists() for file in both)}
    why = f"{args.out}/{study.name}/windows holds no seed of both {first} and {second}"
    check(bool(files), f"{why}\nrun both rows first, with --results FOLDER where results/ has them already")
    for seed, both in files.items():
        ours, theirs = (json.loads(file.read_text()) for file in both)
        command = f"python -m experiments.study{' --gpu' * (study is GPU)} --pair {pair}"
        record = {"command": command, "pair": pair, "seed": seed}
        record |= {"second_at": r_second, "windows": len(theirs[r_second]), "gap": {}, "gap_stderr": {}}
        for r, losses in ours.items():
            gaps = torch.tensor(losses) - torch.tensor(theirs[r_second])
            record["gap"][r] = round(gaps.mean().item(), 5)
            record["gap_stderr"][r] = round(gaps.std().item() / len(gaps) ** 0.5, 5)
            title = f"seed {seed}: {first} at r = {r} less {second} at r = {r_second}"
            print(f"{title}: {record['gap'][r]:+.4f} ± {record['gap_stderr'][r]:.4f}")
        ours, theirs = (right_answers(study, row, seed, args) for row in (first, second))
        record["tasks"] = {}
        for (task, r), hits in ours.items():
            others = theirs[task, r_second if r_second in TASK_ITERS.split(",") else "4"]
            test = record["tasks"].setdefault(task, {})[r] = mcnemar(others, hits)
            print(f"{task}, r = {r}: {hits.mean():.1%} against {others.mean():.1%}, p = {test['p']:.2g}")
        append(f"{study.name}_pairs", record, args.results)


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.study", description=__doc__)
    parser.add_argument("--row", help=f"one of {', '.join(SMALL.rows)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="every row and seed that the results lack")
    parser.add_argument("--evaluate", metavar="FOLDER", help="with --row: a run of that row, already trained")
    parser.add_argument("--pair", metavar="ROW,ROW", help="the difference of two rows that were run here")
    parser.add_argument("--gpu", action="store_true", help="the study at 52M parameters on data/books")
    parser.add_argument("--data_dir", default="data/icl", help="of the zero-shot tasks (data/icl)")
    parser.add_argument(
        "--limit", type=int, help="examples of each task (2000 of the built-in ones, all of others)"
    )
    parser.add_argument("--out", default="out", help="folder of the runs (out)")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--flags", default="", help="more flags for train.py: --flags='--max_steps=10'")
    args = parser.parse_args(argv)
    study = GPU if args.gpu else SMALL
    rows = study.rows
    check(
        args.row or args.all or args.table or args.pair,
        "say what to run: --row ROW, --all, --pair or --table",
    )
    if args.row and args.row not in rows:
        check(False, f"no row {args.row}{nearest(args.row, rows)}\nrows: {', '.join(rows)}")
    todo = []
    if args.row:
        todo = [(args.row, args.seed)]
    elif args.all:
        todo = [(name, seed) for seed in (1, 2, 3) for name in rows if seed <= rows[name].seeds]
    for name, seed in todo:
        done = [(run["row"], run["seed"]) for run in read(study.name, args.results)]
        if (name, seed) not in done:
            run_row(study, name, seed, args)
        elif args.row:
            print(f"{name}, seed {seed}, is in {args.results}/{study.name}.jsonl already")
    if args.pair:
        print_pair(study, args.pair, args)
    else:
        print_table(study, args.results)


if __name__ == "__main__":
    cli(main)
