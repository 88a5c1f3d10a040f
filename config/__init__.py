"""The configuration of a run: dataclass default < Python file < command-line flag, every key typed and
checked.

    python train.py config/abbie_tiny.py --iters=2 --max_steps 100

A config file is Python that assigns keys (`n_embd = 128`); one that varies another begins with `from config.X
import *`.
"""

import argparse
import dataclasses
import difflib
import json
import os
import runpy
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from model import AbbIEConfig, UserError, key


@dataclass(frozen=True)
class Config(AbbIEConfig):
    """A model's shape and recurrence (see AbbIEConfig), and the run that trains it."""
    vocab_size: int = key(0, "tokens of the vocabulary (0: as the data says)")
    data: str = key("data/stdlib", "folder of token shards, made by prepare_data.py")
    out_dir: str = key("", "folder of checkpoints and log (empty: out/ and the config file's name)")
    seed: int = key(1, "seed of the initial weights, the data order and the iteration schedule")
    device: str = key("auto", "auto, cpu, cuda or mps")
    dtype: str = key("auto", "of the matrix products: auto, float32 or bfloat16; the weights stay float32")
    compile: str = key("auto", "torch.compile of the blocks: auto, on or off")
    tokens_per_step: int = key(2 ** 19, "batch size in tokens, whatever the number of processes")
    micro_batch: int = key(16, "sequences that one process takes through the model at a time")
    max_steps: int = key(0, "optimizer steps (0: tokens_per_param decides)")
    tokens_per_param: float = key(20.0, "training tokens per parameter, where max_steps is 0")
    lr: float = key(6e-4, "learning rate after the warmup")
    min_lr: float = key(0.0, "learning rate at the end of the decay")
    warmup_steps: int = key(-1, "steps of linear warmup (-1: 1 % of the run)")
    decay_frac: float = key(0.2, "last part of the run, in which the learning rate falls linearly to min_lr")
    weight_decay: float = key(0.1, "decoupled weight decay of the matrices (norms have none)")
    grad_clip: float = key(1.0, "largest norm of the gradient (0: no clipping)")
    beta1: float = key(0.9, "AdamW's decay of the first moment")
    beta2: float = key(0.95, "AdamW's decay of the second moment")
    eval_every: int = key(500, "steps between evaluations on validation data (0: only at the end)")
    eval_iters: str = key("1,2,4,8", "iterations at which validation loss is measured")
    eval_tokens: int = key(2 ** 20, "validation tokens of an evaluation, always the same ones")
    save_every: int = key(500, "steps between checkpoints (0: only at the end)")
    keep_last: int = key(2, "checkpoints that are kept")
    resume: str = key("auto", "auto: continue the run in out_dir; never: start afresh; or a checkpoint")
    init_from: str = key("", "checkpoint, or hf:FOLDER, whose weights the run starts from")
    force: bool = key(False, "resume although data, tokenizer or shape differ")
    max_skips: int = key(10, "steps in a row without a finite loss and gradient before the run stops")
    activation_checkpointing: bool = key(False, "recompute iterations in the backward pass, to save memory")

    def __post_init__(self):
        problems = []
        try:
            super().__post_init__()
        except UserError as error:
            problems.append(str(error))
        problems += [f"{name}={getattr(self, name)} must be at least {least}" for name, least in (
            ("tokens_per_step", 1),
            ("micro_batch", 1), ("max_steps", 0), ("lr", 0), ("min_lr", 0),
            ("warmup_steps", -1), ("weight_decay", 0), ("grad_clip", 0), ("eval_every", 0),
            ("eval_tokens", 1),
            ("save_every", 0), ("keep_last", 1), ("max_skips", 1), ("seed", 0))
            if not getattr(self, name) >= least]
        problems += [f"{name}={getattr(self, name)} must lie between 0 and 1"
                     for name in ("decay_frac", "beta1", "beta2") if not 0 <= getattr(self, name) <= 1]
        for name, choices in (("dtype", ("auto", "float32", "bfloat16")), ("compile", ("auto", "on", "off"))):
            if getattr(self, name) not in choices:
                problems.append(f"{name}={getattr(self, name)!r} is none of {', '.join(choices)}")
        if self.max_steps == 0 and not self.tokens_per_param > 0:
            problems.append("max_steps or tokens_per_param must be positive")
        if self.tokens_per_step % self.block_size:
            problems.append(f"tokens_per_step={self.tokens_per_step} is no multiple of "
                            f"block_size={self.block_size}")
        try:
            parse_list(self.eval_iters, "eval_iters")
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))

    def model_config(self, vocab_size: int) -> AbbIEConfig:
        """The model's part, with the vocabulary that the data has."""
        shape = {f.name: getattr(self, f.name) for f in dataclasses.fields(AbbIEConfig)}
        return AbbIEConfig(**{**shape, "vocab_size": self.vocab_size or vocab_size})


