"""The study behind the README's results: every rule trained on the same batches, read at many r.

    python -m experiments.study --row abbie_d --seed 1                 # one row -> results/study.jsonl
    python -m experiments.study --row std --seed 1 --evaluate FOLDER   # a row that is trained already
    python -m experiments.study --all                                  # all rows and seeds that are missing
    python -m experiments.study --table                                # what is there, as tables
    python -m experiments.study --pair recall_p6b3,std_8k              # two rows -> study_pairs.jsonl
    python -m experiments.study --gpu --all                            # 52M parameters, on one GPU

A row is flags of train.py, or a subclass that changes one line of the model. The same command continues an
interrupted row; one that is in the results is not run again, but --results FOLDER makes others. --gpu writes
results/study_gpu.jsonl, and reads data/books and the tasks in data/icl (REPRODUCE.md says how to make them).
"""

import json
import statistics
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

import prepare_data
import train
from checkpoint import load_model
from config import ArgumentParser, choose_device, cli, load_config, nearest, parse_list
from data import Shards, documents, get_tokenizer
from eval_icl import mcnemar, mean_stderr, perplexity, run_tasks, window_losses
from experiments import RESULTS, ROOT, append, read
from experiments.evaluation import convergence_of
from model import AbbIE, check, parse_iters

# ------------------------------------------------------------------------------ models that differ in a line


class RawTail(AbbIE):
    """abbie_d whose Tail reads the raw state 2^(r-1) u: what differs from abbie_d is scale alone."""

    def iterate(self, x, h, k, body):
        u, x = super().iterate(x, h, k, body)
        return u * 2.0**k, x


class HalfTail(AbbIE):
    """abbie_d whose Tail starts from output projections of half the size, so with smaller updates."""

    @torch.no_grad()
    def init_weights(self):
        super().init_weights()
        for block in self.tail:
            block.attn.proj.weight.mul_(0.5)
            block.mlp.down.weight.mul_(0.5)


class NoRecall(AbbIE):
    """recall without its h: what is left is the average."""

    def iterate(self, x, h, k, body):
        u = body(x)
        return u, (u + x) / 2


class Undamped(AbbIE):
    """recall without the average: u = h + Delta(x) is the next state."""

    def iterate(self, x, h, k, body):
        u = body(x) + (h - x)
        return u, u


class EqualWeights(AbbIE):
    """The updates of r iterations weigh 1/r each, where those of abbie_d halve: u = h + sum_k Delta_k / r."""

    def iterate(self, x, h, k, body):
        u = body(x, 1 / (k + 1)) + (h - x) / (k + 1)
        return u, u


class TwoDepths(AbbIE):
    """Trained on the loss at r and a tenth of the loss two iterations earlier, both from one sweep."""

    def forward(self, idx, targets=None, iters=None):
        early = max(1, iters - 2) if iters and targets is not None else iters
        if early == iters:
            return super().forward(idx, targets, iters)
        rope, first = self.rope(idx), self.backprop_from(iters)
        h = self.run_head(idx, rope)
        u, x = self.advance(self.start(h), h, 0, early, rope, backprop_from=first)
        _, early_loss = self.logits_and_loss(self.run_tail(u, rope), targets)
        u, _ = self.advance(x, h, early, iters, rope, backprop_from=first)
        logits, loss = self.logits_and_loss(self.run_tail(u, rope), targets)
        return logits, loss + 0.1 * early_loss

    def flops_per_token(self, iters=None, context=None, training=True):
        flops = super().flops_per_token(iters, context, training)
        if not training or iters == 1:
            return flops
        forward = partial(super().flops_per_token, context=context, training=False)
        tail = (forward(2) - forward(1)) * self.config.n_tail_blocks / self.config.n_body_blocks
        return flops + 3 * (tail + 2 * self.unembed.weight.numel())


# ------------------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    title: str  # the rule, and the r that it is trained at
    flags: list[str]
    seeds: int = 1
    std: str = "std"  # the row that it is compared with
    model_class: type = AbbIE
    start: tuple[str, int] | None = None  # the row whose run of the same seed it continues, and at which step


