"""Generate text at any number of iterations, or look at what the model predicts after each.

    python sample.py --iters 8                            # the newest checkpoint under out/, without a prompt
    python sample.py --iters 1,4,8 --prompt "def "                               # one after the other
    python sample.py --iters 8 --prompt_file story.txt --num_samples 3 --temperature 0.8 --top_p 0.95
    python sample.py --iters 8 --draft_iters 2 --temperature 0 --prompt "def "   # the same tokens, faster
    python sample.py --iters 8 --exit kl:1e-2 --prompt "def "                    # as many as a token needs
    python sample.py --ckpt models/chains_abbie_d --lens --iters 1,2,3,4 --prompt "a=3;b=a;c=b;?c"

Generated text goes to stdout and nothing else (a line --- between samples), the prompt and reports to stderr.

In Python: generate(model, prompts, max_new_tokens, iters=None, ...) -> the new ids of every prompt, and
stream(the same), an iterator of (row, id). Prompts are lists of token ids. When a context is full, its last
block_size // 2 tokens start again from position 0. Shapes as in model.py: B rows, T new tokens, K n_kv_heads,
E attn_head_dim, S positions of a cache.
"""

import codecs
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from checkpoint import load_model
from config import DTYPES, ArgumentParser, choose_device, choose_dtype, cli, parse_list
from data import tokenizer_of
from model import AbbIE, UserError, check

# -------------------------------------------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of the tokens so far, (slots, B, K, S, E) each; `lengths` says how many tokens each of
    the B rows holds. In mode "full" there is one slot per block and *iteration*: iteration k of a new token
    reads what iteration k of the old ones wrote, so decoding is exact. In mode "last" all iterations of a
    block share one slot, which holds the newest that they wrote: a prompt's tokens read one another's keys of
    the same iteration, later tokens those of the last one. One place more takes what is not to be kept."""

    def __init__(self, model: AbbIE, batch_size=1, iters=None, mode="full", length=None):
        config, weight = model.config, model.embed.weight
        self.config, self.mode, self.iters = config, mode, model.check_iters(iters)
        self.length = min(length or config.block_size, config.block_size)
        n_slots = config.n_blocks + (self.iters - 1) * config.n_body_blocks * (mode == "full")
        shape = (n_slots, batch_size, config.n_kv_heads, self.length + 1, config.attn_head_dim)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        self.lengths = [0] * batch_size

    def slot(self, index: int, k: int) -> int:
        """Where block `index` writes in iteration k: all blocks, then the Body again for k = 1, 2, ..."""
        if k == 0 or self.mode == "last":
            return index
        config = self.config
        return config.n_blocks + (k - 1) * config.n_body_blocks + index - config.n_head_blocks


class Chunk:
    """New tokens behind those that a cache holds: n_new[b] of row b, padded on the right to T = max(n_new).
    It is the model's `kv`: `at` turns to a block's slot in an iteration, `extend` stores and reads there."""

    def __init__(self, cache: KVCache, n_new: list[int]):
        device, T, starts = cache.keys.device, max(n_new), cache.lengths
        self.cache, self.rows = cache, torch.arange(len(n_new), device=device)[:, None]
        steps = torch.arange(T, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + steps  # (B, T)
        self.real = steps < torch.tensor(n_new, device=device)[:, None]  # (B, T), False where it is padding
        self.end = max(start + n for start, n in zip(starts, n_new))
        check(self.end <= cache.length, f"{self.end} tokens do not fit into a cache of {cache.length}")
        self.mask = None
        equal = len(set(starts)) == len(set(n_new)) == 1
        if not equal or (T > 1 and starts[0] > 0):
            self.mask = torch.arange(self.end, device=device) <= positions[:, None, :, None]  # (B, 1, T, S)
        self.positions = positions.clamp(max=cache.length - 1)
        self.keep(self.real)

    def keep(self, kept: Tensor):
        """Where from now on the new keys and values go: to their places if kept (B, T), else to the last."""
        self.places = torch.where(kept, self.positions, self.cache.length)

    def at(self, index: int, k: int) -> "Chunk":
        self.slot = self.cache.slot(index, k)
        return self

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The new keys and values, (B, K, T, E) each -> all there are, (B, K, S, E) each, and the mask."""
        both = []
        for table, new in ((self.cache.keys[self.slot], keys), (self.cache.values[self.slot], values)):
            table[self.rows, :, self.places] = new.transpose(1, 2)  # (B, T, K, E)
            both.append(table[:, :, : self.end])
        return *both, self.mask


