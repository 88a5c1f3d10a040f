"""Perplexity and zero-shot tasks at any number of iterations, all of them from one sweep of the Body.

    python eval_icl.py --iters 1,2,4,8                       # the newest checkpoint on the built-in tasks
    python eval_icl.py --ckpt out/NAME --iters 1,2,4,8 --tasks hellaswag,lambada_openai,arc_easy,piqa \\
        --data_dir data/icl --out r.json --log_samples s.jsonl            # after: python prepare_data.py icl
    python eval_icl.py --ckpt out/NAME --iters 1,2,4,8 --ppl data/c4
    torchrun --nproc_per_node=8 eval_icl.py --ckpt out/NAME ...           # the same table, faster
    python eval_icl.py --iters 1,2,8 --exit kl:1e-2,mean:2.5 --ppl        # loss, and at adaptive depth too
    python eval_icl.py --ckpt out/NAME --iters 4 --lm_eval mmlu,gsm8k     # any other: see --help

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
lm-evaluation-harness 0.4.13, example by example (experiments/evaluation.py compares them).

Shapes: B rows, T tokens, D n_embd, V vocab_size, M scored tokens, N requests (windows), R columns: entries of
`iters`, each an r or the rule of an early exit, such as "kl:1e-2".
"""

import json
import math
import random
from collections.abc import Iterable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from checkpoint import load_model
from config import (
    ArgumentParser,
    choose_device,
    cli,
    leave_ranks,
    nearest,
    optional,
    parse_list,
    start_ranks,
    together,
)
from data import Shards, get_tokenizer
from decode import Chunk, KVCache, adaptive_states, parse_exit, resolve_exit
from model import AbbIE, check
from tasks import BUILT_IN, DOWNLOADED, TASKS, Example, load_tasks

LOGITS_AT_A_TIME = 1 << 24  # so that memory grows neither with the batch nor with the vocabulary


# ---------------------------------------------------------------------------------------- many r, many ranks


def ascending(model: AbbIE, iters: Iterable[int]) -> list[int]:
    """Sorted, without repetitions. Raises UserError for what the model's rule does not run at."""
    return sorted({model.check_iters(r) for r in iters})


def states_and_depths(model: AbbIE, idx: Tensor, iters: list[int | str], live=None, **tree):
    """Yields for every entry of iters (ascending numbers, then early exits) the states of idx (B, T) that are
    unembedded, (B, T, D), and the iterations that each token ran, (B, T): 0 where it is padding, which `live`
    (B, T) is False for. One sweep of the Body serves all r; each early exit has one of its own, of at most
    the largest r. tree: positions and mask of a decode.Chunk."""
    fixed = [r for r in iters if isinstance(r, int)]
    live = torch.ones_like(idx, dtype=torch.bool) if live is None else live
    (B, T), rope, kv = idx.shape, None, None
    if tree:
        kv = Chunk(KVCache(model, B, 1, "none", length=T), T, **tree)
        rope = kv.rope(model)
    for r, z in zip(fixed, model.states_at(idx, fixed, rope, kv)):
        yield z, r * live
    for rule in iters[len(fixed) :]:
        # All tokens take an iteration together, so that one slot for all iterations is exact: it holds what
        # those still running have just written, and what the others wrote in their last.
        kv = Chunk(KVCache(model, B, fixed[-1], "last", length=T), T, **tree)
        yield adaptive_states(model, idx, kv, parse_exit(rule), live)


