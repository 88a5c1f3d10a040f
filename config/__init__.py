"""The configuration of a run, and how every script starts: its errors, its flags, its device, its ranks.

A key is set by its default, then by the config file, then by a flag:

    python train.py config/abbie_tiny.py --iters=2 --max_steps 100

A config file is Python that assigns keys (`n_embd = 128`); one that varies another begins with
`from config.X import *`.
"""

import argparse
import ast
import dataclasses
import difflib
import importlib
import inspect
import io
import math
import os
import re
import runpy
import sys
import time
import types
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from model import MAX_ITERS, AbbIEConfig, UserError, check, check_range


@dataclass(frozen=True)
class Config(AbbIEConfig):
    """A model's shape and recurrence (see AbbIEConfig), and the run that trains it."""

    vocab_size: int = 0  # tokens of the vocabulary (0: as the data says)
    iters: int | str = 2  # iterations of the Body in training: 2, a range '1-3', or 'poisson:4'
    backprop_iters: int = 0  # gradients reach the last N iterations' updates only (0: all)
    data: str = "data/stdlib"  # folder of token shards, made by prepare_data.py
    out_dir: str = ""  # folder of checkpoints and log (empty: out/ and the config file's name)
    seed: int = 1  # seed of initial weights, data order and iteration schedule
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of matrix products, not of weights: auto, float32 or bfloat16
    compile: str = "auto"  # torch.compile of the blocks: auto (on CUDA), on or off
    tokens_per_step: int = 2**19  # batch size in tokens, whatever the number of processes
    micro_batch: int = 16  # sequences that one process takes through the model at a time
    max_steps: int = 0  # optimizer steps (0: tokens_per_param decides)
    tokens_per_param: float = 20.0  # training tokens per parameter, where max_steps is 0
    lr: float = 6e-4  # learning rate after the warmup
    min_lr: float = 0.0  # learning rate at the end of the decay
    warmup_steps: int = -1  # steps of linear warmup (-1: 1 % of the run)
    decay_frac: float = 0.2  # last part of the run, where lr falls linearly to min_lr
    weight_decay: float = 0.1  # decoupled weight decay of the matrices (norms have none)
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    beta1: float = 0.9  # AdamW's decay of the first moment
    beta2: float = 0.95  # AdamW's decay of the second moment
    eval_every: int = 500  # steps between evaluations on validation data (0: only at the end)
    eval_iters: str = "1,2,4,8"  # iterations at which validation loss is measured
    eval_tokens: int = 2**20  # validation tokens of an evaluation, at most a quarter of the run's
    save_every: int = 500  # steps between checkpoints (0: only at the end)
    keep_last: int = 2  # checkpoints that are kept, besides the one at which the decay begins
    resume: str = "auto"  # auto: continue the run in out_dir; never: start afresh; or a checkpoint
    init_from: str = ""  # checkpoint, or hf:FOLDER, whose weights the run starts from
    activation_checkpointing: bool = False  # recompute iterations in the backward pass, to save memory

    def __post_init__(self):
        self.model_config(self.vocab_size or 1)  # which checks the shape
        check_range(self, 0, math.inf, "vocab_size", "backprop_iters", "max_steps", "tokens_per_param")
        check_range(self, 0, math.inf, "eval_every", "save_every", "lr", "min_lr")
        check_range(self, 0, math.inf, "weight_decay", "grad_clip")
        check_range(self, 1, math.inf, "tokens_per_step", "micro_batch", "eval_tokens", "keep_last")
        check_range(self, -1, math.inf, "warmup_steps")
        check_range(self, 0, 1, "decay_frac")
        check_range(self, 0, 0.99999, "beta1", "beta2")
        check_range(self, 0, 2**64 - 1, "seed")
        check(self.max_steps > 0 or self.tokens_per_param > 0, "set max_steps or tokens_per_param above 0")
        for name, choices in (("dtype", ("auto", *DTYPES)), ("compile", ("auto", "on", "off"))):
            value = getattr(self, name)
            check(value in choices, f"{name}={value!r} is none of {', '.join(choices)}")
        tokens, T, limit = self.tokens_per_step, self.block_size, MAX_ITERS[self.rule]
        check(tokens % T == 0, f"tokens_per_step={tokens} is no multiple of block_size={T}")
        at_most = f"rule {self.rule} runs at {limit} iterations at most"
        check(parse_iters(self.iters)[2] <= limit, f"iters={self.iters}: {at_most}")
        most = max(parse_list(self.eval_iters, "eval_iters"))
        check(most <= limit, f"eval_iters={self.eval_iters}: {at_most}")

    def model_config(self, vocab_size: int) -> AbbIEConfig:
        """The model's part, with the vocabulary that the data has."""
        fits = self.vocab_size == 0 or self.vocab_size >= vocab_size
        check(fits, f"vocab_size={self.vocab_size} is less than the {vocab_size} of the data: leave it out")
        shape = {f.name: getattr(self, f.name) for f in dataclasses.fields(AbbIEConfig)}
        shape |= {"vocab_size": self.vocab_size or vocab_size, "iters": mean_iters(self.iters)}
        return AbbIEConfig(**shape)


