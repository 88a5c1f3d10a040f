"""Decoding: the KV cache of a model with iterations, and the ways to use it.

    generate(model, prompts, max_new_tokens, iters=None, ...) -> the new ids of every prompt
    stream(the same)                  -> an iterator of (row, id), each as soon as it is certain

Prompts are lists of token ids; decoding is greedy unless a temperature is given. The strategies are `step`
(cached, batched, with early exit or without) and `draft_and_verify` (self-speculative). When a context is
full, its last block_size // 2 tokens start again from position 0.

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
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from data import Shards
from model import AbbIE, UserError, check

# -------------------------------------------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of the tokens so far, each (slots, B, K, S, E); `lengths` says how many tokens each of
    the B rows holds. In mode "full" there is one slot per block and *iteration*: iteration k of a new token
    reads what iteration k of the old ones wrote, so decoding is exact. In mode "last" all iterations of a
    Body block share one slot: a prompt is processed exactly, then only its last iteration is left for all
    iterations to read. In mode "none" there are no slots: nothing is kept. tail_every_iter: the Tail is run
    in every iteration too (for early exit by "kl", which looks at its predictions), and in mode "full" has
    slots as the Body has. The model reads and writes it through a Chunk."""

    def __init__(
        self, model: AbbIE, batch_size=1, iters=None, mode="full", tail_every_iter=False, length=None
    ):
        config, weight = model.config, model.embed.weight
        self.mode, self.iters, self.length = mode, model.check_iters(iters), length or config.block_size
        # Slots run: Head, Tail, Body of iteration 0; Body of iteration 1; ... With tail_every_iter: Head;
        # Tail and Body of iteration 0; Tail and Body of iteration 1; ...
        self.first = {"head": 0, "tail": config.n_head_blocks}
        self.first["body"] = config.n_head_blocks + config.n_tail_blocks
        self.n_once = self.first["tail" if tail_every_iter else "body"]
        n_repeated = config.n_blocks - self.n_once
        self.stride = n_repeated if mode == "full" else 0  # slots from an iteration to the next
        n_slots = 0 if mode == "none" else config.n_blocks + self.stride * (self.iters - 1)
        shape = (n_slots, batch_size, config.n_kv_heads, self.length, config.attn_head_dim)
        self.keys, self.values = (weight.new_zeros(shape) for _ in range(2))
        self.lengths = [0] * batch_size