@torch.no_grad()
def step(model: AbbIE, idx: Tensor, cache: KVCache, n_new=None, threshold: float = 0.0, stats=None) -> Tensor:
    """Append idx (B, T) to a cache -> logits (B, V) after each row's last new token. n_new: how many tokens
    of each row count, where rows are padded on the right (default: all T). threshold > 0: early exit."""
    n_new = n_new or [idx.shape[1]] * len(idx)
    chunk = Chunk(cache, n_new)
    x, cos_sin = model.embed(idx), model.cos_sin(idx, chunk.positions)
    if threshold:
        z, ran = settle(model, x, cos_sin, chunk, cache.iters, threshold)
        stats.iters.update(ran[chunk.real].tolist())
    else:
        [z] = model.sweep(x, [cache.iters], cos_sin, chunk)
    cache.lengths = [length + n for length, n in zip(cache.lengths, n_new)]
    last = torch.tensor([max(0, n - 1) for n in n_new], device=idx.device)
    return model.logits(z[torch.arange(len(idx), device=idx.device), last])


# ------------------------------------------------------------------------------------------- choosing a token


def check_finite(logits: Tensor):
    check(bool(logits.isfinite().all()), "the model's predictions are not finite\ntry --dtype float32")


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits (B, V) -> the probabilities (B, V) that tokens are drawn with; at temperature 0 all is on the
    best one. top_k keeps the k best (0: all), top_p the fewest that hold this much probability together
    (nucleus sampling, arXiv 1904.09751)."""
    check_finite(logits)
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


# ------------------------------------------------------------------------------------------------- generating


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
            return f"{text}, {mean:.2f} iterations per token, the prompt's included ({shares})"
        text += f", {iters} iterations per token"
        if self.drafted:
            text += f", {self.accepted / self.drafted:.0%} of {self.drafted} drafted tokens accepted"
        return text


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
    stop_tokens: frozenset[int] = frozenset(),
    cache_mode: str = "full",
    draft_iters: int = 0,
    draft_tokens: int = 4,
    early_exit: str = "",
    stats: Stats | None = None,
) -> Iterator[tuple[int, int]]:
    """An iterator of (row, id): the new tokens of the prompts, at most max_new_tokens each. A row ends with
    one of stop_tokens, which is not yielded. Row b draws from seed + b, so that a batch of N equals N batches
    of 1. cache_mode: see KVCache; draft_iters > 0: see draft_and_verify, one prompt after the other;
    early_exit, "kl:1e-3": see settle. `stats` is filled on the way. Raises UserError for values that are out
    of range or contradict one another: at once, since this is no generator itself."""
    iters, block_size, V = model.check_iters(iters), model.config.block_size, model.config.vocab_size
    check(len(prompts) > 0 and all(prompts), "a prompt has no tokens")
    longest = max(map(len, prompts))
    check(longest <= block_size, f"a prompt is longer than the context of {block_size} tokens")
    known = all(0 <= min(prompt) and max(prompt) < V for prompt in prompts)
    check(known, f"a prompt has a token id that is not in the vocabulary of {V}")
    check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    check(0 <= temperature < math.inf, f"temperature={temperature} must be 0 (greedy) or more")
    check(top_k >= 0, f"top_k={top_k} must be 0 (all) or more")
    check(0 < top_p <= 1, f"top_p={top_p} must be above 0 and at most 1")
    check(cache_mode in ("full", "last"), f"cache={cache_mode!r} is neither full nor last")
    check(0 <= draft_iters < iters, f"draft_iters={draft_iters} must be below iters={iters}")
    check(draft_tokens >= 1, f"draft_tokens={draft_tokens} must be at least 1")
    threshold = parse_exit(early_exit) if early_exit else 0.0
    if draft_iters:
        check(cache_mode == "full", "drafting needs cache=full: its iterations begin the verification")
        check(not early_exit, "drafting and exit exclude each other: a verified token runs all iterations")
    stats, sample = stats or Stats(), partial(distribution, temperature=temperature, top_k=top_k, top_p=top_p)
    rngs = [random.Random(seed + b) for b in range(len(prompts))]
    mode, length = "last" if early_exit else cache_mode, longest + max_new_tokens
    new_cache = partial(KVCache, model, iters=iters, mode=mode, length=length)
    if draft_iters:
        draft = partial(draft_and_verify, model, draft_iters=draft_iters, n=draft_tokens)
        next_step = partial(draft, sample=sample, stats=stats)
        stream_them = partial(stream_drafted, model, new_cache)
    else:
        next_step = partial(step, model, threshold=threshold, stats=stats)
        stream_them = partial(stream_rows, new_cache(batch_size=len(prompts)))
    return stream_them(prompts, max_new_tokens, next_step, sample, rngs, stop_tokens, stats)


def unread(cache: KVCache, contexts: list[list[int]], live: list[bool]) -> tuple[Tensor, list[int]]:
    """What the cache does not hold yet of the live contexts -> ids (B, T), padded, and how many of each row.
    A context that is full starts again with its last block_size // 2 tokens."""
    block_size = cache.config.block_size
    for b, ids in enumerate(contexts):
        if len(ids) > block_size:
            contexts[b], cache.lengths[b] = ids[-(block_size // 2) :], 0
    rows = [ids[n:] if alive else [] for ids, n, alive in zip(contexts, cache.lengths, live)]
    idx = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    return idx.to(cache.keys.device), [len(row) for row in rows]


@torch.no_grad()
def stream_rows(cache, prompts, max_new_tokens, next_step, sample, rngs, stop_tokens, stats):
    """The next token of every row, again and again. A row that draws a stop token is over."""
    contexts, live, start = [list(prompt) for prompt in prompts], [True] * len(prompts), time.perf_counter()
    for _ in range(max_new_tokens):
        idx, n_new = unread(cache, contexts, live)
        tokens = draw(sample(next_step(idx, cache, n_new)), rngs)
        for b, token in enumerate(tokens):
            live[b] = live[b] and token not in stop_tokens
            if live[b]:
                contexts[b].append(token)
                stats.tokens, stats.seconds = stats.tokens + 1, time.perf_counter() - start
                yield b, token
        if not any(live):
            return


def generate(model: AbbIE, prompts: list[list[int]], max_new_tokens: int, iters=None, **options):
    """-> the new ids of every prompt, at most max_new_tokens each. Options and errors: see `stream`."""
    new = [[] for _ in prompts]
    for row, token in stream(model, prompts, max_new_tokens, iters, **options):
        new[row].append(token)
    return new


# ------------------------------------------------------------------------------------------------- early exit


def parse_exit(text: str) -> float:
    """'kl:1e-3' -> 0.001."""
    kind, _, threshold = text.partition(":")
    try:
        if kind == "kl" and 0 < float(threshold) < math.inf:
            return float(threshold)
    except ValueError:
        pass
    raise UserError(f"exit={text!r}: give kl:1e-3, the change of a token's prediction in nats that ends it")


def settle(model: AbbIE, x: Tensor, cos_sin, chunk: Chunk, iters: int, threshold: float):
    """Embeddings x (B, T, D) -> the states that are unembedded, (B, T, D), and the iterations that each token
    ran, (B, T). A token has settled when an iteration changes its prediction by a KL divergence below the
    threshold (as arXiv 2502.05171, section 6.1; each look costs a Tail and an unembedding). Then it keeps its
    state, keys and values, which the tokens still running read; the loop ends when all have settled. So a
    row's depths do not depend on other rows. The cache has one slot for all iterations."""
    h = model.run(model.head, x, cos_sin, chunk)
    x, z, before = model.start(h), torch.zeros_like(h), None
    running, ran = chunk.real.clone(), torch.zeros_like(chunk.positions)
    for k in range(iters):
        chunk.keep(running)
        keep = running[..., None]
        u, next_x = model.iterate(x, h, k, k + 1, cos_sin, chunk)
        next_z = model.norm(model.run(model.tail, u, cos_sin, chunk))
        x, z, ran = torch.where(keep, next_x, x), torch.where(keep, next_z, z), ran + running
        now = model.logits(z).float().log_softmax(-1)  # (B, T, V)
        if before is not None:
            change = F.kl_div(before, now, log_target=True, reduction="none").sum(-1)
            running = running & (change >= threshold)
        before = now
        if not running.any():
            break
    return z, ran


# --------------------------------------------------------------------------------------------------- drafting


def draft_and_verify(model, cache, token, room, rng, *, draft_iters, n, sample, stats) -> list[int]:
    """Self-speculative decoding (LayerSkip, arXiv 2404.16710) of one row: after `token`, draft up to n tokens
    at few iterations, then take all of them on to the cache's iterations in one pass -> those that decoding
    at full depth could have drawn (speculative sampling, arXiv 2302.01318, and 2211.17192) and one more, at
    most `room` in all. The first draft_iters iterations do not depend on how many follow: the draft's Head
    and Body, their states and their keys and values, are the beginning of the verification and are not
    repeated. The Tail's are overwritten."""
    n, start = min(n + 1, room), cache.lengths[0]
    states, drafted, qs = [], [], []
    for j in range(n):
        chunk, idx = Chunk(cache, [1]), torch.tensor([[token]], device=cache.keys.device)
        cos_sin = model.cos_sin(idx, chunk.positions)
        h = model.run(model.head, model.embed(idx), cos_sin, chunk)
        u, x = model.iterate(model.start(h), h, 0, draft_iters, cos_sin, chunk)
        states.append((h, x))
        cache.lengths[0] += 1
        if j < n - 1:  # after the last one, the verification itself predicts
            z = model.norm(model.run(model.tail, u, cos_sin, chunk))
            qs.append(sample(model.logits(z)[:, 0]))
            [token] = draw(qs[-1], [rng])
            drafted.append(token)

    h, x = (torch.cat(parts, dim=1) for parts in zip(*states))  # (1, n, D)
    cache.lengths[0] = start
    chunk = Chunk(cache, [n])
    cos_sin = model.cos_sin(h, chunk.positions)
    u, _ = model.iterate(x, h, draft_iters, cache.iters, cos_sin, chunk)
    p = sample(model.logits(model.norm(model.run(model.tail, u, cos_sin, chunk)))[0])  # (n, V)

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


@torch.no_grad()
def stream_drafted(model, new_cache, prompts, max_new_tokens, draft, sample, rngs, stop_tokens, stats):
    """stream_rows of one prompt after the other, by drafting."""
    block_size, start = model.config.block_size, time.perf_counter()
    for b, prompt in enumerate(prompts):
        cache, contexts, n = new_cache(), [list(prompt)], 0
        while n < max_new_tokens:
            room = min(block_size - cache.lengths[0], max_new_tokens - n)
            if 0 < cache.lengths[0] < block_size:
                tokens = draft(cache, contexts[0][-1], room, rngs[b])
            else:  # a prompt, or a context that starts again
                idx, n_new = unread(cache, contexts, [True])
                tokens = draw(sample(step(model, idx, cache, n_new)), [rngs[b]])
            for token in tokens:
                if token in stop_tokens:
                    n = max_new_tokens
                    break
                contexts[0].append(token)
                n, stats.tokens, stats.seconds = n + 1, stats.tokens + 1, time.perf_counter() - start
                yield b, token


# ------------------------------------------------------------------------------------------------------- text


def encode_prompt(tokenizer, text: str, block_size: int) -> list[int]:
    """The ids that a text begins with: the tokenizer's own (BOS), then its text's, at most block_size; of no
    text at all, the end-of-text token."""
    decoded = not any("\ud800" <= character <= "\udfff" for character in text)  # else bytes that are no text
    check(decoded, "the prompt is no UTF-8 text")
    ids = [*getattr(tokenizer, "bos_tokens", []), *tokenizer.encode_ordinary(text)] or [tokenizer.eot_token]
    if len(ids) > block_size:
        say(f"the prompt has {len(ids)} tokens, of which the model's context takes the last {block_size}")
    return ids[-block_size:]


def token_bytes(tokenizer, token: int) -> bytes:
    try:
        return tokenizer.decode_bytes([token])
    except KeyError:  # an id without a token, where vocab_size is larger than the tokenizer's
        return b""


def stream_text(model, tokenizer, prompts, max_new_tokens, iters, **options):
    """stream in pieces of text, as soon as it is certain, since the bytes of a character may be spread over
    tokens: an iterator of (row, piece). A row ends where the model ends its text."""
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    options["stop_tokens"] = frozenset(getattr(tokenizer, "eot_tokens", [tokenizer.eot_token]))
    tokens = stream(model, prompts, max_new_tokens, iters, **options)  # which refuses what is wrong at once

    def pieces():
        for b, token in tokens:
            yield b, utf8[b].decode(token_bytes(tokenizer, token))
        for b, decoder in enumerate(utf8):
            yield b, decoder.decode(b"", final=True)

    return pieces()


@torch.no_grad()
def lens(model: AbbIE, tokenizer, ids: list[int], iters: list[int], last: int) -> str:
    """What the model predicts after each of the last tokens, at each of iters, from one sweep of the Body: a
    line a token; in each cell the most probable next token and its probability, with * where it is another
    than one column before. The last line is the KL divergence to the next column, in nats, averaged."""

    def spell(token: int) -> str:
        text = token_bytes(tokenizer, token).decode("utf-8", "backslashreplace")
        return repr(text)[1:-1] or "<end>"

    idx = torch.tensor([ids], device=model.embed.weight.device)
    columns = [logits[0, -last:].float().log_softmax(-1) for logits in model.logits_at(idx, iters)]
    table, before = [["after", *map(spell, ids[-last:]), "KL"]], None
    for r, log_p, following in zip(iters, columns, [*columns[1:], None]):
        check_finite(log_p)
        best, cells = log_p.argmax(-1).tolist(), []
        for t, token in enumerate(best):
            mark = "*" if before and before[t] != token else " "
            cells.append(f"{spell(token)} {log_p[t, token].exp():4.0%}{mark}")
        kl = ""
        if following is not None:
            kl = f"{F.kl_div(following, log_p, log_target=True, reduction='batchmean'):.1g} "
        table.append([f"r={r} ", *cells, kl])
        before = best
    widths = [max(map(len, column)) for column in table]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in zip(*table)]
    return "\n".join(line.rstrip() for line in lines)


# ----------------------------------------------------------------------------------------------- command line

OPTIONS = ("temperature", "top_k", "top_p", "seed", "cache_mode", "draft_iters", "draft_tokens", "early_exit")


def say(*text, end="\n"):
    print(*text, end=end, file=sys.stderr, flush=True)


def show(text: str, end="\n"):
    """Text of a model to stdout; control characters, which byte models write, do not reach a terminal."""
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)
    print(text, end=end, flush=True)


