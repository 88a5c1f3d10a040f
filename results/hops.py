"""A task that needs depth: follow a variable to its value, several look-ups away.

    python results/hops.py --train                                  # all stages, into out/hops/1 to 5
    python results/hops.py --data data/hops --most 10 --n_val 4000 --n_train 100      # programs to ask
    python results/hops.py --ckpt out/hops/5 --data data/hops       # accuracy by hops and iterations
    python results/hops.py --ckpt out/hops/5 --data data/hops --exit kl:1e-2    # as deep as each token needs

A program has assignments and then queries, of 4 bytes each:

    a=3;k=8;b=a;m=k;c=b;?c3;?m8

The chains are interleaved at random, every definition before its use, and all variables are distinct letters.
Only the last variable of a chain is asked for, once, so that no answer gives another away; the assignments of
the chain are its hops (?m above: 2, m=k and k=8). A program fills a window of the model exactly; its
end-of-text stands for a last ";".
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
from config import ArgumentParser, cli, load_config, parse_list  # noqa: E402
from model import AbbIE, KVCache, find_checkpoint, parse_iters, save_checkpoint  # noqa: E402
from sample import Stats, adaptive_step, parse_exit  # noqa: E402

KEYS = ("rule", "iters", "n_embd", "n_head_blocks", "n_body_blocks", "n_tail_blocks", "block_size", "data",
        "tokens_per_step", "lr", "seed", "step")
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
WITHOUT = {"init": "the initial weights: the model's own",
           "letters": "letters as chain ends", "exact": "two iterations in stage 2: any from 1 to 3"}
N_PROGRAMS = 50_000  # of a stage, to train on
LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


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
    values = rng.choice(list(DIGITS) + (names[sum(hops):] if letters else []), size=len(hops))
    current, statements = list(values), []
    for chain, name in zip(rng.permutation(np.repeat(np.arange(len(hops)), hops)), names):
        statements.append(f"{name}={current[chain]}")  # the next assignment of that chain
        current[chain] = name
    statements += [f"?{current[chain]}{values[chain]}" for chain in rng.permutation(len(hops))]
    return ";".join(statements)


def write(folder: str, block_size: int, most: int, n_train: int, n_val: int, letters: bool = False):
    """data/NAME in the format of prepare_data.py, a document a window."""
    with tempfile.TemporaryDirectory() as temp:
        for split, n in (("train", n_train), ("val", n_val)):
            rng = np.random.default_rng([1, split == "val"])
            with open(Path(temp) / f"{split}.jsonl", "w") as file:
                for _ in range(n):
                    text = program(rng, block_size // 4, most, letters)
                    file.write(json.dumps({"text": text}) + "\n")
        prepare_data.main(["text", "--input", f"{temp}/train.jsonl", "--val_input", f"{temp}/val.jsonl",
                           "--tokenizer", "bytes", "--out", folder])


@torch.no_grad()
def start(folder: str, seed: int, flags: list[str]) -> str:
    """The weights before stage 1: normal, std 1/sqrt(fan-in), at this width 1.6 times the model's own, from
    which some seeds do not learn to look up twice."""
    config = load_config(["config/hops_tiny.py", f"--block_size={STAGES[0][0]}", "--iters=1", *flags])
    torch.manual_seed(seed)
    model = AbbIE(config.model_config(prepare_data.get_tokenizer("bytes").n_vocab))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            joins = name.endswith(("proj.weight", "down.weight"))  # the residual stream
            p.normal_(std=(p.shape[1] * (2 * config.n_blocks if joins else 1)) ** -0.5)
    if not list(Path(folder).glob("step_*")):
        save_checkpoint(Path(folder), 0, model.state_dict(), {}, {**vars(config), **vars(model.config),
                                                                  "tokenizer": "bytes", "step": 0})
    return folder


def train_stages(out: str, seed: int, flags: list[str], without: str = ""):
    """Every stage starts from the last one's checkpoint. A round is the same run with more steps, which
    train.py continues; the rate is constant, so that rounds make no difference to it. `without` (of WITHOUT)
    leaves something out, and ends after stage 2, where that shows."""
    import train
    before = "" if without == "init" else start(f"{out}/0", seed, flags)
    for stage, (block_size, most, letters, changes) in enumerate(STAGES[:2] if without else STAGES, 1):
        letters = letters and without != "letters"
        if without == "exact" and stage == 2:
            changes = [*changes, "--iters=1-3"]
        data, run = f"data/hops_{block_size}_{most}{'_letters' * letters}", f"{out}/{stage}"
        if not Path(data, "meta.json").exists():
            write(data, block_size, most, N_PROGRAMS, 2000, letters)
        argv = ["config/hops_tiny.py", f"--data={data}", f"--block_size={block_size}", f"--seed={seed}",
                f"--out_dir={run}", f"--init_from={before}", *changes, *flags]
        last = stage == len(STAGES)
        for steps in range(ROUND, LIMIT + 1, ROUND):
            train.main(argv if last else [*argv, f"--max_steps={steps}", "--decay_frac=0"])
            model = AbbIE.from_checkpoint(run).eval()
            r = parse_iters(model.config.iters)[2]
            found = accuracy(model, prepare_data.Shards(data, "val", block_size), [r], 500)["acc"][r]
            print(f"stage {stage}, step {model.meta['step']}: right at r = {r}, by hops:",
                  ", ".join(f"{n}: {share:.0%}" for n, share in found.items()))
            if last or found[most] >= LEARNT:
                break
        before = run


def questions(tokens: np.ndarray):
    """A program's tokens (T,) -> (position of the variable asked for, hops) of each query."""
    source = {}
    for at in range(0, len(tokens), 4):
        first, second, third = map(chr, tokens[at:at + 3])
        if first == "?":
            hops, name = 0, second
            while name in source:
                hops, name = hops + 1, source[name]
            yield at + 1, hops
        else:
            source[first] = third