def parse_list(text: str, name: str) -> list[int]:
    """'1,2,4' -> [1, 2, 4], each from 1 to 128."""
    try:
        values = [int(part) for part in str(text).split(",")]
    except ValueError:
        values = [0]
    if not all(1 <= value <= 128 for value in values):
        raise UserError(f"{name}={text!r}: give integers from 1 to 128, such as 1,2,4,8")
    return values


def nearest(name: str, names) -> str:
    """' (did you mean X?)' or ''."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# ------------------------------------------------------------------------------------------------- the loader

def convert(name: str, value, kind, from_flag: bool):
    """A key's value as its annotated type. Flags come as text, files as Python values; an int may stand for a
    float. Raises UserError where it does not fit."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if from_flag:
        for k in kinds:  # the first type of the annotation that the text fits
            try:
                if k is bool:
                    return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
                if k is types.NoneType:
                    return {"none": None}[value.lower()]
                return json.loads(value) if k is dict else k(value)
            except (ValueError, KeyError):
                continue
    elif type(value) in kinds:
        return value
    elif type(value) is int and float in kinds:
        return float(value)
    names = " or ".join(k.__name__.replace("NoneType", "None") for k in kinds)
    raise UserError(f"{name}={value!r} is not {names}")


def load_config(argv: list[str]) -> Config:
    """[CONFIG.py] [--key=value | --key value ...] -> Config. Everything that is wrong is refused together."""
    hints, values, problems = typing.get_type_hints(Config), {}, []

    def put(name, value, from_flag):
        if name not in hints:
            problems.append(f"unknown key {name}{nearest(name, hints)}")
            return
        try:
            values[name] = convert(name, value, hints[name], from_flag)
        except UserError as error:
            problems.append(str(error))

    flags, files, args = [], [], list(argv)
    if "--help" in args or "-h" in args:
        print_help()
        sys.exit(0)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            files.append(arg)
        elif "=" in arg:
            flags.append(tuple(arg[2:].split("=", 1)))
        elif args and not args[0].startswith("--"):
            flags.append((arg[2:], args.pop(0)))
        else:
            problems.append(f"{arg} has no value")
    if len(files) != 1:
        raise UserError(f"give one config file, not {len(files)}: python train.py config/abbie_tiny.py")
    for name, value in read_config_file(Path(files[0])).items():
        put(name, value, from_flag=False)
    for name, value in flags:
        put(name.replace("-", "_"), value, from_flag=True)
    values.setdefault("out_dir", "out/" + Path(files[0]).stem)
    try:
        config = Config(**values)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems) + "\npython train.py --help lists every key")
    return config


def read_config_file(path: Path) -> dict:
    """The names that a config file assigns."""
    root = str(Path(__file__).parent.parent)
    if not path.is_file():
        known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
        raise UserError(f"{path} is no file{nearest(path.stem, known)}\nconfigs: {', '.join(known)}")
    sys.path.insert(0, root)
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(root)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}


def print_help():
    print("python train.py CONFIG.py [--key=value | --key value ...]\n\nKeys, with type and default "
          "(a config file's value replaces the default, a flag's replaces both):")
    for f in dataclasses.fields(Config):
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
        print(f"  {f.name:26s}{kind:12s}{str(f.default):14s}{f.metadata['help']}")


def show(config: Config) -> str:
    """The resolved config, a few keys a line."""
    lines, line = [], ""
    for name, value in dataclasses.asdict(config).items():
        item = f"{name}={value}  "
        if len(line) + len(item) > 110:
            lines, line = [*lines, line.rstrip()], ""
        line += item
    return "\n".join([*lines, line.rstrip()])


# ------------------------------------------------------------------------------------------ the other scripts

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
    """Run main(argv) as a script: an error that the user can mend ends in at most three lines and exit status
    2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail("\n".join(str(error).splitlines()[:3]))
    except BrokenPipeError:  # the reader of our output has left, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
