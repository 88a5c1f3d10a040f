"""Generate text at any number of iterations, or look at what the model predicts after each.

    python sample.py --iters 8                            # the newest checkpoint under out/, without a prompt
    python sample.py --iters 1,4,8 --prompt "def "                               # one after the other
    python sample.py --iters 8 --prompt_file story.txt --num_samples 3 --temperature 0.8 --top_p 0.95
    python sample.py --iters 8 --draft_iters 2 --temperature 0 --prompt "def "   # the same tokens, faster
    python sample.py --iters 8 --exit kl:1e-2 --prompt "def "                    # as many as a token needs
    python sample.py --ckpt models/chains_abbie_d --lens --iters 1,2,3,4 --prompt "a=3;b=a;c=b;?c"

Generated text goes to stdout and nothing else (a line --- between samples), the prompt and reports to stderr.
In Python: generate(model, prompts, max_new_tokens, iters=None, ...) -> the new ids of every prompt, a list of
ids; stream(the same) yields (row, id). When a context is full, its last block_size // 2 tokens start again
from position 0. Shapes as in model.py: B rows, T new tokens, K n_kv_heads, E attn_head_dim, S places.
"""

import codecs
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from checkpoint import load_model
from config import DTYPES, ArgumentParser, choose_device, choose_dtype, cli, parse_list
from data import tokenizer_of
from model import AbbIE, check, check_range

# -------------------------------------------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of the tokens so far, (slots, B, K, S, E) each; `lengths` says how many tokens each of
    the B rows holds. In mode "full" there is one slot per block and *iteration*: iteration k of a new token
    reads what iteration k of the old ones wrote, so decoding is exact. In mode "last" all iterations of a
    block share one slot, which holds the newest that they wrote: a prompt's tokens read one another's keys of
    the same iteration, later tokens those of the last one. One place more takes what is not to be kept.

    It is the model's `kv`: `expect` says which tokens come, `at` turns to a block's slot, `extend` stores and
    reads there."""

    def __init__(self, model: AbbIE, batch_size=1, iters=None, mode="full", length=None):
        config, weight = model.config, model.embed.weight
        self.model, self.mode, self.iters = model, mode, model.check_iters(iters)
        self.length = min(length or config.block_size, config.block_size)
        n_slots = config.n_blocks + (self.iters - 1) * config.n_body_blocks * (mode == "full")
        shape = (n_slots, batch_size, config.n_kv_heads, self.length + 1, config.attn_head_dim)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        self.lengths = [0] * batch_size
        self.rows = torch.arange(batch_size, device=weight.device)[:, None]  # (B, 1)

    def expect(self, n_new: list[int]):
        """The model is about to read n_new[b] tokens behind those of row b, padded to T = max(n_new)."""
        device, T, starts = self.rows.device, max(n_new), self.lengths
        steps = torch.arange(T, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + steps  # (B, T)
        self.real = steps < torch.tensor(n_new, device=device)[:, None]  # (B, T)
        self.end = max(start + n for start, n in zip(starts, n_new))
        self.mask = None
        equal = len(set(starts)) == len(set(n_new)) == 1
        if not equal or (T > 1 and starts[0] > 0):
            self.mask = torch.arange(self.end, device=device) <= positions[:, None, :, None]  # (B, 1, T, S)
        self.positions = positions.clamp(max=self.length - 1)
        self.cos_sin = self.model.cos_sin(self.positions, self.positions)
        self.keep(self.real)

    def keep(self, kept: Tensor):
        """Where the new keys and values go: to their places if kept (B, T), else to the one more."""
        self.places = torch.where(kept, self.positions, self.length)

    def at(self, index: int, k: int) -> "KVCache":
        """Turn to the slot of block `index` in iteration k. Slots: all blocks, the Body at k = 1, 2, ..."""
        config, self.slot = self.model.config, index
        if k > 0 and self.mode == "full":
            self.slot += config.n_tail_blocks + k * config.n_body_blocks
        return self

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The new keys and values, (B, K, T, E) each -> all there are, (B, K, S, E) each, and the mask."""
        both = []
        for table, new in ((self.keys[self.slot], keys), (self.values[self.slot], values)):
            table[self.rows, :, self.places] = new.transpose(1, 2)  # (B, T, K, E)
            both.append(table[:, :, : self.end])
        return *both, self.mask