class Chunk:
    """T new tokens for some rows of a cache (default: all), and what the model sees of it (its `kv`): it
    turns to block i of "head", "body" or "tail" in iteration k by `kv.at(part, i, k)`; Attention hands over
    its new keys and values, (B, K, T, E) each, by `store`, gets all that there are, (B, K, S, E) each, and
    lets queries see them by `mask`, (B, 1, T, S) of True where a query sees a key, or None, and `causal`.
    One chunk serves every block and iteration.

    `places` (B, T): where in the cache the new keys and values go, right behind what a row holds. `positions`
    (B, T): for the rotary embedding, by default the places. By default a token sees every place up to its
    own; positions and a mask are given where a row is a tree of texts."""

    def __init__(self, cache: KVCache, T: int, rows=None, positions=None, mask=None):
        self.cache, device = cache, cache.keys.device
        all_rows = list(range(cache.keys.shape[1]))
        rows = all_rows if rows is None else rows
        lengths = [cache.lengths[b] for b in rows]
        self.end = max(lengths) + T
        check(self.end <= cache.length, f"{self.end} tokens do not fit into a context of {cache.length}")
        self.rows = torch.tensor(rows, device=device)
        self.places = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        self.positions = self.places if positions is None else positions
        # Rows of equal length are written and read as slices; others through their indices, under a mask.
        self.together = rows == all_rows and len(set(lengths)) == 1
        self.cells = (self.rows[:, None], slice(None), self.places)  # the tokens' own, in (B, K, S, E)
        if self.together:
            self.cells = (slice(None), slice(None), slice(lengths[0], self.end))
        # SDPA aligns its causal mask top-left: it is for a prefill only. One token sees all.
        self.causal = self.together and mask is None and T > 1 and lengths[0] == 0
        self.mask = mask
        if mask is None and not (self.together and T == 1) and not self.causal:
            self.mask = self.see_earlier()

    def see_earlier(self) -> Tensor:
        """The mask (B, 1, T, S) of tokens that see all places up to their own."""
        return torch.arange(self.end, device=self.places.device) <= self.places[:, None, :, None]

    def only(self, live: Tensor) -> tuple[tuple, "Chunk"]:
        """Some of these tokens, live (B, T) bool -> (where they are in (B, T), the chunk of them alone). Rows
        without any drop out; one with fewer than others repeats its last, which writes the same again."""
        if live.all():
            return (slice(None), slice(None)), self
        rows = live.any(1).nonzero()  # (b, 1)
        counts = live[rows[:, 0]].sum(1, keepdim=True)
        order = (~live[rows[:, 0]]).byte().argsort(dim=1, stable=True)  # the live ones, as they are, first
        number = torch.arange(int(counts.max()), device=live.device)
        where = (rows, order.gather(1, torch.minimum(number, counts - 1)))  # (b, 1), (b, t)

        part = copy.copy(self)
        part.together, part.causal, part.rows = False, False, self.rows[rows[:, 0]]
        part.places, part.positions = self.places[where], self.positions[where]
        part.cells = (part.rows[:, None], slice(None), part.places)
        mask = self.see_earlier() if self.mask is None else self.mask
        part.mask = mask[rows, 0, where[1]][:, None]
        return where, part

    def rope(self, model: AbbIE) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the new tokens' positions, (B, 1, T, E/2)."""
        return tuple(table[self.positions][:, None] for table in model.rope_on(self.positions.device))

    def at(self, part: str, i: int, k: int = 0) -> "Chunk":
        """This chunk, turned to the slot of block i of a part in iteration k, which `store` takes next."""
        self.slot = self.cache.first[part] + i + k * self.cache.stride
        return self

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.cache.mode == "none":
            return keys, values
        found = []
        for table, new in ((self.cache.keys, keys), (self.cache.values, values)):
            table = table[self.slot]  # (B, K, S, E)
            table[self.cells] = new if self.together else new.transpose(1, 2)
            if len(self.rows) < len(table):
                table = table[self.rows]
            found.append(table[:, :, : self.end])
        return tuple(found)

    def fill_deeper(self, iters: int):
        """Let these tokens' last keys and values stand for the iterations that they did not run, which other
        tokens may read."""
        cache = self.cache
        if cache.mode != "full" or iters == cache.iters:
            return
        for table in (cache.keys, cache.values):
            slots = table[cache.n_once :].unflatten(0, (cache.iters, -1))  # (iters, blocks, B, K, S, E)
            last = slots[(slice(iters - 1, iters), slice(None), *self.cells)]
            slots[(slice(iters, None), slice(None), *self.cells)] = last


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


def change(kind: str, before: Tensor, now: Tensor) -> Tensor:
    """What an iteration has changed, (B, T): of log-probabilities (B, T, V), or of u (B, T, D)."""
    if kind == "kl":
        return F.kl_div(before, now, log_target=True, reduction="none").sum(-1)
    return (now - before).norm(dim=-1) / now.norm(dim=-1)


