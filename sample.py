"""Generate text at any number of iterations.

    python sample.py --prompt "def "                      # the newest checkpoint under out/, at its own iters
    python sample.py --iters 8 --prompt_file story.txt --num_samples 3 --temperature 0.8 --top_p 0.95
    python sample.py --iters 8 --draft_iters 2 --temperature 0 --prompt "def "     # the same tokens, sooner
    python sample.py --iters 8 --exit kl:1e-3 --prompt "def "                      # as deep as a token needs
    python sample.py --compare 1,2,4,8 --prompt "def "                             # side by side
    python sample.py --ckpt hf:FOLDER                     # on a terminal without a prompt: interactive

Generated text goes to stdout and nothing else; the prompt and reports go to stderr.

In Python, prompts are lists of token ids, and decoding is greedy unless a temperature is given:

    generate(model, prompts, max_new_tokens, iters=None, *, temperature=0.0, top_k=0, top_p=1.0, seed=1,
             stop_token=None, cache_mode="full", draft_iters=0, draft_tokens=4, exit="", compile=False,
             done=None, stats=None)           -> the new ids of every prompt
    stream(the same)                          yields (row, id), each id as soon as it is certain

The strategies are `stream_plain` (cached, batched), in which `adaptive_step` or `static_step` may stand for
the model's own step, and `stream_drafted` (self-speculative). When a context is full, its last
block_size // 2 tokens start again from position 0.
"""

import codecs
import itertools
import math
import random
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import ArgumentParser, cli, parse_list
from model import AbbIE, KVCache, UserError, find_checkpoint
from prepare_data import get_tokenizer


