"""The configuration of a run, and how every script starts: its errors, its flags, its device, its ranks.

A key is set by its default, then by the config file, then by a flag:

    python train.py config/abbie_tiny.py --iters=2 --max_steps 100

A config file is Python that assigns keys (`n_embd = 128`); one that varies another begins with
`from config.X import *`.
"""

import argparse
import dataclasses
import difflib
import importlib
import io
import json
import os
import runpy
import sys
import time
import types
import typing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from model import RULES, AbbIEConfig, UserError, check, key


@dataclass(frozen=True)
class Config(AbbIEConfig):
    """A model's shape and recurrence (see AbbIEConfig), and the run that trains it."""

    vocab_size: int = key(0, "tokens of the vocabulary (0: as the data says)", least=0)
    data: str = key("data/stdlib", "folder of token shards, made by prepare_data.py")
    out_dir: str = key("", "folder of checkpoints and log (empty: out/ and the config file's name)")
    seed: int = key(1, "seed of initial weights, data order and iteration schedule", least=0, most=2**64 - 1)
    device: str = key("auto", "auto, cpu, cuda or mps")
    dtype: str = key("auto", "of matrix products, not of weights", choices=("auto", "float32", "bfloat16"))
    compile: str = key("auto", "torch.compile of the blocks", choices=("auto", "on", "off"))
    tokens_per_step: int = key(2**19, "batch size in tokens, whatever the number of processes", least=1)
    micro_batch: int = key(16, "sequences that one process takes through the model at a time", least=1)
    max_steps: int = key(0, "optimizer steps (0: tokens_per_param decides)", least=0)
    tokens_per_param: float = key(20.0, "training tokens per parameter, where max_steps is 0", least=1e-9)
    lr: float = key(6e-4, "learning rate after the warmup", least=0)
    min_lr: float = key(0.0, "learning rate at the end of the decay", least=0)
    warmup_steps: int = key(-1, "steps of linear warmup (-1: 1 % of the run)", least=-1)
    decay_frac: float = key(0.2, "last part of the run, where lr falls linearly to min_lr", least=0, most=1)
    weight_decay: float = key(0.1, "decoupled weight decay of the matrices (norms have none)", least=0)
    grad_clip: float = key(1.0, "largest norm of the gradient (0: no clipping)", least=0)
    beta1: float = key(0.9, "AdamW's decay of the first moment", least=0, most=1)
    beta2: float = key(0.95, "AdamW's decay of the second moment", least=0, most=1)
    eval_every: int = key(500, "steps between evaluations on validation data (0: only at the end)", least=0)
    eval_iters: str = key("1,2,4,8", "iterations at which validation loss is measured")
    eval_tokens: int = key(2**20, "validation tokens of an evaluation, always the same ones", least=1)
    save_every: int = key(500, "steps between checkpoints (0: only at the end)", least=0)
    keep_last: int = key(2, "checkpoints that are kept", least=1)
    resume: str = key(
        "auto", "auto: continue the run in out_dir; never: start afresh; or a checkpoint to go on from"
    )
    init_from: str = key("", "checkpoint, or hf:FOLDER, whose weights the run starts from")
    force: bool = key(False, "go on although data, rule or shape differ (the checkpoint's are kept)")
    max_skips: int = key(10, "steps without a finite loss or gradient that stop a run, in a row", least=1)
    activation_checkpointing: bool = key(False, "recompute iterations in the backward pass, to save memory")

    def __post_init__(self):
        super().__post_init__()
        tokens, T = self.tokens_per_step, self.block_size
        check(tokens % T == 0, f"tokens_per_step={tokens} is no multiple of block_size={T}")
        most = RULES[self.rule]
        runs = max(parse_list(self.eval_iters, "eval_iters")) <= most
        check(runs, f"eval_iters={self.eval_iters}: rule {self.rule} runs at {most} iterations at most")
        betas = f"beta1={self.beta1}, beta2={self.beta2}: both must be below 1"
        check(max(self.beta1, self.beta2) < 1, betas)

    def model_config(self, vocab_size: int) -> AbbIEConfig:
        """The model's part, with the vocabulary that the data has."""
        fits = self.vocab_size == 0 or self.vocab_size >= vocab_size
        check(fits, f"vocab_size={self.vocab_size} is less than the {vocab_size} of the data: leave it out")
        shape = {f.name: getattr(self, f.name) for f in dataclasses.fields(AbbIEConfig)}
        return AbbIEConfig(**{**shape, "vocab_size": self.vocab_size or vocab_size})


