"""Perplexity, zero-shot tasks and convergence at any number of iterations, from one sweep of the Body.

    python eval_icl.py --iters 1,2,4,8                                          # newest checkpoint, built-in tasks
    python eval_icl.py --ckpt out/NAME --iters 1,2,4,8 --tasks hellaswag,lambada_openai,arc_easy,commonsense_qa \\
        --data_dir data/icl --out r.json --log_samples s.jsonl                  # after: python prepare_data.py icl
    python eval_icl.py --ckpt out/NAME --iters 1,2,4,8 --ppl data/c4 --convergence
    torchrun --nproc_per_node=8 eval_icl.py --ckpt out/NAME ...                 # the same table, sooner
    python eval_icl.py --ckpt out/NAME --iters 4 --lm_eval mmlu,gsm8k           # everything else (pip install lm_eval)

How zero-shot scoring works. A row of a task, here of arc_easy,

    {"question": "What do bees make?", "choices": {"text": ["honey", "iron"], "label": ["A", "B"]}, "answerKey": "A"}

becomes requests, each a context and a continuation, and a request's score is the sum of the log-probabilities that the
model gives to the continuation's tokens, each after the context and the tokens before it:

    "Question: What do bees make?\\nAnswer:"   " honey"   -
    "Question: What do bees make?\\nAnswer:"   " iron"    -

`acc` asks whether the right continuation has the highest score, `acc_norm` whether it has the highest score per
character (without the space). A LAMBADA row has one request, the last word of a text: `acc` asks whether every token of
it is the most probable one, `perplexity` is exp(-mean score), per word. Tasks, strings and metrics are those of
EleutherAI's lm-evaluation-harness 0.4.13, example by example (results/parity.json).

Shapes: B rows, T tokens, D n_embd, V vocab_size, M scored tokens, R entries of iters, N requests or windows.
"""

import contextlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
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


# ------------------------------------------------------------------------------------------- one sweep, many r

def sweep(model: AbbIE, idx: Tensor, iters: list[int], rope=None, kv=None) -> Iterator[Tensor]:
    """idx (B, T) -> for each r of the ascending `iters` the normed state z (B, T, D) that is unembedded. The Body runs
    max(iters) times in all, the Tail once per entry."""
    rope = rope or model.rope(idx)
    h = model.run_head(idx, rope, kv)
    x = model.start(h)
    for k in range(iters[-1]):
        u, x = model.iterate(x, h, k, rope, kv)
        if k + 1 in iters:
            yield model.run_tail(u, rope, kv)


def ascending(model: AbbIE, iters: Iterable[int]) -> list[int]:
    """Sorted, without repetitions. Raises UserError for what the rule does not run at."""
    return sorted({model.check_iters(r) for r in iters})


def sum_over_ranks(x: Tensor, device, world: int) -> Tensor:
    """Each entry was computed by one rank and is 0 on the others, so the sum is exact."""
    if world == 1:
        return x
    x = x.to(device)
    dist.all_reduce(x)
    return x.cpu()


# -------------------------------------------------------------------------------------------------- perplexity

