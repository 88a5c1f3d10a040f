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

These two scores are of config/abbie_tiny.py, a byte model that has read nothing but Python, at r = 2. `acc`
asks whether the right continuation has the highest score, `acc_norm` whether it has the highest score per
character (not counting the space): -23.8 / 5 against -17.2 / 4, wrong both times. A LAMBADA row is one
request, for the last word of a text: `acc` asks whether each of its tokens is the most probable one,
`perplexity` is exp(-mean score), per word. Tasks, strings and metrics are those of EleutherAI's
lm-evaluation-harness 0.4.13, example by example. Two tasks need no download: `cloze` and `lastword` are made
of the validation text of the data that a model was trained on.

Shapes: B rows, T tokens, D n_embd, V vocab_size, M scored tokens, N requests (windows), R entries of iters.
"""

import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
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

from checkpoint import load_model, write_json
from config import (
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
from data import Shards, documents, tokenizer_in, tokenizer_of
from model import AbbIE, UserError, check

# --------------------------------------------------------------------------------- a row -> its requests


class Example(NamedTuple):
    requests: list[tuple[str, str]]  # (context, continuation), one for each choice
    gold: int  # number of the right one


def choose(context: str, choices: list[str], gold: int) -> Example:
    return Example([(context, " " + choice) for choice in choices], gold)


def hellaswag(row: dict) -> Example:
    def clean(text):  # the order matters: an ending may keep a space in front
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


def arc(row: dict) -> Example:
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return choose(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold)


def commonsense_qa(row: dict) -> Example:
    letters, texts = list("ABCDE"), row["choices"]["text"]
    listed = "\n".join(f"{letter}. {texts[i]}" for i, letter in enumerate(letters))
    context = f"Question: {row['question'].strip()}\n{listed}\nAnswer:"
    return choose(context, letters, letters.index(row["answerKey"]))


def piqa(row: dict) -> Example:
    return choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def sciq(row: dict) -> Example:
    choices = [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return choose(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def openbookqa(row: dict) -> Example:
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return choose(row["question_stem"], row["choices"]["text"], gold)


def lambada(row: dict) -> Example:
    context, _, word = row["text"].rpartition(" ")
    return Example([(context, " " + word)], 0)


def winogrande(row: dict) -> Example:
    """Two contexts and one continuation: which option makes the rest of the sentence likelier?"""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return Example([(context, " " + after.strip()) for context in contexts], int(row["answer"]) - 1)


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
    """LAMBADA's form: the last word of a line of four words or more."""
    lines = re.compile(r"(?m)^.*\S [^\W\d_]{1,20}[.,:;]?$")  # the word: letters, and a point at most
    matches = [(text, match) for text in texts for match in lines.finditer(text)]
    spots = [(text, match.end()) for text, match in matches if len(match.group().split()) >= 4]
    return [lambada({"text": text[max(0, end - before) : end]}) for text, end in draw(spots, n)]


# -------------------------------------------------------------------------------- the tasks and their rows

CONVERTED = "refs/convert/parquet"  # the branch in which the Hub keeps datasets as CONFIG/SPLIT/0000.parquet
HELLASWAG = "218ec52e09a7e7462a5400043bb9a69a41d06b76"  # a revision that has all rows
LAMBADA = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"  # SHA-256 of OpenAI's file


class Task(NamedTuple):
    """What is measured, and how a row becomes an Example. Rows are a file of a dataset on the Hugging Face
    Hub; where there is none, render makes Examples of texts: (texts, how many, characters before)."""

    metrics: tuple[str, ...]
    render: Callable
    repo: str = ""
    file: str = ""
    split: str = ""
    n_rows: int = 0
    revision: str = CONVERTED
    sha256: str = ""  # "": what the Hub says it is


