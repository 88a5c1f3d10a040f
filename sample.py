"""Generate text at any number of iterations.

    python sample.py --prompt "def "                      # the newest checkpoint under out/, at its own iters
    python sample.py --iters 8 --prompt_file story.txt --num_samples 3 --temperature 0.8 --top_p 0.95
    python sample.py --iters 8 --draft_iters 2 --temperature 0 --prompt "def "     # the same tokens, faster
    python sample.py --iters 8 --exit kl:1e-2 --prompt "def "                      # as many as a token needs
    python sample.py --iters 8 --exit mean:2.5 --cache last --prompt "def "        # 2.5 of them on average
    python sample.py --iters 8 --dtype int8 --prompt "def "                    # 8-bit weights: faster on CPUs
    python sample.py --compare 1,2,4,8 --prompt "def "                             # side by side
    python sample.py --ckpt hf:FOLDER                     # on a terminal without a prompt: interactive

Generated text goes to stdout and nothing else; the prompt and reports go to stderr.
"""

import codecs
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
            return text[: min(found)]
        self.held = "" if last else self._begun_stop(text)
        return text.removesuffix(self.held)

    def _begun_stop(self, text: str) -> str:
        """The longest end of text that is the beginning of a stop string, or ''."""
        longest = max(map(len, self.stops), default=0)
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                return text[start:]
        return ""


def say(*text, end="\n"):
    print(*text, end=end, file=sys.stderr, flush=True)


def write(text: str):
    print(text, end="", flush=True)


# ----------------------------------------------------------------------------------------------- command line


def encode_prompt(model, tokenizer, prompt: str) -> list[int]:
    ids, S = list(tokenizer.encode_ordinary(prompt)), model.config.block_size
    check(len(ids) > 0, "the prompt is empty\ngive some text: --prompt, --prompt_file or standard input")
    check(len(ids) <= S, f"the prompt has {len(ids)} tokens, the model's context {S}\nshorten it")
    return ids


def show_samples(model, tokenizer, prompt: str, args, options: dict):
    """Continuations of a prompt to stdout: the first as it comes, the others after it."""
    ids = encode_prompt(model, tokenizer, prompt)
    texts = [Text(tokenizer, args.stop) for _ in range(args.num_samples)]
    later, done, stats = [""] * len(texts), set(), Stats()
    options = {**options, "stop_token": tokenizer.eot_token, "done": done, "stats": stats}
    tokens = stream(model, [ids] * len(texts), args.max_new_tokens, args.iters, **options)
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
    ids, columns = encode_prompt(model, tokenizer, prompt), []
    depths = parse_list(args.compare, "compare")
    width = max(16, (shutil.get_terminal_size().columns - 3 * (len(depths) - 1)) // len(depths))
    for iters in depths:
        text, done, whole = Text(tokenizer, args.stop), set(), prompt
        options = {**options, "stop_token": tokenizer.eot_token, "done": done}
        for _, token in stream(model, [ids], args.max_new_tokens, iters, **options):
            whole += text.add(token)
            if text.stopped:
                done.add(0)
        column = [f"iters {iters}", "-" * width]
        for line in (whole + text.end()).expandtabs(4).splitlines():
            column += textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]
        columns.append(column)
    for row in itertools.zip_longest(*columns, fillvalue=""):
        write(" | ".join(f"{cell:{width}}" for cell in row).rstrip() + "\n")


def parse_args(argv: list[str]):
    parser = ArgumentParser(prog="sample.py", description=__doc__)
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
    add("--exit", dest="early_exit", default="", help="kl:1e-2, u:1e-2 or mean:2.5: early exit of tokens")
    add("--cache", dest="cache_mode", default="full", help="full, or last: one slot for all iterations")
    add("--compare", help="show the prompt at several iters side by side: 1,2,4,8")
    add("--compile", dest="compiled", action="store_true", help="record each step as one graph (for CUDA)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "int8"), help="of weights")
    args = parser.parse_args(argv)
    both = args.prompt is not None and args.prompt_file is not None
    check(not both, "--prompt and --prompt_file exclude each other")
    if args.compare:
        alone = not (args.iters or args.draft_iters or args.early_exit or args.num_samples > 1)
        check(
            alone, "--compare runs at its own iters: leave out --iters, --draft_iters, --exit, --num_samples"
        )
    check(args.num_samples >= 1, f"--num_samples={args.num_samples} must be at least 1")
    check("" not in args.stop, "--stop needs some text")
    return args


OPTIONS = ("temperature", "top_k", "top_p", "seed", "cache_mode", "draft_iters", "draft_tokens", "early_exit",
           "compiled")  # fmt: skip


def main(argv: list[str]):
    args = parse_args(argv)
    prompt = read_text(args.prompt_file) if args.prompt_file else args.prompt
    device = choose_device(args.device)
    model = load_model(args.ckpt, device).eval()
    if args.dtype == "int8":
        quantize(model)
    else:
        lay_out_for_decoding(model.to(getattr(torch, args.dtype)))
    if args.early_exit:
        args.early_exit = resolve_exit(model, args.early_exit, model.check_iters(args.iters))
    tokenizer = get_tokenizer(model.meta["tokenizer"])
    options = {name: getattr(args, name) for name in OPTIONS}
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