RECALL, STD = ["--rule=recall"], ["--iters=1"]
SIX, TEN = [*STD, "--n_body_blocks=4"], [*STD, "--n_body_blocks=8"]  # blocks: the FLOPs of r = 2, of r = 4
WIDE = ["--n_embd=256", "--ffn_dim=704", "--n_attn_heads=4"]  # 3.3M parameters
TWICE, FOUR_TIMES = ["--max_steps=4000"], ["--max_steps=8000"]

# 2000 steps unless a row says otherwise.
SHORT = {
    "std": Row("Std, 1", STD, 3),
    "std_deep": Row("Std of six blocks, 1", SIX, 3),
    "abbie_d": Row("`abbie_d`, 2", [], 3),
    "recall": Row("`recall`, 2", RECALL, 3),
    "abbie_c": Row("`abbie_c`, 2", ["--rule=abbie_c"], 3),
    "zero_pt": Row("`zero_pt`, 2", ["--rule=zero_pt"]),
    "abbie_d_literal": Row("`abbie_d_literal`, 2", ["--rule=abbie_d_literal"]),
    "abbie_d_1to3": Row("`abbie_d`, 1-3", ["--iters=1-3"]),
    "recall_1to3": Row("`recall`, 1-3", [*RECALL, "--iters=1-3"]),
    "recall_1to7": Row("`recall`, 1-7", [*RECALL, "--iters=1-7"]),
    "abbie_d_raw_tail": Row("`abbie_d`, raw state to the Tail, 2", [], model_class=RawTail),
    "abbie_d_half_tail": Row("`abbie_d`, half-sized Tail projections, 2", [], model_class=HalfTail),
    "abbie_d_body_1": Row("`abbie_d` cut 2+1+1, 2", ["--n_head_blocks=2", "--n_body_blocks=1"]),
    "abbie_d_body_4": Row(
        "`abbie_d` cut 0+4+0, 2", ["--n_head_blocks=0", "--n_body_blocks=4", "--n_tail_blocks=0"]
    ),
    "std_long": Row("Std, 1, twice as long", [*STD, *TWICE], std="std_long"),
    "abbie_d_long": Row("`abbie_d`, 2, twice as long", TWICE, std="std_long"),
    "recall_long": Row("`recall`, 2, twice as long", [*RECALL, *TWICE], std="std_long"),
    "std_longer": Row("Std, 1, four times as long", [*STD, *FOUR_TIMES], std="std_longer"),
    "std_deep_longer": Row("Std of six blocks, 1, four times as long", [*SIX, *FOUR_TIMES], std="std_longer"),
    "abbie_d_longer": Row("`abbie_d`, 2, four times as long", FOUR_TIMES, std="std_longer"),
    "recall_longer": Row("`recall`, 2, four times as long", [*RECALL, *FOUR_TIMES], std="std_longer"),
    "std_wide": Row("Std, 1, twice as wide", [*STD, *WIDE], 3, std="std_wide"),
    "std_deep_wide": Row("Std of six blocks, 1, twice as wide", [*SIX, *WIDE], std="std_wide"),
    "abbie_d_wide": Row("`abbie_d`, 2, twice as wide", WIDE, 3, std="std_wide"),
    "recall_wide": Row("`recall`, 2, twice as wide", [*RECALL, *WIDE], 3, std="std_wide"),
}

# More iterations, better language: 8000 steps in fp32. Two kinds of control cost the FLOPs of the rows that
# iterate: a deeper Std on the same tokens (six blocks for r = 2; ten for a mean r of 6, of which 3 get
# gradients), and the same Std on more tokens.
FP32 = ["--dtype=float32", "--max_steps=8000"]
B1, B2, B3 = (["--backprop_iters=1"], ["--backprop_iters=2"], ["--backprop_iters=3"])
MANY_R = ["--iters=poisson:6", *FP32]
MANY_RECALL = [*RECALL, *MANY_R, *B3]
STEPS_16K = ["--max_steps=16000"]
HEADS = ["--n_attn_heads=4"]  # instead of 2, of half the size
MANY_TITLE = "`recall`, poisson:6, gradients of 3"


def many(title: str, flags: list[str], seeds: int = 1, std: str = "std_8k", **more) -> Row:
    return Row(title, flags, seeds, std, **more)