def score_tokens(model: AbbIE, z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States z (M, D) that predict tokens (M,) -> nats (M,), and whether another token is the most probable
    one, (M,)."""
    at_a_time = max(1, LOGITS_AT_A_TIME // model.config.vocab_size)
    nats, missed = [], []
    for part, token in zip(z.split(at_a_time), tokens.split(at_a_time)):
        logits = model.logits(part).float()  # (<= at_a_time, V)
        nats.append(F.cross_entropy(logits, token, reduction="none"))
        missed.append(logits.argmax(-1) != token)
    return torch.cat(nats).cpu().double(), torch.cat(missed).cpu()


def sum_over_ranks(x: Tensor, world: int) -> Tensor:
    """Exact: a score is computed by one rank and 0 on the others; iterations and tokens are whole numbers."""
    if world > 1:
        dist.all_reduce(x)
    return x


def progress(batches, name: str, rank: int):
    """A bar on rank 0, if it has a name and there is a terminal (which disable=None looks for)."""
    return tqdm(batches, desc=name, disable=None if name and rank == 0 else True)


# ------------------------------------------------------------------------------------------------- perplexity


@torch.no_grad()
def window_losses(
    model: AbbIE, shards: Shards, iters: list[int | str], n_windows=None, batch_size=16, rank=0, world=1,
    autocast=nullcontext, bar="",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean nats per token and mean iterations, (N, R) each, of N windows, evenly spaced over the split (None:
    all of them), computed in the context autocast(). Batches are the same for every number of ranks, each of
    which takes a stride of them; so is the result. bar: name of a progress bar."""
    n = min(n_windows or shards.n_windows, shards.n_windows)
    chosen = np.arange(n) * shards.n_windows // n
    losses, ran = (torch.zeros(n, len(iters), dtype=torch.float64) for _ in range(2))
    device = model.embed.weight.device
    for first in progress(range(rank * batch_size, n, world * batch_size), bar, rank):
        x, y = (t.to(device) for t in shards.batch(chosen[first : first + batch_size]))
        rows = slice(first, first + len(x))
        with autocast():
            for i, (z, depth) in enumerate(states_and_depths(model, x, iters)):
                nats, _ = score_tokens(model, z.flatten(0, 1), y.flatten())
                losses[rows, i] = nats.view(y.shape).mean(1)
                ran[rows, i] = depth.cpu().double().mean(1)
    return sum_over_ranks(losses, world), sum_over_ranks(ran, world)


def evaluate_loss(model: AbbIE, shards: Shards, iters: list[int], n_windows=None, **options) -> dict:
    """{r: mean nats per token}, on the same windows at every call. The options are window_losses's."""
    iters = ascending(model, iters)
    losses, _ = window_losses(model, shards, iters, n_windows, **options)
    return dict(zip(iters, losses.mean(0).tolist()))


def perplexity(model: AbbIE, shards: Shards, iters: list[int | str], **options) -> dict:
    """Loss in nats per token with its standard error over windows, perplexity per token, and bits per byte of
    the split's text, which compare models of different tokenizers; on a whole split."""
    losses, ran = window_losses(model, shards, iters, **options, bar="perplexity")
    n = len(losses) * shards.block_size
    result = {"data": str(shards.folder), "n": n, "left_out": shards.n_tokens - n, "iters": {}}
    for r, loss, mean_iters in zip(iters, losses.numpy().T, ran.mean(0).tolist()):
        mean = float(loss.mean())
        entry = result["iters"][str(r)] = {"loss": mean, "loss_stderr": mean_stderr(loss)}
        entry["perplexity"] = math.exp(min(700, mean))
        entry["bits_per_byte"] = mean / math.log(2) * shards.n_tokens / shards.n_bytes
        entry["mean_iters"] = mean_iters
    return result


# ------------------------------------------------------------------------------- requests -> tokens -> scores


Pair = tuple[list[int], list[int]]  # a request's tokens: context, continuation


def encode_requests(tokenizer, requests: list[tuple[str, str]]) -> list[Pair]:
    """Strings -> tokens of (context, continuation), split after as many tokens as the context alone has.
    Whitespace at a context's end belongs to the continuation; an empty context becomes the end-of-text
    token."""
    encode = lru_cache(maxsize=8)(lambda text: list(tokenizer.encode_ordinary(text)))
    encoded = []
    for context, continuation in requests:
        start, whole = encode(context.rstrip()), encode(context + continuation)
        if not start:
            start = [tokenizer.eot_token]
            whole = whole if whole[:1] == start else start + whole
        encoded.append((start, whole[len(start) :]))
    return encoded


class Group(NamedTuple):
    """A context and all its continuations, which make one row of a batch."""

    context: list[int]
    continuations: list[tuple[int, list[int]]]  # (number of the request, tokens)

    def size(self) -> int:
        """The tokens that are read: the last one of a continuation is predicted only."""
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.continuations)


def group(requests: list[Pair], T: int) -> tuple[list[Group], list[int]]:
    """Neighbours with equal contexts share a row, up to 2 T tokens. A request longer than block_size T loses
    the beginning of its context; the numbers of these requests come back as well."""
    groups, truncated = [], []
    for number, (context, tokens) in enumerate(requests):
        misfit = f"a continuation of {len(tokens)} tokens does not fit into a context of {T}"
        check(0 < len(tokens) <= T, f"{misfit}\nevaluate a model of larger block_size")
        excess = len(context) + len(tokens) - (T + 1)
        if excess > 0:
            truncated.append(number)
            context = context[excess:]
        if not groups or groups[-1].context != context or groups[-1].size() + len(tokens) > 2 * T:
            groups.append(Group(context, []))
        groups[-1].continuations.append((number, tokens))
    return groups, truncated


