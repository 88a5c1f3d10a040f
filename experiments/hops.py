"""A task that needs depth: follow a variable to its value, several look-ups away. Adds to results/hops.jsonl.

    python -m experiments.hops --train                                  # all stages, into out/hops/1 to 5
    python -m experiments.hops --data data/hops --most 10 --n_val 4000 --n_train 100      # programs to ask
    python -m experiments.hops --ckpt out/hops/5 --data data/hops       # accuracy by hops and iterations
    python -m experiments.hops --ckpt out/hops/5 --data data/hops --exit kl:1e-2          # with early exit

A program has assignments and then queries, of 4 bytes each:

    a=3;k=8;b=a;m=k;c=b;?c3;?m8

The chains are interleaved at random, every definition before its use, and all variables are distinct letters.
Only the last variable of a chain is asked for, once, so that no answer gives another away; the assignments of
the chain are its hops (?m above: 2, m=k and k=8). A program fills a window of the model exactly; its
end-of-text stands for a last ";".
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from decode import resolve_exit

import prepare_data
import train
from checkpoint import checkpoints, find_checkpoint, load_model, save_checkpoint
from config import ArgumentParser, cli, load_config, parse_list
from data import Shards, get_tokenizer
from eval_icl import states_and_depths
from experiments import RESULTS, ROOT, append
from model import AbbIE, check, parse_iters

CONFIG = f"{ROOT}/config/hops_tiny.py"
# (bytes of a program, longest chain, letters, flags). In one go the model only learns which digits occur. So
# one look-up with one iteration, two with two, three with three; then long programs and a range of r. Chains
# of the first stages also end in letters that name nothing: what is fetched is then what can be looked up.
STAGES = [
    (32, 1, True, ["--iters=1", "--lr=3e-3", "--tokens_per_step=4096", "--micro_batch=128"]),
    (32, 2, True, ["--iters=2"]),
    (64, 3, False, ["--iters=2-3"]),
    (128, 4, False, ["--iters=2-4"]),
    (128, 6, False, ["--iters=2-6", "--max_steps=1500", "--decay_frac=0.5"]),
]
# All but the last go on, a round at a time, until the longest chains are answered so well, or to the limit.
ROUND, LIMIT, LEARNT = 200, 1600, 0.9
# Parts of the first two stages that can be left out to see what they do (--without).
WITHOUT = {
    "init": "the initial weights: the model's own",
    "letters": "letters as chain ends",
    "exact": "two iterations in stage 2: any from 1 to 3",
}
N_PROGRAMS, N_VAL = 50_000, 2000  # of a stage, to train on and to ask
LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"

# --------------------------------------------------------------------------------------------------- programs


def program(rng, slots: int, most: int, letters: bool = False) -> str:
    """Chains that fill the slots of 4 bytes with their queries. Lengths are uniform between 1 and a bound
    that is itself uniform between 1 and most: many programs are shallow, which is where learning starts. A
    chain ends in a digit, with `letters` also in one of the letters that name no variable."""
    hops, most = [], int(rng.integers(1, most + 1))
    while sum(hops) + len(hops) != slots or sum(hops) > len(LETTERS):
        if sum(hops) + len(hops) >= slots:
            hops = []
        hops.append(int(rng.integers(1, most + 1)))
    names = list(rng.permutation(list(LETTERS)))
    ends = list(DIGITS) + (names[sum(hops) :] if letters else [])
    values = rng.choice(ends, size=len(hops))
    current, statements = list(values), []
    for chain, name in zip(rng.permutation(np.repeat(np.arange(len(hops)), hops)), names):
        statements.append(f"{name}={current[chain]}")  # the next assignment of that chain
        current[chain] = name
    statements += [f"?{current[chain]}{values[chain]}" for chain in rng.permutation(len(hops))]
    return ";".join(statements)


def write(folder: str, block_size: int, most: int, n_train: int, n_val: int, letters: bool = False):
    """data/NAME in the format of prepare_data.py, a document a window."""
    fits = block_size % 8 == 0 and 8 <= block_size <= 128 and most >= 1  # or chains cannot fill it
    check(fits, f"--block_size={block_size} --most={most}: give a multiple of 8 up to 128, at least 1 hop")
    with tempfile.TemporaryDirectory() as temp:
        for split, n in (("train", n_train), ("val", n_val)):
            rng = np.random.default_rng([1, split == "val"])
            with open(Path(temp) / f"{split}.jsonl", "w") as file:
                for _ in range(n):
                    text = program(rng, block_size // 4, most, letters)
                    file.write(json.dumps({"text": text}) + "\n")
        files = ["--input", f"{temp}/train.jsonl", "--val_input", f"{temp}/val.jsonl"]
        prepare_data.main(["text", *files, "--tokenizer", "bytes", "--out", folder])


def questions(tokens: np.ndarray):
    """A program's tokens (T,) -> (position of the variable asked for, hops) of each query."""
    source = {}
    for at in range(0, len(tokens), 4):
        first, second, third = map(chr, tokens[at : at + 3])
        if first == "?":
            hops, name = 0, second
            while name in source:
                hops, name = hops + 1, source[name]
            yield at + 1, hops
        else:
            source[first] = third


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def start(folder: str, seed: int, flags: list[str]) -> str:
    """The weights before stage 1: normal, std 1/sqrt(fan-in), at this width 1.6 times the model's own, from
    which some seeds do not learn to look up twice."""
    config = load_config([CONFIG, f"--block_size={STAGES[0][0]}", "--iters=1", *flags])
    torch.manual_seed(seed)
    model = AbbIE(config.model_config(get_tokenizer("bytes").n_vocab))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            joins = name.endswith(("proj.weight", "down.weight"))  # the residual stream
            p.normal_(std=(p.shape[1] * (2 * config.n_blocks if joins else 1)) ** -0.5)
    if not checkpoints(Path(folder)):
        meta = {**vars(config), **vars(model.config), "tokenizer": "bytes", "step": 0}
        save_checkpoint(Path(folder), 0, model.state_dict(), {}, meta)
    return folder