def lay_out_for_decoding(model: AbbIE):
    """Store every matrix column by column, with the same shape and values: a CPU then multiplies it with one
    row about 1.3x faster."""
    if model.embed.weight.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()


def parse_args(argv: list[str]):
    parser = ArgumentParser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    add("--iters", help="applications of the Body: 8, or 1,4,8 for several (default: the model's own)")
    prompt = parser.add_mutually_exclusive_group().add_argument
    prompt("--prompt", help="text to continue (default: none, the beginning of a text)")
    prompt("--prompt_file", help="file with the text to continue (-: standard input)")
    add("--num_samples", type=int, default=1, help="continuations of the prompt")
    add("--max_new_tokens", type=int, default=256, help="length of a continuation (default 256)")
    add("--temperature", type=float, default=0.8, help="0: always the best token (default 0.8)")
    add("--top_k", type=int, default=50, help="draw from the k best tokens only (0: all; default 50)")
    add("--top_p", type=float, default=1.0, help="draw from the fewest tokens that hold this probability")
    add("--seed", type=int, default=1, help="sample b draws from seed + b")
    add("--draft_iters", type=int, default=0, help="draft at so many iterations, verify at --iters (0: no)")
    add("--draft_tokens", type=int, default=4, help="tokens that are drafted before a verification")
    add("--exit", dest="early_exit", default="", help="kl:1e-2: a token stops once it has settled")
    add("--cache", dest="cache_mode", default="full", help="full, or last: one slot for all iterations")
    add("--lens", action="store_true", help="show what is predicted after each iteration instead")
    add("--last", type=int, default=16, help="--lens: so many positions of the prompt (default 16)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of weights (auto: bfloat16 on new cards)")
    args = parser.parse_args(argv)
    for name in ("num_samples", "last"):
        check(getattr(args, name) >= 1, f"--{name}={getattr(args, name)} must be at least 1")
    return args