def step(cache: KVCache, idx: Tensor, n_new: list[int], early_exit=0.0, stats=None) -> Tensor:
    """Append idx (B, T), of which n_new[b] tokens of row b count, to a cache -> logits (B, V) after the last
    of each row."""
    model, x = cache.model, cache.model.embed(idx)
    cache.expect(n_new)
    if early_exit:
        z, depths = settle(cache, x, early_exit)
        stats["read"] += sum(n_new)
        stats["iterations"] += int(depths.sum())
    else:
        [z] = model.sweep(x, [cache.iters], cache.cos_sin, cache)
    cache.lengths = [length + n for length, n in zip(cache.lengths, n_new)]
    last = (cache.real.sum(1) - 1).clamp(min=0)  # (B,)
    return model.logits(z[cache.rows[:, 0], last])


# ------------------------------------------------------------------------------------------- choosing a token


@dataclass(frozen=True)
class Decoding:
    """How to decode. Raises UserError for options that are out of range or exclude each other."""

    max_new_tokens: int
    iters: int
    temperature: float = 0.0  # 0: the best token
    top_k: int = 0  # draw from the k best tokens (0: all)
    top_p: float = 1.0  # draw from the fewest that have this probability together (arXiv 1904.09751)
    seed: int = 1  # row b draws from seed + b: a batch of N is N batches of 1
    stop_tokens: Set[int] = frozenset()  # end a row, and are not yielded
    cache_mode: str = "full"  # full or last: see KVCache
    early_exit: float = 0.0  # a token stops once its prediction changes by less, in nats: see settle
    draft_iters: int = 0  # above 0: see draft_and_verify
    draft_tokens: int = 4

    def __post_init__(self):
        check_range(self, 1, math.inf, "max_new_tokens", "draft_tokens")
        check_range(self, 0, math.inf, "temperature", "top_k", "early_exit")
        check_range(self, 1e-9, 1, "top_p")
        draft_iters, iters, mode = self.draft_iters, self.iters, self.cache_mode
        check(0 <= draft_iters < iters, f"draft_iters={draft_iters} must be below iters={iters}")
        check(mode in ("full", "last"), f"cache={mode!r} is neither full nor last")
        if draft_iters > 0:
            check(mode == "full", "drafting needs cache=full")
            check(not self.early_exit, "drafting and exit exclude each other")

    def distribution(self, logits: Tensor) -> Tensor:
        """logits (B, V) -> the probabilities (B, V) that tokens are drawn with; at temperature 0 all is on
        the best one."""
        check_finite(logits)
        if logits.device.type == "mps":  # which has no float64
            logits = logits.cpu()
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        logits = logits.double()
        p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if 0 < self.top_k < p.shape[-1]:
            p = p.masked_fill(p < p.topk(self.top_k).values[:, -1:], 0)
        if self.top_p < 1:
            ranked, order = (p / p.sum(-1, keepdim=True)).sort(descending=True, stable=True)
            kept = ranked.masked_fill(ranked.cumsum(-1) - ranked >= self.top_p, 0)
            p = torch.zeros_like(p).scatter(-1, order, kept)
        return p / p.sum(-1, keepdim=True)


def check_finite(logits: Tensor):
    check(bool(logits.isfinite().all()), "the model's predictions are not finite\ntry --dtype float32")