@dataclass
class Stats:
    """What a generation did, for the report at its end."""
    tokens: int = 0          # generated
    seconds: float = 0.0     # for them, the prompt's time included
    drafted: int = 0
    accepted: int = 0        # of the drafted ones
    iters: Counter = field(default_factory=Counter)  # adaptive depth: iterations -> tokens that ran so many
    depth: dict = field(default_factory=dict)        # and row -> iterations of its newest token

    def report(self, iters: int) -> str:
        text = f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"
        if self.iters:
            n = self.iters.total()
            text += f", {sum(k * count for k, count in self.iters.items()) / n:.2f} iterations per token ("
            return text + ", ".join(f"{k}: {self.iters[k] / n:.0%}" for k in sorted(self.iters)) + ")"
        text += f", {iters} iterations per token"
        if self.drafted:
            text += f", {self.accepted / self.drafted:.0%} of {self.drafted} drafted tokens accepted"
        return text


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
    one random number of the row's own, so that rows do not depend on one another, nor results on the device.
    """
    total = p.cumsum(-1)
    u = torch.tensor([[rng.random()] for rng in rngs], dtype=p.dtype, device=p.device)
    return torch.searchsorted(total, u * total[:, -1:], right=True).clamp_(max=p.shape[-1] - 1)[:, 0].tolist()


# ------------------------------------------------------------------------------------------------- strategies

def generate(model: AbbIE, prompts: list[list[int]], max_new_tokens: int, iters: int | None = None,
             **options) -> list[list[int]]:
    """-> the new ids of every prompt, at most max_new_tokens each. Options and errors: see `stream`."""
    new = [[] for _ in prompts]
    for row, token in stream(model, prompts, max_new_tokens, iters, **options):
        new[row].append(token)
    return new


def stream(model: AbbIE, prompts: list[list[int]], max_new_tokens: int, iters: int | None = None, *,
           temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1,
           stop_token: int | None = None, cache_mode: str = "full", draft_iters: int = 0,
           draft_tokens: int = 4, exit: str = "", compile: bool = False, done: set[int] | None = None,
           stats: Stats | None = None) -> Iterator[tuple[int, int]]:
    """An iterator of (row, id): the new tokens of the prompts, at most max_new_tokens each. A row ends before
    stop_token, and when the caller adds it to the set `done`. Row b draws from seed + b, so that a batch of N
    equals N batches of 1. cache_mode: see KVCache; draft_iters > 0: see stream_drafted (one prompt after the
    other); exit, "kl:1e-3" or "u:1e-2": see adaptive_step; compile: see static_step. `stats` is filled on the
    way. Raises UserError for values that are out of range or contradict one another."""
    iters, S = model.check_iters(iters), model.config.block_size
    for problem, wrong in {
            "a prompt has no tokens": not prompts or not all(prompts),
            f"a prompt is longer than the context of {S} tokens": any(len(p) > S for p in prompts),
            f"max_new_tokens={max_new_tokens} must be at least 1": max_new_tokens < 1,
            f"temperature={temperature} must be 0 (greedy) or more": not 0 <= temperature < math.inf,
            f"top_k={top_k} must be 0 (all) or more": top_k < 0,
            f"top_p={top_p} must be above 0 and at most 1": not 0 < top_p <= 1,
            f"cache={cache_mode!r} is neither full nor last": cache_mode not in ("full", "last"),
            f"draft_iters={draft_iters} must be below iters={iters}": not 0 <= draft_iters < iters,
            f"draft_tokens={draft_tokens} must be at least 1": draft_tokens < 1,
            "drafting needs cache=full: its iterations are the first ones of the verification":
                draft_iters and cache_mode == "last",
            "drafting and exit exclude each other: a verified token runs all iterations":
                draft_iters and exit,
            "compile is for plain decoding: leave out draft_iters and exit":
                compile and (draft_iters or exit),
            }.items():
        if wrong:
            raise UserError(problem)
    stats, done, start = stats or Stats(), set() if done is None else done, time.perf_counter()
    sample = partial(distribution, temperature=temperature, top_k=top_k, top_p=top_p)
    rngs = [random.Random(seed + b) for b in range(len(prompts))]
    cache = KVCache(model.config, 1 if draft_iters else len(prompts), iters, cache_mode,
                    model.embed.weight.device, model.embed.weight.dtype)  # pages are taken as they fill
    if draft_iters:
        tokens = stream_drafted(model, cache, prompts, max_new_tokens, iters, draft_iters, draft_tokens,
                                sample, rngs, done, stats)
    else:
        if exit:
            step = partial(adaptive_step, model, cache, iters, *parse_exit(exit), stats)
        elif compile:
            cache, step = static_step(model, len(prompts), iters, cache_mode)
        else:
            def step(idx, rows):
                return model.step(idx, cache, iters, rows=rows)
        tokens = stream_plain(model, cache, prompts, max_new_tokens, iters, step, sample, rngs, done)
    return until_done(tokens, stop_token, done, stats, start)


def until_done(tokens, stop_token, done, stats, start):
    for b, token in tokens:
        if token == stop_token:
            done.add(b)
        if b not in done:
            stats.tokens, stats.seconds = stats.tokens + 1, time.perf_counter() - start
            yield b, token


def feed(model, cache, contexts, rows, iters, step) -> Tensor:
    """Take what the cache does not hold yet of contexts, dict of row -> ids, through the model -> logits
    (len(rows), V) after the last ids. Prompts, and contexts that start again because they have become too
    long, run all iters together, padded; single tokens take `step` together."""
    S = model.config.block_size
    for b in rows:
        if len(contexts[b]) > S:
            contexts[b] = contexts[b][-(S // 2):]
            cache.lengths[b] = 0
    new, logits = {b: contexts[b][cache.lengths[b]:] for b in rows}, {}
    many, one = [b for b in rows if cache.lengths[b] == 0], [b for b in rows if cache.lengths[b] > 0]
    if many:
        n_new = [len(new[b]) for b in many]
        idx = [new[b] + [0] * (max(n_new) - len(new[b])) for b in many]
        idx = torch.tensor(idx, device=cache.k.device)
        logits.update(zip(many, model.step(idx, cache, iters, n_new, many)))
    if one:
        idx = torch.tensor([new[b] for b in one], device=cache.k.device)
        logits.update(zip(one, step(idx, one)))
    return torch.stack([logits[b] for b in rows])


@torch.no_grad()
def stream_plain(model, cache, prompts, max_new_tokens, iters, step, sample, rngs, done):
    """Every row's next token, again and again; rows in `done` leave the batch."""
    contexts = {b: list(prompt) for b, prompt in enumerate(prompts)}
    for _ in range(max_new_tokens):
        p = sample(feed(model, cache, contexts, list(contexts), iters, step))
        for b, token in zip(list(contexts), draw(p, [rngs[b] for b in contexts])):
            contexts[b].append(token)
            yield b, token
        contexts = {b: ids for b, ids in contexts.items() if b not in done}
        if not contexts:
            return


