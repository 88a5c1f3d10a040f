"""What the study trains: its rows, in groups, and the models that differ from AbbIE in a line.

A row is flags of train.py, or such a model; experiments/study.py trains and reads it.
"""

from functools import partial
from typing import NamedTuple

import torch

from experiments import ROOT
from model import AbbIE

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
CUT_2_1_1 = ["--n_head_blocks=2", "--n_body_blocks=1"]
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
    "abbie_d_body_1": Row("`abbie_d` cut 2+1+1, 2", CUT_2_1_1),
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
STEPS_16K, STEPS_32K = ["--max_steps=16000"], ["--max_steps=32000"]
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
    "recall_4_heads": many(f"{MANY_TITLE}, four heads", [*MANY_RECALL, *HEADS], 2, "std_4_heads"),
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
    # A cheaper way, at the better rate: a Body of one block; less depth in the mean and gradients of 2.
    "recall_body_1_2e-3": many(
        f"{MANY_TITLE}, cut 2+1+1, learning rate 2e-3", [*MANY_RECALL, *CUT_2_1_1, "--lr=2e-3"]
    ),
    "recall_p3b2": many(
        "`recall`, poisson:3, gradients of 2, learning rate 2e-3",
        [*RECALL, *FP32, *B2, "--lr=2e-3", "--iters=poisson:3"],
    ),
}
# Does the lead grow with the run? Rows that start from another do so before either lowers its learning rate,
# which spares their common steps.
LONGER = {
    "std_16k": many("Std, 1", [*STD, *FP32, *STEPS_16K, "--keep_last=21"], 3, "std_16k"),
    "std_more_2_16k": many(
        "Std, 1, 23,680 steps", [*STD, *FP32, "--max_steps=23680"], 3, "std_16k", start=("std_16k", 8000)
    ),
    "recall_2_16k": many(
        "`recall`, 2", [*RECALL, *FP32, *STEPS_16K], 3, "std_16k", start=("recall_2_8k", 4000)
    ),
    "std_ten_16k": many("Std of ten blocks, 1", [*TEN, *FP32, *STEPS_16K], 1, "std_16k"),
    # At 2e-3, where both many r and the Std on more tokens look up with every seed.
    "std_16k_2e-3": many(
        "Std, 1, learning rate 2e-3", [*STD, *FP32, *STEPS_16K, "--lr=2e-3", "--keep_last=21"], 1,
        "std_16k_2e-3",
    ),
    "std_more_16k_2e-3": many(
        "Std, 1, 38,000 steps, learning rate 2e-3",
        [*STD, *FP32, "--max_steps=38000", "--lr=2e-3", "--keep_last=49"], 1, "std_16k_2e-3",
        start=("std_16k_2e-3", 8000),
    ),
    "recall_p6b3_16k_2e-3": many(
        f"{MANY_TITLE}, learning rate 2e-3", [*MANY_RECALL, *STEPS_16K, "--lr=2e-3", "--keep_last=21"], 1,
        "std_16k_2e-3",
    ),
    "std_32k_2e-3": many(
        "Std, 1, 32,000 steps, learning rate 2e-3", [*STD, *FP32, *STEPS_32K, "--lr=2e-3"], 1, "std_32k_2e-3"
    ),
    "std_more_32k_2e-3": many(
        "Std, 1, 76,000 steps, learning rate 2e-3",
        [*STD, *FP32, "--max_steps=76000", "--lr=2e-3"], 1, "std_32k_2e-3",
        start=("std_more_16k_2e-3", 18800),
    ),
    "recall_p6b3_32k_2e-3": many(
        f"{MANY_TITLE}, 32,000 steps, learning rate 2e-3", [*MANY_RECALL, *STEPS_32K, "--lr=2e-3"], 1,
        "std_32k_2e-3", start=("recall_p6b3_16k_2e-3", 8000),
    ),
}  # fmt: skip
# Does the learning rate of 1e-3, chosen for shorter runs, suit 8000 steps? Where another is the best, it has
# three seeds.
RATED = ("std_8k", "std_six", "std_ten", "std_more_2", "std_more", "recall_2_8k", "recall_p6b3")
OTHER_RATES = {
    "4e-3": ("std_more", "recall_p6b3"), "2e-3": RATED, "5e-4": RATED, "2.5e-4": ("std_more_2",),
}  # fmt: skip
BEST_RATES = ("std_8k_2e-3", "recall_p6b3_2e-3", "std_more_2e-3", "std_six_5e-4", "std_more_2_2e-3")


def at_rate(row: Row, lr: str, seeds: int) -> Row:
    return row._replace(
        title=f"{row.title}, learning rate {lr}", flags=[*row.flags, f"--lr={lr}"], seeds=seeds
    )