def draw(p: Tensor, rngs: list[random.Random]) -> list[int]:
    """A token from each row of p (B, V), which need not sum to 1: the inverse of its distribution function at
    one random number of the row's own, so that no row depends on another, nor on the device."""
    total = p.cumsum(-1)
    u = torch.tensor([[rng.random()] for rng in rngs], dtype=p.dtype, device=p.device)
    token = torch.searchsorted(total, u * total[:, -1:], right=True)
    return token.clamp(max=p.shape[-1] - 1)[:, 0].tolist()


# ------------------------------------------------------------------------------------------------- early exit


def settle(cache: KVCache, x: Tensor, early_exit: float) -> tuple[Tensor, Tensor]:
    """Embeddings x (B, T, D) -> the states that are unembedded, (B, T, D), and the iterations that each token
    ran, (B, T). A token has settled when an iteration changes its prediction by a KL divergence below
    early_exit (as arXiv 2502.05171, section 6.1; each look costs a Tail and an unembedding). It keeps this
    state, and its keys and values, which the tokens still running read; the loop ends when all have settled.
    So a row's depths do not depend on other rows. The cache has one slot for all iterations."""
    model, cos_sin = cache.model, cache.cos_sin
    h = model.run(model.head, x, cos_sin, cache)
    x, z, before = model.start(h), torch.zeros_like(h), None
    running, depths = cache.real.clone(), torch.zeros_like(cache.positions)
    for k in range(cache.iters):
        cache.keep(running)
        u, x = model.iterate(x, h, k, k + 1, cos_sin, cache)
        next_z = model.finish(u, cos_sin, cache)
        z = torch.where(running[..., None], next_z, z)
        depths += running
        now = model.logits(z).float().log_softmax(-1)  # (B, T, V)
        if before is not None:
            change = F.kl_div(before, now, log_target=True, reduction="none").sum(-1)
            running = running & (change >= early_exit)
        before = now
        if not running.any():
            break
    return z, depths


# --------------------------------------------------------------------------------------------------- drafting


def draft_and_verify(cache: KVCache, token: int, n: int, rng, decoding, stats) -> list[int]:
    """Self-speculative decoding (LayerSkip, arXiv 2404.16710) of one row: after `token`, draft n - 1 tokens
    at few iterations, then take all n on to the cache's iterations in one pass -> those of the draft that
    decoding at full depth could have drawn (speculative sampling, arXiv 2302.01318, and 2211.17192), and one
    more. The first iterations do not depend on how many follow: the draft's states, keys and values of Head
    and Body begin the verification and are not repeated. The Tail's are overwritten."""
    model, start = cache.model, cache.lengths[0]
    states, drafted, qs = [], [], []
    for j in range(n):
        cache.expect([1])
        idx = torch.tensor([[token]], device=cache.rows.device)
        h = model.run(model.head, model.embed(idx), cache.cos_sin, cache)
        u, x = model.iterate(model.start(h), h, 0, decoding.draft_iters, cache.cos_sin, cache)
        states.append((h, x))
        cache.lengths[0] += 1
        if j < n - 1:  # after the last one, the verification itself predicts
            z = model.finish(u, cache.cos_sin, cache)
            qs.append(decoding.distribution(model.logits(z)[:, 0]))
            [token] = draw(qs[-1], [rng])
            drafted.append(token)

    cache.lengths[0] = start
    cache.expect([n])
    h, x = (torch.cat(parts, dim=1) for parts in zip(*states))  # (1, n, D)
    u, _ = model.iterate(x, h, decoding.draft_iters, cache.iters, cache.cos_sin, cache)
    z = model.finish(u, cache.cos_sin, cache)
    p = decoding.distribution(model.logits(z)[0])  # (n, V)

    accepted = 0
    for token, q in zip(drafted, qs):
        if rng.random() * q[0, token] >= p[accepted, token]:
            # What is left of p: drafted with q and accepted with min(1, p/q), or else drawn from here, tokens
            # come out distributed as p.
            p[accepted] = (p[accepted] - q[0]).clamp(min=0)
            break
        accepted += 1
    cache.lengths[0] = start + 1 + accepted  # what was rejected is forgotten
    stats.update(drafted=n - 1, accepted=accepted)
    return drafted[:accepted] + draw(p[accepted][None], [rng])


