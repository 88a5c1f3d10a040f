"""Perplexity, zero-shot tasks and convergence at any number of iterations, from one sweep of the Body.

    python eval_icl.py --iters 1,2,4,8                       # the newest checkpoint on the built-in tasks
    python eval_icl.py --ckpt out/NAME --iters 1,2,4,8 --tasks hellaswag,lambada_openai,arc_easy,piqa \\
        --data_dir data/icl --out r.json --log_samples s.jsonl            # after: python prepare_data.py icl
    python eval_icl.py --ckpt out/NAME --iters 1,2,4,8 --ppl data/c4 --convergence
    torchrun --nproc_per_node=8 eval_icl.py --ckpt out/NAME ...           # the same table, sooner
    python eval_icl.py --ckpt out/NAME --iters 4 --lm_eval mmlu,gsm8k     # any other: pip install lm_eval

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
lm-evaluation-harness 0.4.13, example by example (results/eval_parity.json).

Shapes: B rows, T tokens, D n_embd, V vocab_size, M scored tokens, R entries of iters, N requests (windows).
"""

import contextlib
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from config import ArgumentParser, cli, nearest, parse_list
from model import AbbIE, UserError
from prepare_data import Shards, documents, get_tokenizer, read_meta

CHUNK = 1 << 24  # logits that are held at a time, so that memory does not grow with batch or vocabulary


# ---------------------------------------------------------------------------------------- many r, many ranks

def ascending(model: AbbIE, iters: Iterable[int]) -> list[int]:
    """Sorted, without repetitions. Raises UserError for what the model's rule does not run at."""
    return sorted({model.check_iters(r) for r in iters})


def sum_over_ranks(x: Tensor, device, world: int) -> Tensor:
    """Every entry was computed by one rank and is 0 on the others, so the sum is exact."""
    if world == 1:
        return x
    x = x.to(device)
    dist.all_reduce(x)
    return x.cpu()


# ------------------------------------------------------------------------------------------------- perplexity

