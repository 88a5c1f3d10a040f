"""A run's folders: each checkpoint is saved whole or not at all, found, and loaded.

    out/NAME/step_00001000/    model.pt, train.pt (optimizer, step, ...), config.json,
                               and manifest.json, which holds the SHA-256 of each

A folder is written under another name, synced, then renamed; so one under its final name is complete. What is
read of it is verified against the manifest, and only that: sampling reads no byte of the optimizer.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from model import AbbIE, AbbIEConfig, UserError, check

FILES = ("config.json", "model.pt", "train.pt")
TO_RUN = ("config.json", "model.pt")  # what it takes to use a model


# ----------------------------------------------------------------------------------------------------- saving


def write_synced(path: Path, write):
    """Create a file through write(file) and have the disk confirm it."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path):
    """Have the disk confirm the names in a folder (Windows has no such call)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, write):
    """Create or replace a file through write(file), whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, write)
    os.replace(temporary, path)


def write_json(path: Path, value):
    """Replace a file by value as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))
    sync_folder(path.parent)


def save_checkpoint(run: Path, step: int, model: dict, train: dict, config: dict) -> Path:
    """Write run/step_NNNNNNNN. Raises UserError where the disk fails; earlier checkpoints are left alone."""
    folder, temporary = run / f"step_{step:08d}", run / f".step_{step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_synced(temporary / "model.pt", lambda file: torch.save(model, file))
        write_synced(temporary / "train.pt", lambda file: torch.save(train, file))
        write_json(temporary / "config.json", config)
        write_json(temporary / "manifest.json", {name: sha256(temporary / name) for name in FILES})
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or of a future that was given up
        os.rename(temporary, folder)
        sync_folder(run)
    except (OSError, RuntimeError) as error:  # torch.save covers a failed write with a RuntimeError
        while error.__context__ is not None:
            error = error.__context__
        raise UserError(
            f"{run}: step {step} could not be saved ({error}); earlier ones are untouched\n"
            "make room, then run the same command again"
        ) from None
    return folder


# ---------------------------------------------------------------------------------------------------- finding


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; a copy of one under another name is none."""
    return sorted(run.glob("step_" + 8 * "[0-9]"))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_sound(folder: Path, names=FILES) -> bool:
    """Whether these files of a checkpoint are what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return set(manifest) == set(FILES) and all(sha256(folder / name) == manifest[name] for name in names)
    except (OSError, ValueError, TypeError):
        return False


def find_checkpoint(path: str | Path | None = None, names=TO_RUN) -> Path:
    """A run folder -> its newest checkpoint of which the files `names` are sound; a checkpoint -> itself;
    None -> that of the run in out/ that was written last. Raises UserError where there is none."""
    if path is None:
        manifests = Path("out").glob("*/step_*/manifest.json")
        newest = max(manifests, key=lambda path: path.stat().st_mtime, default=None)
        check(newest is not None, "no checkpoint under out/\nmake one: python train.py config/abbie_tiny.py")
        path = newest.parents[1]
    path = Path(path)
    steps = checkpoints(path)[::-1]
    for folder in steps or [path]:
        if is_sound(folder, names):
            return folder
        if steps:
            print(f"{folder} is damaged: passed over", file=sys.stderr)
    check(
        bool(steps) or (path / "manifest.json").exists(),
        f"{path} is no checkpoint: it needs {', '.join(FILES)} and manifest.json\n"
        "give a run folder such as out/abbie_tiny, or one step_* folder in it",
    )
    raise UserError(
        f"{path}: no checkpoint here is sound (its files and manifest.json disagree)\n"
        + ("train again, with --resume=never" if steps else f"{path.parent} may hold another")
    )


# ---------------------------------------------------------------------------------------------------- loading


def load_tensors(path: Path) -> dict:
    """A file of tensors and plain values; nothing in it can run code. It is mapped: what has just been read
    to be verified is not read again."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def block_names(config: AbbIEConfig) -> list[str]:
    """Where block 0, 1, ... of the uncut Transformer lives: head.0, ..., body.0, ..., tail.0, ..."""
    depths = {"head": config.n_head_blocks, "body": config.n_body_blocks, "tail": config.n_tail_blocks}
    return [f"{part}.{i}" for part, depth in depths.items() for i in range(depth)]


def load_model(path: str | Path | None = None, device="cpu", model_class=AbbIE, **changes) -> AbbIE:
    """The model of a run folder (its newest sound checkpoint), of one checkpoint, of "hf:FOLDER" (see hf/),
    or of the newest run under out/. `changes` replaces keys of the config: the rule, iters, or where the same
    blocks are cut into Head, Body and Tail. Raises UserError for anything that does not verify, and for a
    subclass's model without its model_class."""
    if str(path).startswith("hf:"):
        from hf.llama import read_folder

        meta, state = read_folder(str(path)[3:], changes)
    else:
        folder = find_checkpoint(path)
        meta = {**json.loads((folder / "config.json").read_text()), "ckpt": str(folder)}
        theirs, ours = meta.setdefault("model_class", "AbbIE"), model_class.__name__
        other = f"{folder} was trained as {theirs}, a subclass of AbbIE; as {ours} it computes something else"
        check(theirs in ("AbbIE", ours), f"{other}\nload it by load_model(path, model_class={theirs})")
        state = load_tensors(folder / "model.pt")
    saved = AbbIEConfig(**{f.name: meta[f.name] for f in fields(AbbIEConfig) if f.name in meta})
    config, name = replace(saved, **changes), meta["ckpt"]
    check(saved.n_blocks == config.n_blocks, f"{name} has {saved.n_blocks} blocks, not {config.n_blocks}")
    moved = dict(zip(block_names(saved), block_names(config)))

    def renamed(key: str) -> str:
        """body.0.attn.qkv.weight -> head.2.attn.qkv.weight, where the cut has moved."""
        part, _, rest = key.partition(".")
        number, _, rest = rest.partition(".")
        block = f"{part}.{number}"
        return f"{moved[block]}.{rest}" if block in moved else key

    state = {renamed(key): tensor for key, tensor in state.items()}
    try:
        model = model_class(config)
        if config.rule != saved.rule:  # zero_pt's own projection is left behind, or starts afresh
            state.pop("project.weight", None)
            if config.rule == "zero_pt":
                state["project.weight"] = model.project.weight
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{name}: its weights do not fit its config\n{reason}") from None
    model.meta = meta
    return model.to(device)