# ------------------------------------------------------------------------------------------------- generating


def new_tokens(cache: KVCache, contexts: list[list[int]]) -> tuple[Tensor, list[int]]:
    """What the cache does not hold yet of the contexts -> ids (B, T), padded, and how many of each row. A
    context that is full starts again with its last block_size // 2 tokens."""
    block_size = cache.model.config.block_size
    for b, ids in enumerate(contexts):
        if len(ids) > block_size:
            contexts[b], cache.lengths[b] = ids[-(block_size // 2) :], 0
    rows = [torch.tensor(ids[n:], dtype=torch.int64) for ids, n in zip(contexts, cache.lengths)]
    idx = pad_sequence(rows, batch_first=True).to(cache.rows.device)
    return idx, [len(row) for row in rows]


def stream_batch(cache, prompts, rngs, decoding, stats):
    """Yield (row, token): the next token of every row, again and again; of one row, several when drafted."""
    contexts = [list(prompt) for prompt in prompts]
    budgets = [decoding.max_new_tokens] * len(prompts)
    while any(budgets):
        room = cache.model.config.block_size - cache.lengths[0]
        if decoding.draft_iters > 0 and cache.lengths[0] > 0 and room > 0:
            n = min(decoding.draft_tokens + 1, room, budgets[0])
            chosen = [draft_and_verify(cache, contexts[0][-1], n, rngs[0], decoding, stats)]
        else:  # also a prompt, and a context that starts again
            logits = step(cache, *new_tokens(cache, contexts), decoding.early_exit, stats)
            chosen = [[token] for token in draw(decoding.distribution(logits), rngs)]
        for b, tokens in enumerate(chosen):
            for token in tokens:
                if token in decoding.stop_tokens:
                    budgets[b] = 0  # the row is over: nothing of it is new
                if budgets[b] > 0:
                    budgets[b] -= 1
                    contexts[b].append(token)
                    yield b, token


@torch.no_grad()
def stream(
    model: AbbIE, prompts: list[list[int]], max_new_tokens: int, iters=None, stats=None, **options
) -> Iterator[tuple[int, int]]:
    """Yield (row, id): the new tokens of the prompts, at most max_new_tokens each. options: see Decoding;
    stats, a Counter, counts what was done. Raises UserError for what is out of range."""
    decoding = Decoding(max_new_tokens, model.check_iters(iters), **options)
    for prompt in prompts:
        model.check_ids(torch.tensor([prompt]))
    stats = Counter() if stats is None else stats
    rngs = [random.Random(decoding.seed + b) for b in range(len(prompts))]
    mode = "last" if decoding.early_exit else decoding.cache_mode
    length = max(map(len, prompts)) + max_new_tokens
    size = 1 if decoding.draft_iters > 0 else len(prompts)
    for first in range(0, len(prompts), size):
        cache = KVCache(model, size, decoding.iters, mode, length)
        batch = slice(first, first + size)
        for b, token in stream_batch(cache, prompts[batch], rngs[batch], decoding, stats):
            stats["tokens"] += 1
            yield first + b, token


def generate(model: AbbIE, prompts, max_new_tokens: int, iters=None, **options) -> list[list[int]]:
    """The new ids of every prompt. Options and errors: see `stream`."""
    new = [[] for _ in prompts]
    for row, token in stream(model, prompts, max_new_tokens, iters, **options):
        new[row].append(token)
    return new


# ------------------------------------------------------------------------------------------------------- text


def encode_prompt(tokenizer, text: str, block_size: int) -> list[int]:
    """The ids that a text begins with: the tokenizer's own (BOS), then its text's, at most block_size; of no
    text at all, the end-of-text token."""
    bos = getattr(tokenizer, "bos_tokens", [])
    ids = [*bos, *tokenizer.encode_ordinary(text)] or [tokenizer.eot_token]
    if len(ids) > block_size:
        print(f"the context takes the prompt's last {block_size} of {len(ids)} tokens", file=sys.stderr)
    return ids[-block_size:]


def token_bytes(tokenizer, token: int) -> bytes:
    try:
        return tokenizer.decode_bytes([token])
    except KeyError:  # vocab_size may be larger than the tokenizer's
        return b""


def stream_text(model, tokenizer, prompts, max_new_tokens, iters, **options) -> Iterator[tuple[int, str]]:
    """Yield (row, piece): stream in pieces of text, as soon as it is certain, since the bytes of a character
    may be spread over tokens. A row ends where the model ends its text."""
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    stops = getattr(tokenizer, "eot_tokens", {tokenizer.eot_token})
    for b, token in stream(model, prompts, max_new_tokens, iters, stop_tokens=stops, **options):
        yield b, utf8[b].decode(token_bytes(tokenizer, token))
    for b, decoder in enumerate(utf8):
        yield b, decoder.decode(b"", final=True)


@torch.no_grad()
def lens(model: AbbIE, tokenizer, ids: list[int], iters: list[int], last: int) -> str:
    """What the model predicts after each of the last tokens, at each of iters, from one sweep of the Body: a
    line a token; in each cell the most probable next token and its probability, with * where it is another
    than one column before. The last line is the KL divergence to the next column, in nats, averaged."""

    def spell(token: int) -> str:
        text = token_bytes(tokenizer, token).decode("utf-8", "backslashreplace")
        return repr(text)[1:-1] or "<end>"

    idx = torch.tensor([ids], device=model.embed.weight.device)
    logits = torch.stack([logits[0, -last:].float() for logits in model.logits_at(idx, iters)])
    check_finite(logits)
    log_p = logits.log_softmax(-1)  # (iters, T, V)
    kl = F.kl_div(log_p[1:], log_p[:-1], log_target=True, reduction="none").sum(-1).mean(-1)
    p, best = log_p.exp().max(-1)  # (iters, T)

    table = [["after", *(f"r={r} " for r in iters)]]
    for t, token in enumerate(ids[-last:]):
        row = [spell(token)]
        for i in range(len(iters)):
            mark = "*" if i > 0 and best[i, t] != best[i - 1, t] else " "
            row.append(f"{spell(best[i, t].item())} {p[i, t]:4.0%}{mark}")
        table.append(row)
    table.append(["KL", *(f"{nats:.1g} " for nats in kl), ""])
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(map(str.rjust, row, widths)).rstrip() for row in table)


# ----------------------------------------------------------------------------------------------- command line


def show(text: str, end="\n"):
    """Text of a model to stdout; control characters, which byte models write, do not reach a terminal."""
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)
    print(text, end=end, flush=True)