RATES = {
    f"{name}_{lr}": at_rate(MANY[name], lr, seeds=3 if f"{name}_{lr}" in BEST_RATES else 1)
    for name in RATED
    for lr, rows in OTHER_RATES.items()
    if name in rows
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
THIN_DATA = {"data/stdlib_16th": 16, "data/stdlib_4th": 4}  # folder: of how many documents one is kept
THIN = ["--dtype=float32", "--data=data/stdlib_16th"]


def thin(title: str, flags: list[str], std: str, seeds: int = 1) -> Row:
    return Row(title, [*flags, *THIN], seeds, std)


MANY_THIN = [*RECALL, *P6B3]
SCARCE = {
    "std_thin_2k": thin("Std, 1, 2000 steps", STD, "std_thin_2k", 3),
    "std_thin_4k": thin("Std, 1, 4000 steps", [*STD, *TWICE], "std_thin_4k"),
    "std_thin": thin("Std, 1, 8000 steps", [*STD, *FOUR_TIMES], "std_thin"),
    "std_ten_thin_2k": thin("Std of ten blocks, 1, 2000 steps", TEN, "std_thin_2k", 3),
    "recall_thin_2k": thin(f"{MANY_TITLE}, 2000 steps", MANY_THIN, "std_thin_2k", 3),
    "recall_thin_4k": thin(f"{MANY_TITLE}, 4000 steps", [*MANY_THIN, *TWICE], "std_thin_4k"),
    "recall_thin": thin(f"{MANY_TITLE}, 8000 steps", [*MANY_THIN, *FOUR_TIMES], "std_thin"),
}
# Between: every 4th file, 2.6 MB, of which 8000 steps are 3 epochs and 19,000 steps 8. Each at the rate that
# is its best on all of the text.
QUARTER_DATA = ["--data=data/stdlib_4th"]
QUARTER = {
    "std_quarter": many("Std, 1", [*STD, *FP32, "--lr=2e-3", *QUARTER_DATA], 1, "std_quarter"),
    "std_ten_quarter": many(
        "Std of ten blocks, 1, learning rate 1e-3", [*TEN, *FP32, *QUARTER_DATA], 3, "std_quarter"
    ),
    "std_more_quarter": many(
        "Std, 1, 19,000 steps",
        [*STD, "--dtype=float32", "--max_steps=19000", "--lr=2e-3", *QUARTER_DATA], 3, "std_quarter",
    ),
    "recall_quarter": many(MANY_TITLE, [*MANY_RECALL, "--lr=2e-3", *QUARTER_DATA], 3, "std_quarter"),
}  # fmt: skip
# Does text that is seen again ask for more weight decay than 0.1? With seed 1 it does not.
QUARTER |= {
    f"{name}_decay": row._replace(
        title=f"{row.title}, weight decay 0.3", flags=[*row.flags, "--weight_decay=0.3"], seeds=1
    )
    for name, row in QUARTER.items()
    if name in ("std_more_quarter", "recall_quarter")
}
# As the tables of RESULTS.md have them.
GROUPS = {
    "2000 steps": SHORT,
    "8000 steps, fp32": MANY,
    "16,000 steps and more, fp32": LONGER,
    "8000 steps, fp32, other learning rates": RATES,
    "2000 steps, fp32": {**ABLATIONS, **DEPTHS},
    "8000 steps, fp32, English": ENGLISH,
    "fp32, 0.5 MB of text": SCARCE,
    "fp32, 2.6 MB of text, learning rate 2e-3": QUARTER,
}

GPU_ROWS = {
    "std": Row("Std, 1", STD),
    "std_deep": Row("Std of the FLOPs of r = 2, 1", [*STD, "--n_body_blocks=8"]),
    "abbie_d": Row("`abbie_d`, 2", []),
    "recall": Row("`recall`, 2", RECALL),
    "recall_p6b3": Row("`recall`, poisson:6, gradients of 3", [*RECALL, "--iters=poisson:6", *B3]),
    "std_deeper": Row("Std of the FLOPs of poisson:6, 1", [*STD, "--n_body_blocks=16"]),
    "std_more_2": Row("Std, 1, on more tokens: the FLOPs of r = 2", [*STD, "--max_steps=3020"]),
    "std_more": Row("Std, 1, on more tokens: the FLOPs of poisson:6", [*STD, "--max_steps=4220"]),
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
    groups: dict[str, dict[str, Row]]  # title of a table -> its rows
    base: list[str]  # config and flags that all rows share
    iters: str  # at which loss is measured
    tasks: str
    limit: int | None  # examples of each task

    @property
    def rows(self) -> dict[str, Row]:
        return {name: row for group in self.groups.values() for name, row in group.items()}


SMALL = Study(
    "study", GROUPS, [f"{ROOT}/config/abbie_tiny.py", *SMALL_FLAGS.split()],
    "1,2,3,4,6,8,16,32", "cloze,lastword", 2000,
)  # fmt: skip
GPU = Study(
    "study_gpu", {"52M parameters": GPU_ROWS}, [f"{ROOT}/config/abbie_124m.py", *GPU_FLAGS.split()],
    "1,2,3,4,6,8", "lambada_openai,arc_easy,piqa,commonsense_qa,hellaswag", None,
)  # fmt: skip