MANY = {
    "std_8k": many("Std, 1", [*STD, *FP32], 3),
    "std_4_heads": many("Std with four heads, 1", [*STD, *FP32, *HEADS], 3, "std_4_heads"),
    "std_six": many("Std of six blocks, 1", [*SIX, *FP32], 3),
    "std_ten": many("Std of ten blocks, 1", [*TEN, *FP32], 3),
    "std_more_2": many("Std, 1, 11,840 steps", [*STD, "--dtype=float32", "--max_steps=11840"], 3),
    "std_more": many("Std, 1, 19,000 steps", [*STD, "--dtype=float32", "--max_steps=19000"], 3),
    "recall_p6b3": many(MANY_TITLE, MANY_RECALL, 3),
    "recall_4_heads": many(f"{MANY_TITLE}, four heads", [*MANY_RECALL, *HEADS], 3, "std_4_heads"),
    "recall_p6": many("`recall`, poisson:6, all gradients", [*RECALL, *MANY_R]),
    "recall_p6b2": many("`recall`, poisson:6, gradients of 2", [*RECALL, *MANY_R, *B2]),
    "recall_p6b1": many("`recall`, poisson:6, gradients of 1", [*RECALL, *MANY_R, *B1]),
    "recall_1to7_8k": many("`recall`, 1-7", [*RECALL, "--iters=1-7", *FP32]),
    "recall_2_8k": many("`recall`, 2", [*RECALL, *FP32, "--keep_last=11"], 3),  # the next two start from it
    "recall_2_half": many(
        f"2 for half of the steps, then {MANY_TITLE}", MANY_RECALL, start=("recall_2_8k", 4000)
    ),
    "recall_2_most": many(
        f"2 for 70 % of the steps, then {MANY_TITLE}", MANY_RECALL, start=("recall_2_8k", 5600)
    ),
    "recall_6_8k": many("`recall`, 6", [*RECALL, "--iters=6", *FP32]),
    "abbie_d_2_8k": many("`abbie_d`, 2", FP32, 3),
    "abbie_d_p6b3": many("`abbie_d`, poisson:6, gradients of 3", [*MANY_R, *B3]),
}
# Does the lead grow with the run? Rows that start from another do so before either lowers its learning rate,
# which spares their common steps.
LONGER = {
    "std_16k": many("Std, 1", [*STD, *FP32, *STEPS_16K, "--keep_last=21"], 3, "std_16k"),
    "std_more_2_16k": many(
        "Std, 1, 23,680 steps", [*STD, *FP32, "--max_steps=23680"], 3, "std_16k", start=("std_16k", 8000)
    ),
    "std_more_16k": many(
        "Std, 1, 38,000 steps", [*STD, *FP32, "--max_steps=38000"], 3, "std_16k", start=("std_16k", 8000)
    ),
    "recall_2_16k": many(
        "`recall`, 2", [*RECALL, *FP32, *STEPS_16K], 3, "std_16k", start=("recall_2_8k", 4000)
    ),
    "recall_p6b3_16k": many(MANY_TITLE, [*MANY_RECALL, *STEPS_16K], 3, "std_16k"),
}
# Does the learning rate, which suited all at 2000 steps, suit them at 8000?
RATES = {
    f"{name}_{lr}": MANY[name]._replace(
        title=f"{MANY[name].title}, learning rate {lr}", flags=[*MANY[name].flags, f"--lr={lr}"], seeds=1
    )
    for name in ("std_six", "std_more_2", "recall_2_8k")
    for lr in ("5e-4", "2e-3")
}
# What makes recall iterate, a line changed each: 2000 steps in fp32.
P6B3 = ["--iters=poisson:6", *B3]


def ablation(title: str, flags: list[str], model_class=AbbIE) -> Row:
    return Row(title, [*flags, "--dtype=float32"], std="std_2k", model_class=model_class)