def lay_out_for_decoding(model: AbbIE):
    """Store every matrix column by column: a CPU then multiplies it with one row about 1.3x faster."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
            module.weight.data = module.weight.data.t().contiguous().t()


def parse_exit(text: str) -> float:
    """'kl:1e-2' -> 0.01, '' -> 0.0."""
    try:
        threshold = float(text.removeprefix("kl:") or 0)
    except ValueError:
        threshold = -1.0
    advice = "give kl:1e-2, the change of a token's prediction in nats that ends it"
    check(threshold > 0 or not text, f"--exit={text}: {advice}")
    return threshold


def parse_args(argv: list[str]):
    parser = ArgumentParser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: newest under out/)")
    add("--iters", help="applications of the Body: 8, or 1,4,8 (default: the model's own)")
    prompt = parser.add_mutually_exclusive_group().add_argument
    prompt("--prompt", default="", help="text to continue (default: none)")
    prompt("--prompt_file", help="file with the text to continue (-: standard input)")
    add("--num_samples", type=int, default=1, help="continuations of the prompt")
    add("--max_new_tokens", type=int, default=256, help="of a continuation (default 256)")
    add("--temperature", type=float, default=0.8, help="0: the best token (default 0.8)")
    add("--top_k", type=int, default=50, help="draw from the k best (0: all; default 50)")
    add("--top_p", type=float, default=1.0, help="draw from the best of this probability")
    add("--seed", type=int, default=1, help="sample b draws from seed + b")
    add("--cache", dest="cache_mode", default="full", help="full, or last: one slot for all iterations")
    text = "kl:1e-2: a token stops when settled (--cache last)"
    add("--exit", default="", help=text)
    add("--draft_iters", type=int, default=0, help="draft at so many iterations")
    add("--lens", action="store_true", help="show the prediction after each iteration")
    add("--last", type=int, default=16, help="--lens: tokens (0: all; default 16)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights")
    return parser.parse_args(argv)


def read_prompt(args) -> str:
    """The text of --prompt or --prompt_file, without the final newline and the byte order mark of a file."""
    text = args.prompt
    if args.prompt_file:
        with open(0 if args.prompt_file == "-" else args.prompt_file, "rb") as file:
            text = file.read().decode("utf-8-sig", "surrogateescape")
        text = text.removesuffix("\n").removesuffix("\r")
    valid = text == text.encode(errors="ignore").decode()  # no surrogates
    check(valid, "the prompt is no UTF-8 text")
    return text


def main(argv: list[str]):
    args = parse_args(argv)
    check_range(args, 1, math.inf, "num_samples")
    check_range(args, 0, math.inf, "last")
    prompt, device = read_prompt(args), choose_device(args.device)
    model = load_model(args.ckpt, device).eval().to(choose_dtype(args.dtype, device))
    lay_out_for_decoding(model)
    print(f"[{model.meta['ckpt']}, {model.embed.weight.dtype} on {device}]", file=sys.stderr)
    iters_list = parse_list(args.iters or model.config.iters, "iters")
    tokenizer = tokenizer_of(model)
    ids = encode_prompt(tokenizer, prompt, model.config.block_size)
    if args.lens:
        return show(lens(model, tokenizer, ids, iters_list, args.last))
    names = ("temperature", "top_k", "top_p", "seed", "cache_mode", "draft_iters")
    options = {name: getattr(args, name) for name in names}
    options["early_exit"] = parse_exit(args.exit)
    for iters in iters_list:  # bad options are refused before anything is printed
        Decoding(args.max_new_tokens, model.check_iters(iters), **options)
    prompts, separator = [ids] * args.num_samples, ""
    for iters in iters_list:
        stats, start, texts = Counter(), time.perf_counter(), [""] * args.num_samples
        end = "" if prompt and sys.stdout.isatty() else "\n"  # on a terminal the text follows its prompt
        print(f"iters {iters}: {prompt}", end=end, file=sys.stderr, flush=True)
        pieces = stream_text(model, tokenizer, prompts, args.max_new_tokens, iters, stats=stats, **options)
        show(separator, end="")
        for b, piece in pieces:  # the first sample as it comes, the others after it
            if b == 0:
                show(piece, end="")
            texts[b] += piece
        show("")
        separator = "---\n"
        for text in texts[1:]:
            show(separator + text)
        rate = stats["tokens"] / (time.perf_counter() - start)
        depth = round(stats["iterations"] / stats["read"], 2) if stats["read"] else iters
        report = f"{stats['tokens']} tokens, {rate:.1f} tokens/s, {depth} iterations per token"
        if stats["drafted"]:
            report += f", {stats['accepted']} of {stats['drafted']} drafted tokens accepted"
        print(f"[{report}]", file=sys.stderr)


if __name__ == "__main__":
    cli(main)
