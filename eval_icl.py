"""Perplexity and zero-shot tasks at any number of iterations, all of them from one sweep of the Body.

    python eval_icl.py --iters 1,2,4,8                       # the newest checkpoint on the built-in tasks
    python eval_icl.py --ckpt out/NAME --iters 1,2,4,8 --tasks hellaswag,lambada_openai,arc_easy,piqa \\
        --data_dir data/icl --out r.json --log_samples s.jsonl            # after: python prepare_data.py icl
    python eval_icl.py --ckpt out/NAME --iters 1,2,4,8 --ppl data/c4      # on a whole validation split
    torchrun --nproc_per_node=8 eval_icl.py --ckpt out/NAME ...           # the same table, faster
    python -m hf.export --ckpt out/NAME --out FOLDER                      # any other task: lm_eval --model hf

How zero-shot scoring works. A row of a task, here of arc_easy,

    {"question": "What do bees make?", "answerKey": "A",
     "choices": {"text": ["honey", "iron"], "label": ["A", "B"]}}

becomes requests, each a context and a continuation. A request's score is the sum of the log-probabilities
that the model gives to the continuation's tokens, each after the context and the tokens before it:

    "Question: What do bees make?\\nAnswer:"  " honey"  -23.8
    "Question: What do bees make?\\nAnswer:"  " iron"   -17.2

(of config/abbie_tiny.py, a byte model that has read nothing but Python, at r = 2). `acc` asks whether the
right continuation has the highest score, `acc_norm` whether it has the highest score per character (not
counting the space): -23.8 / 5 against -17.2 / 4, wrong both times. A LAMBADA row is one request, for the last
word of a text: `acc` asks whether each of its tokens is the most probable one, `perplexity` is exp(-mean
score), per word. All this is as in EleutherAI's lm-evaluation-harness 0.4.13, example by example. Two tasks
need no download: `cloze` and `lastword` are made of the validation text of a model's training data, or of
the folder that --ppl names.

Shapes: B rows, T tokens, D n_embd, V vocab_size, M scored tokens, N requests (windows), R entries of iters.
"""

import json
import math
import os
import random
import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from checkpoint import load_model, write_json, write_whole
from config import (
    DTYPES,
    ArgumentParser,
    choose_device,
    choose_dtype,
    cli,
    leave_ranks,
    nearest,
    parse_list,
    start_ranks,
    together,
)
from data import Shards, tokenizer_in, tokenizer_of
from model import AbbIE, UserError, check

# --------------------------------------------------------------------------------- a row -> its requests


class Example(NamedTuple):
    """A (context, continuation) for each choice, and the number of the right one."""

    requests: list[tuple[str, str]]
    gold: int


def choose(context: str, choices: list[str], gold: int) -> Example:
    return Example([(context, " " + choice) for choice in choices], gold)


def last_word(text: str) -> Example:
    context, _, word = text.rpartition(" ")
    return Example([(context, " " + word)], 0)


def clean(text: str) -> str:
    """HellaSwag's text. The order matters: an ending may keep a space in front."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def render(name: str, row: dict) -> Example:
    """A row of a task's dataset -> what the harness makes of it."""
    match name:
        case "hellaswag":
            context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            endings = [clean(ending) for ending in row["endings"]]
            return choose(clean(context), endings, int(row["label"]))
        case "lambada_openai":
            return last_word(row["text"])
        case "arc_easy" | "arc_challenge" | "openbookqa":
            bare = name == "openbookqa"
            context = row["question_stem"] if bare else f"Question: {row['question']}\nAnswer:"
            gold = row["choices"]["label"].index(row["answerKey"].strip())
            return choose(context, row["choices"]["text"], gold)
        case "commonsense_qa":
            letters, texts = list("ABCDE"), row["choices"]["text"]
            listed = "\n".join(f"{letter}. {texts[i]}" for i, letter in enumerate(letters))
            context = f"Question: {row['question'].strip()}\n{listed}\nAnswer:"
            return choose(context, letters, letters.index(row["answerKey"]))
        case "piqa":
            choices = [row["sol1"], row["sol2"]]
            return choose(f"Question: {row['goal']}\nAnswer:", choices, int(row["label"]))
        case "sciq":
            context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
            wrong = [row[f"distractor{i}"] for i in (1, 2, 3)]
            return choose(context, [*wrong, row["correct_answer"]], 3)
        case "winogrande":  # which option makes the rest of the sentence likelier?
            before, after = row["sentence"].split("_", 1)
            contexts = [before + row["option1"], before + row["option2"]]
            requests = [(context, " " + after.strip()) for context in contexts]
            return Example(requests, int(row["answer"]) - 1)


