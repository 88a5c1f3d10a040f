"""Generate text at any number of iterations.

    python sample.py --prompt "def "                          # the newest checkpoint under out/, at its own iters
    python sample.py --iters 8 --prompt_file story.txt --num_samples 3 --temperature 0.8 --top_p 0.95
    python sample.py --iters 8 --draft_iters 2 --temperature 0 --prompt "def "     # the same tokens, sooner
    python sample.py --iters 8 --exit kl:1e-3 --prompt "def "                      # as deep as each token needs
    python sample.py --compare 1,2,4,8 --prompt "def "                             # side by side
    python sample.py --ckpt hf:FOLDER                         # on a terminal without a prompt: interactive

Generated text goes to stdout and nothing else; what else there is to say goes to stderr.

In Python, with prompts as lists of token ids (decoding is greedy unless a temperature is given):

    generate(model, prompts, max_new_tokens, iters=None, *, temperature=0.0, top_k=0, top_p=1.0, seed=1,
             stop_token=None, cache_mode="full", draft_iters=0, draft_tokens=4, exit="", done=None, stats=None)
        -> the new ids of every prompt
    stream(the same) yields (row, id) as soon as a token is certain; a row that the caller adds to the set `done`
        gets no more

The decoding strategies are `stream_plain` (cached, batched), `adaptive_step` (each token stops iterating when it has
settled) and `stream_drafted` (self-speculative). When a context is full, its last block_size // 2 tokens start again
from position 0.
"""

import codecs
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
from torch import Tensor
from torch.nn import functional as F

from config import ArgumentParser, cli, parse_list
from model import AbbIE, KVCache, UserError, find_checkpoint
from prepare_data import get_tokenizer


@dataclass
class Stats:
    """What a generation did, for the report at its end."""
    tokens: int = 0          # generated
    seconds: float = 0.0     # prompt included
    drafted: int = 0
    accepted: int = 0        # of the drafted
    iters: Counter = field(default_factory=Counter)  # iterations -> tokens that ran so many

    def __str__(self):
        text = f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"
        if self.iters:
            n = self.iters.total()
            text += f", {sum(k * count for k, count in self.iters.items()) / n:.2f} iterations per token"
        if len(self.iters) > 1:
            text += " (" + ", ".join(f"{k}: {self.iters[k] / n:.0%}" for k in sorted(self.iters)) + ")"
        if self.drafted:
            text += f", {self.accepted / self.drafted:.0%} of {self.drafted} drafted tokens accepted"
        return text


# ---------------------------------------------------------------------------------------------- choosing a token

def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits (B, V) -> the probabilities (B, V) that tokens are drawn with; temperature 0: all on the best one.
    top_k keeps the k best (0: all); top_p the fewest that hold this much probability together (nucleus sampling,
    arXiv 1904.09751)."""
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
    """A token from each row of p (B, V), which need not sum to 1: the inverse of its distribution function at one
    random number of the row's own, so that rows do not depend on one another, nor results on the device."""
    total = p.cumsum(-1)
    u = torch.tensor([[rng.random()] for rng in rngs], dtype=p.dtype, device=p.device)
    return torch.searchsorted(total, u * total[:, -1:], right=True).clamp_(max=p.shape[-1] - 1)[:, 0].tolist()


# --------------------------------------------------------------------------------------------------- strategies

def generate(model: AbbIE, prompts: list[list[int]], max_new_tokens: int, iters: int | None = None, **options):
    """-> the new ids of every prompt: lists of at most max_new_tokens. Arguments and errors as of `stream`."""
    new = [[] for _ in prompts]
    for row, token in stream(model, prompts, max_new_tokens, iters, **options):
        new[row].append(token)
    return new


