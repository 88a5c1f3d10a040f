"""Decoding: the KV cache of a model with iterations, and the ways to use it.

    generate(model, prompts, max_new_tokens, iters=None, ...) -> the new ids of every prompt
    stream(the same)                  -> an iterator of (row, id), each as soon as it is certain

Prompts are lists of token ids; decoding is greedy unless a temperature is given. The strategies are
`stream_plain` (cached, batched), in which `adaptive_step` (early exit) or `static_step` (compiled) may stand
for `step`, and `stream_drafted` (self-speculative). When a context is full, its last block_size // 2 tokens
start again from position 0.

Shapes as in model.py: B rows, T new tokens, K n_kv_heads, E attn_head_dim, S = block_size positions of a
cache."""

import copy
import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Shards
from model import AbbIE, AbbIEConfig, UserError, check

# -------------------------------------------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of the tokens so far, each (slots, B, K, S, E); `lengths` says how many tokens each of
    the B rows holds. In mode "full" there is one slot per block and *iteration*: iteration k of a new token
    reads what iteration k of the old ones wrote, so decoding is exact. In mode "last" all iterations of a
    Body block share one slot: a prompt is processed exactly, then only its last iteration is left for all
    iterations to read. looks: the Tail is run in every iteration too (early exit by "kl" looks at its
    predictions), and in mode "full" has slots as the Body has.

    The protocol between a cache and the model: the model asks `kv.at(part, i, k)` for the slot of block i of
    "head", "body" or "tail" in iteration k; Attention hands the slot its new keys and values, (B, K, T, E)
    each, by `store`, gets all that there are, (B, K, S, E) each, and lets queries see them by the slot's
    `mask`, (T, S) or (B, 1, T, S) of True where a query sees a key, or None, and `causal`."""

    def __init__(
        self, config: AbbIEConfig, batch_size=1, max_iters=None, mode="full", device="cpu", dtype=None,
        looks=False, length=None,
    ):  # fmt: skip
        self.mode, self.max_iters, self.length = mode, max_iters or config.mean_iters, length
        self.length = length or config.block_size
        # Slots run: Head, Tail, Body of iteration 0; Body of iteration 1; ... With looks: Head; Tail and Body
        # of iteration 0; Tail and Body of iteration 1; ...
        self.first = {"head": 0, "tail": config.n_head_blocks}
        self.first["body"] = config.n_head_blocks + config.n_tail_blocks
        self.n_once = self.first["tail" if looks else "body"]
        n_repeated, times = config.n_blocks - self.n_once, self.max_iters if mode == "full" else 1
        self.stride = {"head": 0, "tail": n_repeated if looks else 0, "body": n_repeated}
        shape = (self.n_once + n_repeated * times, batch_size, config.n_kv_heads)
        self.keys = torch.zeros(*shape, self.length, config.attn_head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch_size

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.keys[:, 0, :, 0].numel() * self.keys.element_size()

    def slot(self, part: str, i: int, k: int = 0) -> int:
        return self.first[part] + i + (k * self.stride[part] if self.mode == "full" else 0)

    def chunk(self, starts: list[int] | Tensor, T: int, rows: list[int] | None = None, **tree) -> "Chunk":
        """T new tokens in each of `rows` (default: all), from place starts[b] on. starts as a tensor (B,)
        keeps every shape the same from step to step, as a compiled or recorded step needs."""
        return Chunk(self, starts, T, None if rows == list(range(len(self.lengths))) else rows, **tree)


class Chunk:
    """New tokens in some rows of a cache: the places where their keys and values go, and what they may attend
    to: all places up to their own, at positions that are the places; or, where a row is a tree of texts,
    what `mask` (B, 1, T, S) says, at `positions` (B, T). One chunk serves every block and iteration; `at`
    picks the slot."""

    def __init__(self, cache: KVCache, starts, T: int, rows: list[int] | None, positions=None, mask=None):
        self.cache, device, static = cache, cache.keys.device, isinstance(starts, Tensor)
        self.end = cache.length if static else max(starts) + T
        check(self.end <= cache.length, f"{self.end} tokens do not fit into a context of {cache.length}")
        # Rows of equal length are written and read as slices; others through their indices, under a mask.
        self.together = not static and rows is None and len(set(starts)) == 1
        self.rows = torch.tensor(range(len(starts)) if rows is None else rows, device=device)
        if self.together:
            self.places = torch.arange(starts[0], self.end, device=device)  # (T,)
            self.where = (slice(None), slice(None), slice(starts[0], self.end))  # of (B, K, S, E)
        else:
            starts = starts if static else torch.tensor(starts, device=device)
            self.places = starts[:, None] + torch.arange(T, device=device)  # (B, T)
            self.where = (self.rows[:, None], slice(None), self.places)
        self.positions = self.places if positions is None else positions
        # SDPA aligns its causal mask top-left: it is for a prefill only. One token sees all.
        self.causal = self.together and mask is None and T > 1 and starts[0] == 0
        self.mask = mask
        if mask is None and not (self.together and T == 1) and not self.causal:
            self.mask = self.see_earlier()

    def see_earlier(self) -> Tensor:
        """The mask (T, S), or (B, 1, T, S), of tokens that see all places up to their own."""
        places = self.places if self.together else self.places[:, None]
        return torch.arange(self.end, device=places.device) <= places[..., None]

    def only(self, live: Tensor) -> tuple[tuple, "Chunk"]:
        """Some of these tokens, live (B, T) bool -> (where they are in (B, T), the chunk of them alone). Rows
        of which none is left drop out; shorter rows repeat their last one, which changes nothing."""
        if live.all():
            return (slice(None), slice(None)), self
        rows = live.any(1).nonzero()  # (b, 1)
        counts = live[rows[:, 0]].sum(1, keepdim=True)
        first = (~live[rows[:, 0]]).byte().argsort(dim=1, stable=True)  # the live ones, in order, come first
        number = torch.arange(int(counts.max()), device=live.device)
        where = (rows, first.gather(1, torch.minimum(number, counts - 1)))  # (b, 1), (b, t)

        part = copy.copy(self)
        part.together, part.causal, part.rows = False, False, self.rows[rows[:, 0]]
        part.places = self.places.expand(live.shape)[where]
        part.positions = self.positions.expand(live.shape)[where]
        part.where = (part.rows[:, None], slice(None), part.places)
        tree = self.mask is not None and self.positions is not self.places
        part.mask = self.mask[rows, 0, where[1]][:, None] if tree else part.see_earlier()
        return where, part

    def rope(self, model: AbbIE) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the new tokens' positions, (T, E/2) or (B, 1, T, E/2)."""
        tables = (table[self.positions] for table in model.rope_on(self.positions.device))
        return tuple(table if table.dim() == 2 else table[:, None] for table in tables)

    def at(self, part: str, i: int, k: int = 0) -> "Slot":
        return Slot(self, self.cache.slot(part, i, k))

    def fill_deeper(self, iters: int):
        """Let these tokens' last keys and values stand for the iterations that they did not run, which other
        tokens may read."""
        cache = self.cache
        if cache.mode == "last" or iters == cache.max_iters:
            return
        for table in (cache.keys, cache.values):
            slots = table[cache.n_once :].unflatten(0, (cache.max_iters, -1))  # (iters, blocks, B, K, S, E)
            last = slots[(slice(iters - 1, iters), slice(None), *self.where)]
            slots[(slice(iters, None), slice(None), *self.where)] = last