def batches_of(groups: list[Group], batch_size: int) -> list[list[Group]]:
    """Little padding: a row is at least 3/4 as long as the longest of its batch, which comes first."""
    batches = []
    for row in sorted(groups, key=Group.size, reverse=True):
        if not batches or len(batches[-1]) == batch_size or row.size() < 0.75 * batches[-1][0].size():
            batches.append([])
        batches[-1].append(row)
    return batches


def pack(groups: list[Group]) -> tuple[Tensor, ...]:
    """The continuations of a context lie one after another in its row. -> idx (B, T); its branches (B, T): 0
    in the context, 1, 2, ... in its continuations, -1 for padding on the right; the positions (B, T) that
    tokens would have in a text alone; and for each of M tokens to score the place in B * T whose logits
    predict it, the token, and the number of its request, (M,) each."""
    T = max(row.size() for row in groups)
    idx, branches, positions = (np.zeros((len(groups), T), np.int64) for _ in range(3))
    places, tokens, owners = [], [], []
    for b, row in enumerate(groups):
        start = end = len(row.context)
        idx[b, :start], positions[b, :start] = row.context, range(start)
        for c, (number, continuation) in enumerate(row.continuations, 1):
            new = range(end, end + len(continuation) - 1)
            idx[b, new], branches[b, new] = continuation[:-1], c
            positions[b, new] = start + np.arange(len(new))
            places += [b * T + at for at in (start - 1, *new)]
            tokens += continuation
            owners += [number] * len(continuation)
            end = new.stop
        branches[b, end:] = -1
    return tuple(torch.as_tensor(a) for a in (idx, branches, positions, places, tokens, owners))


def tree_of(branches: Tensor, positions: Tensor) -> dict:
    """A continuation sees the context and itself, but not the others. -> positions and mask of a chunk;
    nothing where a row has no others and is an ordinary text."""
    if branches.max() <= 1:
        return {}
    visible = (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])  # (B, T queries, T keys)
    return {"positions": positions, "mask": visible.tril()[:, None]}


@torch.no_grad()
def score(
    model: AbbIE, requests: list[Pair], iters: list[int | str], batch_size=32, rank=0, world=1, bar=""
) -> tuple[np.ndarray, np.ndarray, list[int], list[float]]:
    """Tokens of N (context, continuation) -> log-likelihoods (N, R), whether every token is the argmax
    (N, R), the numbers of the requests whose context was truncated, and the mean iterations of the tokens
    read, R of them. Batches are the same for every number of ranks, each of which takes a stride of them."""
    groups, truncated = group(requests, model.config.block_size)
    device = model.embed.weight.device
    total, misses = (torch.zeros(len(requests), len(iters), dtype=torch.float64) for _ in range(2))
    ran = torch.zeros(2, len(iters), dtype=torch.float64)  # iterations, tokens
    for batch in progress(batches_of(groups, batch_size)[rank::world], bar, rank):
        *packed, owners = pack(batch)
        idx, branches, positions, places, tokens = (t.to(device) for t in packed)
        live = branches >= 0
        found = states_and_depths(model, idx, iters, live, **tree_of(branches, positions))
        for i, (z, depth) in enumerate(found):
            ran[:, i] += torch.stack([depth.sum(), live.sum()]).cpu()
            nats, missed = score_tokens(model, z.flatten(0, 1)[places], tokens)
            total[:, i].index_add_(0, owners, -nats)
            misses[:, i].index_add_(0, owners, missed.double())
    total, misses, ran = (sum_over_ranks(x, world).numpy() for x in (total, misses, ran))
    return total, misses == 0, truncated, (ran[0] / ran[1]).tolist()


# ------------------------------------------------------------------------------------------ scores -> metrics


def mean_stderr(x: np.ndarray) -> float | str:
    return float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else "N/A"