@torch.no_grad()
def stream(model: AbbIE, prompts: list[list[int]], max_new_tokens: int, iters: int | None = None, *,
           temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1,
           stop_token: int | None = None, cache_mode: str = "full", draft_iters: int = 0, draft_tokens: int = 4,
           exit: str = "", done: set[int] | None = None, stats: Stats | None = None) -> Iterator[tuple[int, int]]:
    """Yield (row, id) for every new token of the prompts, at most max_new_tokens each; a row ends before stop_token,
    and when the caller adds it to the set `done`. Row b draws from seed + b, so a batch of N equals N batches of 1.
    cache_mode: see KVCache. draft_iters > 0: see stream_drafted. exit, "kl:1e-3" or "u:1e-2": see adaptive_step.
    `stats` is filled on the way. Raises UserError for options that contradict one another."""
    iters, S = model.check_iters(iters), model.config.block_size
    for problem, wrong in {
            "a prompt has no tokens": not all(prompts) or not prompts,
            f"a prompt is longer than the context of {S} tokens": any(len(p) > S for p in prompts),
            f"max_new_tokens={max_new_tokens} must be at least 1": max_new_tokens < 1,
            f"temperature={temperature} must be 0 (greedy) or more": not 0 <= temperature < float("inf"),
            f"top_k={top_k} must be 0 (all) or more": top_k < 0,
            f"top_p={top_p} must be above 0 and at most 1": not 0 < top_p <= 1,
            f"cache={cache_mode!r} is neither full nor last": cache_mode not in ("full", "last"),
            f"draft_iters={draft_iters} must be below iters={iters}": not 0 <= draft_iters < iters,
            f"draft_tokens={draft_tokens} must be at least 1": draft_tokens < 1,
            "drafting needs cache=full, since the draft's iterations are a prefix of the verification's":
                draft_iters and cache_mode == "last",
            "drafting and exit exclude each other: a verified token runs all iterations": draft_iters and exit,
            }.items():
        if wrong:
            raise UserError(problem)
    stats, done, start = stats or Stats(), set() if done is None else done, time.perf_counter()
    sample = partial(distribution, temperature=temperature, top_k=top_k, top_p=top_p)
    rngs = [random.Random(seed + b) for b in range(len(prompts))]
    cache = KVCache(model.config, 1 if draft_iters else len(prompts), iters, cache_mode,
                    model.embed.weight.device, model.embed.weight.dtype)
    contexts = [list(prompt) for prompt in prompts]
    if draft_iters:
        tokens = ((b, token) for b, context in enumerate(contexts) for token in stream_drafted(
            model, cache, context, max_new_tokens, iters, draft_iters, draft_tokens, sample, rngs[b], stats))
    else:
        tokens = stream_plain(model, cache, contexts, max_new_tokens, iters, parse_exit(exit), sample, rngs, done, stats)
    for b, token in tokens:
        if token == stop_token:
            done.add(b)
        if b not in done:
            stats.tokens, stats.seconds = stats.tokens + 1, time.perf_counter() - start
            yield b, token