class Slot:
    """One slot of a cache under a chunk: what Attention meets."""

    def __init__(self, chunk: Chunk, index: int):
        self.chunk, self.index, self.mask, self.causal = chunk, index, chunk.mask, chunk.causal

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache = self.chunk.cache
        return self._write(cache.keys[self.index], keys), self._write(cache.values[self.index], values)

    def _write(self, table: Tensor, new: Tensor) -> Tensor:
        """Put new (B, K, T, E) into its places of table -> all that the rows hold so far, (B, K, S, E)."""
        chunk = self.chunk
        table[chunk.where] = new if chunk.together else new.transpose(1, 2)
        if chunk.together or len(chunk.rows) == table.shape[0]:
            return table[:, :, : chunk.end]
        return table[chunk.rows, :, : chunk.end]


def run(model: AbbIE, idx: Tensor, kv: Chunk, iters: int) -> Tensor:
    """idx (B, T), whose places in a cache kv knows -> the state that is unembedded, (B, T, D)."""
    return next(model.states_at(idx, [iters], kv.rope(model), kv))


@torch.no_grad()
def step(model: AbbIE, idx: Tensor, cache: KVCache, iters=None, n_new=None, rows=None) -> Tensor:
    """Append idx (B, T) to `rows` of a cache (default: all) -> logits (B, V) after each row's last new token.
    Rows may be padded on the right: the list n_new (default: T each) says how many tokens of each count."""
    iters, n_new = model.check_iters(iters), n_new or [idx.shape[1]] * idx.shape[0]
    most = cache.max_iters
    check(iters <= most, f"iters={iters}, but the cache was made for {most} iterations")
    rows = list(range(idx.shape[0])) if rows is None else rows
    kv = cache.chunk([cache.lengths[b] for b in rows], idx.shape[1], rows)
    z = run(model, idx, kv, iters)
    kv.fill_deeper(iters)
    return model.logits(take_last(z, cache, n_new, rows))


