"""What several test files need."""

import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import save_checkpoint
from data import Shards, tokenizer_in
from model import AbbIE, AbbIEConfig

ROOT = Path(__file__).parent.parent
TINY = dict(
    vocab_size=97, block_size=32, n_embd=32, n_attn_heads=4, n_kv_heads=2, ffn_dim=48,
    n_head_blocks=1, n_body_blocks=2, n_tail_blocks=1,
)  # fmt: skip
STRETCH = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@torch.no_grad()
def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of the size that training reaches, so that every sublayer matters."""
    for p in model.parameters():
        noise = torch.randn_like(p)
        p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() == 2 else 1 + 0.2 * noise)
    return model


def make(seed=0, **keys) -> AbbIE:
    """A tiny model."""
    torch.manual_seed(seed)
    return randomize(AbbIE(AbbIEConfig(**{**TINY, **keys})))


def tokens(batch=2, length=24, seed=1, vocab=97):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, prompt: list[int], n: int, iters: int) -> list[int]:
    """The n best next tokens, one after the other, without a cache."""
    ids = torch.tensor([prompt])
    for _ in range(n):
        ids = torch.cat((ids, model(ids, iters=iters)[0][:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


def calls_of(part: torch.nn.Module) -> list[tuple]:
    """(B, T) of every call from now on."""
    shapes = []
    part.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:-1])))
    return shapes


def save(run: Path, step: int, model: AbbIE, **meta) -> Path:
    """A checkpoint of the model."""
    config = {**asdict(model.config), "tokenizer": "bytes", "step": step, **meta}
    return save_checkpoint(run, step, model.state_dict(), {"step": step}, config)


def refused(message: str, function, *args, **keys):
    """The call ends in a UserError (an export has its own) of at most three lines, with this message."""
    with pytest.raises(ValueError, match=message) as error:
        function(*args, **keys)
    assert type(error.value).__name__ == "UserError"
    assert len(str(error.value).splitlines()) <= 3


def start_python(command: list, cwd=ROOT, env=None, **pipes) -> subprocess.Popen:
    """Python with these arguments, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=env, **pipes)


def fork_server():
    """A context whose processes are forked from one that has imported what they need and done no more: a fork
    of this process, which has had threads, may find a lock held for ever."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faulty_train", "prepare_data"])
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # where that process finds them
    return context


def documents(folder, split: str) -> list[list[int]]:
    """The tokens of a split's documents, each without its end-of-text."""
    shards = Shards(folder, split, 1)
    eot = tokenizer_in(folder, shards.tokenizer).eot_token
    tokens = np.concatenate([shards.read(i, 0, n) for i, n in enumerate(shards.sizes) if n])
    ends = np.flatnonzero(tokens == eot) + 1
    return [part[part != eot].tolist() for part in np.split(tokens, ends)[:-1]]