def feed(model: AbbIE, cache: KVCache, contexts: list[list[int]], rows: list[int], iters: int, exit=None,
         stats: Stats | None = None) -> Tensor:
    """Take the tokens of contexts that the cache does not hold yet through the model -> logits (len(rows), V) after
    them. Prompts and contexts that start again run all iters and share a padded batch; single tokens do too."""
    for b in rows:
        if len(contexts[b]) > model.config.block_size:
            contexts[b] = contexts[b][-(model.config.block_size // 2):]
            cache.lengths[b] = 0
    new = {b: contexts[b][cache.lengths[b]:] for b in rows}
    logits = {}
    for single in (False, True):
        group = [b for b in rows if (len(new[b]) == 1) is single]
        if group:
            n_new = [len(new[b]) for b in group]
            idx = torch.tensor([new[b] + [0] * (max(n_new) - len(new[b])) for b in group], device=cache.k.device)
            chosen = None if group == list(range(len(cache.lengths))) else group
            if single and exit:
                out = adaptive_step(model, idx, cache, iters, chosen, exit, stats)
            else:
                out = model.step(idx, cache, iters, n_new, chosen)
                stats.iters[iters] += len(group) if single else 0
            logits.update(zip(group, out))
    return torch.stack([logits[b] for b in rows])


def stream_plain(model, cache, contexts, max_new_tokens, iters, exit, sample, rngs, done, stats):
    """Every row's next token, again and again; rows in `done` leave the batch."""
    live = list(range(len(contexts)))
    for i in range(max_new_tokens):
        p = sample(feed(model, cache, contexts, live, iters, exit, stats))
        for b, token in zip(live, draw(p, [rngs[b] for b in live])):
            contexts[b].append(token)
            yield b, token
        live = [b for b in live if b not in done]
        if not live:
            return


def parse_exit(text: str) -> tuple[str, float] | None:
    """'kl:1e-3' -> ("kl", 0.001), '' -> None."""
    kind, _, threshold = text.partition(":")
    try:
        if text == "":
            return None
        if kind in ("kl", "u") and float(threshold) > 0:
            return kind, float(threshold)
    except ValueError:
        pass
    raise UserError(f"exit={text!r}: give kl:1e-3 (change of the prediction, in nats) or u:1e-2 (relative change of the state)")


def adaptive_step(model, idx, cache, iters, rows, exit, stats):
    """One token idx (B, 1) per row -> logits (B, V); a row leaves the Body once it has settled, and lends its last keys
    and values to the iterations that it skipped. Settled means, for "kl", that an iteration changed the prediction by a
    KL divergence below the threshold (as in arXiv 2502.05171, section 6.1; each look costs a Tail); for "u", that it
    changed what the Tail reads by less than this share of its norm."""
    kind, threshold = exit
    rows = list(range(len(cache.lengths))) if rows is None else rows
    live = torch.arange(len(rows), device=idx.device)

    def chunk(live):
        chosen = [rows[i] for i in live.tolist()]
        return cache.chunk([cache.lengths[b] for b in chosen], 1, None if len(chosen) == len(cache.lengths) else chosen)

    whole = kv = chunk(live)
    rope = kv.rope(model)
    h = model.run_head(idx, rope, kv)
    x, final, before = model.start(h), torch.empty_like(h), None
    logits = h.new_empty(len(rows), model.config.vocab_size)
    for k in range(iters):
        u, x = model.iterate(x, h, k, rope, kv)
        final[live] = u
        if kind == "kl":
            logits[live] = model.logits(model.run_tail(u, rope, kv))[:, 0]
            now = logits[live].float().log_softmax(-1)
            settled = k > 0 and F.kl_div(before, now, log_target=True, reduction="none").sum(-1) < threshold
        else:
            now = u[:, 0].float()
            settled = k > 0 and (now - before).norm(dim=-1) < threshold * now.norm(dim=-1)
        before = now
        if k + 1 == iters:
            stats.iters[iters] += len(live)
        elif k > 0 and settled.any():
            stats.iters[k + 1] += int(settled.sum())
            chunk(live[settled]).fill_deeper(k + 1)
            going = ~settled
            live, x, h, before = live[going], x[going], h[going], before[going]
            if not len(live):
                break
            kv = chunk(live)
            rope = kv.rope(model)
    if kind != "kl":
        logits = model.logits(model.run_tail(final, whole.rope(model), whole))[:, 0]
    for b in rows:
        cache.lengths[b] += 1
    return logits


def stream_drafted(model, cache, context, max_new_tokens, iters, draft_iters, draft_tokens, sample, rng, stats):
    """Self-speculative decoding of one prompt (LayerSkip, arXiv 2404.16710; acceptance by speculative sampling, arXiv
    2302.01318): draft some tokens at draft_iters, then take all of them on to `iters` in one pass. Iterations below
    draft_iters do not depend on iters, so the draft's Head and Body, their states and keys and values, are the beginning
    of the verification and are not repeated; the Tail's are overwritten."""
    cache.lengths, n = [0], 0
    while n < max_new_tokens:
        start = cache.lengths[0]
        if start in (0, model.config.block_size):  # a prompt, or a full context that starts again
            contexts = [context]
            tokens = draw(sample(feed(model, cache, contexts, [0], iters, None, stats)), [rng])
            context = contexts[0]
        else:
            room = min(draft_tokens + 1, model.config.block_size - start, max_new_tokens - n)
            tokens = draft_and_verify(model, cache, context[-1], room, iters, draft_iters, sample, rng, stats)
        context += tokens
        n += len(tokens)
        yield from tokens


def draft_and_verify(model, cache, token, n, iters, draft_iters, sample, rng, stats):
    """Feed `token` and n - 1 drafted ones -> the accepted drafted tokens and one more, drawn at `iters`."""
    start, states, drafted, q = cache.lengths[0], [], [], []
    for j in range(n):
        kv = cache.chunk([start + j], 1)
        rope = kv.rope(model)
        h = model.run_head(torch.tensor([[token]], device=cache.k.device), rope, kv)
        x = model.start(h)
        for k in range(draft_iters):
            u, x = model.iterate(x, h, k, rope, kv)
        states.append((h, x))
        if j < n - 1:  # nothing is drafted after the last: the verification's own prediction follows it
            q.append(sample(model.logits(model.run_tail(u, rope, kv))[:, 0]))
            [token] = draw(q[-1], [rng])
            drafted.append(token)

    h, x = (torch.cat(s, dim=1) for s in zip(*states))  # (1, n, D)
    kv = cache.chunk([start], n)
    rope = kv.rope(model)
    for k in range(draft_iters, iters):
        u, x = model.iterate(x, h, k, rope, kv)
    p = sample(model.logits(model.run_tail(u, rope, kv))[0])  # (n, V)

    accepted = 0
    while accepted < n - 1:
        at, token = accepted, drafted[accepted]
        if rng.random() * q[at][0, token] >= p[at, token]:
            p[at] = (p[at] - q[at][0]).clamp(min=0)  # a draft accepted at min(1, p/q) and this make p together
            break
        accepted += 1
    cache.lengths[0] = start + 1 + accepted  # what was rejected is forgotten
    stats.drafted, stats.accepted = stats.drafted + n - 1, stats.accepted + accepted
    stats.iters[iters] += accepted + 1
    return drafted[:accepted] + draw(p[accepted][None], [rng])


# ----------------------------------------------------------------------------------------------------------- text

class Text:
    """Token ids -> text, as soon as it is certain: the bytes of an unfinished character and what may become a stop
    string are held back. `stopped` is set when a stop string has come; it and what follows are no part of the text."""

    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer, self.stops, self.held, self.stopped = tokenizer, stops, "", False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._release(self.utf8.decode(self.tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """What is left when no token follows."""
        return "" if self.stopped else self._release(self.utf8.decode(b"", final=True), last=True)

    def _release(self, new: str, last=False) -> str:
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


# ------------------------------------------------------------------------------------------------- command line

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
    say(prompt, end="")
    for b, token in stream(model, [ids] * len(texts), args.max_new_tokens, args.iters, stop_token=tokenizer.eot_token,
                           done=done, stats=stats, **options):
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
    say(f"[{stats}]")


def show_side_by_side(model, tokenizer, prompt: str, args, options: dict):
    """The same prompt, and the same random numbers, at several iters, a column each."""
    ids, columns = encode(model, tokenizer, prompt), []
    depths = parse_list(args.compare, "compare")
    width = max(16, (shutil.get_terminal_size().columns - 3 * (len(depths) - 1)) // len(depths))
    for iters in depths:
        text, done = Text(tokenizer, args.stop), set()
        whole = prompt
        for _, token in stream(model, [ids], args.max_new_tokens, iters, stop_token=tokenizer.eot_token, done=done,
                               **options):
            whole += text.add(token)
            if text.stopped:
                done.add(0)
        lines = (whole + text.end()).expandtabs(4).splitlines()
        wrapped = [part for line in lines for part in textwrap.wrap(
            line, width, drop_whitespace=False, replace_whitespace=False) or [""]]
        columns.append([f"iters {iters}", "-" * width, *wrapped])
    for i in range(max(map(len, columns))):
        write(" | ".join(f"{column[i] if i < len(column) else '':{width}}" for column in columns).rstrip() + "\n")


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
    add("--draft_iters", type=int, default=0, help="draft at so many iterations, verify at --iters (0: no drafting)")
    add("--draft_tokens", type=int, default=4, help="tokens that are drafted before a verification")
    add("--exit", default="", help="kl:1e-3 or u:1e-2: a token stops iterating when it changes less than that")
    add("--cache", dest="cache_mode", default="full", help="full (exact), or last: one slot for all iterations")
    add("--compare", help="show the prompt at several iters side by side: 1,2,4,8")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", help="of weights and cache: float32 or bfloat16")
    args = parser.parse_args(argv)
    for problem, wrong in {
            "--prompt and --prompt_file exclude each other": args.prompt is not None and args.prompt_file,
            "--compare runs at its own iters: leave out --iters, --draft_iters, --exit and --num_samples":
                args.compare and (args.iters or args.draft_iters or args.exit or args.num_samples > 1),
            f"--num_samples={args.num_samples} must be at least 1": args.num_samples < 1,
            f"--dtype={args.dtype} is neither float32 nor bfloat16": args.dtype not in ("float32", "bfloat16"),
            "--stop needs some text": "" in args.stop,
            }.items():
        if wrong:
            raise UserError(problem)
    return args


def main(argv: list[str]):
    args = parse_args(argv)
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed", "cache_mode",
                                                      "draft_iters", "draft_tokens", "exit")}
    prompt = args.prompt
    if args.prompt_file:
        prompt = read_text(args.prompt_file)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    path = args.ckpt if args.ckpt else find_checkpoint(None)
    try:
        model = AbbIE.from_checkpoint(path, device=device).to(getattr(torch, args.dtype)).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be used: {str(error).splitlines()[0]}\ntry --device cpu") from None
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