ABLATIONS = {
    "std_2k": ablation("Std, 1", STD),
    "recall_2k": ablation("`recall`, 2", RECALL),
    "recall_p6b3_2k": ablation(MANY_TITLE, [*RECALL, *P6B3]),
    "recall_no_h": ablation("`recall` without its h, the same", [*RECALL, *P6B3], NoRecall),
    "recall_undamped": ablation("`recall` without the average, the same", [*RECALL, *P6B3], Undamped),
    "abbie_d_p6b3_2k": ablation("`abbie_d`, poisson:6, gradients of 3", P6B3),
    "abbie_d_equal": ablation("`abbie_d` with weights 1/r, the same", P6B3, EqualWeights),
}
# Depth in the mean, its spread, or the truncated gradient? p4, p8b2 and p10b1 cost the FLOPs of p6b3: less
# depth and more gradients, or the other way round.
DEPTHS = {
    "recall_6b3_2k": ablation("`recall`, 6, gradients of 3", [*RECALL, "--iters=6", *B3]),
    "recall_1to7_2k": ablation("`recall`, 1-7", [*RECALL, "--iters=1-7"]),
    "recall_p6_2k": ablation("`recall`, poisson:6, all gradients", [*RECALL, "--iters=poisson:6"]),
    "recall_p6b2_2k": ablation("`recall`, poisson:6, gradients of 2", [*RECALL, "--iters=poisson:6", *B2]),
    "recall_p6b1_2k": ablation("`recall`, poisson:6, gradients of 1", [*RECALL, "--iters=poisson:6", *B1]),
    "recall_p4_2k": ablation("`recall`, poisson:4, all gradients", [*RECALL, "--iters=poisson:4"]),
    "recall_p8b2_2k": ablation("`recall`, poisson:8, gradients of 2", [*RECALL, "--iters=poisson:8", *B2]),
    "recall_p10b1_2k": ablation("`recall`, poisson:10, gradients of 1", [*RECALL, "--iters=poisson:10", *B1]),
    "recall_two_depths": ablation(
        f"{MANY_TITLE}, and a tenth of the loss two iterations earlier", [*RECALL, *P6B3], TwoDepths
    ),
}
# The same on English: books, as bytes.
BOOKS = ["--data=data/books_bytes"]
ENGLISH = {
    "std_books": Row("Std, 1", [*STD, *FP32, *BOOKS], std="std_books"),
    "std_more_books": Row(
        "Std, 1, 19,000 steps", [*STD, "--dtype=float32", "--max_steps=19000", *BOOKS], std="std_books"
    ),
    "recall_books": Row(MANY_TITLE, [*MANY_RECALL, *BOOKS], std="std_books"),
}
# The same where text is scarce: every 16th file of the library, 0.5 MB, and all of the validation text. More
# steps are more epochs, 4, 8 and 17 of them, so that there is a best number of steps.
THIN_DATA = "data/stdlib_16th"
THIN = ["--dtype=float32", f"--data={THIN_DATA}"]


def thin(title: str, flags: list[str], std: str, seeds: int = 1) -> Row:
    return Row(title, [*flags, *THIN], seeds, std)


MANY_THIN = [*RECALL, *P6B3]
SCARCE = {
    "std_thin_2k": thin("Std, 1, 2000 steps", STD, "std_thin_2k", 3),
    "std_thin_4k": thin("Std, 1, 4000 steps", [*STD, *TWICE], "std_thin_4k"),
    "std_thin": thin("Std, 1, 8000 steps", [*STD, *FOUR_TIMES], "std_thin"),
    "std_ten_thin_2k": thin("Std of ten blocks, 1, 2000 steps", TEN, "std_thin_2k"),
    "recall_thin_2k": thin(f"{MANY_TITLE}, 2000 steps", MANY_THIN, "std_thin_2k", 3),
    "recall_thin_4k": thin(f"{MANY_TITLE}, 4000 steps", [*MANY_THIN, *TWICE], "std_thin_4k"),
    "recall_thin": thin(f"{MANY_TITLE}, 8000 steps", [*MANY_THIN, *FOUR_TIMES], "std_thin"),
}
ROWS = {**SHORT, **MANY, **LONGER, **RATES, **ABLATIONS, **DEPTHS, **ENGLISH, **SCARCE}

GPU_ROWS = {
    "std": Row("Std, 1", STD),
    "std_deep": Row("Std of the FLOPs of r = 2, 1", [*STD, "--n_body_blocks=8"]),
    "abbie_d": Row("`abbie_d`, 2", []),
    "recall": Row("`recall`, 2", RECALL),
    "recall_p6b3": Row("`recall`, poisson:6, gradients of 3", [*RECALL, "--iters=poisson:6", *B3]),
    "std_deeper": Row("Std of the FLOPs of poisson:6, 1", [*STD, "--n_body_blocks=16"]),
    "zero_pt": Row("`zero_pt`, 2", ["--rule=zero_pt"]),
    "abbie_c": Row("`abbie_c`, 2", ["--rule=abbie_c"]),
}