def take_last(z: Tensor, cache: KVCache, n_new: list[int], rows: list[int]) -> Tensor:
    """Count n_new tokens into the cache's rows -> the states (B, D) of their last ones, of z (B, T, D)."""
    for b, n in zip(rows, n_new):
        cache.lengths[b] += n
    last = torch.tensor(n_new, device=z.device) - 1
    return z[torch.arange(len(n_new), device=z.device), last]


# ------------------------------------------------------------------------------------------- choosing a token


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits (B, V) -> the probabilities (B, V) that tokens are drawn with; at temperature 0 all is on the
    best one. top_k keeps the k best (0: all), top_p the fewest that hold this much probability together
    (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits.double()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if 0 < top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ranked, order = (p / p.sum(-1, keepdim=True)).sort(descending=True, stable=True)
        kept = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        p = torch.zeros_like(p).scatter(-1, order, kept)
    return p / p.sum(-1, keepdim=True)


def draw(p: Tensor, rngs: list[random.Random]) -> list[int]:
    """A token from each row of p (B, V), which need not sum to 1: the inverse of its distribution function at
    one random number of the row's own, so that rows do not depend on one another, nor results on the
    device."""
    total = p.cumsum(-1)
    u = torch.tensor([[rng.random()] for rng in rngs], dtype=p.dtype, device=p.device)
    return torch.searchsorted(total, u * total[:, -1:], right=True).clamp_(max=p.shape[-1] - 1)[:, 0].tolist()


# -------------------------------------------------------------------------------------- generate and stream


@dataclass
class Stats:
    """What a generation did, for the report at its end."""

    tokens: int = 0  # generated
    seconds: float = 0.0  # for them, the prompt's time included
    drafted: int = 0
    accepted: int = 0  # of the drafted ones
    iters: Counter = field(default_factory=Counter)  # early exit: iterations -> tokens that ran so many

    def report(self, iters: int) -> str:
        text = f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"
        if self.iters:
            n = self.iters.total()
            mean = sum(k * count for k, count in self.iters.items()) / n
            shares = ", ".join(f"{k}: {self.iters[k] / n:.0%}" for k in sorted(self.iters))
            return f"{text}, {mean:.2f} iterations per token ({shares})"
        text += f", {iters} iterations per token"
        if self.drafted:
            text += f", {self.accepted / self.drafted:.0%} of {self.drafted} drafted tokens accepted"
        return text


def generate(
    model: AbbIE, prompts: list[list[int]], max_new_tokens: int, iters=None, **options
) -> list[list[int]]:
    """-> the new ids of every prompt, at most max_new_tokens each. Options and errors: see `stream`."""
    new = [[] for _ in prompts]
    for row, token in stream(model, prompts, max_new_tokens, iters, **options):
        new[row].append(token)
    return new


def stream(
    model: AbbIE,
    prompts: list[list[int]],
    max_new_tokens: int,
    iters: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1,
    stop_token: int | None = None,
    cache_mode: str = "full",
    draft_iters: int = 0,
    draft_tokens: int = 4,
    early_exit: str = "",
    compiled: bool = False,
    done: set[int] | None = None,
    stats: Stats | None = None,
) -> Iterator[tuple[int, int]]:
    """An iterator of (row, id): the new tokens of the prompts, at most max_new_tokens each. A row ends before
    stop_token, and when the caller adds it to the set `done`. Row b draws from seed + b, so that a batch of N
    equals N batches of 1. cache_mode: see KVCache; draft_iters > 0: see stream_drafted (one prompt after the
    other); early_exit, "kl:1e-3" or "u:1e-2": see adaptive_step; compiled: see static_step. `stats` is filled
    on the way. Raises UserError for values that are out of range or contradict one another."""
    iters, S = model.check_iters(iters), model.config.block_size
    check(len(prompts) > 0 and all(prompts), "a prompt has no tokens")
    check(all(len(prompt) <= S for prompt in prompts), f"a prompt is longer than the context of {S} tokens")
    known = all(0 <= min(prompt) and max(prompt) < model.config.vocab_size for prompt in prompts)
    check(known, f"a prompt has a token id that is not in the vocabulary of {model.config.vocab_size}")
    check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    check(0 <= temperature < math.inf, f"temperature={temperature} must be 0 (greedy) or more")
    check(top_k >= 0, f"top_k={top_k} must be 0 (all) or more")
    check(0 < top_p <= 1, f"top_p={top_p} must be above 0 and at most 1")
    check(cache_mode in ("full", "last"), f"cache={cache_mode!r} is neither full nor last")
    check(0 <= draft_iters < iters, f"draft_iters={draft_iters} must be below iters={iters}")
    check(draft_tokens >= 1, f"draft_tokens={draft_tokens} must be at least 1")
    if draft_iters:
        check(cache_mode == "full", "drafting needs cache=full: its iterations begin the verification")
        check(not early_exit, "drafting and exit exclude each other: a verified token runs all iterations")
    if compiled:
        check(
            not draft_iters and not early_exit,
            "compile is for plain decoding: leave out draft_iters and exit",
        )
    stats, done, start = stats or Stats(), set() if done is None else done, time.perf_counter()
    sample = partial(distribution, temperature=temperature, top_k=top_k, top_p=top_p)
    rngs = [random.Random(seed + b) for b in range(len(prompts))]
    weight, batch_size = model.embed.weight, 1 if draft_iters else len(prompts)
    looks = early_exit.startswith("kl")
    cache = KVCache(model.config, batch_size, iters, cache_mode, weight.device, weight.dtype, looks)
    if draft_iters:
        draft = partial(draft_and_verify, model, cache, iters=iters, draft_iters=draft_iters, sample=sample)
        tokens = stream_drafted(
            model, cache, prompts, max_new_tokens, iters, draft_tokens, draft, sample, rngs, done, stats
        )
    else:
        next_step = partial(step, model, cache=cache, iters=iters)
        if early_exit:
            how = {"cache": cache, "iters": iters, "rule": parse_exit(early_exit), "stats": stats}
            next_step = partial(adaptive_step, model, **how)
        elif compiled:
            cache, next_step = static_step(model, len(prompts), iters, cache_mode)
        tokens = stream_plain(cache, prompts, max_new_tokens, next_step, sample, rngs, done)
    return until_done(tokens, stop_token, done, stats, start)


def until_done(tokens, stop_token, done, stats, start):
    for b, token in tokens:
        if token == stop_token:
            done.add(b)
        if b not in done:
            stats.tokens, stats.seconds = stats.tokens + 1, time.perf_counter() - start
            yield b, token


# ------------------------------------------------------------------------------------------------ plain steps


def feed(cache, contexts, rows, next_step) -> Tensor:
    """Take what the cache does not hold yet of contexts, dict of row -> ids, through the model by
    `next_step(idx, n_new=, rows=)` -> logits (len(rows), V) after the last ids. Prompts, and contexts that
    start again because they have become too long, go together, padded; and so do single tokens."""
    S = cache.length
    for b in rows:
        if len(contexts[b]) > S:
            contexts[b] = contexts[b][-(S // 2) :]
            cache.lengths[b] = 0
    prompts = [b for b in rows if cache.lengths[b] == 0]
    logits = {}
    for alike in (prompts, [b for b in rows if b not in prompts]):
        new = [contexts[b][cache.lengths[b] :] for b in alike]
        n_new = [len(ids) for ids in new]
        padded = [ids + [0] * (max(n_new) - len(ids)) for ids in new]
        if alike:
            found = next_step(torch.tensor(padded, device=cache.keys.device), n_new=n_new, rows=alike)
            logits.update(zip(alike, found))
    return torch.stack([logits[b] for b in rows])


@torch.no_grad()
def stream_plain(cache, prompts, max_new_tokens, next_step, sample, rngs, done):
    """Every row's next token, again and again; rows in `done` leave the batch."""
    contexts = {b: list(prompt) for b, prompt in enumerate(prompts)}
    for _ in range(max_new_tokens):
        p = sample(feed(cache, contexts, list(contexts), next_step))
        for b, token in zip(list(contexts), draw(p, [rngs[b] for b in contexts])):
            contexts[b].append(token)
            yield b, token
        contexts = {b: ids for b, ids in contexts.items() if b not in done}
        if not contexts:
            return


def static_step(model: AbbIE, batch_size: int, iters: int, cache_mode: str, **how):
    """A cache and what stands for `step`: single tokens have the same shapes whatever the rows and lengths,
    since positions are a tensor, and all rows and the whole cache take part, under a mask. So their step can
    be compiled and, on CUDA, recorded as a graph whose replay needs no Python. That takes a minute, so the
    model keeps both for the next call."""
    kept, name = model.__dict__.setdefault("static_steps", {}), (batch_size, iters, cache_mode)
    if name in kept:
        kept[name][0].lengths = [0] * batch_size
        return kept[name]
    weight, S = model.embed.weight, model.config.block_size
    cache = KVCache(model.config, batch_size, iters, cache_mode, weight.device, weight.dtype)
    model.rope_on(weight.device)
    for table in (cache.keys, cache.values):
        torch._dynamo.mark_static_address(table)

    def forward(idx, starts):
        return model.logits(run(model, idx, cache.chunk(starts, 1), iters))[:, 0]

    forward = torch.compile(forward, fullgraph=True, **(how or {"mode": "reduce-overhead"}))

    def compiled_step(idx, n_new, rows):
        if max(n_new) > 1:
            return step(model, idx, cache, iters, n_new, rows)
        whole = torch.zeros(batch_size, 1, dtype=idx.dtype, device=idx.device)
        whole[rows] = idx
        starts = torch.tensor([min(n, S - 1) for n in cache.lengths], device=idx.device)
        logits = forward(whole, starts)[rows]  # the other rows wrote beyond their end, which nobody reads
        for b in rows:
            cache.lengths[b] += 1
        return logits

    kept[name] = cache, compiled_step
    return kept[name]


# ------------------------------------------------------------------------------------------------- early exit


def parse_exit(text: str, kinds=("kl", "u")) -> tuple[str, float]:
    """'kl:1e-3' -> ("kl", 0.001)."""
    kind, _, threshold = text.partition(":")
    try:
        if kind in kinds and 0 < float(threshold) < math.inf:
            return kind, float(threshold)
    except ValueError:
        pass
    raise UserError(
        f"exit={text!r}: give kl:1e-3 (change of the prediction in nats), u:1e-2 (relative change of\n"
        "the state that the Tail reads), or, on the command line, mean:2.5 (iterations per token)"
    )


def resolve_exit(model: AbbIE, text: str, iters: int) -> str:
    """'mean:2.5' -> 'kl:0.0123', with which text of the model's training data runs so many iterations per
    token on average; others as they are. Raises UserError where that text is not at hand."""
    kind, mean = parse_exit(text, ("kl", "u", "mean"))
    if kind != "mean":
        return text
    check(2 <= mean <= iters, f"exit={text}: the mean must lie between 2 and iters={iters}")
    data, T = model.meta.get("data"), model.config.block_size
    there = data and Path(data, "meta.json").exists()
    check(there, f"exit={text} needs the model's training data, {data}\ngive a threshold: kl:1e-2")
    shards = Shards(data, "train", T)
    n = min(shards.n_windows, -(-4096 // T))
    idx, _ = shards.batch([i * shards.n_windows // n for i in range(n)])
    return f"kl:{threshold_for(model, idx.to(model.embed.weight.device), mean, iters):.3g}"


@torch.no_grad()
def threshold_for(model: AbbIE, idx: Tensor, mean: float, iters: int) -> float:
    """The threshold of "kl" at which tokens idx (B, T) run `mean` iterations on average."""
    before, changes = None, []
    for z in model.states_at(idx, list(range(1, iters))):
        now = model.logits(z).float().log_softmax(-1)
        if before is not None:
            changes.append(F.kl_div(before, now, log_target=True, reduction="none").sum(-1))
        before = now
    changes = torch.stack(changes)  # (iters - 2, B, T): seen after iteration 2, ..., iters - 1
    low, high = -30.0, 10.0  # of its logarithm
    for _ in range(40):
        middle = (low + high) / 2
        moving = (changes >= math.exp(middle)).cumprod(0)
        low, high = (middle, high) if 2 + moving.sum(0).double().mean() > mean else (low, middle)
    return math.exp(high)


@torch.no_grad()
def adaptive_states(model: AbbIE, idx: Tensor, kv: Chunk, iters: int, rule, live: Tensor):
    """idx (B, T), of which live (B, T) are no padding -> the states that are unembedded, (B, T, D), and the
    iterations that each token ran, (B, T). Iteration k works on the tokens that have not settled yet; those
    that have leave the Body, and their last keys and values stand for the iterations that they skip. Whether
    a token settles depends on earlier tokens and itself alone, so reading many tokens at once equals reading
    them one by one. A token has settled when one more iteration changes
    - "kl": the prediction by a KL divergence below the threshold (as arXiv 2502.05171, section 6.1; each look
      costs a Tail and an unembedding);
    - "u": what the Tail reads by less than this share of its norm (costs nothing).
    The raw state of abbie_d never settles: it halves its distance, and u quarters it, whatever the token."""
    kind, threshold = rule
    h = model.run_head(idx, kv.rope(model), kv)
    x, z, before = model.start(h).clone(), torch.zeros_like(h), None
    live, depths = live.clone(), torch.zeros(idx.shape, dtype=torch.int64, device=idx.device)
    for k in range(iters):
        where, some = kv.only(live)
        rope = some.rope(model)
        u, x[where] = model.advance(x[where], h[where], k, k + 1, rope, some)
        if kind == "kl":
            z[where] = model.run_tail(u, rope, some, k)
            now = model.logits(z[where]).float().log_softmax(-1)
        else:
            z[where] = now = u
        if before is None:
            before = torch.empty(*idx.shape, now.shape[-1], dtype=now.dtype, device=now.device)
            settled = torch.zeros(u.shape[:2], dtype=torch.bool, device=idx.device)
        elif kind == "kl":
            change = F.kl_div(before[where], now, log_target=True, reduction="none").sum(-1)
            settled = change < threshold
        else:
            settled = (now - before[where]).norm(dim=-1) < threshold * now.norm(dim=-1)
        before[where] = now
        leaving = torch.zeros_like(live)
        leaving[where] = settled | (k + 1 == iters)
        if leaving.any():
            depths[leaving] = k + 1
            kv.only(leaving)[1].fill_deeper(k + 1)
            live &= ~leaving
            if not live.any():
                break
    return z if kind == "kl" else model.run_tail(z, kv.rope(model), kv), depths


@torch.no_grad()
def adaptive_step(model, idx: Tensor, cache: KVCache, iters: int, n_new=None, rows=None, *, rule, stats):
    """`step` with early exit: every token runs as many iterations as it needs, at most iters. `stats` gets
    how many these were."""
    T = idx.shape[1]
    n_new, rows = n_new or [T] * len(idx), rows or list(range(len(idx)))
    kv = cache.chunk([cache.lengths[b] for b in rows], T, rows)
    live = torch.arange(T, device=idx.device) < torch.tensor(n_new, device=idx.device)[:, None]
    z, depths = adaptive_states(model, idx, kv, iters, rule, live)
    stats.iters.update(depths[live].tolist())
    return model.logits(take_last(z, cache, n_new, rows))


# --------------------------------------------------------------------------------------------------- drafting


@torch.no_grad()
def stream_drafted(
    model, cache, prompts, max_new_tokens, iters, draft_tokens, draft, sample, rngs, done, stats
):
    """Self-speculative decoding (LayerSkip, arXiv 2404.16710), one prompt after the other: draft some tokens
    at few iterations, then take all of them on to `iters` in one pass and keep those that decoding at `iters`
    could have drawn (speculative sampling, arXiv 2302.01318, and 2211.17192)."""
    S = model.config.block_size
    for b, prompt in enumerate(prompts):
        context, n, cache.lengths = {0: list(prompt)}, 0, [0]
        while n < max_new_tokens and b not in done:
            start = cache.lengths[0]
            if start in (0, S):  # a prompt, or a full context that starts again
                read = partial(step, model, cache=cache, iters=iters)
                tokens = draw(sample(feed(cache, context, [0], read)), [rngs[b]])
            else:
                width = min(draft_tokens + 1, S - start, max_new_tokens - n)
                tokens = draft(context[0][-1], width, rng=rngs[b], stats=stats)
            context[0] += tokens
            n += len(tokens)
            yield from ((b, token) for token in tokens)


def draft_and_verify(model, cache, token, n, *, iters, draft_iters, sample, rng, stats) -> list[int]:
    """Feed `token` and n - 1 drafted ones -> the accepted ones and one more, drawn at `iters`. The first
    draft_iters iterations do not depend on iters: the draft's Head and Body, their states and their keys and
    values, are the beginning of the verification and are not repeated. The Tail's are overwritten."""
    start, states, drafted, q = cache.lengths[0], [], [], []
    for j in range(n):
        kv = cache.chunk([start + j], 1)
        rope = kv.rope(model)
        h = model.run_head(torch.tensor([[token]], device=cache.keys.device), rope, kv)
        u, x = model.advance(model.start(h), h, 0, draft_iters, rope, kv)
        states.append((h, x))
        if j < n - 1:  # after the last one, the verification itself predicts
            q.append(sample(model.logits(model.run_tail(u, rope, kv))[:, 0]))
            [token] = draw(q[-1], [rng])
            drafted.append(token)

    h, x = (torch.cat(parts, dim=1) for parts in zip(*states))  # (1, n, D)
    kv = cache.chunk([start], n)
    rope = kv.rope(model)
    u, _ = model.advance(x, h, draft_iters, iters, rope, kv)
    p = sample(model.logits(model.run_tail(u, rope, kv))[0])  # (n, V)

    accepted = 0
    for token, draft in zip(drafted, q):
        if rng.random() * draft[0, token] >= p[accepted, token]:
            p[accepted] = (p[accepted] - draft[0]).clamp(min=0)  # with acceptance at p/q, this makes p again
            break
        accepted += 1
    cache.lengths[0] = start + 1 + accepted  # what was rejected is forgotten
    stats.drafted, stats.accepted = stats.drafted + n - 1, stats.accepted + accepted
    return drafted[:accepted] + draw(p[accepted][None], [rng])


# -------------------------------------------------------------------------------------- weights for decoding


def lay_out_for_decoding(model: AbbIE) -> AbbIE:
    """Store every matrix column by column, with the same shape and values: a CPU then multiplies it with one
    row about 1.3x faster."""
    if model.embed.weight.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()
    return model


class Int8Linear(nn.Module):
    """A Linear whose weights are 8-bit integers with a scale for each row: a quarter of the bytes to read.
    What it multiplies is rounded to 7 bits (with 8, sums of products overflow on CPUs without VNNI), with a
    scale for each token, so that no token depends on its batch. PyTorch's own integer product on x86 CPUs."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).double()
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in PyTorch 2.13, with nothing there in its place
            weight = torch.quantize_per_channel(weight, scale, zeros, axis=0, dtype=torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), fp32."""
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return multiply(x / scale, 1 / 63, 64, self.packed) * scale


def quantize(model: AbbIE) -> AbbIE:
    """Every matrix product in 8-bit integers (Int8Linear); the embedding and all else stay fp32. For decoding
    and scoring alone. Raises UserError where PyTorch cannot do it: elsewhere than on x86 CPUs."""
    engines = torch.backends.quantized
    possible = model.embed.weight.device.type == "cpu" and "fbgemm" in engines.supported_engines
    check(possible, "dtype=int8 is for x86 CPUs\ntry --dtype float32 or bfloat16, or --device cpu")
    before, engines.engine = engines.engine, "fbgemm"
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    engines.engine = before
    return model
