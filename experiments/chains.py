"""A task that needs depth: follow a variable to its value, several look-ups away.

    python -m experiments.chains --rule abbie_d --seed 1    # train in stages, then ask; ends in
                                                            # out/chains/abbie_d_seed_1/iters_2-6
    python -m experiments.chains --rule abbie_d --iters 2   # the last stage at r = 2 alone
    python -m experiments.chains --ckpt models/chains_abbie_d

A program has assignments and then queries, of 4 bytes each:

    a=3;k=8;b=a;m=k;c=b;?c3;?m8

The chains are interleaved at random, every definition before its use, and all variables are distinct letters.
Only the last variable of a chain is asked for, once, so that no answer gives another away; the assignments of
the chain are its hops (?m above: 2, m=k and k=8).

Training reads windows of 128 bytes: programs of all lengths, one after the other, which share no variable. So
a window holds questions near its beginning, as one types them, and questions to a program that fills it.
"""

import json
import random
import shutil
import tempfile
from pathlib import Path

import torch

import prepare_data
import train
from checkpoint import load_model, write_json
from config import ArgumentParser, cli, parse_list
from experiments import RESULTS, ROOT, append
from model import AbbIE, check

CONFIG = f"{ROOT}/config/chains.py"
# (data, bytes of a window, longest chain, flags). On the last stage's data alone a model learns which digits
# occur, and no look-up. So first one look-up with one iteration, then up to three with two. The chains of
# these stages also end in letters that name nothing: what is fetched is then what can be looked up.
STAGES = [
    ("data/chains_1", 32, 1, ["--iters=1", "--micro_batch=64", "--max_steps=800", "--decay_frac=0"]),
    ("data/chains_3", 64, 3, ["--iters=2", "--micro_batch=32", "--max_steps=1000", "--decay_frac=0"]),
    ("data/chains", 128, 6, []),
]
N_WINDOWS, N_VAL = 32_000, 256  # of a stage
LEARNT = 0.9  # share of r hops that a stage must answer at its r, or the next one is in vain
LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"

# --------------------------------------------------------------------------------------------------- programs


def program(rng: random.Random, statements: int, longest: int, names: list[str], letters=False) -> list[str]:
    """The statements, an even number, of one program; its variables are taken off the end of `names`. Lengths
    of chains are uniform between 1 and a bound that is itself uniform up to `longest`: many programs are
    shallow. A chain ends in a digit, with `letters` also in one of the names that remain."""
    hops, bound = [], rng.randint(1, longest)
    while sum(hops) + len(hops) != statements or sum(hops) > len(names):
        if sum(hops) + len(hops) >= statements:
            hops, bound = [], rng.randint(1, longest)
        hops.append(rng.randint(1, bound))
    variables = [names.pop() for _ in range(sum(hops))]
    values = [rng.choice([*DIGITS, *names] if letters else DIGITS) for _ in hops]
    turns = [chain for chain, length in enumerate(hops) for _ in range(length)]
    rng.shuffle(turns)
    current, lines = list(values), []
    for chain, variable in zip(turns, variables):
        lines.append(f"{variable}={current[chain]}")  # the next assignment of that chain
        current[chain] = variable
    queries = [f"?{variable}{value}" for variable, value in zip(current, values)]
    rng.shuffle(queries)
    return lines + queries