@torch.no_grad()
def window_losses(model: AbbIE, shards: Shards, iters: list[int], n_windows: int | None = None, batch_size: int = 16,
                  rank: int = 0, world: int = 1, autocast: Callable = contextlib.nullcontext, bar=None) -> Tensor:
    """Mean nats per token (N, R) of N windows, evenly spaced over the split (None: all of them). Batches are the same
    for every number of ranks, each of which takes a stride of them, so the result is too, bit for bit."""
    n = min(n_windows or shards.n_windows, shards.n_windows)
    chosen = np.arange(n) * shards.n_windows // n
    losses, device = torch.zeros(n, len(iters), dtype=torch.float64), model.embed.weight.device
    for start in tqdm(range(rank * batch_size, n, world * batch_size), desc=bar, disable=None if bar else True):
        x, y = (t.to(device) for t in shards.batch(chosen[start:start + batch_size]))
        with autocast():
            for i, z in enumerate(sweep(model, x, iters)):
                step = max(1, CHUNK // model.config.vocab_size)
                nats = torch.cat([F.cross_entropy(model.logits(part).float(), target, reduction="none") for part, target
                                  in zip(z.flatten(0, 1).split(step), y.flatten().split(step))])
                losses[start:start + len(x), i] = nats.cpu().double().view(y.shape).mean(1)
    return sum_over_ranks(losses, device, world)


def evaluate_loss(model: AbbIE, shards: Shards, iters: list[int], n_windows: int | None = None, batch_size: int = 16,
                  rank: int = 0, world: int = 1, autocast: Callable = contextlib.nullcontext) -> dict[int, float]:
    """{r: mean nats per token} on the same windows whenever it is called. `autocast` makes a context."""
    iters = ascending(model, iters)
    losses = window_losses(model, shards, iters, n_windows, batch_size, rank, world, autocast)
    return dict(zip(iters, losses.mean(0).tolist()))


def perplexity(model: AbbIE, shards: Shards, iters: list[int], batch_size: int, rank: int, world: int) -> dict:
    """Loss (nats per token), its standard error over windows, perplexity and bits per byte on a whole split. Bits per
    byte count the bytes of the split's text; they compare models of different tokenizers."""
    losses = window_losses(model, shards, iters, None, batch_size, rank, world, bar="perplexity" * (rank == 0))
    n = len(losses) * shards.block_size
    result = {"n": n, "left_out": shards.n_tokens - n, "iters": {}}
    for r, loss in zip(iters, losses.T):
        mean, stderr = loss.mean().item(), (loss.std() / len(loss) ** 0.5).item() if len(loss) > 1 else "N/A"
        result["iters"][str(r)] = {
            "loss": mean, "loss_stderr": stderr, "perplexity": math.exp(min(mean, 700)),
            "bits_per_byte": mean / math.log(2) * shards.n_tokens / shards.n_bytes}
    return result


# ----------------------------------------------------------------------------- tasks: row -> requests (strings)

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
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


def arc(row):
    choices = row["choices"]
    return choose(f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))


def commonsense_qa(row):
    texts = row["choices"]["text"]
    listed = "\n".join(f"{letter}. {texts[i]}" for i, letter in enumerate("ABCDE"))
    return choose(f"Question: {row['question'].strip()}\n{listed}\nAnswer:", list("ABCDE"), "ABCDE".index(row["answerKey"]))


def piqa(row):
    return choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def openbookqa(row):
    choices = row["choices"]
    return choose(row["question_stem"], choices["text"], choices["label"].index(row["answerKey"].lstrip()))


def sciq(row):
    choices = [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return choose(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def winogrande(row):
    """Two contexts, one continuation: which option makes the rest of the sentence likelier?"""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return Example([(context, " " + after.strip()) for context in contexts], int(row["answer"]) - 1,
                   [len(context) for context in contexts])


class Task(NamedTuple):
    render: Callable[[dict], Example]
    metrics: tuple[str, ...]
    split: str
    n: int  # rows of the official file


CHOICE = ("acc", "acc_norm")
TASKS = {
    "hellaswag": Task(hellaswag, CHOICE, "validation", 10042),
    "lambada_openai": Task(lambda row: last_word(row["text"]), ("perplexity", "acc"), "test", 5153),
    "arc_easy": Task(arc, CHOICE, "test", 2376),
    "arc_challenge": Task(arc, CHOICE, "test", 1172),
    "commonsense_qa": Task(commonsense_qa, ("acc",), "validation", 1221),
    "piqa": Task(piqa, CHOICE, "validation", 1838),
    "openbookqa": Task(openbookqa, CHOICE, "test", 500),
    "sciq": Task(sciq, CHOICE, "test", 1000),
    "winogrande": Task(winogrande, ("acc",), "validation", 1267),
}
BUILT_IN = {"cloze": CHOICE, "lastword": ("perplexity", "acc")}  # made of validation text
N_BUILT_IN = 500


def read_task(name: str, data_dir: str | Path, limit: int | None) -> list[Example]:
    """The first `limit` rows of DATA_DIR/TASK/SPLIT.jsonl. Raises UserError for a missing file or a malformed row."""
    task, folder = TASKS[name], Path(data_dir) / name
    path = folder / f"{task.split}.jsonl"
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in folder.glob("*.jsonl")))
        raise UserError(f"{path} is missing" + f" ({name} is scored on its {task.split} split, not {others})" * bool(others)
                        + f"\npython prepare_data.py icl --out {data_dir}")
    examples = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                example = task.render(json.loads(line))
                if not 0 <= example.gold < len(example.requests) or not all(c.strip() for _, c in example.requests):
                    raise ValueError("an answer that is empty or not among the choices")
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                what = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{path}, line {number}, is no row of {name}: {what}\n"
                                "get it again: python prepare_data.py icl") from None
            examples.append(example)
    if not examples:
        raise UserError(f"{path} holds no rows\nget it again: python prepare_data.py icl")
    return examples