@torch.no_grad()
def window_losses(model: AbbIE, shards: Shards, iters: list[int], n_windows: int | None = None,
                  batch_size: int = 16, rank: int = 0, world: int = 1, autocast=contextlib.nullcontext,
                  bar: str = "") -> Tensor:
    """Mean nats per token (N, R) of N windows, evenly spaced over the split (None: all of them). Batches
    are the same for every number of ranks, each of which takes a stride of them; so is the result."""
    n = min(n_windows or shards.n_windows, shards.n_windows)
    chosen = np.arange(n) * shards.n_windows // n
    losses, device = torch.zeros(n, len(iters), dtype=torch.float64), model.embed.weight.device
    step = max(1, CHUNK // model.config.vocab_size)
    hidden = None if bar and rank == 0 else True  # None: hidden where there is no terminal
    for first in tqdm(range(rank * batch_size, n, world * batch_size), desc=bar, disable=hidden):
        x, y = (t.to(device) for t in shards.batch(chosen[first:first + batch_size]))
        with autocast():
            for i, z in enumerate(model.states_at(x, iters)):
                nats = [F.cross_entropy(model.logits(part).float(), target, reduction="none")
                        for part, target in zip(z.flatten(0, 1).split(step), y.flatten().split(step))]
                losses[first:first + len(x), i] = torch.cat(nats).cpu().double().view(y.shape).mean(1)
    return sum_over_ranks(losses, device, world)


def evaluate_loss(model: AbbIE, shards: Shards, iters: list[int], n_windows: int | None = None,
                  batch_size: int = 16, rank: int = 0, world: int = 1,
                  autocast=contextlib.nullcontext) -> dict[int, float]:
    """{r: mean nats per token}, on the same windows at every call. Computed in the context autocast()."""
    iters = ascending(model, iters)
    losses = window_losses(model, shards, iters, n_windows, batch_size, rank, world, autocast)
    return dict(zip(iters, losses.mean(0).tolist()))


def perplexity(model: AbbIE, shards: Shards, iters: list[int], **options) -> dict:
    """Loss in nats per token with its standard error over windows, perplexity per token, and bits per
    byte of the split's text, which compare models of different tokenizers; on a whole split."""
    losses = window_losses(model, shards, iters, **options, bar="perplexity")
    n = len(losses) * shards.block_size
    result = {"data": str(shards.folder), "n": n, "left_out": shards.n_tokens - n, "iters": {}}
    for r, loss in zip(iters, losses.numpy().T):
        mean = float(loss.mean())
        result["iters"][str(r)] = {
            "loss": mean, "loss_stderr": mean_stderr(loss), "perplexity": math.exp(min(700, mean)),
            "bits_per_byte": mean / math.log(2) * shards.n_tokens / shards.n_bytes}
    return result


# ------------------------------------------------------------------------------------------------ convergence

@torch.no_grad()
def convergence(model: AbbIE, idx: Tensor, iters: int) -> dict:
    """idx (B, T), B >= 2 -> for every r up to `iters`, means over tokens of what happens to u, the state
    that the Tail reads, brought to unit RMS:

        change, cosine          of u against the u of the iteration before (change: relative distance)
        settled                 the fraction of tokens whose argmax is the same from this r to the last
        from_zero, from_noise,  path independence: the relative distance of this u from the one that starts
        from_other              at zeros, at noise as large as the Head's output, or at another row's h
    """
    def unit(u):
        return F.rms_norm(u.float(), u.shape[-1:])

    def distance(u, v):
        return ((u - v).norm(dim=-1) / v.norm(dim=-1)).mean().item()

    rope = model.rope(idx)
    h = model.run_head(idx, rope)
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    x, before, argmax, result = model.start(h), None, [], {}
    others = {"from_zero": torch.zeros_like(h), "from_noise": noise * h.square().mean().sqrt(),
              "from_other": h.roll(1, 0)}
    for k in range(iters):
        u, x = model.iterate(x, h, k, rope)
        now, entry = unit(u), result.setdefault(str(k + 1), {})
        if before is not None:
            entry["change"] = distance(now, before)
            entry["cosine"] = F.cosine_similarity(now, before, dim=-1).mean().item()
        parts = model.run_tail(u, rope).flatten(0, 1).split(max(1, CHUNK // model.config.vocab_size))
        argmax.append(torch.cat([model.logits(part).argmax(-1) for part in parts]))
        for name, y in others.items():
            u, others[name] = model.iterate(y, h, k, rope)
            entry[name] = distance(unit(u), now)
        before = now
    argmax = torch.stack(argmax)  # (iters, B * T)
    stays = (argmax == argmax[-1]).flip(0).cumprod(0).flip(0)
    for r, fraction in enumerate(stays.float().mean(1).tolist(), 1):
        result[str(r)]["settled"] = fraction
    return result


# --------------------------------------------------------------------------- tasks: row -> requests (strings)

class Example(NamedTuple):
    requests: list[tuple[str, str]]  # (context, continuation)
    gold: int                        # number of the right one
    lengths: list[int]               # of the choices in characters, for acc_norm


def choose(context: str, choices: list[str], gold: int) -> Example:
    return Example([(context, " " + choice) for choice in choices], gold, [len(choice) for choice in choices])


def last_word(text: str) -> Example:
    context, _, word = text.rpartition(" ")
    return Example([(context, " " + word)], 0, [len(word)])


def hellaswag(row):
    def clean(text):  # the order matters: an ending may keep a space in front
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


def arc(row):
    gold = row["choices"]["label"].index(row["answerKey"])
    return choose(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold)


def commonsense_qa(row):
    letters, texts = "ABCDE", row["choices"]["text"]
    listed = "\n".join(f"{letter}. {texts[i]}" for i, letter in enumerate(letters))
    context = f"Question: {row['question'].strip()}\n{listed}\nAnswer:"
    return choose(context, list(letters), list(letters).index(row["answerKey"]))


def piqa(row):
    return choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def openbookqa(row):
    gold = row["choices"]["label"].index(row["answerKey"].lstrip())
    return choose(row["question_stem"], row["choices"]["text"], gold)


def sciq(row):
    choices = [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return choose(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def winogrande(row):
    """Two contexts and one continuation: which option makes the rest of the sentence likelier?"""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return Example([(context, " " + after.strip()) for context in contexts], int(row["answer"]) - 1,
                   [len(context) for context in contexts])


class Task(NamedTuple):
    metrics: tuple[str, ...]
    render: Callable[[dict], Example] | None = None  # None: made of validation text
    split: str = ""
    n: int | None = None  # rows of the official file


CHOICE, WORD = ("acc", "acc_norm"), ("perplexity", "acc")
TASKS = {
    "cloze": Task(CHOICE), "lastword": Task(WORD),
    "hellaswag": Task(CHOICE, hellaswag, "validation", 10042),
    "lambada_openai": Task(WORD, lambda row: last_word(row["text"]), "test", 5153),
    "arc_easy": Task(CHOICE, arc, "test", 2376),
    "arc_challenge": Task(CHOICE, arc, "test", 1172),
    "commonsense_qa": Task(("acc",), commonsense_qa, "validation", 1221),
    "piqa": Task(CHOICE, piqa, "validation", 1838),
    "openbookqa": Task(CHOICE, openbookqa, "test", 500),
    "sciq": Task(CHOICE, sciq, "test", 1000),
    "winogrande": Task(("acc",), winogrande, "validation", 1267),
}
N_BUILT_IN = 300  # examples of cloze and of lastword


def read_task(name: str, data_dir: str | Path, limit: int | None) -> list[Example]:
    """The first `limit` rows of DATA_DIR/TASK/SPLIT.jsonl. Raises UserError for a missing file and for
    the first row that is not one of the task's."""
    task, folder = TASKS[name], Path(data_dir) / name
    path, command = folder / f"{task.split}.jsonl", f"python prepare_data.py icl --out {data_dir}"
    if not path.is_file():
        others = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl")))
        others = f" ({name} is scored on its {task.split} split, not on {others})" if others else ""
        raise UserError(f"{path} is missing{others}\n{command}")
    examples = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                example = task.render(json.loads(line))
                if not 0 <= example.gold < len(example.requests):
                    raise ValueError(f"no choice {example.gold}")
                if not all(continuation.strip() for _, continuation in example.requests):
                    raise ValueError("an empty choice")
            except (KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{path}, line {number}, is no row of {name} ({reason})\n"
                                f"remove the file and get it again: {command}") from None
            examples.append(example)
    if not examples:
        raise UserError(f"{path} has no rows\nremove it and get it again: {command}")
    return examples


def make_task(name: str, data: str | Path, block_size: int, limit: int | None) -> list[Example]:
    """Examples of a built-in task from the validation split of `data`, the same ones every time. Contexts
    have at most block_size / 2 characters."""
    tokenizer, texts, size = get_tokenizer(read_meta(data)["tokenizer"]), [], 0
    for tokens in documents(data, "val"):
        texts.append(tokenizer.decode(tokens[:1 << 20].tolist()))
        size += len(texts[-1])
        if size > 1 << 21:
            break
    n, before, rng = min(limit or N_BUILT_IN, N_BUILT_IN), min(512, block_size // 2), random.Random(1234)
    examples = []
    if name == "cloze":  # HellaSwag's form: the next 32 characters or so, and three others from elsewhere
        spots = [(text, m.start()) for text in texts for m in re.finditer(r"(?s)(?<=\S) (?=\S.{47})", text)]
        spots = rng.sample(spots, min(4 * n, len(spots) // 4 * 4))
        stretches = [re.match(r"(?s).{32}\S{,16}", text[at + 1:at + 49]).group() for text, at in spots]
        for i in range(0, len(spots), 4):
            (text, at), gold, choices = spots[i], rng.randrange(4), stretches[i + 1:i + 4]
            choices.insert(gold, stretches[i])
            examples.append(choose(text[max(0, at - before):at], choices, gold))
    else:  # LAMBADA's form: the last word of a line of four words or more
        word = re.compile(r"(?m)(?<=\S) [^\W\d_]{1,20}[.,:;]?$")  # letters, and a point at most
        spots = [(text, m.end()) for text in texts for m in word.finditer(text)
                 if len(text[text.rfind("\n", 0, m.end()) + 1:m.end()].split()) >= 4]
        spots = rng.sample(spots, min(n, len(spots)))
        examples = [last_word(text[max(0, end - before):end]) for text, end in spots]
    if not examples:
        raise UserError(f"the validation split of {data} is too small to make {name} of it\n"
                        "prepare more text")
    return examples


def load_tasks(names: list[str], data: str | Path | None, data_dir: str | Path, block_size: int,
               limit: int | None) -> dict[str, list[Example]]:
    """The examples of all tasks, or a UserError before anything is scored."""
    loaded = {}
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}{nearest(name, TASKS)}; there are {', '.join(TASKS)}\n"
                            f"any other task of the harness: --lm_eval {name}")
        if TASKS[name].render:
            loaded[name] = read_task(name, data_dir, limit)
        elif data:
            loaded[name] = make_task(name, data, block_size, limit)
        else:
            raise UserError(f"{name} is made of the text that the model was trained on, which is not known\n"
                            "give a folder of shards with --ppl DATA")
    return loaded


# ------------------------------------------------------------------------------- requests -> tokens -> scores

def encode(tokenizer, requests: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Strings -> tokens of (context, continuation), split after as many tokens as the context alone has.
    Whitespace at a context's end belongs to the continuation; an empty context becomes the end-of-text
    token."""
    ids = lru_cache(maxsize=8)(lambda text: list(tokenizer.encode_ordinary(text)))
    encoded = []
    for context, continuation in requests:
        start, whole = ids(context.rstrip()), ids(context + continuation)
        if not start:
            start = [tokenizer.eot_token]
            whole = whole if whole[:1] == start else start + whole
        encoded.append((start, whole[len(start):]))
    return encoded


class Group(NamedTuple):
    """A context and all its continuations, which make one row of a batch."""
    context: list[int]
    continuations: list[tuple[int, list[int]]]  # (number of the request, tokens)

    def size(self) -> int:  # a continuation's last token is predicted but not read
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.continuations)


def group(requests: list[tuple[list[int], list[int]]], T: int) -> tuple[list[Group], list[int]]:
    """Neighbours with equal contexts share a row, up to 2 T tokens. A request that does not fit into the
    model's context of T tokens loses the beginning of its own; the numbers of these requests come back as
    well."""
    groups, truncated = [], []
    for number, (context, tokens) in enumerate(requests):
        if not 0 < len(tokens) <= T:
            raise UserError(f"a continuation of {len(tokens)} tokens does not fit into a context of {T}\n"
                            "evaluate a model of larger block_size")
        if (excess := len(context) + len(tokens) - (T + 1)) > 0:
            truncated.append(number)
            context = context[excess:]
        if not groups or groups[-1].context != context or groups[-1].size() + len(tokens) > 2 * T:
            groups.append(Group(context, []))
        groups[-1].continuations.append((number, tokens))
    return groups, truncated


class Tree:
    """Stands where the cache stands in decoding. The continuations of a context lie one after another in
    its row, each at the positions that it would have alone; it sees the context and itself, but not the
    others."""
    causal = False

    def __init__(self, branch: Tensor):  # (B, T): 0 in the context and 1, 2, ... in its continuations
        visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        self.mask = visible.tril()[:, None]  # (B, 1, T queries, T keys)

    def at(self, part, i, k=0):
        return self

    def store(self, k, v):
        return k, v


def pack(groups: list[Group]) -> tuple[Tensor, ...]:
    """-> idx, positions, branch, (B, T) each, padded on the right (what nothing reads); and for M tokens
    to score the place in B * T whose logits predict it, the token, and the number of its request, (M,)
    each."""
    T = max(g.size() for g in groups)
    idx, positions, branch = (np.zeros((len(groups), T), np.int64) for _ in range(3))
    places, tokens, owners = [], [], []
    for b, (context, continuations) in enumerate(groups):
        end = len(context)
        idx[b, :end], positions[b, :end] = context, range(end)
        for c, (number, continuation) in enumerate(continuations, 1):
            new = range(end, end + len(continuation) - 1)
            idx[b, new], branch[b, new] = continuation[:-1], c
            positions[b, new] = len(context) + np.arange(len(new))
            places += [b * T + at for at in (len(context) - 1, *new)]
            tokens += continuation
            owners += [number] * len(continuation)
            end = new.stop
    return tuple(torch.as_tensor(a) for a in (idx, positions, branch, places, tokens, owners))


@torch.no_grad()
def score(model: AbbIE, requests: list[tuple[list[int], list[int]]], iters: list[int], batch_size: int = 32,
          rank: int = 0, world: int = 1, bar: str = "") -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Tokens of N (context, continuation) -> log-likelihoods (N, R), whether every token is the argmax
    (N, R), and the numbers of the requests whose context was truncated. Batches hold rows of about equal
    length and are the same for every number of ranks, each of which takes a stride of them."""
    groups, truncated = group(requests, model.config.block_size)
    batches = []  # of rows at least 3/4 as long as the longest, which comes first
    for row in sorted(groups, key=Group.size, reverse=True):
        if not batches or len(batches[-1]) == batch_size or row.size() < 0.75 * batches[-1][0].size():
            batches.append([])
        batches[-1].append(row)
    device, step = model.embed.weight.device, max(1, CHUNK // model.config.vocab_size)
    total, misses = (torch.zeros(len(requests), len(iters), dtype=torch.float64) for _ in range(2))
    hidden = None if bar and rank == 0 else True
    for batch in tqdm(batches[rank::world], desc=bar, disable=hidden):
        *packed, owners = pack(batch)
        idx, positions, branch, places, tokens = (t.to(device) for t in packed)
        rope = tuple(table[positions][:, None] for table in model.rope_on(device))  # (B, 1, T, E/2) each
        tree = Tree(branch) if branch.max() > 1 else None  # without branches: plain causal attention
        rows, row = places.unique(return_inverse=True)  # continuations share their context's last logits
        for i, z in enumerate(model.states_at(idx, iters, rope, tree)):
            z = z.flatten(0, 1)[rows]
            nats, miss = torch.zeros(len(tokens), device=device), torch.zeros(len(tokens), device=device)
            for at in range(0, len(rows), step):
                logits = model.logits(z[at:at + step]).float()  # (<= step, V)
                mine = ((row >= at) & (row < at + step)).nonzero()[:, 0]
                here = row[mine] - at
                nats[mine] = logits[here, tokens[mine]] - logits.logsumexp(-1)[here]
                miss[mine] = (logits.argmax(-1)[here] != tokens[mine]).float()
            total[:, i].index_add_(0, owners, nats.cpu().double())
            misses[:, i].index_add_(0, owners, miss.cpu().double())
    total, misses = (sum_over_ranks(x, device, world).numpy() for x in (total, misses))
    return total, misses == 0, truncated


# ------------------------------------------------------------------------------------------ scores -> metrics

def mean_stderr(x: np.ndarray) -> float | str:
    return float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else "N/A"


def bootstrap_stderr(loglikelihoods: np.ndarray, bootstrap_iters: int) -> float | str:
    """Standard error of exp(-mean) with the harness's own resamples: chunk i of at most 1000 of them is
    drawn by random.Random(i). NumPy's generator in the same state gives the same numbers, a hundred times
    sooner."""
    n, size = len(loglikelihoods), min(1000, bootstrap_iters)
    if n == 1 or size < 2:
        return "N/A"
    means, source = [], np.random.RandomState()
    for i in range(bootstrap_iters // size):
        *key, position = random.Random(i).getstate()[1]
        source.set_state(("MT19937", key, position))
        for rows in range(0, size, 100):
            picks = (source.random_sample((min(100, size - rows), n)) * n).astype(np.int32)
            means.append(loglikelihoods[picks].mean(1))
    return float(np.std(np.exp(np.minimum(700, -np.concatenate(means))), ddof=1))


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict:
    """Exact two-sided test of whether two r are right equally often, from the examples where just one of
    them is."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return {"gained": gained, "lost": lost, "p": min(1.0, 2 * tail / 2 ** n)}


def run_task(model: AbbIE, tokenizer, name: str, examples: list[Example], iters: list[int],
             bootstrap_iters: int = 100_000, log=None, rank: int = 0, **options) -> dict:
    """Score one task -> {"n", "truncated": examples, "iters": {r: {metric, metric_stderr}}, "paired":
    {"reference": the trained r (else the first), r: {metric: {gained, lost, p}}}}. `log`, an open file,
    gets a line per example and r."""
    requests = encode(tokenizer, [request for example in examples for request in example.requests])
    scores, greedy, truncated = score(model, requests, iters, rank=rank, bar=name, **options)
    ends = np.cumsum([len(example.requests) for example in examples])
    scores, greedy = np.split(scores, ends[:-1]), np.split(greedy, ends[:-1])  # an example each, (choices, R)
    base = iters.index(model.config.mean_iters) if model.config.mean_iters in iters else 0
    cut = set(np.searchsorted(ends, truncated, side="right").tolist())
    result = {"n": len(examples), "truncated": len(cut), "iters": {str(r): {} for r in iters},
              "paired": {"reference": iters[base], **{str(r): {} for r in iters if r != iters[base]}}}
    metrics = TASKS[name].metrics
    for metric in metrics:
        if metric == "perplexity":
            words = np.concatenate(scores)
            values = np.exp(np.minimum(700, -words.mean(0)))
            stderrs = [bootstrap_stderr(column, bootstrap_iters) for column in words.T]
        else:
            if metrics == WORD:
                hits = np.array([exact.all(0) for exact in greedy])  # (examples, R)
            else:
                per = [np.array(e.lengths)[:, None] if metric == "acc_norm" else 1 for e in examples]
                hits = np.array([(s / p).argmax(0) == e.gold for e, s, p in zip(examples, scores, per)])
            values, stderrs = hits.mean(0), [mean_stderr(column) for column in hits.T]
            for i, r in enumerate(iters):
                if i != base:
                    result["paired"][str(r)][metric] = mcnemar(hits[:, base], hits[:, i])
        for r, value, stderr in zip(iters, values.tolist(), stderrs):
            result["iters"][str(r)].update({metric: value, metric + "_stderr": stderr})
    if log and rank == 0:
        for number, (example, s, exact) in enumerate(zip(examples, scores, greedy)):
            for i, r in enumerate(iters):
                line = {"task": name, "doc_id": number, "iters": r, "loglikelihoods": s[:, i].tolist(),
                        "is_greedy": exact[:, i].tolist(), "gold": example.gold}
                log.write(json.dumps(line) + "\n")
    return result


def run_tasks(model: AbbIE, tokenizer, tasks: list[str], iters: list[int], data: str | Path | None = None,
              data_dir: str | Path = "data/icl", limit: int | None = None, **options) -> dict:
    """Score tasks at every entry of iters -> {"tasks": {name: the result of run_task}}. The built-in
    tasks are made of the shards in the folder `data`; the options are run_task's."""
    iters = ascending(model, iters)
    loaded = load_tasks(tasks, data, data_dir, model.config.block_size, limit)
    return {"tasks": {name: run_task(model, tokenizer, name, examples, iters, **options)
                      for name, examples in loaded.items()}}


# ----------------------------------------------------------------------------- any other task, by the harness

def harness_model(model: AbbIE, tokenizer, iters: int, batch_size: int = 32, rank: int = 0, world: int = 1):
    """The model at one r as an lm_eval.api.model.LM. Ranks share the scoring and each hold all results."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError:
        raise UserError("--lm_eval needs the harness\npip install lm_eval==0.4.13") from None
    T, eot = model.config.block_size, tokenizer.eot_token

    class HarnessModel(LM):
        tokenizer_name = getattr(tokenizer, "name", "tokenizer")

        def loglikelihood(self, requests, disable_tqdm=False):
            encoded = encode(tokenizer, [request.args for request in requests])
            scores, greedy, _ = score(model, encoded, [iters], batch_size, rank, world, bar="log-likelihood")
            return list(zip(scores[:, 0].tolist(), greedy[:, 0].tolist()))

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows, owners = [], []  # a text's tokens, each predicted once, in windows of T
            for number, request in enumerate(requests):
                ids = list(tokenizer.encode_ordinary(request.args[0]))
                for window in get_rolling_token_windows(ids, eot, T, 1):
                    windows.append(make_disjoint_window(window))
                    owners.append(number)
            scores = score(model, windows, [iters], batch_size, rank, world, bar="rolling")[0][:, 0]
            return np.bincount(owners, scores, minlength=len(requests)).tolist()

        def generate_until(self, requests, disable_tqdm=False):
            """What follows each context, up to its first stop string or the end of the text."""
            from sample import stream

            def settings(i):
                return json.dumps(requests[i].args[1], sort_keys=True)

            texts, batches = [""] * len(requests), []  # a batch shares its settings and has about one length
            for _, alike in groupby(sorted(range(len(requests)), key=settings), settings):
                alike = sorted(alike, key=lambda i: len(requests[i].args[0]))
                batches += [alike[first:first + batch_size] for first in range(0, len(alike), batch_size)]
            hidden = True if disable_tqdm or rank else None
            for batch in tqdm(batches, desc="generation", disable=hidden):
                asked = requests[batch[0]].args[1]
                n = min(int(asked.get("max_gen_toks", 256)), T - 1)
                stops = asked.get("until") or []
                stops = [stops] if isinstance(stops, str) else stops
                heat = float(asked.get("temperature") or 0) if asked.get("do_sample", True) else 0.0
                prompts = [tokenizer.encode_ordinary(requests[i].args[0])[n - T:] or [eot] for i in batch]
                new, done = [[] for _ in batch], set()
                for b, token in stream(model, prompts, n, iters, temperature=heat, stop_token=eot, done=done):
                    new[b].append(token)
                    text = tokenizer.decode(new[b])
                    if ends := [text.find(stop) for stop in stops if stop and stop in text]:
                        done.add(b)
                    texts[batch[b]] = text[:min(ends, default=len(text))]
            return texts

    return HarnessModel()


def run_harness(model: AbbIE, tokenizer, tasks: list[str], iters: list[int], num_fewshot: int | None = None,
                limit: int | None = None, bootstrap_iters: int = 100_000, **options) -> dict:
    """The harness's own results for its own tasks: {r: {task: {metric: value}}}."""
    models = {str(r): harness_model(model, tokenizer, r, **options) for r in iters}
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
    manager, results = TaskManager(), {}
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise UserError(f"the harness knows no task {unknown[0]}{nearest(unknown[0], manager.all_tasks)}")
    for r, adapter in models.items():
        found = simple_evaluate(adapter, tasks=tasks, num_fewshot=num_fewshot, limit=limit, log_samples=False,
                                task_manager=manager, bootstrap_iters=bootstrap_iters)
        results[r] = found["results"]
        if not options.get("rank"):
            print(f"iters {r}\n{make_table(found)}")
    return results


# ----------------------------------------------------------------------------------------------------- output

LOWER_IS_BETTER = ("perplexity", "loss", "bits_per_byte")


def cell(metric: str, value: float | str) -> str:
    """Accuracies in percent."""
    if value == "N/A":
        return "N/A"
    if metric.startswith("acc"):
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if value < 1000 else f"{value:.4g}"


def print_table(results: dict):
    """Rows: tasks and metrics. Columns: iters. The best r of a row is marked with *."""
    sections, notes = dict(results.get("tasks", {})), []
    if "ppl" in results:
        sections[results["ppl"]["data"]] = results["ppl"]
    if not sections:
        return
    columns, width = list(next(iter(sections.values()))["iters"]), max(map(len, sections))
    print(f"{'':{width}s}  {'':13s} {'n':>10s}" + "".join(f"{'r=' + r:>23s} " for r in columns) + " *: best")
    for name, section in sections.items():
        official, n = TASKS[name].n if name in TASKS else None, section["n"]
        count = f"{n}/{official}" if official and official != n else str(n)
        for metric in (key for key in section["iters"][columns[0]] if not key.endswith("_stderr")):
            values = {r: scores[metric] for r, scores in section["iters"].items()}
            best = (min if metric in LOWER_IS_BETTER else max)(values, key=values.get)
            line = ""
            for r, value in values.items():
                stderr = section["iters"][r].get(metric + "_stderr")
                text = cell(metric, value) + (f" ± {cell(metric, stderr)}" if stderr is not None else "")
                line += f"{text:>23s}" + ("*" if value == values[best] else " ")
            print(f"{name:{width}s}  {metric:13s} {count:>10s}{line}")
            paired = section.get("paired", {})
            test = paired.get(best, {}).get(metric)
            if test and test["gained"] > test["lost"]:
                notes.append(f"{name} {metric}: r={best} gains {test['gained']} and loses {test['lost']} "
                             f"examples against r={paired['reference']}, McNemar p = {test['p']:.2g}")
        if cut := section.get("truncated"):
            notes.append(f"{name}: {cut} of {n} examples exceed the model's context and lost their beginning")
        if section.get("left_out"):
            notes.append(f"{name}: {section['left_out']} tokens behind the last window of a shard left out")
    print("\n".join(notes))


def print_convergence(found: dict, iters: list[int]):
    print(f"convergence, mean over {found['n']} tokens")
    print(" " * 25 + "".join(f"{f'r={r}':>10s}" for r in iters))
    for quantity in ("change", "cosine", "settled", "from_zero", "from_noise", "from_other"):
        for which in ("trained", "untrained"):
            values = [found[which][str(r)].get(quantity) for r in iters]
            cells = ["-" if v is None else f"{v:.4f}" if v > 1e-3 else f"{v:.1e}" for v in values]
            print(f"  {quantity:12s}{which:11s}" + "".join(f"{text:>10s}" for text in cells))


def find_shards(model: AbbIE, data: str | None) -> Shards:
    """The validation split of a folder in the model's tokens."""
    if not data:
        raise UserError("this model does not name the data that it was trained on\n"
                        "give a folder of shards with --ppl DATA")
    shards, tokenizer = Shards(data, "val", model.config.block_size), model.meta["tokenizer"]
    if shards.tokenizer != tokenizer:
        raise UserError(f"{data} holds {shards.tokenizer} tokens, but the model reads {tokenizer}\n"
                        f"prepare it with --tokenizer {tokenizer}")
    return shards


def main(argv: list[str]):
    parser = ArgumentParser(prog="eval_icl.py", description=__doc__.split("\n\nHow")[0])
    add = parser.add_argument
    add("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    add("--iters", default="1,2,4,8", help="iterations of the Body (default 1,2,4,8)")
    add("--tasks", help=f"of {', '.join(TASKS)} (the first two)")
    add("--data_dir", default="data/icl", help="holds TASK/SPLIT.jsonl")
    add("--limit", type=int, help="score only the first so many rows of each task")
    add("--ppl", nargs="?", const="", metavar="DATA", help="loss, perplexity and bits per byte on the whole "
        "validation split of a folder of shards (default: the one that the model was trained on)")
    add("--convergence", action="store_true", help="how the state changes with each iteration")
    add("--lm_eval", help="tasks of the harness, such as mmlu,gsm8k, at every r in turn")
    add("--num_fewshot", type=int, help="shots for --lm_eval (default: the task's own)")
    add("--batch_size", type=int, default=32, help="rows at a time (default 32)")
    add("--bootstrap_iters", type=int, default=100_000, help="resamples for word perplexity")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", help="write the results here as JSON")
    add("--log_samples", help="write every example's scores here, a line of JSON each")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise UserError("--batch_size and --limit must be at least 1")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else args.device.replace("auto", "cpu")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    # Whatever can be wrong is found before anything is computed.
    model = AbbIE.from_checkpoint(args.ckpt, device=device)
    iters, tokenizer = parse_list(args.iters, "iters"), get_tokenizer(model.meta["tokenizer"])
    iters = ascending(model, iters)
    tasks = args.tasks.split(",") if args.tasks else []
    if not tasks and args.ppl is None and not args.convergence and not args.lm_eval:
        tasks = list(TASKS)[:2]
    own = model.meta.get("data")
    examples = load_tasks(tasks, own or args.ppl, args.data_dir, model.config.block_size, args.limit)
    if args.ppl is not None or args.convergence:
        shards = find_shards(model, args.ppl or own)
    if args.out and rank == 0:
        open(args.out, "a").close()  # it can be written
    log = open(args.log_samples, "w") if args.log_samples and rank == 0 else None

    options = {"batch_size": args.batch_size, "rank": rank, "world": world}
    results = {"ckpt": model.meta["ckpt"], "trained_iters": model.config.mean_iters, "tasks": {}}
    for name in tasks:
        results["tasks"][name] = run_task(model, tokenizer, name, examples[name], iters, log=log,
                                          bootstrap_iters=args.bootstrap_iters, **options)
    if args.ppl is not None:
        results["ppl"] = perplexity(model, shards, iters, **options)
    if rank == 0:
        print_table(results)
    if args.convergence:
        n = min(8, shards.n_windows)
        idx = shards.batch(np.arange(n) * shards.n_windows // n)[0].to(device)
        torch.manual_seed(0)
        results["convergence"] = {"n": idx.numel(), "trained": convergence(model, idx, iters[-1]),
                                  "untrained": convergence(AbbIE(model.config).to(device), idx, iters[-1])}
        if rank == 0:
            print_convergence(results["convergence"], iters)
    if args.lm_eval:
        results["lm_eval"] = run_harness(model, tokenizer, args.lm_eval.split(","), iters, args.num_fewshot,
                                         args.limit, args.bootstrap_iters, **options)
    if args.out and rank == 0:
        Path(args.out).write_text(json.dumps(results, indent=1, default=float) + "\n")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