# The names of the converted files follow the Hub's rule. We have not seen piqa's: should its
# download fail, look the name up on the Hub.
ACC, NORM, WORD = ("acc",), ("acc", "acc_norm"), ("perplexity", "acc")
TASKS = {
    "cloze": Task(NORM, make_cloze),
    "lastword": Task(WORD, make_last_word),
    "hellaswag": Task(
        NORM, hellaswag,
        "Rowan/hellaswag", "data/validation-00000-of-00001.parquet", "validation", 10042, HELLASWAG,
    ),
    "lambada_openai": Task(
        WORD, lambada,
        "EleutherAI/lambada_openai", "data/lambada_test.jsonl", "test", 5153, "main", LAMBADA,
    ),
    "arc_easy": Task(NORM, arc, "allenai/ai2_arc", "ARC-Easy/test/0000.parquet", "test", 2376),
    "arc_challenge": Task(NORM, arc, "allenai/ai2_arc", "ARC-Challenge/test/0000.parquet", "test", 1172),
    "commonsense_qa": Task(
        ACC, commonsense_qa, "tau/commonsense_qa", "default/validation/0000.parquet", "validation", 1221
    ),
    "piqa": Task(NORM, piqa, "baber/piqa", "default/validation/0000.parquet", "validation", 1838),
    "openbookqa": Task(NORM, openbookqa, "allenai/openbookqa", "main/test/0000.parquet", "test", 500),
    "sciq": Task(NORM, sciq, "allenai/sciq", "default/test/0000.parquet", "test", 1000),
    "winogrande": Task(
        ACC, winogrande, "allenai/winogrande", "winogrande_xl/validation/0000.parquet", "validation", 1267
    ),
}  # fmt: skip
BUILT_IN = [name for name, task in TASKS.items() if not task.repo]
DOWNLOADED = [name for name, task in TASKS.items() if task.repo]


def load_task(name: str, data, data_dir, block_size: int, limit: int | None) -> list[Example]:
    """The first `limit` examples of a task (None: all): rows of DATA_DIR/TASK/SPLIT.jsonl, or, of a built-in
    task, made of the folder of shards `data` (None: 300). Raises UserError for an unknown task, a missing
    file and the first row that is not one of the task's."""
    if name not in TASKS:
        raise UserError(
            f"unknown task {name!r}{nearest(name, TASKS)}; there are {', '.join(TASKS)}\n"
            "the harness has others: python -m hf.export, then lm_eval --model hf"
        )
    if name in BUILT_IN:
        return make_task(name, data, block_size, limit or 300)
    path, examples = Path(data_dir, name, f"{TASKS[name].split}.jsonl"), []
    command = f"python prepare_data.py icl --out {data_dir}"
    check(path.is_file(), f"{path} is missing\nget it: {command}")
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                example = TASKS[name].render(json.loads(line))
                if not 0 <= example.gold < len(example.requests):
                    raise ValueError(f"no choice {example.gold}")
                if not all(continuation.strip() for _, continuation in example.requests):
                    raise ValueError("an empty choice")
            except (KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number} is no row of {name} ({type(error).__name__}: {error})\n"
                    f"remove the file and get it again: {command}"
                ) from None
            examples.append(example)
    check(bool(examples), f"{path} has no rows\nremove it and get it again: {command}")
    return examples