def train_stages(out: str, seed: int, flags: list[str], without: str = ""):
    """Every stage starts from the last one's checkpoint. A round is the same run with more steps, which
    train.py continues; the rate is constant, so that rounds make no difference to it. `without` (of WITHOUT)
    leaves something out, and ends after stage 2, where that shows."""
    before = "" if without == "init" else start(f"{out}/0", seed, flags)
    for stage, (block_size, most, letters, changes) in enumerate(STAGES[:2] if without else STAGES, 1):
        letters = letters and without != "letters"
        if without == "exact" and stage == 2:
            changes = [*changes, "--iters=1-3"]
        data, run = f"data/hops_{block_size}_{most}{'_letters' * letters}", f"{out}/{stage}"
        if not Path(data, "meta.json").exists():
            write(data, block_size, most, N_PROGRAMS, N_VAL, letters)
        argv = [CONFIG, f"--data={data}", f"--block_size={block_size}", f"--seed={seed}"]
        argv += [f"--out_dir={run}", f"--init_from={before}", *changes, *flags]
        last = stage == len(STAGES)
        for steps in range(ROUND, LIMIT + 1, ROUND):
            train.main(argv if last else [*argv, f"--max_steps={steps}", "--decay_frac=0"])
            model = load_model(run).eval()
            r = parse_iters(model.config.iters)[2]
            found = accuracy(model, Shards(data, "val", block_size), [r], 500)["acc"][r]
            shares = ", ".join(f"{n}: {share:.0%}" for n, share in found.items())
            print(f"stage {stage}, step {model.meta['step']}: right at r = {r}, by hops: {shares}")
            if last or found[most] >= LEARNT:
                break
        before = run


def stage_steps(meta: dict) -> list[int]:
    """Steps of the stages that led to a checkpoint, as far back as they are still there."""
    steps = [meta["step"]]
    while meta.get("init_from") and checkpoints(Path(meta["init_from"])):
        meta = json.loads((find_checkpoint(meta["init_from"]) / "config.json").read_text())
        steps.insert(0, meta["step"])
    return [n for n in steps if n]  # not the weights before stage 1


# ----------------------------------------------------------------------------------------------------- asking


@torch.no_grad()
def accuracy(model: AbbIE, shards: Shards, iters: list[int], n_programs: int) -> dict:
    """{"n": {hops: queries}, "acc": {iters: {hops: share answered right}}} over the first programs."""
    n, right, n_programs = {}, {r: {} for r in iters}, min(n_programs, shards.n_windows)
    for first in range(0, n_programs, 64):
        x, y = shards.batch(range(first, min(first + 64, n_programs)))
        asked = [(row, at, hops) for row in range(len(x)) for at, hops in questions(x[row].numpy())]
        rows, ats, hops = torch.tensor(asked).T
        for h, count in zip(*hops.unique(return_counts=True)):
            n[int(h)] = n.get(int(h), 0) + int(count)
        for r, logits in zip(iters, model.logits_at(x, iters)):
            hit = logits[rows, ats].argmax(-1) == y[rows, ats]
            for h in hops.unique().tolist():
                right[r][h] = right[r].get(h, 0) + int(hit[hops == h].sum())
    shares = {r: {h: round(right[r][h] / n[h], 4) for h in sorted(n)} for r in iters}
    return {"n": dict(sorted(n.items())), "acc": shares}