def bootstrap_stderr(loglikelihoods: np.ndarray, bootstrap_iters: int) -> float | str:
    """Standard error of exp(-mean) with the harness's own resamples: chunk i of at most 1000 of them is drawn
    by random.Random(i). NumPy's generator in the same state gives the same numbers, a hundred times
    faster."""
    n, size = len(loglikelihoods), min(1000, bootstrap_iters)
    if n == 1 or size < 2:
        return "N/A"
    means, source = [], np.random.RandomState()
    for i in range(bootstrap_iters // size):
        *state, position = random.Random(i).getstate()[1]
        source.set_state(("MT19937", state, position))
        for rows in range(0, size, 100):
            picks = (source.random_sample((min(100, size - rows), n)) * n).astype(np.int32)
            means.append(loglikelihoods[picks].mean(1))
    return float(np.std(np.exp(np.minimum(700, -np.concatenate(means))), ddof=1))


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict:
    """Exact two-sided test of whether two r (or two models) are right equally often, from the examples where
    just one of them is; before and after (N,) bool."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return {"gained": gained, "lost": lost, "p": min(1.0, 2 * tail / 2**n)}


def is_right(example: Example, scores: np.ndarray, greedy: np.ndarray, metric: str) -> np.ndarray:
    """One example's scores and greedy, (choices, R) each -> whether it is right at each r, (R,)."""
    if len(example.requests) == 1:  # LAMBADA: every token of the word is the argmax
        return greedy[0]
    if metric == "acc_norm":  # per character of the choice, without the space before it
        scores = scores / np.array([[len(continuation) - 1] for _, continuation in example.requests])
    return scores.argmax(0) == example.gold


def run_task(
    model: AbbIE, tokenizer, name: str, examples: list[Example], iters: list[int | str],
    bootstrap_iters=100_000, log=None, **options,
) -> dict:  # fmt: skip
    """Score one task -> {"n", "truncated": examples, "iters": {r: {metric, metric_stderr, mean_iters}},
    "paired": {"reference": the trained r (else the first), r: {metric: {gained, lost, p}}}}. `log`, an open
    file, gets a line per example and r. The options are score's."""
    requests = encode_requests(tokenizer, [request for example in examples for request in example.requests])
    scores, greedy, truncated, mean_iters = score(model, requests, iters, bar=name, **options)
    ends = np.cumsum([len(example.requests) for example in examples])
    scores, greedy = np.split(scores, ends[:-1]), np.split(greedy, ends[:-1])  # an example each, (choices, R)
    trained = model.config.mean_iters
    reference = trained if trained in iters else iters[0]
    entries = {str(r): {} for r in iters}
    paired = {str(r): {} for r in iters if r != reference}
    for metric in TASKS[name].metrics:
        if metric == "perplexity":
            words = np.concatenate(scores)  # (examples, R)
            values = np.exp(np.minimum(700, -words.mean(0)))
            stderrs = [bootstrap_stderr(column, bootstrap_iters) for column in words.T]
        else:
            right = np.array([is_right(*one, metric) for one in zip(examples, scores, greedy)])
            values, stderrs = right.mean(0), [mean_stderr(column) for column in right.T]
            base = right[:, iters.index(reference)]
            for r, column in zip(iters, right.T):
                if r != reference:
                    paired[str(r)][metric] = mcnemar(base, column)
        for entry, value, stderr in zip(entries.values(), values.tolist(), stderrs):
            entry.update({metric: value, metric + "_stderr": stderr})
    for entry, ran in zip(entries.values(), mean_iters):
        entry["mean_iters"] = ran
    for number, example in enumerate(examples if log else []):
        for r, nats, hits in zip(iters, scores[number].T.tolist(), greedy[number].T.tolist()):
            line = {"task": name, "doc_id": number, "iters": r}
            line |= {"loglikelihoods": nats, "is_greedy": hits, "gold": example.gold}
            log.write(json.dumps(line) + "\n")
    cut = np.unique(np.searchsorted(ends, truncated, side="right"))
    result = {"n": len(examples), "truncated": len(cut), "iters": entries}
    return {**result, "paired": {"reference": reference, **paired}}


def run_tasks(model: AbbIE, tokenizer, tasks, iters, data=None, data_dir="data/icl", limit=None, **options):
    """Score tasks at every r -> {"tasks": {name: the result of run_task}}. The built-in tasks are made of the
    shards in the folder `data`; the options are run_task's."""
    iters, results = ascending(model, iters), {}
    for name, examples in load_tasks(tasks, data, data_dir, model.config.block_size, limit).items():
        results[name] = run_task(model, tokenizer, name, examples, iters, **options)
    return {"tasks": results}


# ----------------------------------------------------------------------------- any other task, by the harness


def find_harness_tasks(names: list[str], include_path: str | None = None):
    """The TaskManager of the harness, which knows these tasks; with include_path, those of this folder
    instead of its own. Raises UserError for a name that it does not know, and where there is no harness."""
    packages = "lm_eval==0.4.13 transformers accelerate safetensors tokenizers"
    optional("accelerate", packages)  # which the harness needs for models of transformers
    TaskManager = optional("lm_eval.tasks", packages).TaskManager
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    known = manager.all_tasks
    for name in names:
        check(name in known, f"the harness knows no task {name}{nearest(name, known)}")
    return manager


def run_harness(model: AbbIE, args, manager) -> dict:
    """The harness's own results for its own tasks, args.lm_eval: {r: {task: {metric: value}}}. It runs what
    hf/export.py writes, by transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from hf.export import export

    how = {"tasks": args.lm_eval, "task_manager": manager, "log_samples": False}
    how |= {name: getattr(args, name) for name in ("num_fewshot", "limit", "bootstrap_iters", "batch_size")}
    results = {}
    with TemporaryDirectory() as folder:
        folder = Path(folder, "model")
        export(model, folder)
        for r in args.iters:
            runs = {"pretrained": str(folder), "trust_remote_code": True, "dtype": "float32", "iters": r}
            found = simple_evaluate("hf", runs, device=str(model.embed.weight.device), **how)
            results[str(r)] = found["results"]
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
    columns = list(next(iter(sections.values()))["iters"])
    width = max(map(len, sections))
    titles = "".join(f"{'r=' + r if r.isdigit() else r:>23s} " for r in columns)
    print(f"{'':{width}s}  {'':13s} {'n':>10s}{titles} *: best")
    adaptive = not all(map(str.isdigit, columns))
    for name, section in sections.items():
        n, entries, paired = section["n"], section["iters"], section.get("paired", {})
        official = TASKS[name].n_rows if name in DOWNLOADED else n
        count = str(n) if n == official else f"{n}/{official}"
        for metric in entries[columns[0]]:
            if metric.endswith("_stderr") or (metric == "mean_iters" and not adaptive):
                continue
            better = min if metric in LOWER_IS_BETTER else max
            best = better(columns, key=lambda r: entries[r][metric])
            line = ""
            for entry in entries.values():
                text = cell(metric, entry[metric])
                if metric + "_stderr" in entry:
                    text += f" ± {cell(metric, entry[metric + '_stderr'])}"
                starred = entry[metric] == entries[best][metric] and metric != "mean_iters"
                line += f"{text:>23s}" + ("*" if starred else " ")
            print(f"{name:{width}s}  {metric:13s} {count:>10s}{line}")
            test = paired.get(best, {}).get(metric)
            if test and test["gained"] > test["lost"]:
                notes.append(
                    f"{name} {metric}: r={best} gains {test['gained']} and loses {test['lost']} "
                    f"examples against r={paired['reference']}, McNemar p = {test['p']:.2g}"
                )
        if cut := section.get("truncated"):
            notes.append(f"{name}: {cut} of {n} examples exceed the model's context and lost their beginning")
        if left_out := section.get("left_out"):
            notes.append(f"{name}: {left_out} tokens behind the last window of a shard left out")
    print("\n".join(notes))


# ------------------------------------------------------------------------------------------------ the command


def comma_list(text: str) -> list[str]:
    return text.split(",") if text else []


def parse_args(argv: list[str]):
    parser = ArgumentParser(prog="eval_icl.py", description=__doc__.split("\n\nHow")[0])
    add = parser.add_argument
    add("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    add("--iters", default="1,2,4,8", help="iterations of the Body (default 1,2,4,8)")
    adaptive = "also at adaptive depth, up to the last of --iters, as in sample.py: kl:1e-2,mean:2.5"
    add("--exit", dest="exits", type=comma_list, default="", help=adaptive)
    default = f"{','.join(BUILT_IN)}, where neither --ppl nor --lm_eval is given"
    add("--tasks", type=comma_list, default="", help=f"of {', '.join(TASKS)} (default: {default})")
    add("--data_dir", default="data/icl", help="holds TASK/SPLIT.jsonl")
    add("--limit", type=int, help="rows of each task, the first N; of a built-in one, examples (300)")
    whole = "loss, perplexity and bits per byte on the whole validation split of a folder of shards"
    tasks_too = "default: the training data; the built-in tasks are made of the same folder"
    add("--ppl", nargs="?", const="", metavar="DATA", help=f"{whole} ({tasks_too})")
    anything = "tasks of lm-evaluation-harness, such as mmlu,gsm8k, at every r in turn, in one process"
    add("--lm_eval", type=comma_list, default="", help=anything)
    add("--num_fewshot", type=int, help="shots for --lm_eval (default: the task's own)")
    add("--include_path", help="folder of task files for --lm_eval to take instead of the harness's")
    add("--batch_size", type=int, default=32, help="rows at a time (default 32)")
    add("--bootstrap_iters", type=int, default=100_000, help="resamples for word perplexity")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", help="write the results here as JSON")
    add("--log_samples", help="write every example's scores here, a line of JSON each")
    args = parser.parse_args(argv)
    check(args.batch_size >= 1, f"--batch_size={args.batch_size} must be at least 1")
    check(args.limit is None or args.limit >= 1, f"--limit={args.limit} must be at least 1")
    for name in ("num_fewshot", "include_path"):
        check(args.lm_eval or getattr(args, name) is None, f"--{name} is for --lm_eval")
    args.iters = parse_list(args.iters, "iters")
    if not args.tasks and not args.lm_eval and args.ppl is None:
        args.tasks = BUILT_IN
    return args


def prepare(args, rank: int, world: int) -> tuple:
    """-> model, examples of the tasks, shards or None, the harness's tasks or None. Whatever can be wrong is
    found here, before anything is computed."""
    model = load_model(args.ckpt, choose_device(args.device))
    args.iters, T = ascending(model, args.iters), model.config.block_size
    args.exits = list(dict.fromkeys(resolve_exit(model, rule, args.iters[-1]) for rule in args.exits))
    if args.exits:  # whose predictions are all kept until the next iteration
        most = 8 * LOGITS_AT_A_TIME // (model.config.vocab_size * T)
        args.batch_size = min(args.batch_size, max(1, most))
    data, shards = args.ppl or model.meta.get("data"), None
    needed = args.ppl is not None or any(name in BUILT_IN for name in args.tasks)
    why = "this model does not name the data that it was trained on"
    advice = "give a folder of shards: --ppl DATA, and for the built-in tasks --tasks cloze,lastword too"
    check(not needed or bool(data), f"{why}\n{advice}")
    examples = load_tasks(args.tasks, data, args.data_dir, T, args.limit)
    if args.ppl is not None:
        shards, tokenizer = Shards(data, "val", T), model.meta["tokenizer"]
        why = f"{shards.folder} holds {shards.tokenizer} tokens, but the model reads {tokenizer}"
        check(shards.tokenizer == tokenizer, f"{why}\nprepare it with --tokenizer {tokenizer}")
    manager = None
    if args.lm_eval:
        why = "--lm_eval runs in one process\nin several: python -m hf.export, then lm_eval --model hf"
        check(world == 1, why)
        name = model.meta["tokenizer"]
        exported = name in ("bytes", "gpt2") or name.startswith("hf:")
        check(exported, f"--lm_eval runs models of bytes, gpt2 and hf: tokens, not of {name}")
        manager = find_harness_tasks(args.lm_eval, args.include_path)
    for path in (args.out, args.log_samples):
        if path and rank == 0:
            open(path, "a").close()  # it can be written
    return model, examples, shards, manager


def evaluate(args, rank: int, world: int, model: AbbIE, examples: dict, shards, manager) -> dict:
    """Compute and print all that is asked for -> the contents of --out."""
    options = {"batch_size": args.batch_size, "rank": rank, "world": world}
    columns, tokenizer = [*args.iters, *args.exits], get_tokenizer(model.meta["tokenizer"])
    results = {"ckpt": model.meta["ckpt"], "trained_iters": model.config.mean_iters, "tasks": {}}
    kept = args.log_samples and rank == 0
    with open(args.log_samples, "w") if kept else nullcontext() as log:
        for name, task in examples.items():
            how = {"bootstrap_iters": args.bootstrap_iters, "log": log, **options}
            results["tasks"][name] = run_task(model, tokenizer, name, task, columns, **how)
    if shards:
        results["ppl"] = perplexity(model, shards, columns, **options)
    print_table(results)
    if manager:
        results["lm_eval"] = run_harness(model, args, manager)
    return results


def main(argv: list[str]):
    rank, world = start_ranks()
    args = together(lambda: parse_args(argv))
    work = together(lambda: prepare(args, rank, world))
    results = together(lambda: evaluate(args, rank, world, *work))
    if args.out and rank == 0:
        Path(args.out).write_text(json.dumps(results, indent=1, default=float) + "\n")
    leave_ranks()


if __name__ == "__main__":
    cli(main)