def read_prompt(args) -> str:
    """The text of --prompt or --prompt_file, without the final newline and the byte order mark of a file."""
    if not args.prompt_file:
        return args.prompt or ""
    if args.prompt_file == "-":
        data = sys.stdin.buffer.read() if sys.stdin else b""
    else:
        data = Path(args.prompt_file).read_bytes()
    return data.decode("utf-8-sig", "surrogateescape").removesuffix("\n").removesuffix("\r")


def main(argv: list[str]):
    args = parse_args(argv)
    several = parse_list(args.iters, "iters") if args.iters else [None]
    prompt, device = read_prompt(args), choose_device(args.device)
    model = load_model(args.ckpt, device).eval().to(choose_dtype(args.dtype, device))
    lay_out_for_decoding(model)
    tokenizer, several = tokenizer_of(model), [model.check_iters(r) for r in several]
    say(f"[{model.meta['ckpt']}, {str(model.embed.weight.dtype).removeprefix('torch.')} on {device}]")
    ids = encode_prompt(tokenizer, prompt, model.config.block_size)
    if args.lens:
        return show(lens(model, tokenizer, ids, several, args.last))
    options, separator = {name: getattr(args, name) for name in OPTIONS}, ""
    for iters in several:
        stats, texts = Stats(), [""] * args.num_samples
        prompts, n = [ids] * args.num_samples, args.max_new_tokens
        pieces = stream_text(model, tokenizer, prompts, n, iters, stats=stats, **options)
        say(f"iters {iters}: {prompt}", end="" if prompt else "\n")
        show(separator, end="")
        for b, piece in pieces:  # the first sample as it comes, the others after it
            if b == 0:
                show(piece, end="")
            texts[b] += piece
        show("")
        separator = "---\n"
        for text in texts[1:]:
            show(separator + text)
        say(f"[{stats.report(iters)}]")


if __name__ == "__main__":
    cli(main)