def static_step(model, batch_size, iters, cache_mode, **how):
    """A cache and a step -> logits (B, V) for one token idx (B, 1) of each of `rows`, with the same shapes
    whatever the rows and lengths: positions are a tensor; all rows and the whole cache take part, under a
    mask. So it can be compiled and, on CUDA, recorded as a graph whose replay needs no Python. That takes a
    minute, so the model keeps both for the next call."""
    kept, key = model.__dict__.setdefault("static_steps", {}), (batch_size, iters, cache_mode)
    if key in kept:
        kept[key][0].lengths = [0] * batch_size
        return kept[key]
    cache = KVCache(model.config, batch_size, iters, cache_mode, model.embed.weight.device,
                    model.embed.weight.dtype)
    model.rope_on(cache.k.device)
    for table in (cache.k, cache.v):
        torch._dynamo.mark_static_address(table)

    def forward(idx, starts):
        return model.logits(model.run(idx, cache.chunk(starts, 1), iters))[:, 0]

    forward = torch.compile(forward, fullgraph=True, **(how or {"mode": "reduce-overhead"}))

    def step(idx, rows):
        S, device = model.config.block_size, idx.device
        full = torch.zeros(len(cache.lengths), 1, dtype=idx.dtype, device=device)
        full[rows] = idx
        starts = torch.tensor([min(n, S - 1) for n in cache.lengths], device=device)
        logits = forward(full, starts)[rows]  # the other rows wrote beyond their end, which nobody reads
        for b in rows:
            cache.lengths[b] += 1
        return logits

    kept[key] = cache, step
    return kept[key]


def parse_exit(text: str) -> tuple[str, float]:
    """'kl:1e-3' -> ("kl", 0.001)."""
    kind, _, threshold = text.partition(":")
    try:
        if kind in ("kl", "u") and 0 < float(threshold) < math.inf:
            return kind, float(threshold)
    except ValueError:
        pass
    raise UserError(f"exit={text!r}: give kl:1e-3 (change of the prediction in nats)\n"
                    "or u:1e-2 (relative change of the state that the Tail reads)")


def adaptive_step(model, cache, iters, kind, threshold, stats, idx, rows):
    """One token idx (B, 1) for each of `rows` -> logits (B, V). A row leaves the Body once it has settled,
    and lends its last keys and values to the iterations that it skips. It has settled when one changes
    - "kl": the prediction by a KL divergence below the threshold (as arXiv 2502.05171, section 6.1; each look
      costs a Tail and an unembedding);
    - "u": what the Tail reads by less than this share of its norm (costs nothing).
    The raw state of abbie_d never settles: it halves its distance, and u quarters it, whatever the token."""
    def chunk(live):
        chosen = [rows[i] for i in live]
        return cache.chunk([cache.lengths[b] for b in chosen], 1, chosen)

    live = list(range(len(rows)))
    whole = kv = chunk(live)
    rope = kv.rope(model)
    h = model.run_head(idx, rope, kv)
    x, final, before = model.start(h), torch.empty_like(h), None
    logits = h.new_empty(len(rows), model.config.vocab_size)
    for k in range(iters):
        u, x = model.iterate(x, h, k, rope, kv)
        if kind == "kl":
            logits[live] = model.logits(model.run_tail(u, rope, kv))[:, 0]
            now = logits[live].float().log_softmax(-1)
        else:
            final[live] = u
            now = u[:, 0].float()
        if k + 1 == iters:
            settled = torch.ones(len(live), dtype=torch.bool)
        elif k == 0:
            settled = torch.zeros(len(live), dtype=torch.bool)
        elif kind == "kl":
            settled = F.kl_div(before, now, log_target=True, reduction="none").sum(-1) < threshold
        else:
            settled = (now - before).norm(dim=-1) < threshold * now.norm(dim=-1)
        before, leaves = now, settled.tolist()
        if any(leaves):
            stats.iters[k + 1] += sum(leaves)
            stats.depth.update((rows[i], k + 1) for i, left in zip(live, leaves) if left)
            chunk([i for i, left in zip(live, leaves) if left]).fill_deeper(k + 1)
            live = [i for i, left in zip(live, leaves) if not left]
            if not live:
                break
            stay = ~settled
            x, h, before, kv = x[stay], h[stay], now[stay], chunk(live)
            rope = kv.rope(model)
    if kind == "u":
        logits = model.logits(model.run_tail(final, whole.rope(model), whole))[:, 0]
    for b in rows:
        cache.lengths[b] += 1
    return logits