def parse_iters(spec: int | str) -> tuple[str, float, int]:
    """2 -> ("fixed", 2, 2), "1-3" -> ("uniform", 1, 3), "poisson:4" -> ("poisson", 4.0, 128): kind, smallest
    (of poisson: mean), largest. Raises UserError for anything else."""
    text, kind, low, high = str(spec), "fixed", 0, 0
    try:
        if text.startswith("poisson:"):
            kind, low, high = "poisson", float(text[8:]), 128
        elif "-" in text:
            kind, (low, high) = "uniform", map(int, text.split("-"))
        else:
            low = high = int(text)
    except ValueError:
        pass
    valid = (1 < low if kind == "poisson" else 1 <= low) and low <= high <= 128
    check(valid, f"iters={spec!r}: give an integer from 1 to 128, a range like '1-3', or 'poisson:4'")
    return kind, low, high


def mean_iters(spec: int | str) -> int:
    """The rounded mean of a schedule: what the trained model does when no iters is given."""
    kind, low, high = parse_iters(spec)
    return int((low if kind == "poisson" else (low + high) / 2) + 0.5)


def parse_list(text: str, name: str) -> list[int]:
    """'1,2,4' -> [1, 2, 4], each from 1 to 128."""
    parts = [part.strip() for part in str(text).split(",")]
    valid = all(part.isdecimal() and 1 <= int(part) <= 128 for part in parts)
    check(valid, f"{name}={text!r}: give integers from 1 to 128, such as 1,2,4,8")
    return [int(part) for part in parts]


