"""A run's folders: each checkpoint is saved whole or not at all, found, and loaded.

    out/NAME/step_00001000/    model.pt, train.pt (optimizer, step, ...), config.json
    models/NAME/               model.pt and config.json alone: a model

A folder is written under another name, synced, then renamed; so one under its final name is whole. What is
read is checked by the CRC32 of each tensor, which torch.save writes and torch.load does not look at.
"""

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch

from config import typed
from model import AbbIE, AbbIEConfig, UserError, check

# ---------------------------------------------------------------------------------------------------- writing


def sync(path: Path):
    """Have the disk confirm a file, or the names in a folder (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_whole(path: Path, data: bytes):
    """Create or replace a file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # which a full disk does not say
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value):
    """Create or replace a file by value as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1).encode() + b"\n")


@contextmanager
def whole_folder(folder: Path):
    """Yield a temporary folder, which gets its name `folder` when it is written, whole or not at all. Raises
    UserError where the disk fails."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        sync(folder.parent)
    except (OSError, RuntimeError) as error:  # torch.save covers a failed write with a RuntimeError
        while error.__context__ is not None:
            error = error.__context__
        advice = "what was saved before is untouched: once that is mended, run the same command again"
        raise UserError(f"{folder} could not be saved ({error})\n{advice}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(run: Path, step: int, model: dict, train: dict, config: dict) -> Path:
    """Write run/step_NNNNNNNN, with the tokenizer's files where config names a folder of them ("hf:..."),
    which may move."""
    folder = run / f"step_{step:08d}"
    with whole_folder(folder) as temporary:
        for name, content in (("model.pt", model), ("train.pt", train)):
            with open(temporary / name, "wb") as file:  # of a path, torch would not say why it failed
                torch.save(content, file)
        write_json(temporary / "config.json", config)
        if config.get("tokenizer", "").startswith("hf:"):
            from hf.llama import copy_tokenizer

            data = Path(config.get("data", ""))
            own = data if (data / "tokenizer.json").exists() else config["tokenizer"][3:]
            copy_tokenizer(str(own), temporary)
    return folder


@contextmanager
def locked(run: Path):
    """Keep other processes out of a run's folder, which is made, and removed if nothing is written to it. The
    lock dies with its process (Windows has none)."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "lock", "a") as file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                advice = "wait until it has ended, or choose another --out_dir"
                raise UserError(f"{run}: another process is training here\n{advice}") from None
        try:
            yield
        finally:
            if [path.name for path in run.iterdir()] == ["lock"]:
                shutil.rmtree(run)


def set_aside(run: Path, step: int):
    """Checkpoints later than the one that a run goes on from, decayed or damaged, are kept under another
    name."""
    for folder in checkpoints(run):
        if folder.name > f"step_{step:08d}":
            kept = folder.with_name(folder.name.replace("step", "passed_over"))
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
            print(f"{folder} is kept as {kept}")


def prune(run: Path, keep_last: int, kept: str):
    """Delete all checkpoints but the last ones and `kept`, and what a killed save left."""
    for folder in [*checkpoints(run)[:-keep_last], *run.glob(".step_*.tmp")]:
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- reading


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; a copy of one under another name is none."""
    return sorted(Path(run).glob("step_" + 8 * "[0-9]"))


def read_json(path: Path, advice: str = "") -> dict:
    """Raises UserError, with the advice, for a file that is missing, damaged or no dictionary."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({error})\n{advice}") from None


def read_tensors(path: Path) -> dict:
    """A file of tensors and plain values; nothing in it can run code. It is mapped: what has just been read
    to be checked is not read again."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever zipfile and torch.load come up with
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    raise UserError(f"{path} is damaged: {damaged} has another CRC32")


def newest_run() -> Path:
    """The run under out/ that was written last."""
    saved = sorted(Path("out").glob("**/step_*/config.json"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise UserError(
            "there is no checkpoint under out/\ngive a model that ships: --ckpt models/chains_abbie_d\n"
            "or make one: python train.py config/abbie_tiny.py"
        )
    return saved[-1].parents[1]


def load_newest(path: str | Path | None, load: Callable):
    """load(folder) of a checkpoint, or of the newest checkpoint of a run folder that it does not refuse.
    None: the run under out/ that was written last."""
    path = newest_run() if path is None else Path(path).expanduser()
    *newer, oldest = checkpoints(path)[::-1] or [path]
    if oldest == path and not (path / "model.pt").exists():
        advice = "give a run folder such as out/abbie_tiny, one step_* folder in it, or one of models/"
        if (path / "model.safetensors").exists() or (not path.exists() and str(path).count("/") == 1):
            advice += f"\na folder or repository of Hugging Face is hf:{path}"
        raise UserError(f"{path} is no checkpoint: it has no model.pt\n{advice}")
    for folder in newer:
        try:
            return load(folder)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
    return load(oldest)


def load_model(path: str | Path | None = None, device="cpu", **changes) -> AbbIE:
    """The model of a run folder (its newest checkpoint that loads), of one checkpoint, of "hf:FOLDER" (see
    hf/), or of the newest run under out/. `changes` replaces keys of the config: the rule, iters, or where
    the same blocks are cut into Head, Body and Tail. Raises UserError for what cannot be loaded."""
    if str(path).startswith("hf:"):
        from hf.llama import read_folder

        meta, state, changes = read_folder(str(path)[3:], changes)
        return build_model(meta, state, changes).to(device)

    def load(folder: Path) -> AbbIE:
        meta = {**read_json(folder / "config.json"), "ckpt": str(folder)}
        return build_model(meta, read_tensors(folder / "model.pt"), changes)

    return load_newest(path, load).to(device)


def build_model(meta: dict, state: dict, changes: dict) -> AbbIE:
    """A model of these weights; meta holds the keys of AbbIEConfig, and "ckpt", where they come from."""
    name = meta["ckpt"]
    earlier = f"{name} is of an earlier version, whose weights had other names"
    check("model_class" not in meta, f"{earlier}\ntrain it again, in another --out_dir")
    check(isinstance(meta.get("tokenizer"), str), f"{name}: its config.json names no tokenizer")
    try:
        shape = {f.name: typed(f.name, meta[f.name], f"{name}: {f.name}") for f in fields(AbbIEConfig)}
        saved = AbbIEConfig(**shape)
    except KeyError as error:
        raise UserError(f"{name}: its config.json does not describe a model: no {error}") from None
    config = replace(saved, **changes)
    check(saved.n_blocks == config.n_blocks, f"{name} has {saved.n_blocks} blocks, not {config.n_blocks}")
    model = AbbIE(config)
    if config.rule != saved.rule:  # zero_pt's own projection is left behind, or starts afresh
        state = {key: tensor for key, tensor in state.items() if key != "adapter.weight"}
        if config.rule == "zero_pt":
            state["adapter.weight"] = model.adapter.weight
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{name}: its weights do not fit its config\n{reason}") from None
    finite = all(p.isfinite().all() for p in model.parameters())
    check(finite, f"{name}: its weights are not finite: the training that made it has diverged")
    model.meta = meta
    return model
