"""Generate text at any number of iterations.

    python sample.py --prompt "def "                      # the newest checkpoint under out/, at its own iters
    python sample.py --iters 8 --prompt_file story.txt --num_samples 3 --temperature 0.8 --top_p 0.95
    python sample.py --iters 8 --draft_iters 2 --temperature 0 --prompt "def "     # the same tokens, faster
    python sample.py --iters 8 --exit kl:1e-2 --prompt "def "                      # as many as a token needs
    python sample.py --iters 8 --exit mean:2.5 --cache last --prompt "def "        # 2.5 of them on average
    python sample.py --iters 8 --dtype int8 --prompt "def "                    # 8-bit weights: faster on CPUs
    python sample.py --compare 1,2,4,8 --prompt "def "                             # side by side
    python sample.py --ckpt hf:FOLDER                     # on a terminal without a prompt: interactive

Generated text goes to stdout and nothing else, the prompt and reports to stderr; --compare prints columns,
which begin with the prompt.
"""

import codecs
import io
import itertools
import shutil
import sys
import textwrap
from pathlib import Path

import torch

from checkpoint import load_model
from config import ArgumentParser, choose_device, cli, parse_list
from data import get_tokenizer
from decode import Stats, lay_out_for_decoding, quantize, resolve_exit, stream
from model import UserError, check


def stream_text(model, tokenizer, prompts, max_new_tokens, iters, **options):
    """decode.stream in pieces of text, as soon as it is certain, since the bytes of a character may be spread
    over tokens: an iterator of (row, piece). A row ends where the model ends its text."""
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    options["stop_token"] = tokenizer.eot_token
    tokens = stream(model, prompts, max_new_tokens, iters, **options)  # which refuses what is wrong at once

    def pieces():
        for b, token in tokens:
            try:
                spelt = tokenizer.decode_bytes([token])
            except KeyError:  # an id without a token, where vocab_size is larger than the tokenizer's
                spelt = b""
            yield b, utf8[b].decode(spelt)
        for b, decoder in enumerate(utf8):
            yield b, decoder.decode(b"", final=True)

    return pieces()


def say(*text, end="\n"):
    print(*text, end=end, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------- command line

OPTIONS = ("temperature", "top_k", "top_p", "seed", "cache_mode", "draft_iters", "draft_tokens", "early_exit")


def is_unicode(text: str) -> bool:
    """Bytes that are no UTF-8 reach Python as surrogates, from flags and files alike."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def continuations(model, tokenizer, prompt: str, args, iters, stats):
    """An iterator of (sample, piece of its text)."""
    check(is_unicode(prompt), "the prompt is no UTF-8 text")
    ids = list(tokenizer.encode_ordinary(prompt))
    n, S = len(ids), model.config.block_size
    check(n > 0, "the prompt is empty\ngive some text: --prompt, --prompt_file or standard input")
    check(n <= S, f"the prompt has {n} tokens, the model's context {S}\nshorten it")
    options = {name: getattr(args, name) for name in OPTIONS}
    prompts = [ids] * args.num_samples
    return stream_text(model, tokenizer, prompts, args.max_new_tokens, iters, stats=stats, **options)


def show_samples(model, tokenizer, prompt: str, args):
    """Continuations of a prompt to stdout: the first as it comes, the others after it."""
    stats, texts = Stats(), [""] * args.num_samples
    pieces = continuations(model, tokenizer, prompt, args, args.iters, stats)
    say(prompt, end="")
    for b, piece in pieces:
        if b == 0:
            print(piece, end="", flush=True)
        texts[b] += piece
    print(flush=True)
    for b, text in enumerate(texts[1:], 2):
        say(f"--- sample {b}\n{prompt}", end="")
        print(text, flush=True)
    say(f"[{stats.report(model.check_iters(args.iters))}]")


def show_side_by_side(model, tokenizer, prompt: str, args):
    """The same prompt, and the same random numbers, at several iters, a column each."""
    columns, compared = [], parse_list(args.compare, "compare")
    width = max(16, (shutil.get_terminal_size().columns - 3 * (len(compared) - 1)) // len(compared))
    for iters in compared:
        pieces = continuations(model, tokenizer, prompt, args, iters, Stats())
        text, column = prompt + "".join(piece for _, piece in pieces), [f"iters {iters}", "-" * width]
        for line in text.expandtabs(4).splitlines():
            column += textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]
        columns.append(column)
    for row in itertools.zip_longest(*columns, fillvalue=""):
        print(" | ".join(f"{cell:{width}}" for cell in row).rstrip(), flush=True)


def parse_args(argv: list[str]):
    parser = ArgumentParser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    add("--iters", type=int, help="applications of the Body (default: the rounded mean of training)")
    prompt = parser.add_mutually_exclusive_group().add_argument
    prompt("--prompt", help="text to continue (default: standard input, interactive on a terminal)")
    prompt("--prompt_file", help="file with the text to continue")
    add("--num_samples", type=int, default=1, help="continuations of a prompt")
    add("--max_new_tokens", type=int, default=256, help="length of a continuation")
    add("--temperature", type=float, default=0.8, help="0: always the best token (default 0.8)")
    add("--top_k", type=int, default=50, help="draw from the k best tokens only (0: all; default 50)")
    add("--top_p", type=float, default=1.0, help="draw from the fewest tokens that hold this probability")
    add("--seed", type=int, default=1, help="sample b draws from seed + b")
    add("--draft_iters", type=int, default=0, help="draft at so many iterations, verify at --iters (0: no)")
    add("--draft_tokens", type=int, default=4, help="tokens that are drafted before a verification")
    add("--exit", dest="early_exit", default="", help="kl:1e-2, u:1e-2 or mean:2.5: early exit of tokens")
    add("--cache", dest="cache_mode", default="full", help="full, or last: one slot for all iterations")
    add("--compare", help="show the prompt at several iters side by side: 1,2,4,8")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "int8"), help="of weights")
    args = parser.parse_args(argv)
    if args.compare:
        alone = not (args.iters or args.draft_iters or args.early_exit or args.num_samples > 1)
        others = "--iters, --draft_iters, --exit, --num_samples"
        check(alone, f"--compare runs at its own iters: leave out {others}")
    check(args.num_samples >= 1, f"--num_samples={args.num_samples} must be at least 1")
    return args


def main(argv: list[str]):
    args = parse_args(argv)
    prompt = args.prompt
    if args.prompt_file:
        prompt = Path(args.prompt_file).read_text(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    model = load_model(args.ckpt, choose_device(args.device)).eval()
    if args.dtype == "int8":
        quantize(model)
    else:
        lay_out_for_decoding(model.to(getattr(torch, args.dtype)))
    if args.early_exit:
        args.early_exit = resolve_exit(model, args.early_exit, model.check_iters(args.iters))
    tokenizer = get_tokenizer(model.meta["tokenizer"])
    show = show_side_by_side if args.compare else show_samples
    if prompt is None and not (sys.stdin and sys.stdin.isatty()):
        prompt = sys.stdin.read() if sys.stdin else ""
    if prompt is not None:
        return show(model, tokenizer, prompt, args)
    say("a prompt a line; Ctrl-D ends\n> ", end="")
    for line in sys.stdin:
        try:
            show(model, tokenizer, line.rstrip("\n"), args)
        except UserError as error:
            say(error)
        say("> ", end="")
    say()


if __name__ == "__main__":
    cli(main)