@torch.no_grad()
def resolve_exit(model: AbbIE, text: str, iters: int) -> str:
    """'mean:2.5' -> 'kl:0.0123', the threshold at which a token of the model's training data would run so
    many iterations on average, found on 4096 of them; other exits as they are. Raises UserError where that
    data is not at hand."""
    kind, mean = parse_exit(text, ("kl", "u", "mean"))
    if kind != "mean":
        return text
    check(2 <= mean < iters, f"exit={text}: the mean must lie between 2 and iters={iters}")
    data, T = model.meta.get("data"), model.config.block_size
    there = data and Path(data, "meta.json").exists()
    check(there, f"exit={text} needs the model's training data, {data}\ngive a threshold: kl:1e-2")
    shards = Shards(data, "train", T)
    n = min(shards.n_windows, -(-4096 // T))
    idx, _ = shards.batch([i * shards.n_windows // n for i in range(n)])
    states = model.states_at(idx.to(model.embed.weight.device), list(range(1, iters)))
    seen = (model.logits(z).float().log_softmax(-1) for z in states)
    changes = torch.stack([change("kl", *pair) for pair in pairwise(seen)])  # (iters - 2, B, T)
    # least: the smallest change of a token so far. A token runs 2 iterations, and one more for each of these
    # above the threshold. So mean - 2 a token have to lie above it: it is the next one in falling order.
    least = changes.cummin(0).values.flatten().sort(descending=True).values
    return f"kl:{max(1e-13, least[int((mean - 2) * idx.numel())]):.3g}"


@torch.no_grad()
def adaptive_states(model: AbbIE, idx: Tensor, kv: Chunk, exit_rule, live: Tensor):
    """idx (B, T), of which live (B, T) are no padding -> the states that are unembedded, (B, T, D), and the
    iterations that each token ran, (B, T). Iteration k works on the tokens that have not settled yet; those
    that have leave the Body, and their last keys and values stand for the iterations that they skip. Whether
    a token settles depends on earlier tokens and itself alone, so with a cache of mode "full" reading many
    tokens at once equals reading them one by one. A token has settled when one more iteration changes
    - "kl": the prediction by a KL divergence below the threshold (as arXiv 2502.05171, section 6.1; each look
      costs a Tail and an unembedding);
    - "u": what the Tail reads by less than this share of its norm (costs nothing). With abbie_d this tells
      little: the change of u quarters with every iteration by construction, whatever the token."""
    (kind, threshold), iters = exit_rule, kv.cache.iters
    h = model.run_head(idx, kv.rope(model), kv)
    x, before = model.start(h).clone(), None
    left = torch.zeros_like(h)  # by each token's last iteration: for "kl" z, for "u" u
    live, ran = live.clone(), torch.zeros_like(idx)
    for k in range(iters):
        where, some = kv.only(live)
        rope = some.rope(model)
        u, x[where] = model.advance(x[where], h[where], k, k + 1, rope, some)
        if kind == "kl":
            left[where] = model.run_tail(u, rope, some, k)
            now = model.logits(left[where]).float().log_softmax(-1)
        else:
            left[where] = now = u
        settled = torch.full(u.shape[:2], k + 1 == iters, device=idx.device)
        if before is None:
            before = now.new_empty(*idx.shape, now.shape[-1])
        else:
            settled |= change(kind, before[where], now) < threshold
        before[where] = now
        leaving = torch.zeros_like(live)
        leaving[where] = settled
        if leaving.any():
            ran[leaving] = k + 1
            kv.only(leaving)[1].fill_deeper(k + 1)
            live &= ~leaving
            if not live.any():
                break
    return left if kind == "kl" else model.run_tail(left, kv.rope(model), kv), ran


# ------------------------------------------------------------------------------------------------------ steps


@torch.no_grad()
def step(
    model: AbbIE, idx: Tensor, cache: KVCache, n_new=None, rows=None, exit_rule=None, stats=None
) -> Tensor:
    """Append idx (B, T) to `rows` of a cache (default: all) -> logits (B, V) after each row's last new token.
    Rows may be padded on the right: the list n_new (default: T each) says how many tokens of each count. With
    an exit_rule (see parse_exit), every token runs as many iterations as it needs, at most the cache's, and
    `stats` gets how many these were."""
    (B, T), device = idx.shape, idx.device
    n_new, rows = n_new or [T] * B, rows or list(range(B))
    kv, lengths = Chunk(cache, T, rows), torch.tensor(n_new, device=device)
    if exit_rule:
        live = torch.arange(T, device=device) < lengths[:, None]
        z, ran = adaptive_states(model, idx, kv, exit_rule, live)
        stats.iters.update(ran[live].tolist())
    else:
        [z] = model.states_at(idx, [cache.iters], kv.rope(model), kv)
    for b, n in zip(rows, n_new):
        cache.lengths[b] += n
    return model.logits(z[torch.arange(B, device=device), lengths - 1])


# ------------------------------------------------------------------------------------------- choosing a token


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits (B, V) -> the probabilities (B, V) that tokens are drawn with; at temperature 0 all is on the
    best one. top_k keeps the k best (0: all), top_p the fewest that hold this much probability together
    (nucleus sampling, arXiv 1904.09751)."""
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
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


# --------------------------------------------------------------------------------------------------- drafting


def draft_and_verify(model, cache, token, room, rng, *, iters, draft_iters, draft_tokens, sample, stats):
    """Self-speculative decoding (LayerSkip, arXiv 2404.16710): after `token`, draft some at few iterations,
    then take all of them on to `iters` in one pass -> those that decoding at `iters` could have drawn
    (speculative sampling, arXiv 2302.01318, and 2211.17192) and one more, at most `room` in all. The first
    draft_iters iterations do not depend on iters: the draft's Head and Body, their states and their keys and
    values, are the beginning of the verification and are not repeated. The Tail's are overwritten."""
    n, start = min(draft_tokens + 1, room), cache.lengths[0]
    states, drafted, qs = [], [], []
    for j in range(n):
        kv = Chunk(cache, 1)
        rope = kv.rope(model)
        h = model.run_head(torch.tensor([[token]], device=cache.keys.device), rope, kv)
        u, x = model.advance(model.start(h), h, 0, draft_iters, rope, kv)
        states.append((h, x))
        cache.lengths[0] += 1
        if j < n - 1:  # after the last one, the verification itself predicts
            qs.append(sample(model.logits(model.run_tail(u, rope, kv))[:, 0]))
            [token] = draw(qs[-1], [rng])
            drafted.append(token)

    h, x = (torch.cat(parts, dim=1) for parts in zip(*states))  # (1, n, D)
    cache.lengths[0] = start
    kv = Chunk(cache, n)
    rope = kv.rope(model)
    u, _ = model.advance(x, h, draft_iters, iters, rope, kv)
    p = sample(model.logits(model.run_tail(u, rope, kv))[0])  # (n, V)

    accepted = 0
    for token, q in zip(drafted, qs):
        if rng.random() * q[0, token] >= p[accepted, token]:
            # What is left of p: drafted with q and accepted with min(1, p/q), or else drawn from here, tokens
            # come out distributed as p.
            p[accepted] = (p[accepted] - q[0]).clamp(min=0)
            break
        accepted += 1
    cache.lengths[0] = start + 1 + accepted  # what was rejected is forgotten
    stats.drafted, stats.accepted = stats.drafted + n - 1, stats.accepted + accepted
    return drafted[:accepted] + draw(p[accepted][None], [rng])


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


def feed(cache, contexts, next_step) -> Tensor:
    """Take what the cache does not hold yet of contexts, dict of row -> ids, through the model by
    `next_step(idx, n_new=, rows=)` -> logits (len(contexts), V) after the last ids. Prompts, and contexts
    that start again because they have become too long, go together, padded; and so do single tokens."""
    S = cache.length
    for b, ids in contexts.items():
        if len(ids) > S:
            contexts[b], cache.lengths[b] = ids[-(S // 2) :], 0
    prompts = [b for b in contexts if cache.lengths[b] == 0]
    others = [b for b in contexts if cache.lengths[b] > 0]
    logits = {}
    for rows in (prompts, others):
        new = [torch.tensor(contexts[b][cache.lengths[b] :]) for b in rows]
        if rows:
            idx = pad_sequence(new, batch_first=True).to(cache.keys.device)
            found = next_step(idx, n_new=[len(ids) for ids in new], rows=rows)
            logits.update(zip(rows, found))
    return torch.stack([logits[b] for b in contexts])


@torch.no_grad()
def stream_rows(cache, prompts, max_new_tokens, next_step, sample, rngs, stop_token, stats, draft):
    """Every row's next token, again and again, of as many prompts at a time as the cache has rows; a row that
    draws stop_token leaves. `draft`, if there is one, takes the place of a step (of one row)."""
    size, S, start = len(cache.lengths), cache.length, time.perf_counter()
    for first in range(0, len(prompts), size):
        contexts, n = dict(enumerate(map(list, prompts[first : first + size]))), 0
        cache.lengths = [0] * size
        while contexts and n < max_new_tokens:
            room = min(S - cache.lengths[0], max_new_tokens - n)
            if draft and 0 < cache.lengths[0] < S:  # neither a prompt nor a context that starts again
                new = [draft(contexts[0][-1], room, rngs[first])]
            else:
                p = sample(feed(cache, contexts, next_step))
                new = [[token] for token in draw(p, [rngs[first + b] for b in contexts])]
            n += len(new[0])
            for b, tokens in zip(list(contexts), new):
                for token in tokens:
                    if token == stop_token:
                        del contexts[b]
                        break
                    contexts[b].append(token)
                    stats.tokens, stats.seconds = stats.tokens + 1, time.perf_counter() - start
                    yield first + b, token


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
    stats: Stats | None = None,
) -> Iterator[tuple[int, int]]:
    """An iterator of (row, id): the new tokens of the prompts, at most max_new_tokens each. A row ends with
    stop_token, which is not yielded. Row b draws from seed + b, so that a batch of N equals N batches of 1.
    cache_mode: see KVCache; draft_iters > 0: see draft_and_verify, one prompt after the other; early_exit,
    "kl:1e-3" or "u:1e-2": see adaptive_states. `stats` is filled on the way. Raises UserError for values that
    are out of range or contradict one another: at once, since this is no generator itself."""
    iters, S, V = model.check_iters(iters), model.config.block_size, model.config.vocab_size
    check(len(prompts) > 0 and all(prompts), "a prompt has no tokens")
    check(all(len(prompt) <= S for prompt in prompts), f"a prompt is longer than the context of {S} tokens")
    known = all(0 <= min(prompt) and max(prompt) < V for prompt in prompts)
    check(known, f"a prompt has a token id that is not in the vocabulary of {V}")
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
    stats = stats or Stats()
    sample = partial(distribution, temperature=temperature, top_k=top_k, top_p=top_p)
    rngs = [random.Random(seed + b) for b in range(len(prompts))]
    exit_rule = parse_exit(early_exit) if early_exit else None
    batch_size = 1 if draft_iters else len(prompts)
    cache = KVCache(model, batch_size, iters, cache_mode, tail_every_iter=early_exit.startswith("kl"))
    next_step = partial(step, model, cache=cache, exit_rule=exit_rule, stats=stats)
    draft = None
    if draft_iters:
        how = {"iters": iters, "draft_iters": draft_iters, "draft_tokens": draft_tokens}
        draft = partial(draft_and_verify, model, cache, sample=sample, stats=stats, **how)
    return stream_rows(cache, prompts, max_new_tokens, next_step, sample, rngs, stop_token, stats, draft)


def generate(model: AbbIE, prompts: list[list[int]], max_new_tokens: int, iters=None, **options):
    """-> the new ids of every prompt, at most max_new_tokens each. Options and errors: see `stream`."""
    new = [[] for _ in prompts]
    for row, token in stream(model, prompts, max_new_tokens, iters, **options):
        new[row].append(token)
    return new


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
    Its input is rounded to 7 bits (with 8, sums of products overflow on CPUs without VNNI), with a scale for
    each token, so that no token depends on its batch. PyTorch's own integer product on x86 CPUs."""

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
        return multiply(x / scale, 1 / 63, 64, self.packed) * scale  # -1 ... 1 -> 64 - 63 ... 64 + 63


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