def make_task(name: str, data: str | Path, block_size: int, n: int) -> list[Example]:
    """n examples (if there are so many) from the first two million characters of the validation split of
    `data`; those for a larger n begin with them. Contexts have at most block_size / 2 characters, and at most
    512."""
    tokenizer, texts, size = tokenizer_in(data, Shards(data, "val", 1).tokenizer), [], 0
    for tokens in documents(data, "val"):
        texts.append(tokenizer.decode(tokens[: 1 << 20].tolist()))
        size += len(texts[-1])
        if size > 1 << 21:
            break
    examples = TASKS[name].render(texts, n, min(512, block_size // 2))
    check(bool(examples), f"the validation split of {data} is too small to make {name} of\nprepare more text")
    return examples


# ------------------------------------------------------------------------------------- requests -> scores

LOGITS_AT_A_TIME = 1 << 24  # so that memory grows neither with the batch nor with the vocabulary


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
        pairs.append((torch.tensor(start), torch.tensor(whole[len(start) :], dtype=torch.int64)))
    return pairs


def score_tokens(model: AbbIE, z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States z (M, D) that predict tokens (M,) -> log-probabilities (M,) float64, and whether each token is
    the most probable one (M,). The softmax is fp32, over the vocabulary without its padding."""
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
    argmax (N, R), at each of the ascending iters, computed in the context autocast(). A context that is too
    long loses its start. Batches are the same for any number of ranks, each of which takes a stride of them;
    so are the scores. bar: name of a progress bar."""
    device, N = model.embed.weight.device, len(pairs)
    longest_first = sorted(range(N), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
    batches = [longest_first[first : first + batch_size] for first in range(0, N, batch_size)]
    result = torch.zeros(2, N, len(iters), dtype=torch.float64)
    for batch in tqdm(batches[rank::world], desc=bar, disable=None if bar and rank == 0 else True):
        rows = [torch.cat(pairs[n])[-(model.config.block_size + 1) :] for n in batch]
        lengths = [len(pairs[n][1]) for n in batch]
        # Each position predicts the next token, so the last one of a row is not read. Rows are padded on the
        # right, where no token before can see it.
        idx = pad_sequence([row[:-1] for row in rows], batch_first=True).to(device)  # (B, T)
        tokens = torch.cat([pairs[n][1] for n in batch]).to(device)  # (M,)
        with autocast():
            for i, z in enumerate(model.states_at(idx, iters)):  # (B, T, D)
                ends = [len(row) - 1 for row in rows]
                scored = [z[b, end - n : end] for b, (end, n) in enumerate(zip(ends, lengths))]
                logprobs, hits = score_tokens(model, torch.cat(scored), tokens)  # (M,) each
                result[0, batch, i] = torch.stack([part.sum() for part in logprobs.split(lengths)])
                result[1, batch, i] = torch.stack([part.all() for part in hits.split(lengths)]).double()
    if world > 1:
        dist.all_reduce(result)  # exact: one rank has the scores of a request, and the others 0
    return result[0].numpy(), result[1].bool().numpy()


def window_losses(
    model: AbbIE, shards: Shards, iters, n_windows=None, batch_size=32, rank=0, world=1, bar="", **options
) -> np.ndarray:
    """Mean nats per token (N, R) of N windows, evenly spaced over the split (None: all of them). A window is
    a request whose context is one token. Read by one batch for each rank. The options are score's."""
    N = min(n_windows or shards.n_windows, shards.n_windows)
    windows = np.arange(N) * shards.n_windows // N
    step, losses = batch_size * world, []
    for first in tqdm(range(0, N, step), desc=bar, disable=None if bar and rank == 0 else True):
        x, y = shards.batch(windows[first : first + step])
        pairs = list(zip(x[:, :1], y))
        scores, _ = score(model, pairs, iters, batch_size, rank, world, **options)
        losses.append(-scores / shards.block_size)
    return np.concatenate(losses)


def evaluate_loss(model: AbbIE, shards: Shards, iters: Iterable[int], n_windows=None, **options) -> dict:
    """{r: mean nats per token}, on the same windows at every call. The options are score's."""
    iters = sorted({model.check_iters(r) for r in iters})
    losses = window_losses(model, shards, iters, n_windows, **options)
    return dict(zip(iters, losses.mean(0).tolist()))


# ------------------------------------------------------------------------------------------ scores -> metrics


def check_finite(scores: np.ndarray, iters: list[int]):
    """Scores (N, R). NaN compares as False: without this, a broken model would seem to guess choice 0."""
    broken = [r for r, finite in zip(iters, np.isfinite(scores).all(0)) if not finite]
    check(
        not broken,
        f"the model is not finite: at iters {broken} it has NaN or infinite scores\n"
        "take an earlier checkpoint, fewer iterations, or --dtype float32",
    )


def summary(metric: str, x: np.ndarray) -> dict:
    """The mean of x (N,) and its standard error (None where N is 1). A perplexity is exp(mean), and its
    error, by the delta method, exp(mean) times that of the mean."""
    mean = float(x.mean())
    stderr = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else None
    if metric == "perplexity":
        mean = math.exp(min(700, mean))
        stderr = stderr and mean * stderr
    return {metric: mean, f"{metric}_stderr": stderr}


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict:
    """Exact two-sided test of whether two r (or two models) are right equally often, from the examples where
    just one of them is; before and after (N,) bool."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return {"gained": gained, "lost": lost, "p": min(1.0, 2 * tail / 2**n)}


def measure(metric: str, example: Example, scores: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    """One example's scores and greedy, (choices, R) each -> what the metric is the mean of, (R,)."""
    if metric == "perplexity":
        return -scores[0]
    if len(example.requests) == 1:  # LAMBADA: every token of the word is the argmax
        return greedy[0]
    if metric == "acc_norm":  # per character of the choice, without the space before it
        lengths = [len(continuation) - 1 for _, continuation in example.requests]
        scores = scores / np.array(lengths)[:, None]
    return scores.argmax(0) == example.gold


def run_task(
    model: AbbIE, tokenizer, name: str, examples: list[Example], iters: list[int], **options
) -> tuple[dict, list[dict]]:
    """Score one task at ascending iters -> its result, and a sample for every example and r.

    The result: {"n", "left_out", "truncated": examples, "iters": {r: {metric, metric_stderr}}, "paired":
    {"reference": the default r (else the first), r: {metric: McNemar's test}}}. Examples with a continuation
    longer than the model's context are left out. The options are score's."""
    T, kept, pairs, truncated = model.config.block_size, [], [], 0
    for number, example in enumerate(examples):
        encoded = encode_requests(tokenizer, example.requests)
        for (_, tokens), (_, text) in zip(encoded, example.requests):
            check(len(tokens) > 0, f"{name}, row {number + 1}: {text!r} adds no token to its context")
        if max(len(tokens) for _, tokens in encoded) <= T:
            kept.append(number)
            pairs += encoded
            truncated += any(len(context) + len(tokens) > T + 1 for context, tokens in encoded)
    check(len(kept) > 0, f"{name}: no row's continuations fit into the model's context of {T} tokens")
    scores, greedy = score(model, pairs, iters, bar=name, **options)
    check_finite(scores, iters)
    ends = np.cumsum([len(examples[number].requests) for number in kept])[:-1]
    rows = list(zip(kept, np.split(scores, ends), np.split(greedy, ends)))  # (number, (choices, R) twice)

    reference = model.config.iters if model.config.iters in iters else iters[0]
    entries, paired = ({str(r): {} for r in iters} for _ in range(2))
    for metric in TASKS[name].metrics:
        values = np.array([measure(metric, examples[number], *row) for number, *row in rows])  # (N, R)
        for r, column in zip(entries, values.T):
            entries[r] |= summary(metric, column)
            if metric != "perplexity":
                paired[r][metric] = mcnemar(values[:, iters.index(reference)], column)
    result = {"n": len(kept), "left_out": len(examples) - len(kept), "truncated": truncated}
    result |= {"iters": entries, "paired": {"reference": reference, **paired}}
    samples = []
    for number, nats, hits in rows:
        for i, r in enumerate(iters):
            sample = {"task": name, "doc_id": number, "iters": r}
            sample["loglikelihoods"] = nats[:, i].tolist()
            sample["is_greedy"] = hits[:, i].tolist()
            sample["gold"] = examples[number].gold
            samples.append(sample)
    return result, samples


def run_tasks(
    model: AbbIE, tokenizer, names, iters, data=None, data_dir="data/icl", limit=None, **options
) -> dict:
    """Score tasks at every r -> {"tasks": {name: the result of run_task}}. Arguments as load_task's; the
    options are score's."""
    iters, results = sorted({model.check_iters(r) for r in iters}), {}
    for name in names:
        examples = load_task(name, data, data_dir, model.config.block_size, limit)
        results[name], _ = run_task(model, tokenizer, name, examples, iters, **options)
    return {"tasks": results}


def perplexity(model: AbbIE, shards: Shards, iters: list[int], **options) -> dict:
    """Of a whole split: loss in nats per token, perplexity per token, and bits per byte of its text, which
    compare models of different tokenizers. Errors are those of a mean over windows."""
    losses = window_losses(model, shards, iters, **options, bar="perplexity")
    check_finite(losses, iters)
    n, bits = losses.shape[0] * shards.block_size, shards.n_tokens / shards.n_bytes / math.log(2)
    entries = {}
    for r, loss in zip(iters, losses.T):
        entry = summary("loss", loss) | summary("perplexity", loss)
        entries[str(r)] = entry | summary("bits_per_byte", bits * loss)
    result = {"data": str(shards.folder), "n": n}
    return result | {"left_out": shards.n_tokens - n, "iters": entries}


# -------------------------------------------------------------------------------------------------- the table


def cell(metric: str, value: float) -> str:
    if metric.startswith("acc"):  # in percent
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if value < 1000 else f"{value:.4g}"


def print_table(results: dict):
    """Rows: tasks and metrics. Columns: iters. The best r of a row is marked with *."""
    sections, lines, notes = dict(results.get("tasks", {})), [], []
    if "ppl" in results:
        sections[results["ppl"]["data"]] = results["ppl"]
    for name, section in sections.items():
        n, left_out, entries = section["n"], section["left_out"], section["iters"]
        official = TASKS[name].n_rows if name in DOWNLOADED else n + left_out
        count = str(n) if n == official else f"{n}/{official}"
        lines = lines or [["", "*: best", "n", *(f"r={r} " for r in entries)]]
        for metric in [key for key in next(iter(entries.values())) if not key.endswith("_stderr")]:
            better = max if metric.startswith("acc") else min
            best = better(entries, key=lambda r: entries[r][metric])
            cells = []
            for entry in entries.values():
                value, stderr = entry[metric], entry[f"{metric}_stderr"]
                error = "" if stderr is None else f" ± {cell(metric, stderr)}"
                mark = "*" if value == entries[best][metric] else " "
                cells.append(cell(metric, value) + error + mark)
            lines.append([name, metric, count, *cells])
            test = section.get("paired", {}).get(best, {}).get(metric)
            if test and test["gained"] > test["lost"]:
                notes.append(
                    f"{name} {metric}: r={best} gains {test['gained']} and loses {test['lost']} "
                    f"examples against r={section['paired']['reference']}, McNemar p = {test['p']:.2g}"
                )
        if name in TASKS and left_out:
            notes.append(f"{name}: {left_out} rows left out: a choice is longer than the model's context")
        if section.get("truncated"):
            notes.append(f"{name}: {section['truncated']} rows longer than the context lost their beginning")
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, metric, *cells in lines:
        cells = [text.rjust(width) for text, width in zip(cells, widths[2:])]
        print("  ".join([name.ljust(widths[0]), metric.ljust(widths[1]), *cells]))
    for note in notes:
        print(note)


# ------------------------------------------------------------------------------------------------ the command


def parse_args(argv: list[str]):
    parser = ArgumentParser(prog="eval_icl.py", description=__doc__.split("\n\nHow")[0])
    add = parser.add_argument
    add("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    add("--iters", default="1,2,4,8", help="iterations of the Body (default 1,2,4,8)")
    default = f"default: {','.join(BUILT_IN)}, where --ppl is not given"
    add("--tasks", default="", help=f"of {', '.join(TASKS)} ({default})")
    add("--data_dir", default="data/icl", help="holds TASK/SPLIT.jsonl (default data/icl)")
    add("--limit", type=int, help="examples of each task, the first N (default: all; of a built-in one 300)")
    text = "loss, perplexity and bits per byte on the validation split of a folder of shards "
    text += "(default: the training data; the built-in tasks are made of the same folder)"
    add("--ppl", nargs="?", const="", metavar="FOLDER", help=text)
    add("--batch_size", type=int, default=32, help="requests or windows at a time (default 32)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    text = "of matrix products (default float32, as the harness; auto: bfloat16 where it is fast)"
    add("--dtype", default="float32", choices=("auto", "float32", "bfloat16"), help=text)
    add("--out", metavar="FILE", help="write the results here as JSON, after every task")
    add("--log_samples", metavar="FILE", help="write every example's scores here, a line of JSON each")
    args = parser.parse_args(argv)
    check(args.batch_size >= 1, f"--batch_size={args.batch_size} must be at least 1")
    check(args.limit is None or args.limit >= 1, f"--limit={args.limit} must be at least 1")
    args.tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not args.tasks and args.ppl is None:
        args.tasks = BUILT_IN
    return args


def save(args, rank: int, results: dict, samples: list[dict]):
    """Rank 0 replaces the results, and adds the samples to those of earlier tasks."""
    with together():
        if args.out and rank == 0:
            write_json(Path(args.out), results)
        if args.log_samples and rank == 0:
            with open(args.log_samples, "a") as file:
                file.writelines(json.dumps(sample) + "\n" for sample in samples)


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
            check(
                isinstance(data, str) and data != "",
                "this model does not say what it was trained on\n"
                "name a folder of shards: --ppl FOLDER, with --tasks cloze,lastword to make these of it",
            )
        tasks = {name: load_task(name, data, args.data_dir, T, args.limit) for name in args.tasks}
        if args.ppl is not None:
            shards, name = Shards(data, "val", T), model.meta["tokenizer"]
            check(
                shards.tokenizer == name,
                f"{data} holds {shards.tokenizer} tokens, but the model reads {name}\n"
                f"prepare the text again with --tokenizer {name}",
            )
        for path in map(Path, filter(None, (args.out, args.log_samples))):
            writable = os.access(path.parent, os.W_OK) and not path.is_dir()
            check(writable, f"{path} cannot be written\nname a file in a folder that exists")
        if rank == 0:
            print(f"evaluating {model.meta['ckpt']}", file=sys.stderr)
            if args.log_samples:
                open(args.log_samples, "w").close()

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    options = {"batch_size": args.batch_size, "rank": rank, "world": world}
    options["autocast"] = autocast
    results = {"ckpt": model.meta["ckpt"], "trained_iters": model.config.iters}
    results |= {"dtype": str(dtype).removeprefix("torch."), "tasks": {}}
    for name, examples in tasks.items():
        results["tasks"][name], samples = run_task(model, tokenizer, name, examples, iters, **options)
        save(args, rank, results, samples)
    if args.ppl is not None:
        results["ppl"] = perplexity(model, shards, iters, **options)
        save(args, rank, results, [])
    print_table(results)
    leave_ranks()


if __name__ == "__main__":
    cli(main)