@torch.no_grad()
def accuracy(model: AbbIE, shards: prepare_data.Shards, iters: list[int], n_programs: int) -> dict:
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
    return {"n": dict(sorted(n.items())),
            "acc": {r: {h: round(right[r][h] / n[h], 4) for h in sorted(n)} for r in iters}}


@torch.no_grad()
def adaptive(model: AbbIE, shards: prepare_data.Shards, exit: str, iters: int, n_programs: int) -> dict:
    """The first programs read a token at a time, each token as deep as it needs, at most iters (`exit` as in
    sample.py): {"mean_iters": of all tokens, "iters": {hops: of a query}, "acc": {hops: share right}}."""
    depths, right, stats, n_programs = {}, {}, Stats(), min(n_programs, shards.n_windows)
    for first in range(0, n_programs, 64):
        x, y = shards.batch(range(first, min(first + 64, n_programs)))
        asked = {(row, at): hops for row in range(len(x)) for at, hops in questions(x[row].numpy())}
        cache, rows = KVCache(model.config, len(x), iters), list(range(len(x)))
        for at in range(x.shape[1]):
            logits = adaptive_step(model, cache, iters, *parse_exit(exit), stats, x[:, at:at + 1], rows)
            for row, hit in enumerate(logits.argmax(-1) == y[:, at]):
                if hops := asked.get((row, at)):
                    depths.setdefault(hops, []).append(stats.depth[row])
                    right.setdefault(hops, []).append(float(hit))
    return {"n_programs": n_programs,
            "mean_iters": round(sum(k * n for k, n in stats.iters.items()) / stats.iters.total(), 3),
            "iters": {h: round(float(np.mean(depths[h])), 3) for h in sorted(depths)},
            "acc": {h: round(float(np.mean(right[h])), 4) for h in sorted(right)}}


def stage_steps(meta: dict) -> list[int]:
    """Steps of the stages that led to a checkpoint, as far back as they are still there."""
    steps = [meta["step"]]
    while meta.get("init_from") and any(Path(meta["init_from"]).glob("step_*")):
        meta = json.loads((find_checkpoint(meta["init_from"]) / "config.json").read_text())
        steps.insert(0, meta["step"])
    return [n for n in steps if n]  # not the weights before stage 1


def show(result: dict):
    hops = list(result["n"])
    print("iters  " + "".join(f"{h} hop{'s' * (h > 1):5s}" for h in hops))
    for r, row in result["acc"].items():
        print(f"{r:>5}  " + "".join(f"{row[h]:<7.3f}" for h in hops))
    for exit, found in result.get("exit", {}).items():
        print(f"{exit}: {found['mean_iters']} iterations per token; of a query, and right:")
        for what in ("iters", "acc"):
            print(f"{what:>5}  " + "".join(f"{value:<7.3f}" for value in found[what].values()))


def main(argv: list[str]):
    parser = ArgumentParser(prog="results/hops.py", description=__doc__)
    parser.add_argument("--train", action="store_true", help="train through all stages")
    parser.add_argument("--out_dir", default="out/hops", help="folder of the stages (out/hops)")
    parser.add_argument("--flags", default="", help="more flags for train.py: --flags='--rule=abbie_d'")
    parser.add_argument("--without", default="", choices=["", *WITHOUT],
                        help="with --train: leave out, and end after stage 2: "
                             + "; ".join(f"{name} ({what})" for name, what in WITHOUT.items()))
    parser.add_argument("--data", default="data/hops", help="the programs")
    parser.add_argument("--ckpt", help="checkpoint to examine; without one, the programs are written")
    parser.add_argument("--iters", default="1,2,3,4,5,6,7,8,9,10,12,16")
    parser.add_argument("--n_programs", type=int, default=4000, help="most that are asked (4000)")
    parser.add_argument("--exit", default="", help="kl:1e-2,kl:1e-1: also with tokens that stop by "
                        "themselves, at the largest of --iters, on the first 2048 programs")
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--most", type=int, default=6, help="longest chain")
    parser.add_argument("--n_train", type=int, default=N_PROGRAMS)
    parser.add_argument("--n_val", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--title", default="", help="what was tried, for --out")
    parser.add_argument("--figure", default="", help="title of its panel in the figure, if it has one")
    parser.add_argument("--trained_hops", type=int, help="longest chain in training, for the figure")
    parser.add_argument("--out", type=Path, help="JSON list that the try is added to, results/hops.json")
    args = parser.parse_args(argv)
    if args.train:
        return train_stages(args.out_dir, args.seed, args.flags.split(), args.without)
    if args.ckpt is None:
        return write(args.data, args.block_size, args.most, args.n_train, args.n_val)
    model = AbbIE.from_checkpoint(args.ckpt).eval()
    shards = prepare_data.Shards(args.data, "val", model.config.block_size)
    iters = parse_list(args.iters, "iters")
    result = accuracy(model, shards, iters, args.n_programs)
    if args.exit:
        result["exit"] = {exit: adaptive(model, shards, exit, max(iters), min(2048, args.n_programs))
                          for exit in args.exit.split(",")}
    show(result)
    if args.out:
        tries = json.loads(args.out.read_text()) if args.out.exists() else []
        config = {**{key: model.meta[key] for key in KEYS}, "init_from": Path(model.meta["init_from"]).name}
        tries.append({"title": args.title, "figure": args.figure, "config": config,
                      "programs": args.data, "trained_hops": args.trained_hops,
                      "stage_steps": stage_steps(model.meta), "n_params": model.n_params(), **result})
        args.out.write_text(json.dumps(tries, indent=1))


if __name__ == "__main__":
    cli(main)