@torch.no_grad()
def accuracy_with_exit(model: AbbIE, shards: Shards, exit: str, iters: int, n_programs: int) -> dict:
    """The first programs read with early exit, at most iters (`exit` as in sample.py): {"mean_iters": of all
    tokens, "iters": {hops: of a query}, "acc": {hops: share right}}."""
    depths, right, n_programs, total = {}, {}, min(n_programs, shards.n_windows), 0
    for first in range(0, n_programs, 64):
        x, y = shards.batch(range(first, min(first + 64, n_programs)))
        [_, (z, ran)] = states_and_depths(model, x, [iters, exit])
        hit = model.logits(z).argmax(-1) == y
        total += int(ran.sum())
        for row in range(len(x)):
            for at, hops in questions(x[row].numpy()):
                depths.setdefault(hops, []).append(int(ran[row, at]))
                right.setdefault(hops, []).append(bool(hit[row, at]))
    return {
        "n_programs": n_programs,
        "mean_iters": round(total / (n_programs * shards.block_size), 3),
        "iters": {h: round(float(np.mean(depths[h])), 3) for h in sorted(depths)},
        "acc": {h: round(float(np.mean(right[h])), 4) for h in sorted(right)},
    }


def show(result: dict):
    hops = list(result["n"])
    print("iters  " + "".join(f"{f'{h} hops':<9}" for h in hops))
    for r, row in result["acc"].items():
        print(f"{r:>5}  " + "".join(f"{row[h]:<9.3f}" for h in hops))
    for spec, found in result.get("exit", {}).items():
        print(f"{spec}: {found['mean_iters']} iterations per token; of a query, and right:")
        for what in ("iters", "acc"):
            print(f"{what:>5}  " + "".join(f"{value:<9.3f}" for value in found[what].values()))


KEYS = (
    "rule", "iters", "n_embd", "n_head_blocks", "n_body_blocks", "n_tail_blocks", "block_size", "data",
    "tokens_per_step", "lr", "seed", "step",
)  # fmt: skip


def ask(args):
    """Print a checkpoint's accuracy; with a --title, also add it to the results."""
    model = load_model(args.ckpt).eval()
    shards, iters = Shards(args.data, "val", model.config.block_size), parse_list(args.iters, "iters")
    result = accuracy(model, shards, iters, args.n_programs)
    if args.exit:
        n = min(2048, args.n_programs)
        specs = [resolve_exit(model, spec, max(iters)) for spec in args.exit.split(",")]
        result["exit"] = {spec: accuracy_with_exit(model, shards, spec, max(iters), n) for spec in specs}
    show(result)
    if args.title:
        record = {
            "title": args.title,
            "figure": args.figure,
            "config": {key: model.meta[key] for key in KEYS},
            "programs": args.data,
            "trained_hops": args.trained_hops,
            "stage_steps": stage_steps(model.meta),
            "n_params": model.n_params(),
            **result,
        }
        record["config"]["init_from"] = Path(model.meta["init_from"]).name
        append("hops", record, args.results)


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.hops", description=__doc__)
    add = parser.add_argument
    without = "; ".join(f"{name} ({what})" for name, what in WITHOUT.items())
    add("--train", action="store_true", help="train through all stages")
    add("--out_dir", default="out/hops", help="folder of the stages (out/hops)")
    add("--flags", default="", help="more flags for train.py: --flags='--rule=abbie_d'")
    add(
        "--without", default="", choices=["", *WITHOUT], help=f"--train: leave out, end at stage 2: {without}"
    )
    add("--data", default="data/hops", help="the programs")
    add("--ckpt", help="checkpoint to examine; without one, the programs are written")
    add("--iters", default="1,2,3,4,5,6,7,8,9,10,12,16")
    add("--n_programs", type=int, default=4000, help="most that are asked (4000)")
    add("--exit", default="", help="kl:1e-2,kl:1e-1: also with early exit, on the first 2048 programs")
    add("--block_size", type=int, default=128)
    add("--most", type=int, default=6, help="longest chain")
    add("--n_train", type=int, default=N_PROGRAMS)
    add("--n_val", type=int, default=N_VAL)
    add("--seed", type=int, default=1)
    add("--title", default="", help="what was tried: adds it to the results")
    add("--figure", default="", help="title of its panel in the figure, if it has one")
    add("--trained_hops", type=int, help="longest chain in training, for the figure")
    add("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    check(bool(args.trained_hops) or not args.figure, "--figure needs --trained_hops, which it frames")
    if args.train:
        train_stages(args.out_dir, args.seed, args.flags.split(), args.without)
    elif args.ckpt is None and Path(args.data, "meta.json").exists():
        print(f"{args.data} is there already: remove it to make it anew")
    elif args.ckpt is None:
        write(args.data, args.block_size, args.most, args.n_train, args.n_val)
    else:
        ask(args)


if __name__ == "__main__":
    cli(main)