def draw(spots: list, n: int) -> list:
    """n of the spots by chance (all, if there are fewer); the first of them are the same for every n."""
    rng, chosen = random.Random(1234), {}
    while len(chosen) < min(n, len(spots)):
        chosen[rng.randrange(len(spots))] = True
    return [spots[i] for i in chosen]


def make_cloze(texts: list[str], n: int, before: int) -> list[Example]:
    """HellaSwag's form: the next 32 characters or so, and three others from elsewhere."""
    space = re.compile(r"(?s)(?<=\S) (?=\S.{47})")
    spots = [(text, match.start()) for text in texts for match in space.finditer(text)]
    spots = draw(spots, min(4 * n, len(spots) // 4 * 4))
    stretches = [re.match(r"(?s).{32}\S{,16}", text[at + 1 : at + 49]).group() for text, at in spots]
    examples = []
    for i in range(0, len(spots), 4):
        (text, at), choices = spots[i], stretches[i + 1 : i + 4]
        gold = i // 4 % 4  # the right one takes every place in turn
        choices.insert(gold, stretches[i])
        examples.append(choose(text[max(0, at - before) : at], choices, gold))
    return examples


def make_last_word(texts: list[str], n: int, before: int) -> list[Example]:
    """LAMBADA's form: the last word, letters and a point at most, of a line of four words or more."""
    lines = re.compile(r"(?m)^.*\S [^\W\d_]{1,20}[.,:;]?$")
    spots = []
    for text in texts:
        for match in lines.finditer(text):
            if len(match.group().split()) >= 4:
                spots.append((text, match.end()))
    return [last_word(text[max(0, end - before) : end]) for text, end in draw(spots, n)]


# -------------------------------------------------------------------------------- the tasks and their rows


class Task(NamedTuple):
    """Its metrics, and the split and number of its rows; a built-in task has none."""

    metrics: tuple[str, ...]
    split: str = ""
    n_rows: int = 0


ACC, NORM, WORD = ("acc",), ("acc", "acc_norm"), ("perplexity", "acc")
TASKS = {
    "cloze": Task(NORM),
    "lastword": Task(WORD),
    "hellaswag": Task(NORM, "validation", 10042),
    "lambada_openai": Task(WORD, "test", 5153),
    "arc_easy": Task(NORM, "test", 2376),
    "arc_challenge": Task(NORM, "test", 1172),
    "commonsense_qa": Task(ACC, "validation", 1221),
    "piqa": Task(NORM, "validation", 1838),
    "openbookqa": Task(NORM, "test", 500),
    "sciq": Task(NORM, "test", 1000),
    "winogrande": Task(ACC, "validation", 1267),
}
BUILT_IN = ["cloze", "lastword"]
DOWNLOADED = [name for name in TASKS if name not in BUILT_IN]


def load_task(name: str, data, data_dir, block_size: int, limit: int | None) -> list[Example]:
    """The first `limit` examples of a task (None: all): rows of DATA_DIR/TASK/SPLIT.jsonl, or, of a built-in
    task, made of the folder of shards `data` (None: 300)."""
    if name in BUILT_IN:
        return make_task(name, data, block_size, limit or 300)
    path, examples = Path(data_dir, name, f"{TASKS[name].split}.jsonl"), []
    command = f"python prepare_data.py icl --out {data_dir}"
    check(path.is_file(), f"{path} is missing\nget it: {command}")
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                example = render(name, json.loads(line))
                texts = [continuation.strip() for _, continuation in example.requests]
                check(0 <= example.gold < len(texts), f"no choice {example.gold}")
                check(all(texts), "an empty choice")
            except Exception as error:  # whatever a row of another form leads to
                problem = f"{path}, line {number} is no row of {name}: {error!r}"
                raise UserError(f"{problem}\nremove the file and get it again: {command}") from None
            examples.append(example)
    check(bool(examples), f"{path} has no rows\nremove it and get it again: {command}")
    return examples


def make_task(name: str, data: str | Path, block_size: int, n: int) -> list[Example]:
    """n examples (if there are so many) from the first two million tokens of the largest validation shard;
    those for a larger n begin with them. Contexts have at most block_size / 2 characters, and at most 512."""
    shards = Shards(data, "val", 1)
    tokenizer, largest = tokenizer_in(data, shards.tokenizer), int(np.argmax(shards.sizes))
    tokens = shards.read(largest, 0, min(1 << 21, shards.sizes[largest]))
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token) + 1)
    texts = [tokenizer.decode(part[part != tokenizer.eot_token].tolist()) for part in documents]
    make = make_cloze if name == "cloze" else make_last_word
    examples = make(texts, n, min(512, block_size // 2))
    check(bool(examples), f"{data}: the validation split is too small for {name}\nprepare more text")
    return examples


# ------------------------------------------------------------------------------------- requests -> scores

# So that memory grows neither with the batch nor with the vocabulary.
LOGITS_AT_A_TIME = 1 << 24


def encode_requests(tokenizer, requests: list[tuple[str, str]]) -> list[tuple]:
    """Strings -> tokens of (context, continuation), split after as many tokens as the context alone has.
    Whitespace at a context's end belongs to the continuation; an empty context becomes the end-of-text
    token."""
    pairs = []
    for context, continuation in requests:
        start = tokenizer.encode_ordinary(context.rstrip())
        whole = tokenizer.encode_ordinary(context + continuation)
        if not start:
            start = [tokenizer.eot_token]
            whole = whole if whole[:1] == start else start + whole
        check(len(whole) > len(start), f"{continuation!r} adds no token to its context")
        pairs.append((torch.tensor(start), torch.tensor(whole[len(start) :])))
    return pairs


def score_tokens(model: AbbIE, z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States z (M, D) that predict tokens (M,) -> log-probabilities (M,) float64, and whether each token is
    the most probable one (M,). The softmax is fp32."""
    at_a_time = max(1, LOGITS_AT_A_TIME // model.config.vocab_size)
    logprobs, hits = [], []
    for part, token in zip(z.split(at_a_time), tokens.split(at_a_time)):
        logits = model.logits(part).float()  # (<= at_a_time, V)
        logprobs.append(-F.cross_entropy(logits, token, reduction="none"))
        hits.append(logits.argmax(-1) == token)
    return torch.cat(logprobs).cpu().double(), torch.cat(hits).cpu()


@torch.no_grad()
def score(
    model: AbbIE, pairs, iters, batch_size=32, rank=0, world=1, autocast=nullcontext, bar=""
) -> tuple[np.ndarray, np.ndarray]:
    """N pairs of tokens (context, continuation) -> log-likelihoods (N, R), and whether every token is the
    argmax (N, R), at each of the ascending iters. A context that is too long loses its start. Batches are the
    same for any number of ranks, each of which takes a stride of them; so are the scores."""
    device, N = model.embed.weight.device, len(pairs)
    longest_first = sorted(range(N), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
    batches = [longest_first[first : first + batch_size] for first in range(0, N, batch_size)]
    result = torch.zeros(2, N, len(iters), dtype=torch.float64)
    for batch in tqdm(batches[rank::world], desc=bar, disable=None if bar and rank == 0 else True):
        rows = [torch.cat(pairs[n])[-(model.config.block_size + 1) :] for n in batch]
        lengths = [len(pairs[n][1]) for n in batch]
        ends = [len(row) - 1 for row in rows]
        # Each position predicts the next token, so the last one of a row is not read. Rows are padded on the
        # right, where no token before can see it.
        idx = pad_sequence([row[:-1] for row in rows], batch_first=True).to(device)  # (B, T)
        tokens = torch.cat([pairs[n][1] for n in batch]).to(device)  # (M,)
        with autocast():
            for i, z in enumerate(model.states_at(idx, iters)):  # (B, T, D)
                scored = [row[end - n : end] for row, end, n in zip(z, ends, lengths)]
                logprobs, hits = score_tokens(model, torch.cat(scored), tokens)  # (M,) each
                for n, nats, hit in zip(batch, logprobs.split(lengths), hits.split(lengths)):
                    result[0, n, i], result[1, n, i] = nats.sum(), hit.all()
    if world > 1:
        dist.all_reduce(result)  # exact: one rank has the scores of a request, and the others 0
    return result[0].numpy(), result[1].bool().numpy()


def window_losses(
    model: AbbIE, shards: Shards, iters, n_windows=None, batch_size=32, rank=0, world=1, bar="", **options
) -> np.ndarray:
    """Mean nats per token (N, R) of N windows, evenly spaced over the split (None: all of them). A window is
    a request whose context is one token. Read by one batch for each rank. The options are score's."""
    N = min(n_windows or shards.n_windows, shards.n_windows)
    windows, step, losses = np.arange(N) * shards.n_windows // N, batch_size * world, []
    for first in tqdm(range(0, N, step), desc=bar, disable=None if bar and rank == 0 else True):
        x, y = shards.batch(windows[first : first + step])
        scores, _ = score(model, list(zip(x[:, :1], y)), iters, batch_size, rank, world, **options)
        losses.append(-scores / shards.block_size)
    return np.concatenate(losses)


def evaluate_loss(model: AbbIE, shards: Shards, iters: Iterable[int], n_windows=None, **options) -> dict:
    """{r: mean nats per token}, on the same windows at every call. The options are score's."""
    iters = sorted({model.check_iters(r) for r in iters})
    losses = window_losses(model, shards, iters, n_windows, **options)
    return dict(zip(iters, losses.mean(0).tolist()))


# --------------------------------------------------------------------------------- scores -> metrics, a table


def check_finite(scores: np.ndarray, iters: list[int]):
    """Scores (N, R). NaN compares as False: without this, a broken model would seem to guess choice 0."""
    broken = [r for r, finite in zip(iters, np.isfinite(scores).all(0)) if not finite]
    problem = f"the model is not finite: at iters {broken} it has NaN or infinite scores"
    check(not broken, f"{problem}\ntake an earlier checkpoint, fewer iterations, or --dtype float32")


def measure(metrics: tuple[str, ...], example: Example, scores, greedy) -> dict[str, np.ndarray]:
    """One example's scores and greedy, (choices, R) each -> {metric: what it is the mean of, (R,)}."""
    if metrics == WORD:  # every token of the word is the argmax
        return {"perplexity": -scores[0], "acc": greedy[0]}
    # Per character of the choice, without the space before it.
    lengths = np.array([len(continuation) - 1 for _, continuation in example.requests])
    right = scores.argmax(0) == example.gold
    return {"acc": right, "acc_norm": (scores / lengths[:, None]).argmax(0) == example.gold}


def summarize(values: dict[str, np.ndarray], iters: list[int]) -> dict:
    """{metric: (N, R)} -> {r: {metric: the mean, metric_stderr: its standard error, None where N is 1}}. A
    perplexity is exp(mean), and its error, by the delta method, exp(mean) times that of the mean."""
    entries = {str(r): {} for r in iters}
    for metric, table in values.items():
        for entry, x in zip(entries.values(), table.T):
            mean = float(x.mean())
            stderr = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else None
            if metric == "perplexity":
                mean = math.exp(min(700, mean))
                stderr = stderr and mean * stderr
            entry |= {metric: mean, f"{metric}_stderr": stderr}
    return entries


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict:
    """Exact two-sided test of whether two r (or two models) are right equally often, from the examples where
    just one of them is; before and after (N,) bool."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return {"gained": gained, "lost": lost, "p": min(1.0, 2 * tail / 2**n)}


def run_task(
    model: AbbIE, tokenizer, name: str, examples: list[Example], iters: list[int], **options
) -> tuple[dict, list[dict]]:
    """One task at ascending iters -> {"n", "left_out", "iters": {r: {metric, metric_stderr}}, "paired":
    {"reference": the default r (else the first), r: {metric: McNemar's test}}}, and a sample for every
    example and r. Those with a continuation longer than the context are left out. Options: score's."""
    metrics, T, kept, pairs = TASKS[name].metrics, model.config.block_size, [], []
    for number, example in enumerate(examples):
        encoded = encode_requests(tokenizer, example.requests)
        if max(len(tokens) for _, tokens in encoded) <= T:
            kept.append(number)
            pairs += encoded
    check(bool(kept), f"{name}: no row's continuations fit into the context of {T} tokens")
    scores, greedy = score(model, pairs, iters, bar=name, **options)
    check_finite(scores, iters)
    ends = np.cumsum([len(examples[number].requests) for number in kept])[:-1]
    measured, samples = [], []
    for number, nats, hits in zip(kept, np.split(scores, ends), np.split(greedy, ends)):
        measured.append(measure(metrics, examples[number], nats, hits))
        for i, r in enumerate(iters):
            sample = {"task": name, "doc_id": number, "iters": r}
            sample["loglikelihoods"] = nats[:, i].tolist()
            sample["is_greedy"] = hits[:, i].tolist()
            sample["gold"] = examples[number].gold
            samples.append(sample)

    reference = model.config.iters if model.config.iters in iters else iters[0]
    values, paired = {}, {"reference": reference, **{str(r): {} for r in iters}}
    for metric in metrics:
        values[metric] = x = np.array([example[metric] for example in measured])  # (N, R)
        for i, r in enumerate(iters):
            if metric != "perplexity":
                paired[str(r)][metric] = mcnemar(x[:, iters.index(reference)], x[:, i])
    result = {"n": len(kept), "left_out": len(examples) - len(kept)}
    return {**result, "iters": summarize(values, iters), "paired": paired}, samples


def perplexity(model: AbbIE, shards: Shards, iters: list[int], **options) -> dict:
    """Of a whole split: loss in nats per token, perplexity per token, and bits per byte of its text, which
    compare models of different tokenizers. Errors are those of a mean over windows."""
    losses = window_losses(model, shards, iters, bar="perplexity", **options)
    check_finite(losses, iters)
    n, bits = losses.shape[0] * shards.block_size, shards.n_tokens / shards.n_bytes / math.log(2)
    values = {"loss": losses, "perplexity": losses, "bits_per_byte": bits * losses}
    result = {"data": str(shards.folder), "n": n, "left_out": shards.n_tokens - n}
    return {**result, "iters": summarize(values, iters)}


def cell(entry: dict, metric: str, best: float) -> str:
    """A metric and its error; accuracies in percent."""
    texts = []
    for value in (entry[metric], entry[f"{metric}_stderr"]):
        if value is not None and metric.startswith("acc"):
            texts.append(f"{100 * value:.2f}")
        elif value is not None:
            texts.append(f"{value:.4f}" if value < 1000 else f"{value:.4g}")
    return " ± ".join(texts) + ("*" if entry[metric] == best else " ")


def print_table(results: dict):
    """Rows: tasks and metrics. Columns: iters. The best r of a row is marked with *."""
    sections, lines = dict(results["tasks"]), []
    if "ppl" in results:
        sections[results["ppl"]["data"]] = results["ppl"]
    for name, section in sections.items():
        n, entries = section["n"], list(section["iters"].values())
        official = TASKS[name].n_rows if name in DOWNLOADED else n + section["left_out"]
        count = str(n) if n == official else f"{n}/{official}"
        lines = lines or [["", "*: best", "n", *(f"r={r} " for r in section["iters"])]]
        for metric in [key for key in entries[0] if not key.endswith("_stderr")]:
            better = max if metric.startswith("acc") else min
            best = better(entry[metric] for entry in entries)
            lines.append([name, metric, count, *(cell(entry, metric, best) for entry in entries)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, metric, *cells in lines:
        cells = [text.rjust(width) for text, width in zip(cells, widths[2:])]
        print(name.ljust(widths[0]), metric.ljust(widths[1]), *cells, sep="  ")
    for name, section in results["tasks"].items():
        if section["left_out"]:
            print(f"{name}: {section['left_out']} rows left out: a choice is longer than the context")


# ------------------------------------------------------------------------------------------------ the command


def parse_args(argv: list[str]):
    parser = ArgumentParser(prog="eval_icl.py", description=__doc__.split("\n\nHow")[0])
    add = parser.add_argument
    add("--ckpt", help="run folder, checkpoint or hf:FOLDER (the newest under out/)")
    add("--iters", default="1,2,4,8", help="iterations of the Body (1,2,4,8)")
    add("--tasks", default="", help=f"of {', '.join(TASKS)} (without --ppl: {','.join(BUILT_IN)})")
    add("--data_dir", default="data/icl", help="holds TASK/SPLIT.jsonl (data/icl)")
    add("--limit", type=int, help="the first N examples of each task (all; of a built-in one 300)")
    add("--ppl", nargs="?", const="", metavar="FOLDER", help="validation loss on shards (its own data)")
    add("--batch_size", type=int, default=32, help="requests or windows at a time (32)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", choices=("auto", *DTYPES), help="of matrix products (float32)")
    add("--out", type=Path, metavar="FILE", help="JSON of the results, written after every task")
    add("--log_samples", type=Path, metavar="FILE", help="JSON lines of every example's scores")
    args = parser.parse_args(argv)
    check(args.batch_size >= 1, "--batch_size must be at least 1")
    check(args.limit is None or args.limit >= 1, "--limit must be at least 1")
    default = BUILT_IN if args.ppl is None else []
    args.tasks = re.findall(r"[^,\s]+", args.tasks) or default
    for name in args.tasks:
        if name not in TASKS:
            raise UserError(f"no task {name}{nearest(name, TASKS)}\nthere are {', '.join(TASKS)}")
    return args


def main(argv: list[str]):
    rank, world = start_ranks()
    with together():  # what can be wrong is found here, before anything is computed or written
        args = parse_args(argv)
        device = choose_device(args.device)
        model, dtype = load_model(args.ckpt, device), choose_dtype(args.dtype, device)
        tokenizer, T = tokenizer_of(model), model.config.block_size
        iters = sorted({model.check_iters(r) for r in parse_list(args.iters, "iters")})
        data = args.ppl or model.meta.get("data")
        if args.ppl is not None or set(args.tasks) & set(BUILT_IN):
            check(isinstance(data, str), "the model names no data: give shards by --ppl FOLDER")
        tasks = {name: load_task(name, data, args.data_dir, T, args.limit) for name in args.tasks}
        if args.ppl is not None:
            shards, tokens = Shards(data, "val", T), model.meta["tokenizer"]
            other = f"{data} holds {shards.tokenizer} tokens, the model reads {tokens}"
            check(shards.tokenizer == tokens, f"{other}\nprepare the text with --tokenizer {tokens}")
        for path in filter(None, (args.out, args.log_samples)):
            writable = os.access(path.parent, os.W_OK) and (path.is_file() or not path.exists())
            check(writable, f"{path} cannot be written\nname one in a folder that exists")
    if rank == 0:
        print(f"evaluating {model.meta['ckpt']}", file=sys.stderr)

    results = {"ckpt": model.meta["ckpt"], "trained_iters": model.config.iters}
    results |= {"dtype": str(dtype).removeprefix("torch."), "tasks": {}}
    samples = []

    def save():
        with together():
            if rank == 0 and args.out:
                write_json(args.out, results)
            if rank == 0 and args.log_samples:
                lines = "".join(json.dumps(sample) + "\n" for sample in samples)
                write_whole(args.log_samples, lines.encode())

    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    options = {"batch_size": args.batch_size, "rank": rank, "world": world, "autocast": autocast}
    for name, examples in tasks.items():
        results["tasks"][name], task_samples = run_task(model, tokenizer, name, examples, iters, **options)
        samples += task_samples
        save()
    if args.ppl is not None:
        results["ppl"] = perplexity(model, shards, iters, **options)
        save()
    print_table(results)
    leave_ranks()


if __name__ == "__main__":
    cli(main)