@torch.no_grad()
def stream_drafted(model, cache, prompts, max_new_tokens, iters, draft_iters, draft_tokens, sample, rngs,
                   done, stats):
    """Self-speculative decoding (LayerSkip, arXiv 2404.16710), one prompt after the other: draft some tokens
    at draft_iters, then take all of them on to `iters` in one pass and keep those that decoding at `iters`
    could have drawn (speculative sampling, arXiv 2302.01318, and 2211.17192)."""
    S = model.config.block_size
    for b, prompt in enumerate(prompts):
        context, n, cache.lengths = {0: list(prompt)}, 0, [0]
        while n < max_new_tokens and b not in done:
            start = cache.lengths[0]
            if start in (0, S):  # a prompt, or a full context that starts again
                tokens = draw(sample(feed(model, cache, context, [0], iters, None)), [rngs[b]])
            else:
                width = min(draft_tokens + 1, S - start, max_new_tokens - n)
                tokens = draft_and_verify(model, cache, context[0][-1], width, iters, draft_iters, sample,
                                          rngs[b], stats)
            context[0] += tokens
            n += len(tokens)
            yield from ((b, token) for token in tokens)


def draft_and_verify(model, cache, token, n, iters, draft_iters, sample, rng, stats) -> list[int]:
    """Feed `token` and n - 1 drafted ones -> the accepted ones and one more, drawn at `iters`. The first
    draft_iters iterations do not depend on iters: the draft's Head and Body, their states and their keys and
    values, are the beginning of the verification and are not repeated. The Tail's are overwritten."""
    start, states, drafted, q = cache.lengths[0], [], [], []
    for j in range(n):
        kv = cache.chunk([start + j], 1)
        rope = kv.rope(model)
        h = model.run_head(torch.tensor([[token]], device=cache.k.device), rope, kv)
        x = model.start(h)
        for k in range(draft_iters):
            u, x = model.iterate(x, h, k, rope, kv)
        states.append((h, x))
        if j < n - 1:  # after the last one, the verification itself predicts
            q.append(sample(model.logits(model.run_tail(u, rope, kv))[:, 0]))
            [token] = draw(q[-1], [rng])
            drafted.append(token)

    h, x = (torch.cat(parts, dim=1) for parts in zip(*states))  # (1, n, D)
    kv = cache.chunk([start], n)
    rope = kv.rope(model)
    for k in range(draft_iters, iters):
        u, x = model.iterate(x, h, k, rope, kv)
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


def lay_out_for_decoding(model: AbbIE) -> AbbIE:
    """Store every matrix column by column, with the same shape and values: a CPU then multiplies it with one
    row about 1.3x faster."""
    if model.embed.weight.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()
    return model


# ------------------------------------------------------------------------------------------------------- text