def parse_list(text: str, name: str, most: int = 128) -> list[int]:
    """'1,2,4' -> [1, 2, 4], each from 1 to `most`."""
    try:
        values = [int(part) for part in str(text).split(",")]
    except ValueError:
        values = [0]
    valid = all(1 <= value <= most for value in values)
    check(valid, f"{name}={text!r}: give integers from 1 to {most}, such as 1,2,4,8")
    return values


def nearest(name: str, names) -> str:
    """' (did you mean X?)' or ''."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# ---------------------------------------------------------------------------------- config file and flags


WORDS = {bool: {"true": True, "1": True, "false": False, "0": False}, types.NoneType: {"none": None}}


def from_text(hint, text: str):
    """A flag's text as the first type of `hint` (int, int | None, ...) that it fits, or as it is."""
    for one in typing.get_args(hint) or (hint,):
        try:
            if one in WORDS:
                return WORDS[one][text.lower()]
            return json.loads(text) if one is dict else one(text)
        except (ValueError, KeyError):
            continue
    return text


def load_config(argv: list[str]) -> Config:
    """CONFIG.py [--key=value | --key value ...] -> Config. Raises UserError for what is wrong in either."""
    hints = typing.get_type_hints(Config)
    parser = ArgumentParser(prog="train.py", description=__doc__.partition("\n\n")[2])
    parser.add_argument("file", metavar="CONFIG.py", type=Path, help="such as config/abbie_tiny.py")
    for f in dataclasses.fields(Config):
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        text = f"{f.metadata['about']}{choices}; default {f.default!r}".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="", help=text)
    flags = vars(parser.parse_args(argv))
    path = flags.pop("file")
    values = read_config_file(path)
    for name in values:
        check(name in hints, f"{path}: unknown key {name}{nearest(name, hints)}")
    values |= {name: from_text(hints[name], text) for name, text in flags.items()}
    for name, value in values.items():
        hint = hints[name]
        if type(value) is int and hint is float:
            values[name] = value = float(value)
        place = f"--{name}={value}" if name in flags else f"{path}: {name}={value!r}"
        if not isinstance(value, hint):
            kind = hint.__name__ if isinstance(hint, type) else hint
            raise UserError(f"{place} is not {kind}")
    return Config(**{**values, "out_dir": values.get("out_dir") or f"out/{path.stem}"})


def read_config_file(path: Path) -> dict:
    """The names that a config file assigns."""
    folder = Path(__file__).parent
    known = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
    check(path.is_file(), f"{path} is no file{nearest(path.stem, known)}\nconfigs: {', '.join(known)}")
    sys.path.insert(0, str(folder.parent))  # for `from config.X import *`, wherever the file lies
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}


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
        if not is_out_of_memory(error):
            raise
        message = "out of memory\ntry fewer rows at a time, fewer iterations, or another --device"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def is_out_of_memory(error: RuntimeError) -> bool:
    signs = ("out of memory", "not enough memory", "can't allocate memory")  # of CUDA, of CPUs
    return any(sign in str(error).lower() for sign in signs)


def optional(module: str, packages: str = ""):
    """A module that only some commands need. packages: what to install for it, where the names differ."""
    try:
        return importlib.import_module(module)
    except ImportError:
        packages = packages or module.partition(".")[0]
        raise UserError(f"this needs packages that are not installed\npip install {packages}") from None


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


def start_ranks() -> tuple[int, int]:
    """Join the other processes, if torchrun started several -> (rank, world). Only rank 0 is heard."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        sys.stdout = open(os.devnull, "w")
    if world > 1:
        # A prefix for each restart: the store may still hold the addresses of ranks that died before it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, *_ = next(dist.rendezvous("env://"))
        # Both by name: without one, PyTorch makes only the accelerator's, and objects, waits and CPU tensors
        # would need a card. Gloo waits 30 minutes for a rank 0 that checks its data or saves.
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            rank=rank, world_size=world, store=dist.PrefixStore(attempt, store),
            timeout=timedelta(minutes=30),
        )  # fmt: skip
    return rank, world


def leave_ranks():
    """The end of what start_ranks began, which PyTorch wants to be told: it may abort otherwise."""
    if dist.is_initialized():
        # Older versions hang here if a thread of theirs has yet to let go of its last tensor, for which it
        # needs the lock that Python holds (pytorch #154976): give it the time.
        time.sleep(0.5)
        dist.destroy_process_group()


def together(function):
    """function() on every rank -> its result. What one of them refuses ends them all, with one error."""
    result = error = None
    try:
        result = function()
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
    return result


def on_rank_0(function):
    """function() on rank 0 alone -> its result, on every rank. What it refuses ends them all."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    result = [together(function if first else lambda: None)]
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    return result[0]