# A study holds everything fixed but the row; dtype too, so that a row means the same on every machine.
SMALL_FLAGS = """--block_size=256 --n_embd=128 --ffn_dim=352 --n_attn_heads=2 --n_head_blocks=1
    --n_body_blocks=2 --n_tail_blocks=1 --dtype=bfloat16 --lr=1e-3 --warmup_steps=100 --decay_frac=0.5
    --tokens_per_step=1024 --micro_batch=4 --max_steps=2000 --eval_every=400 --eval_iters=1,2
    --eval_tokens=32768 --save_every=400"""
GPU_FLAGS = """--data=data/books --block_size=512 --n_embd=512 --ffn_dim=1408 --n_attn_heads=8
    --n_head_blocks=2 --n_body_blocks=4 --n_tail_blocks=2 --dtype=bfloat16 --tokens_per_step=65536
    --micro_batch=64 --max_steps=2400 --lr=1e-3 --eval_every=300 --eval_iters=1,2,4 --save_every=300"""


class Study(NamedTuple):
    name: str  # of the file in results/
    rows: dict[str, Row]
    base: list[str]  # config and flags that all rows share
    iters: str  # at which loss is measured
    tasks: str
    limit: int | None  # examples of each task


SMALL = Study(
    "study", ROWS, [f"{ROOT}/config/abbie_tiny.py", *SMALL_FLAGS.split()],
    "1,2,3,4,6,8,16,32", "cloze,lastword", 2000,
)  # fmt: skip
GPU = Study(
    "study_gpu", GPU_ROWS, [f"{ROOT}/config/abbie_124m.py", *GPU_FLAGS.split()],
    "1,2,3,4,6,8", "lambada_openai,arc_easy,piqa,commonsense_qa,hellaswag", None,
)  # fmt: skip
TASK_ITERS, VAL_TOKENS = "1,2,4,8", 2**18


# -------------------------------------------------------------------------------------------- making a record


def write_thin_data(folder: Path):
    """Every 16th training document of data/stdlib, and its whole validation split."""
    with TemporaryDirectory() as texts:
        for split, step in (("train", 16), ("val", 1)):
            with open(f"{texts}/{split}.jsonl", "w") as file:
                for tokens in islice(documents("data/stdlib", split), 0, None, step):
                    file.write(json.dumps({"text": bytes(tokens.tolist()).decode()}) + "\n")
        inputs = ["--input", f"{texts}/train.jsonl", "--val_input", f"{texts}/val.jsonl"]
        prepare_data.main(["text", *inputs, "--out", str(folder)])


def run_row(study: Study, name: str, seed: int, args):
    """Train (or go on, or take the run in --evaluate), evaluate, and add the record to the results."""
    row, run = study.rows[name], Path(args.evaluate or f"{args.out}/{study.name}/{name}-{seed}")
    argv = [*study.base, *row.flags, f"--seed={seed}", f"--out_dir={run}", *args.flags.split()]
    config = load_config(argv)
    if config.data == THIN_DATA and not Path(config.data, "meta.json").exists():
        write_thin_data(Path(config.data))
    if row.start and not any(run.glob("step_*")):
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
    """A list of r, of which a Std is read at 1 and 2 only: it stays where it is then."""
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


def print_table(study: Study, folder):
    """The records as Markdown."""
    runs = read(study.name, folder)
    long = "8000 steps, fp32"
    groups = {"2000 steps": SHORT, long: MANY, "16,000 steps, fp32": LONGER}
    groups |= {f"{long}, other learning rates": RATES}
    groups |= {"2000 steps, fp32": {**ABLATIONS, **DEPTHS}, f"{long}, English": ENGLISH}
    groups |= {"fp32, 0.5 MB of text": SCARCE}
    groups = groups if study is SMALL else {"52M parameters": GPU_ROWS}
    for title, names in groups.items():
        rows = runs_by_row(study, names, runs)
        if rows:
            print(f"\n**{title}**\n")
            print_losses(study, rows, runs)
            print_tasks(rows)


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
    parser.add_argument("--row", help=f"one of {', '.join(ROWS)}")
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