def window(rng: random.Random, statements: int, longest: int, letters=False) -> str:
    """Programs of any even number of statements, one after the other, that share no variable."""
    names, lines = rng.sample(LETTERS, len(LETTERS)), []
    while len(lines) < statements:
        length = min(2 * rng.randint(1, statements // 2), statements - len(lines))
        lines += program(rng, length, longest, names, letters)
    return ";".join(lines)


def write_windows(folder: str, block_size: int, longest: int, letters: bool):
    """Token shards of windows, a document each: its end-of-text stands for a last ";"."""
    with tempfile.TemporaryDirectory() as temporary:
        for split, n in (("train", N_WINDOWS), ("val", N_VAL)):
            rng = random.Random(f"{split} {block_size} {longest}")
            lines = [json.dumps({"text": window(rng, block_size // 4, longest, letters)}) for _ in range(n)]
            Path(temporary, f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        files = ["--input", f"{temporary}/train.jsonl", "--val_input", f"{temporary}/val.jsonl"]
        prepare_data.main(["text", *files, "--tokenizer", "bytes", "--out", folder])


# -------------------------------------------------------------------------------------------------- questions


def programs(kind: str, n: int, longest: int) -> list[str]:
    """n programs to ask: "full" ones of 32 statements, "short" ones of 2, 4, ... 30. The same for all models,
    and apart from what is trained on."""
    rng, texts = random.Random(f"ask {kind}"), []
    for _ in range(n):
        statements = 32 if kind == "full" else 2 * rng.randint(1, 15)
        texts.append(";".join(program(rng, statements, longest, rng.sample(LETTERS, len(LETTERS)))))
    return texts


def questions(text: str) -> list[tuple[int, int]]:
    """A program -> (position of the variable asked for, hops) of each query."""
    source, queries = {}, []
    for at in range(0, len(text), 4):
        first, second, third = text[at : at + 3]
        if first == "?":
            hops, name = 0, second
            while name in source:
                hops, name = hops + 1, source[name]
            queries.append((at + 1, hops))
        else:
            source[first] = third
    return queries


@torch.no_grad()
def accuracy(model: AbbIE, texts: list[str], iters: list[int]) -> dict:
    """{"n": {hops: queries}, "acc": {iters: {hops: share answered right}}}."""
    asked, right = [], {r: [] for r in iters}  # of all queries: hops; right or not
    for first in range(0, len(texts), 64):
        batch = texts[first : first + 64]
        width = max(map(len, batch))
        idx = torch.tensor([list(text.ljust(width, "\n").encode()) for text in batch])
        places = [(row, at, hops) for row, text in enumerate(batch) for at, hops in questions(text)]
        rows, ats, hops = torch.tensor(places).T
        asked.append(hops)
        for r, logits in zip(iters, model.logits_at(idx, iters)):
            right[r].append(logits[rows, ats].argmax(-1) == idx[rows, ats + 1])
    asked, right = torch.cat(asked), {r: torch.cat(parts).double() for r, parts in right.items()}
    lengths = asked.unique().tolist()
    shares = {r: {h: round(right[r][asked == h].mean().item(), 4) for h in lengths} for r in iters}
    return {"n": {h: int((asked == h).sum()) for h in lengths}, "acc": shares}


def ask(model: AbbIE, args) -> list[dict]:
    """Print accuracy by hops and iterations -> a record for short programs and one for full ones."""
    iters, records = parse_list(args.iters_asked, "iters_asked"), []
    for kind, longest in (("short", 6), ("full", 8)):
        result = accuracy(model, programs(kind, args.n_programs, longest), iters)
        print(f"\n{args.n_programs} {kind} programs\niters  " + "".join(f"{h} hops   " for h in result["n"]))
        for r, row in result["acc"].items():
            print(f"{r:>5}  " + "".join(f"{share:<9.3f}" for share in row.values()))
        records.append({"programs": kind, "n_programs": args.n_programs, **result})
    return records


# --------------------------------------------------------------------------------------------------- training


def train_stages(args) -> AbbIE:
    """Each stage starts from the weights of the one before. What is done is not done again: runs that differ
    in --iters share the first stages. Raises UserError where a stage has not learnt what the next needs."""
    before = ""
    for number, (data, block_size, longest, changes) in enumerate(STAGES, 1):
        last = number == len(STAGES)
        name = f"iters_{args.iters}" if last else f"stage_{number}"
        run = f"{args.out_dir}/{args.rule}_seed_{args.seed}/{name}"
        if not Path(data, "meta.json").exists():
            write_windows(data, block_size, longest, letters=not last)
        argv = [CONFIG, f"--data={data}", f"--block_size={block_size}", f"--rule={args.rule}"]
        argv += [f"--seed={args.seed}", f"--out_dir={run}", f"--init_from={before}", *changes]
        argv += [f"--iters={args.iters}"] if last else []
        train.main([*argv, *args.flags.split()])
        model = load_model(run).eval()
        if not last:
            rng = random.Random(0)
            texts = [window(rng, block_size // 4, longest) for _ in range(200)]
            r = model.config.iters
            shares = accuracy(model, texts, [r])["acc"][r]
            print(f"stage {number}: right at r = {r}, by hops: {shares}")
            check(shares[r] >= LEARNT, f"{run}: {shares[r]:.0%} of {r} hops at r = {r}\ntry another --seed")
        before = run
    return model


def save_model(model: AbbIE, folder: Path, command: str):
    """Copy a checkpoint's weights and config.json, which then names the command of all stages."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(model.meta["ckpt"], "model.pt"), folder)
    meta = {key: value for key, value in model.meta.items() if key != "ckpt"}
    write_json(folder / "config.json", {**meta, "made_by": {**meta["made_by"], "command": command}})


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.chains", description=__doc__)
    add = parser.add_argument
    add("--ckpt", help="a model to ask; without one, one is trained")
    add("--rule", default="abbie_d")
    add("--seed", type=int, default=1)
    add("--iters", default="2-6", help="of the last stage (2-6)")
    add("--out_dir", default="out/chains", help="folder of all runs (out/chains)")
    add("--flags", default="", help="more flags of train.py for all stages: --flags='--device=cpu'")
    add("--save", type=Path, help="folder that gets the trained model: models/chains_abbie_d")
    add("--n_programs", type=int, default=2000, help="short ones to ask, and full ones (2000)")
    add("--iters_asked", default="1,2,3,4,5,6,8,12,16")
    add("--results", type=Path, default=RESULTS, help="folder of the records (experiments/results)")
    args = parser.parse_args(argv)
    if args.ckpt:
        ask(load_model(args.ckpt).eval(), args)
        return
    model = train_stages(args)
    command = " ".join(["python -m experiments.chains", *argv])
    if args.save:
        save_model(model, args.save, command)
    about = {"command": command, "rule": args.rule, "iters": args.iters, "seed": args.seed}
    about |= {"trained_hops": STAGES[-1][2], "n_params": model.n_params()}
    about |= {key: model.meta["made_by"][key] for key in ("device", "torch", "threads", "commit")}
    for record in ask(model, args):
        append("chains", {**about, **record}, args.results)


if __name__ == "__main__":
    cli(main)