def make_built_in(name: str, data: str | Path, block_size: int, limit: int | None) -> list[Example]:
    """Examples from the validation split of `data`, the same ones every time; contexts of at most block_size / 2
    characters. Raises UserError where the split is too small for a single one."""
    meta, texts, size = read_meta(data), [], 0
    tokenizer = get_tokenizer(meta["tokenizer"])
    for tokens in documents(data, "val"):
        texts.append(tokenizer.decode(tokens[:1 << 20].tolist()))
        size += len(texts[-1])
        if size > 1 << 21:
            break
    n, before, rng = min(limit or N_BUILT_IN, N_BUILT_IN), min(512, block_size // 2), random.Random(1234)
    examples = []
    if name == "cloze":
        # The 48 characters (then to the end of a word) after some space, among three such stretches from elsewhere.
        spots = [(text, m.start()) for text in texts for m in re.finditer(r"(?s)(?<=\S) (?=\S.{64})", text)]
        spots = rng.sample(spots, min(4 * n, len(spots) // 4 * 4))
        stretches = [re.match(r"(?s).{48}\S{,16}", text[at + 1:at + 65]).group() for text, at in spots]
        for i in range(0, len(spots), 4):
            (text, at), gold, choices = spots[i], rng.randrange(4), stretches[i + 1:i + 4]
            choices.insert(gold, stretches[i])
            examples.append(choose(text[max(0, at - before):at], choices, gold))
    else:
        # The last word of a line of four words or more.
        spots = [(text, m.end()) for text in texts for m in re.finditer(r"(?m)(?<=\S) (?=\S*\w)\S{1,32}$", text)
                 if len(text[text.rfind("\n", 0, m.end()) + 1:m.end()].split()) >= 4]
        spots = rng.sample(spots, min(n, len(spots)))
        examples = [last_word(text[max(0, end - before):end]) for text, end in spots]
    if not examples:
        raise UserError(f"the validation split of {data} is too small to make the task {name} of it\nprepare more text")
    return examples


def load_tasks(names: list[str], data: str | Path | None, data_dir: str | Path, block_size: int,
               limit: int | None = None) -> dict[str, list[Example]]:
    """Every task's examples, or a UserError before anything is scored."""
    loaded = {}
    for name in names:
        if name in TASKS:
            loaded[name] = read_task(name, data_dir, limit)
        elif name not in BUILT_IN:
            raise UserError(f"unknown task {name}{nearest(name, [*TASKS, *BUILT_IN])}\n"
                            f"tasks: {', '.join([*BUILT_IN, *TASKS])}; any other of the harness: --lm_eval {name}")
        elif not data:
            raise UserError(f"{name} is made of validation text, and this model does not say what it was trained on\n"
                            "name a folder of shards with --ppl")
        else:
            loaded[name] = make_built_in(name, data, block_size, limit)
    return loaded


# ------------------------------------------------------------------------------------ requests -> tokens -> scores

def encode(tokenizer, requests: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Strings -> tokens of (context, continuation), split where the context's own tokens end. Whitespace at the end of
    a context belongs to the continuation; an empty context becomes the end-of-text token."""
    ids = lru_cache(maxsize=8)(lambda text: list(tokenizer.encode_ordinary(text)))
    encoded = []
    for context, continuation in requests:
        text, context = context + continuation, context.rstrip()
        prefix, whole = ids(context), ids(text)
        if not context and text == continuation and whole[0] != tokenizer.eot_token:
            prefix, whole = [tokenizer.eot_token], [tokenizer.eot_token, *whole]
        encoded.append((prefix, whole[len(prefix):]))
    return encoded


class Group(NamedTuple):
    """A context and all its continuations: one row of a batch."""
    context: list[int]
    continuations: list[tuple[int, list[int]]]  # (number of the request, tokens)

    def size(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.continuations)  # a last token is not read


def group(requests: list[tuple[list[int], list[int]]], T: int) -> tuple[list[Group], list[int]]:
    """Neighbours with equal contexts share a row. A request that is longer than the model's context of T tokens loses
    the beginning of its context; the numbers of such requests come back as well."""
    groups, truncated = [], []
    for number, (context, tokens) in enumerate(requests):
        if not 0 < len(tokens) <= T:
            raise UserError(f"a continuation of {len(tokens)} tokens does not fit into a context of {T}\n"
                            "evaluate a model with a larger block_size")
        if (drop := len(context) + len(tokens) - (T + 1)) > 0:
            truncated.append(number)
            context = context[drop:]
        if not groups or groups[-1].context != context or groups[-1].size() + len(tokens) > 2 * T:
            groups.append(Group(context, []))
        groups[-1].continuations.append((number, tokens))
    return groups, truncated


class Tree:
    """Stands where a cache stands in decoding: a context's continuations lie side by side in one row, at the positions
    that each would have alone, and see the context and themselves but not one another."""
    causal = False

    def __init__(self, branch: Tensor):  # (B, T): 0 for the context, 1, 2, ... for its continuations
        same = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)  # (B, query, key)
        self.mask = same.tril()[:, None]  # (B, 1, T, T)

    def at(self, part, i, k=0):
        return self

    def store(self, k, v):
        return k, v


def pack(groups: list[Group]):
    """Groups -> idx, positions, branch (B, T), padded on the right, and for the M tokens to score: the place in B * T
    whose logits predict it, the token, and the number of its request, (M,) each."""
    T = max(g.size() for g in groups)
    idx, positions, branch = (np.zeros((len(groups), T), np.int64) for _ in range(3))
    places, tokens, owner = [], [], []
    for b, (context, continuations) in enumerate(groups):
        end = len(context)
        idx[b, :end], positions[b, :end] = context, np.arange(end)
        for c, (number, continuation) in enumerate(continuations, 1):
            new = slice(end, end + len(continuation) - 1)
            idx[b, new], branch[b, new] = continuation[:-1], c
            positions[b, new] = len(context) + np.arange(len(continuation) - 1)
            places += [b * T + len(context) - 1, *range(b * T + new.start, b * T + new.stop)]
            tokens += continuation
            owner += [number] * len(continuation)
            end = new.stop
    return [torch.as_tensor(a) for a in (idx, positions, branch, places, tokens, owner)]


@torch.no_grad()
def score(model: AbbIE, requests: list[tuple[list[int], list[int]]], iters: list[int], batch_size: int = 32,
          rank: int = 0, world: int = 1, bar: str = "") -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Tokens of (context, continuation) -> log-likelihoods (N, R), whether every token is the argmax (N, R), and the
    numbers of the requests whose context was truncated. Batches hold rows of about equal length and are the same for
    every number of ranks, each of which takes a stride of them."""
    groups, truncated = group(requests, model.config.block_size)
    groups.sort(key=Group.size, reverse=True)
    device, n = model.embed.weight.device, len(requests)
    total, misses = (torch.zeros(n, len(iters), dtype=torch.float64) for _ in range(2))
    hidden = None if bar and rank == 0 else True  # None: where there is no terminal
    for start in tqdm(range(rank * batch_size, len(groups), world * batch_size), desc=bar, disable=hidden):
        *packed, owner = pack(groups[start:start + batch_size])
        idx, positions, branch, places, tokens = (t.to(device) for t in packed)
        rope = tuple(table[positions][:, None] for table in model.rope_on(device))  # (B, 1, T, E/2)
        read, where = places.unique(return_inverse=True)  # continuations share the logits after their context
        for i, z in enumerate(sweep(model, idx, iters, rope, Tree(branch))):
            z, nats, hits = z.flatten(0, 1)[read], torch.zeros(len(tokens), device=device), torch.zeros_like(tokens)
            step = max(1, CHUNK // model.config.vocab_size)
            for first in range(0, len(read), step):
                logits = model.logits(z[first:first + step]).float()  # (<= step, V)
                mine = ((where >= first) & (where < first + step)).nonzero()[:, 0]
                row, token = where[mine] - first, tokens[mine]
                nats[mine] = logits[row, token] - logits.logsumexp(-1)[row]
                hits[mine] = (logits.argmax(-1)[row] == token).long()
            total[:, i].index_add_(0, owner, nats.cpu().double())
            misses[:, i].index_add_(0, owner, 1 - hits.cpu().double())
    total, misses = sum_over_ranks(total, device, world), sum_over_ranks(misses, device, world)
    return total.numpy(), (misses == 0).numpy(), truncated


# ---------------------------------------------------------------------------------------------- scores -> metrics

def mean_stderr(x: np.ndarray) -> float | str:
    return float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else "N/A"


def bootstrap_stderr(loglikelihoods: np.ndarray, bootstrap_iters: int) -> float | str:
    """Standard error of exp(-mean), with the harness's resamples: chunk i of at most 1000 draws by random.Random(i).
    NumPy's generator, put into the same state, gives the same numbers."""
    n, size = len(loglikelihoods), min(1000, bootstrap_iters)
    if n == 1 or size == 0:
        return "N/A"
    means = []
    for i in range(bootstrap_iters // size):
        *key, position = random.Random(i).getstate()[1]
        source = np.random.RandomState()
        source.set_state(("MT19937", key, position))
        means.append(loglikelihoods[(source.random_sample((size, n)) * n).astype(np.int32)].mean(1))
    return float(np.std(np.exp(-np.concatenate(means)), ddof=1))


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict:
    """Exact two-sided test of whether two r answer equally well, on the examples that only one of them gets right."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return {"gained": gained, "lost": lost, "p": min(1.0, 2 * tail / 2 ** n)}


def run_task(model: AbbIE, tokenizer, name: str, examples: list[Example], iters: list[int],
             batch_size: int = 32, bootstrap_iters: int = 100_000, log=None, rank: int = 0, world: int = 1) -> dict:
    """Score one task: {"n", "truncated" (examples), "iters": {r: {metric, metric_stderr}}, "paired": {"reference":
    r0, r: {metric: {gained, lost, p}}}}, r0 being the trained r. `log` is a file that gets one line per example
    and r."""
    metrics = BUILT_IN[name] if name in BUILT_IN else TASKS[name].metrics
    requests = encode(tokenizer, [request for example in examples for request in example.requests])
    loglikelihoods, greedy, truncated = score(model, requests, iters, batch_size, rank, world, bar=name)
    ends = np.cumsum([len(example.requests) for example in examples])
    per_example = list(zip(examples, np.split(loglikelihoods, ends), np.split(greedy, ends)))  # (choices, R) each
    result = {"n": len(examples), "truncated": len(set(np.searchsorted(ends, truncated, side="right"))),
              "iters": {str(r): {} for r in iters}, "paired": {}}
    reference = iters.index(model.config.mean_iters) if model.config.mean_iters in iters else 0
    result["paired"] = {"reference": iters[reference], **{str(r): {} for r in iters if r != iters[reference]}}
    for metric in metrics:
        if metric == "perplexity":  # of the whole word, not per token
            values = np.exp(np.minimum(700, -loglikelihoods.mean(0)))
            stderrs = [bootstrap_stderr(column, bootstrap_iters) for column in loglikelihoods.T]
        else:
            if "perplexity" in metrics:
                hits = np.array([exact.all(0) for _, _, exact in per_example])
            else:
                hits = np.array([
                    (scores / (np.array(example.lengths)[:, None] if metric == "acc_norm" else 1)).argmax(0) == example.gold
                    for example, scores, _ in per_example])
            values, stderrs = hits.mean(0), [mean_stderr(column) for column in hits.T]
            for i, r in enumerate(iters):
                if i != reference:
                    result["paired"][str(r)][metric] = mcnemar(hits[:, reference], hits[:, i])
        for r, value, stderr in zip(iters, values, stderrs):
            result["iters"][str(r)].update({metric: float(value), metric + "_stderr": stderr})
    if log and rank == 0:
        for number, (example, scores, exact) in enumerate(per_example):
            for i, r in enumerate(iters):
                log.write(json.dumps({"task": name, "doc_id": number, "iters": r, "gold": example.gold,
                                      "loglikelihoods": scores[:, i].tolist(), "is_greedy": exact[:, i].tolist()}) + "\n")
    return result


def run_tasks(model: AbbIE, tokenizer, tasks: list[str], iters: list[int], data: str | Path | None = None,
              data_dir: str | Path = "data/icl", limit: int | None = None, **options) -> dict:
    """Score tasks at every entry of iters -> {"tasks": {name: run_task's result}}. `data` is the folder of shards that
    the built-in tasks are made of; options go to run_task."""
    iters = ascending(model, iters)
    loaded = load_tasks(tasks, data, data_dir, model.config.block_size, limit)
    return {"tasks": {name: run_task(model, tokenizer, name, examples, iters, **options)
                      for name, examples in loaded.items()}}


# ------------------------------------------------------------------------------------------------------- output

LOWER_IS_BETTER = ("perplexity", "loss", "bits_per_byte")


def print_table(results: dict):
    """Rows: tasks and metrics; columns: iters; the best of each row marked with *. Accuracies in percent."""
    sections = {name: task for name, task in results.get("tasks", {}).items()}
    if "ppl" in results:
        sections[results["ppl"]["data"]] = results["ppl"]
    iters = next(iter(sections.values()))["iters"]
    print(f"{'':16s}{'':14s}{'n':>8s}" + "".join(f"{'r=' + r:>18s}" for r in iters) + "   (* best r)")
    for name, section in sections.items():
        for metric in [m for m in section["iters"][next(iter(iters))] if not m.endswith("_stderr")]:
            values = {r: scores[metric] for r, scores in section["iters"].items()}
            best = (min if metric in LOWER_IS_BETTER else max)(values.values())
            percent, cells = 100 if metric.startswith("acc") else 1, ""
            for r, value in values.items():
                stderr = section["iters"][r].get(metric + "_stderr", "N/A")
                text = f"{value * percent:.4g}" if percent == 1 else f"{value * percent:.2f}"
                text += f" ± {stderr * percent:.2g}" if stderr != "N/A" else ""
                cells += f"{text + ('*' if value == best else ' '):>18s}"
            print(f"{name:16s}{metric:14s}{section['n']:>8d}{cells}")


def main(argv: list[str]):
    parser = ArgumentParser(prog="eval_icl.py", description=__doc__.split("\n\n")[1])
    parser.add_argument("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    parser.add_argument("--iters", default="1,2,4,8", help="iterations of the Body (default 1,2,4,8)")
    parser.add_argument("--tasks", default="cloze,lastword", help=f"of {', '.join([*BUILT_IN, *TASKS])}")
    parser.add_argument("--data_dir", default="data/icl", help="DATA_DIR/TASK/SPLIT.jsonl (default data/icl)")
    parser.add_argument("--limit", type=int, help="score the first so many rows of each task")
    args = parser.parse_args(argv)
    model = AbbIE.from_checkpoint(args.ckpt)
    results = run_tasks(model, get_tokenizer(model.meta["tokenizer"]), args.tasks.split(","), parse_list(args.iters, "iters"),
        model.meta.get("data"), args.data_dir, args.limit)
    print_table(results)


if __name__ == "__main__":
    cli(main)