class Text:
    """Token ids -> text, as soon as it is certain: the bytes of an unfinished character and what may become a
    stop string are held back. `stopped` is set when a stop string has come, which ends the text before it."""

    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer, self.stops, self.held, self.stopped = tokenizer, stops, "", False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._release(self.utf8.decode(self.tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """What is left when no token follows."""
        return self._release(self.utf8.decode(b"", final=True), last=True)

    def _release(self, new: str, last=False) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        found = [text.find(stop) for stop in self.stops if stop in text]
        if found:
            self.stopped, self.held = True, ""
            return text[:min(found)]
        begun = 0 if last else max((n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1))
                                    if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - begun:]
        return text[:len(text) - begun]


def say(*text, end="\n"):
    print(*text, end=end, file=sys.stderr, flush=True)


def write(text: str):
    print(text, end="", flush=True)


# ----------------------------------------------------------------------------------------------- command line

def encode(model, tokenizer, prompt: str) -> list[int]:
    ids, S = list(tokenizer.encode_ordinary(prompt)), model.config.block_size
    if not ids:
        raise UserError("the prompt is empty\ngive some text: --prompt, --prompt_file or standard input")
    if len(ids) > S:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context {S}\nshorten it")
    return ids


def show_samples(model, tokenizer, prompt: str, args, options: dict):
    """Continuations of a prompt to stdout: the first as it comes, the others after it."""
    ids = encode(model, tokenizer, prompt)
    texts = [Text(tokenizer, args.stop) for _ in range(args.num_samples)]
    later, done, stats = [""] * len(texts), set(), Stats()
    tokens = stream(model, [ids] * len(texts), args.max_new_tokens, args.iters,
                    stop_token=tokenizer.eot_token, done=done, stats=stats, **options)
    say(prompt, end="")
    for b, token in tokens:
        text = texts[b].add(token)
        if texts[b].stopped:
            done.add(b)
        if b == 0:
            write(text)
        else:
            later[b] += text
    for b, text in enumerate(texts):
        if b > 0:
            say(f"--- sample {b + 1}\n{prompt}", end="")
        write(later[b] + text.end() + "\n")
    say(f"[{stats.report(model.check_iters(args.iters))}]")


def show_side_by_side(model, tokenizer, prompt: str, args, options: dict):
    """The same prompt, and the same random numbers, at several iters, a column each."""
    ids, columns = encode(model, tokenizer, prompt), []
    depths = parse_list(args.compare, "compare")
    width = max(16, (shutil.get_terminal_size().columns - 3 * (len(depths) - 1)) // len(depths))
    for iters in depths:
        text, done = Text(tokenizer, args.stop), set()
        whole = prompt
        for _, token in stream(model, [ids], args.max_new_tokens, iters, stop_token=tokenizer.eot_token,
                               done=done, **options):
            whole += text.add(token)
            if text.stopped:
                done.add(0)
        lines = (whole + text.end()).expandtabs(4).splitlines()
        wrapped = [part for line in lines for part in textwrap.wrap(
            line, width, drop_whitespace=False, replace_whitespace=False) or [""]]
        columns.append([f"iters {iters}", "-" * width, *wrapped])
    for row in itertools.zip_longest(*columns, fillvalue=""):
        write(" | ".join(f"{cell:{width}}" for cell in row).rstrip() + "\n")


def parse_args(argv: list[str]):
    parser = ArgumentParser(prog="sample.py", description=__doc__.split("\n\nIn Python")[0])
    add = parser.add_argument
    add("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    add("--iters", type=int, help="applications of the Body (default: the rounded mean of training)")
    add("--prompt", help="text to continue (default: standard input, interactive on a terminal)")
    add("--prompt_file", help="file with the text to continue")
    add("--num_samples", type=int, default=1, help="continuations of a prompt")
    add("--max_new_tokens", type=int, default=256, help="length of a continuation")
    add("--temperature", type=float, default=0.8, help="0: always the best token (default 0.8)")
    add("--top_k", type=int, default=50, help="draw from the k best tokens only (0: all; default 50)")
    add("--top_p", type=float, default=1.0, help="draw from the fewest tokens that hold this probability")
    add("--seed", type=int, default=1, help="sample b draws from seed + b")
    add("--stop", action="append", default=[], help="end before this text (may be given several times)")
    add("--draft_iters", type=int, default=0, help="draft at so many iterations, verify at --iters (0: no)")
    add("--draft_tokens", type=int, default=4, help="tokens that are drafted before a verification")
    add("--exit", default="", help="kl:1e-3 or u:1e-2: a token stops iterating when it changes less")
    add("--cache", dest="cache_mode", default="full", help="full, or last: one slot for all iterations")
    add("--compare", help="show the prompt at several iters side by side: 1,2,4,8")
    add("--compile", action="store_true", help="record each step as one graph (a minute's wait; for CUDA)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", help="of weights and cache: float32 or bfloat16")
    args = parser.parse_args(argv)
    for problem, wrong in {
            "--prompt and --prompt_file exclude each other": args.prompt is not None and args.prompt_file,
            "--compare runs at its own iters: leave out --iters, --draft_iters, --exit and --num_samples":
                args.compare and (args.iters or args.draft_iters or args.exit or args.num_samples > 1),
            f"--num_samples={args.num_samples} must be at least 1": args.num_samples < 1,
            f"--dtype={args.dtype} is neither float32 nor bfloat16":
                args.dtype not in ("float32", "bfloat16"),
            "--stop needs some text": "" in args.stop,
            }.items():
        if wrong:
            raise UserError(problem)
    return args


def main(argv: list[str]):
    args = parse_args(argv)
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed", "cache_mode",
                                                      "draft_iters", "draft_tokens", "exit", "compile")}
    prompt = args.prompt
    if args.prompt_file:
        prompt = read_text(args.prompt_file)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    path = args.ckpt if args.ckpt else find_checkpoint(None)
    try:
        model = AbbIE.from_checkpoint(path, device=device).to(getattr(torch, args.dtype)).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be used: {str(error).splitlines()[0]}\n"
                        "try --device cpu") from None
    lay_out_for_decoding(model)
    tokenizer = get_tokenizer(model.meta["tokenizer"])
    show = show_side_by_side if args.compare else show_samples
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None:
        return show(model, tokenizer, prompt, args, options)
    say("a prompt a line; Ctrl-D ends")
    while True:
        say("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return say()
        try:
            show(model, tokenizer, line.rstrip("\n"), args, options)
        except UserError as error:
            say(error)


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text") from None


if __name__ == "__main__":
    cli(main)