def nearest(name: str, names) -> str:
    """' (did you mean X?)' or ''."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# ---------------------------------------------------------------------------------- config file and flags


def load_config(argv: list[str]) -> Config:
    """CONFIG.py [--key=value | --key value ...] -> Config. Raises UserError for what is wrong in either."""
    source = inspect.getsource(AbbIEConfig) + inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    parser = ArgumentParser(prog="train.py", description=__doc__.partition("\n\n")[2])
    parser.add_argument("file", metavar="CONFIG.py", type=Path, help="such as config/abbie_tiny.py")
    for f in dataclasses.fields(Config):
        text = f"{comments[f.name]}; default {f.default!r}".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="", help=text)
    flags = vars(parser.parse_args(argv))
    path = flags.pop("file")
    values = {}
    for name, value in read_config_file(path).items():
        values[name] = typed(name, value, f"{path}: {name}={value!r}")
    for name, text in flags.items():
        values[name] = typed(name, from_text(name, text), f"--{name}={text}")
    return Config(**{**values, "out_dir": values.get("out_dir") or f"out/{path.stem}"})


KINDS = typing.get_type_hints(Config)  # key -> int, int | None, ...


def from_text(name: str, text: str):
    """A flag's text as the Python value that it spells, where its key may hold other values than text."""
    words = {"true": "True", "false": "False", "none": "None"}
    try:
        return text if KINDS[name] is str else ast.literal_eval(words.get(text.lower(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def typed(name: str, value, place: str):
    """The value of a key in its type: an integer may stand for a float, a number for its text."""
    kind = KINDS[name]
    if type(value) is int and kind in (float, str):
        value = kind(value)
    valid = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    check(valid, f"{place} is not {kind.__name__ if isinstance(kind, type) else kind}")
    return value


def read_config_file(path: Path) -> dict:
    """The keys that a config file assigns; its modules, functions and helper variables are its own. What may
    be a key of another program's, such as learning_rate, is said."""
    folder = Path(__file__).parent
    if not path.is_file():
        known = sorted(f"config/{p.name}" for p in folder.glob("[!_]*.py"))
        guess = nearest(f"config/{path.stem}.py", known)
        raise UserError(f"{path} is no file{guess}\nthere are {', '.join(known)}")
    sys.path.insert(0, str(folder.parent))  # for `from config.X import *`, wherever the file lies
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    for name, value in names.items():
        if name in KINDS or name.startswith("_") or callable(value) or isinstance(value, types.ModuleType):
            continue
        guess = nearest(name, KINDS)
        check(not guess, f"{path}: unknown key {name}{guess}\na variable of your own may begin with _")
        print(f"{path}: {name} is no key (see python train.py --help)", file=sys.stderr)
    return {name: value for name, value in names.items() if name in KINDS}


# --------------------------------------------------------------------------------- how every script starts


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors that name the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        if "unrecognized arguments: " in message:
            wrong = message.split(": ", 1)[1].split()[0].split("=")[0]
            message += nearest(wrong, self._option_string_actions)
        raise UserError(f"{message}\npython {self.prog} --help lists the flags")


def cli(main):
    """Run main(argv) as a script: an error that the user can mend ends in three lines at most, status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what an encoding such as ASCII cannot print
    # The first call of MKL's vector functions in a process settles which kernels all later ones take. Where
    # two threads share it, one may take a kernel of low accuracy (pytorch #188792): so one thread makes it.
    torch.zeros(1).cos()
    try:
        return main(sys.argv[1:])
    except UserError as error:
        message = "\n".join(str(error).splitlines()[:3])
    except BrokenPipeError:  # the reader of our output has left, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        signs = ("out of memory", "not enough memory", "can't allocate memory")  # of CUDA, of CPUs
        if not any(sign in str(error).lower() for sign in signs):
            raise
        message = "out of memory\ntry a smaller --micro_batch or --batch_size, fewer iterations,\n"
        message += "or, to train, --activation_checkpointing=true"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def optional(module: str):
    """A module that only some commands need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"this needs a package that is not installed\npip install {package}") from None


def choose_device(name: str = "auto") -> torch.device:
    """The device of this process: 'auto' is the machine's accelerator, or the CPU; under torchrun each
    process has a card of its own. Raises UserError for one that cannot be used."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = (accelerator.type if accelerator else "cpu") if name == "auto" else name
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"device={name} cannot be used: {reason}\ntry --device=cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """auto: bfloat16 on a card that computes it (from Ampere on; older ones emulate it); in training also on
    a CPU that does (AVX512-BF16 or AMX)."""
    if name != "auto":
        return DTYPES[name]
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and training and torch.backends.mkldnn.is_available():  # not on every Mac
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


# ------------------------------------------------------------------------------------------------------ ranks


def start_ranks() -> tuple[int, int]:
    """Join the other processes, if torchrun started several -> (rank, world). Only rank 0 is heard."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        sys.stdout = open(os.devnull, "w")
    if world > 1:
        # A prefix for each restart: the store may still hold the addresses of ranks that died before it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, *_ = next(dist.rendezvous("env://"))
        store, timeout = dist.PrefixStore(attempt, store), timedelta(minutes=30)
        # Both by name: without one, PyTorch makes only the accelerator's, and objects, waits and CPU tensors
        # would need a card. Gloo waits for as long as rank 0 may take to check its data or save.
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, store=store, timeout=timeout)
    return rank, world


def leave_ranks():
    """The end of what start_ranks began, which PyTorch wants to be told: it may abort otherwise."""
    if dist.is_initialized():
        # Older versions hang here if a thread of theirs has yet to let go of its last tensor, for which it
        # needs the lock that Python holds (pytorch #154976): give it the time.
        time.sleep(0.5)
        dist.destroy_process_group()


@contextmanager
def together():
    """A block that every rank runs. What one of them refuses ends them all, with one error."""
    error = None
    try:
        yield
    except (UserError, OSError) as refusal:
        error = refusal
    if dist.is_initialized():
        refused = [None] * dist.get_world_size()
        dist.all_gather_object(refused, error is not None)
        if any(refused):
            first = dist.get_rank() == refused.index(True)
            leave_ranks()
            if not first:
                sys.exit(2)  # the first that refuses says why
    if error is not None:
        raise error


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]
