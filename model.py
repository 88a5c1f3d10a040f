"""AbbIE: a decoder-only Transformer whose middle part is applied r times with the same weights.

Source: "AbbIE: Autoregressive Block-Based Iterative Encoder for Efficient Sequence Modeling",
arXiv 2507.08567. A Transformer is cut into Head, Body and Tail, each a few ordinary blocks:

    idx -> embed -> Head -> h -> Body, Body, ... (r times) -> Tail -> norm -> unembed -> logits

What differs from a textbook GPT is one method, `AbbIE.iterate`, and the loop in `AbbIE.forward` that
calls it. The block is the Llama block: RMSNorm before each sublayer, rotary embedding, SwiGLU, no biases,
tied embeddings.

The paper's formula (AbbIE-D).     x_0 = h,  x_{k+1} = B(x_k) + x_k
A residual joins consecutive iterations. B is the Body with its own residual stream, B(x) = x + Delta(x),
where Delta is the sum of its sublayers' updates. At r = 1 AbbIE is to be exactly a standard Transformer,
so the Tail reads B(x_{r-1}), before the residual is added.

Our form of it.                    y_0 = h,  u = B(y, 2^-k),  y <- (u + y) / 2,  and the Tail reads u
B(y, c) is the Body with every sublayer update multiplied by c. This is the same function at its natural
size: let y_k = x_k / 2^k. RMSNorm reads the same direction, so every update is the same, and dividing
x + Delta by 2^k divides Delta by 2^k; hence u = B(x_k) / 2^k and y_{k+1} = (u + y_k) / 2. (The same up to
the norm's epsilon.) The raw state doubles at every iteration: it would overflow near r = 64, and the Tail's
updates would fade beside it as r grows.

The geometric weights.             u = h + sum_{k<r-1} 2^-(k+1) Delta_k + 2^-(r-1) Delta_{r-1}
The weights of the updates sum to 1 at every r: (1), (1/2, 1/2), (1/2, 1/4, 1/4), (1/2, 1/4, 1/8, 1/8).
So the Tail meets the same scale at every r, and u converges as r grows, by construction, trained or not:
the change of y halves with each iteration, that of u quarters. It also means that later iterations can
refine, but hardly compute. AbbIE-C, x <- B(x), has the weights (1, 1, 1, ...) and does not converge.

Shapes: B batch, T tokens, D n_embd, H n_attn_heads, K n_kv_heads, E attn_head_dim, F ffn_dim,
V vocab_size, S positions in a cache. "head" alone always means the paper's Head.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

# rule -> largest iters
RULES = {"abbie_d": 128, "abbie_d_literal": 48, "abbie_c": 128, "zero_pt": 128, "recall": 128}


class UserError(ValueError):
    """An error that the user can mend: at most three lines, what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------- configuration

def key(default, help: str):
    """A dataclass field with its meaning, which `train.py --help` prints."""
    return field(default=default, metadata={"help": help})


def parse_iters(spec: int | str) -> tuple[str, float, int]:
    """2 -> ("fixed", 2, 2), "1-3" -> ("uniform", 1, 3), "poisson:4" -> ("poisson", 4.0, 128): kind,
    parameter, largest. Raises UserError for anything else."""
    try:
        if isinstance(spec, str) and spec.startswith("poisson:"):
            kind, low, high = "poisson", float(spec[8:]), 128
            valid = 1 < low <= high
        elif isinstance(spec, str) and "-" in spec:
            kind, (low, high) = "uniform", map(int, spec.split("-"))
            valid = 1 <= low <= high <= 128
        else:
            kind, low, high = "fixed", int(spec), int(spec)
            valid = not isinstance(spec, (bool, float)) and 1 <= low <= 128
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"iters={spec!r}: give an integer from 1 to 128, a range like '1-3', or 'poisson:4'")
    return kind, low, high


@dataclass(frozen=True)
class AbbIEConfig:
    """The shape of a model and its recurrence. Raises UserError where the values contradict one another."""
    vocab_size: int = key(50257, "tokens of the vocabulary (0 in a run's config: as its data says)")
    block_size: int = key(1024, "longest context in tokens")
    n_embd: int = key(1024, "width D of the residual stream")
    n_attn_heads: int = key(16, "attention heads, of n_embd / n_attn_heads channels each")
    n_kv_heads: int | None = key(None, "heads of keys and values, for groups of attention heads (None: all)")
    ffn_dim: int = key(2816, "hidden width of the SwiGLU MLP")
    n_head_blocks: int = key(8, "blocks of the Head, applied once")
    n_body_blocks: int = key(8, "blocks of the Body, applied `iters` times")
    n_tail_blocks: int = key(8, "blocks of the Tail, applied once")
    rope_base: float = key(10000.0, "base of the rotary embedding's wavelengths")
    rope_scaling: dict | None = key(None, "Llama-3 stretching of rotary wavelengths, as in Hugging Face")
    norm_eps: float = key(1e-5, "epsilon of every RMSNorm")
    tie_embeddings: bool = key(True, "the unembedding is the embedding")
    rule: str = key("abbie_d", f"how an iteration follows the last: {', '.join(RULES)}")
    iters: int | str = key(2, "iterations of the Body in training: 2, a range '1-3', or 'poisson:4'")
    backprop_iters: int = key(0, "gradients reach the updates of the last so many iterations only (0: all)")

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_attn_heads)
        problems = [f"{name}={getattr(self, name)} must be at least {least}" for name, least in (
            ("vocab_size", 0), ("block_size", 2), ("n_embd", 1), ("n_attn_heads", 1), ("n_kv_heads", 1),
            ("ffn_dim", 1),
            ("n_head_blocks", 0), ("n_body_blocks", 1), ("n_tail_blocks", 0), ("backprop_iters", 0))
            if getattr(self, name) < least]
        if not problems and self.n_embd % (2 * self.n_attn_heads):
            problems.append(f"n_embd={self.n_embd} is no even multiple of n_attn_heads={self.n_attn_heads}")
        if not problems and self.n_attn_heads % self.n_kv_heads:
            problems.append(f"n_kv_heads={self.n_kv_heads} must divide n_attn_heads={self.n_attn_heads}")
        problems += [f"{name}={getattr(self, name)} must be positive" for name in ("rope_base", "norm_eps")
                     if not getattr(self, name) > 0]
        if self.rope_scaling is not None:
            wanted = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
            if self.rope_scaling.get("rope_type") != "llama3" or wanted - set(self.rope_scaling):
                problems.append(f"rope_scaling needs rope_type 'llama3' and {', '.join(sorted(wanted))}")
        if self.rule not in RULES:
            problems.append(f"rule={self.rule!r} is none of {', '.join(RULES)}")
        try:
            kind, _, high = parse_iters(self.iters)
            if kind != "poisson" and high > RULES.get(self.rule, 128):
                problems.append(f"rule {self.rule} allows iters up to {RULES[self.rule]}, not {self.iters}")
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))

    @property
    def attn_head_dim(self) -> int:
        return self.n_embd // self.n_attn_heads

    @property
    def n_blocks(self) -> int:
        """Blocks with weights of their own: the depth of the model at r = 1."""
        return self.n_head_blocks + self.n_body_blocks + self.n_tail_blocks

    @property
    def block_names(self) -> list[str]:
        """Where block 0, 1, ... of the uncut Transformer lives: head.0, ..., body.0, ..., tail.0, ..."""
        depths = {"head": self.n_head_blocks, "body": self.n_body_blocks, "tail": self.n_tail_blocks}
        return [f"{part}.{i}" for part, n in depths.items() for i in range(n)]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of 64, which matrix units prefer."""
        return -(-self.vocab_size // 64) * 64

    @property
    def mean_iters(self) -> int:
        """The rounded mean of `iters`: what a model does when no iters is given."""
        kind, low, high = parse_iters(self.iters)
        return int((low if kind == "poisson" else (low + high) / 2) + 0.5)


# -------------------------------------------------------------------------------------------------- the block

def rope_table(config: AbbIEConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (block_size, E/2) in fp32 of the rotary embedding (RoFormer, arXiv 2104.09864, eq.
    15), with the wavelengths stretched as in Llama 3.1 where rope_scaling says so."""
    E, s = config.attn_head_dim, config.rope_scaling
    freq = 1 / config.rope_base ** (torch.arange(0, E, 2, dtype=torch.int64).float() / E)  # (E/2,) per token
    if s is not None:
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # within the first context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelengths, kept; 0: long, stretched
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    angle = torch.outer(torch.arange(config.block_size).float(), freq)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + E/2) of x (B, H, T, E) by their position's angle ("rotate-half")."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: AbbIEConfig):
        super().__init__()
        self.config = config
        D, E, H, K = config.n_embd, config.attn_head_dim, config.n_attn_heads, config.n_kv_heads
        self.qkv = nn.Linear(D, (H + 2 * K) * E, bias=False)
        self.proj = nn.Linear(H * E, D, bias=False)

    def forward(self, x, rope, kv=None):
        B, T, D = x.shape
        E, H, K = self.config.attn_head_dim, self.config.n_attn_heads, self.config.n_kv_heads
        qkv = self.qkv(x).split((H * E, K * E, K * E), dim=-1)
        q, k, v = (y.view(B, T, -1, E).transpose(1, 2) for y in qkv)
        q, k = rotate(q, *rope), rotate(k, *rope)  # (B, H, T, E), (B, K, T, E)
        if kv is not None:  # decoding: attend to the keys and values of earlier tokens as well, (B, K, S, E)
            k, v = kv.store(k, v)
        mask, causal = (None, True) if kv is None else (kv.mask, kv.causal)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: AbbIEConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x (B, T, D) -> (B, T, D). Every sublayer's update is multiplied by c before it joins the residual
    stream."""

    def __init__(self, config: AbbIEConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, kv=None, c=1.0):
        x = x + c * self.attn(self.attn_norm(x), rope, kv)
        return x + c * self.mlp(self.mlp_norm(x))


# -------------------------------------------------------------------------------------- the cache of decoding

class KVCache:
    """Keys and values of the tokens so far, each (slots, B, K, S, E) with S = block_size; `lengths` says how
    many tokens each of the B rows holds. In mode "full" there is one slot per block and *iteration*:
    iteration k of a new token reads what iteration k of the old ones wrote, so decoding is exact. In mode
    "last" all iterations of a Body block share one slot: a prompt is processed exactly, then only its last
    iteration is left for all iterations to read."""

    def __init__(self, config: AbbIEConfig, batch_size=1, max_iters: int | None = None, mode="full",
                 device="cpu", dtype=torch.float32):
        self.config, self.mode, self.max_iters = config, mode, max_iters or config.mean_iters
        self.n_once = config.n_head_blocks + config.n_tail_blocks
        n_slots = self.n_once + config.n_body_blocks * (self.max_iters if mode == "full" else 1)
        shape = (n_slots, batch_size, config.n_kv_heads, config.block_size, config.attn_head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * batch_size

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.k[:, 0, :, 0].numel() * self.k.element_size()

    def slot(self, part: str, i: int, k: int = 0) -> int:
        """Slots run: Head, Tail, Body at iteration 0, Body at iteration 1, ..."""
        if part == "body":
            return self.n_once + i + (k * self.config.n_body_blocks if self.mode == "full" else 0)
        return i + (self.config.n_head_blocks if part == "tail" else 0)

    def chunk(self, starts: list[int] | Tensor, T: int, rows: list[int] | None = None) -> "Chunk":
        """T new tokens in each of `rows` (default: all), from position starts[b] on. starts as a tensor (B,)
        keeps every shape the same from step to step, as a compiled or recorded step needs."""
        return Chunk(self, starts, T, None if rows == list(range(len(self.lengths))) else rows)


class Chunk:
    """New tokens in some rows of a cache: where their keys and values go, and what they may attend to. One
    chunk serves every block and iteration; `at` picks the slot."""

    def __init__(self, cache: KVCache, starts: list[int] | Tensor, T: int, rows: list[int] | None):
        self.cache, device, static = cache, cache.k.device, isinstance(starts, Tensor)
        self.end = cache.config.block_size if static else max(starts) + T
        if self.end > cache.config.block_size:
            raise UserError(f"{self.end} tokens do not fit into a context of {cache.config.block_size}")
        # Rows of equal length are written and read as slices; others through their indices, under a mask.
        self.together = not static and rows is None and len(set(starts)) == 1
        self.causal, self.mask, keys = False, None, torch.arange(self.end, device=device)
        if self.together:
            self.where = (slice(None), slice(None), slice(starts[0], self.end))  # of (B, K, S, E)
            self.positions = keys[starts[0]:]  # (T,)
            self.causal = T > 1 and starts[0] == 0  # SDPA aligns its causal mask top-left: for a prefill only
            if T > 1 and not self.causal:
                self.mask = keys <= self.positions[:, None]  # (T, S)
        else:
            self.rows = torch.tensor(range(len(starts)) if rows is None else rows, device=device)
            starts = starts if static else torch.tensor(starts, device=device)
            self.positions = starts[:, None] + torch.arange(T, device=device)  # (B, T)
            self.where = (self.rows[:, None], slice(None), self.positions)
            self.mask = keys <= self.positions[:, None, :, None]  # (B, 1, T, S)

    def rope(self, model) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the new tokens' positions, (T, E/2) or (B, 1, T, E/2)."""
        tables = (table[self.positions] for table in model.rope_on(self.positions.device))
        return tuple(tables) if self.together else tuple(table[:, None] for table in tables)

    def at(self, part: str, i: int, k: int = 0) -> "Slot":
        return Slot(self, self.cache.slot(part, i, k))

    def fill_deeper(self, iters: int):
        """Tokens that ran fewer iterations than another may read lend their last keys and values to the
        deeper slots."""
        cache = self.cache
        if cache.mode == "last" or iters == cache.max_iters:
            return
        for table in (cache.k, cache.v):
            body = table[cache.n_once:].unflatten(0, (cache.max_iters, -1))  # (iters, blocks, B, K, S, E)
            last = body[(slice(iters - 1, iters), slice(None), *self.where)]
            body[(slice(iters, None), slice(None), *self.where)] = last


class Slot:
    """One slot of a cache under a chunk: what `Attention` meets."""

    def __init__(self, chunk: Chunk, index: int):
        self.chunk, self.index, self.mask, self.causal = chunk, index, chunk.mask, chunk.causal

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (B, K, T, E) -> all keys and values that the rows hold up to here, (B, K, S, E)."""
        chunk, tables = self.chunk, (self.chunk.cache.k[self.index], self.chunk.cache.v[self.index])
        for table, new in zip(tables, (k, v)):
            table[chunk.where] = new if chunk.together else new.transpose(1, 2)
        if chunk.together or len(chunk.rows) == tables[0].shape[0]:
            return tuple(table[:, :, :chunk.end] for table in tables)
        return tuple(table[chunk.rows, :, :chunk.end] for table in tables)


# ------------------------------------------------------------------------------------------------ checkpoints

FILES = ("config.json", "model.pt", "train.pt")  # and manifest.json, written last: the SHA-256 of each


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint holds every file that its manifest lists, unchanged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return set(manifest) == set(FILES) and all(sha256(folder / name) == manifest[name] for name in FILES)
    except (OSError, ValueError, TypeError):
        return False


def find_checkpoint(path: str | Path | None = None) -> Path:
    """A run folder -> its newest complete checkpoint; a checkpoint -> itself; None -> the newest complete one
    of the run in out/ that was written last. Raises UserError where there is none."""
    if path is None:
        runs = sorted({p.parents[1] for p in Path("out").glob("*/step_*/manifest.json")},
                      key=lambda run: max(p.stat().st_mtime for p in run.glob("step_*/manifest.json")))
        if not runs:
            raise UserError("no checkpoint under out/\nmake one: python train.py config/abbie_tiny.py")
        path = runs[-1]
    path = Path(path)
    steps = sorted(path.glob("step_*"), reverse=True)
    for folder in steps or [path]:
        if is_complete(folder):
            return folder
        if folder.is_dir() and steps:
            print(f"{folder} is damaged or incomplete: passed over", file=sys.stderr)
    if (path / "manifest.json").exists() or steps:
        raise UserError(f"{path}: no checkpoint here is complete (its files and manifest.json disagree)\n"
                        "use an older one, or train again")
    raise UserError(f"{path} is no checkpoint: it needs {', '.join(FILES)} and manifest.json\n"
                    "give a run folder such as out/abbie_tiny, or one step_* folder in it")


def load_tensors(path: Path) -> dict:
    """Read a file of tensors and plain values; nothing in it can run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def write_synced(path: Path, write):
    """Create a file through write(file) and have the disk confirm it."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path):
    """Have the disk confirm the names in a folder (Windows has no such call)."""
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def save_checkpoint(run: Path, step: int, model: dict, train: dict, config: dict) -> Path:
    """Write run/step_NNNNNNNN so that it is there whole or not at all: under another name, synced, then
    renamed. Raises UserError where the disk fails; earlier checkpoints are as they were."""
    try:
        return write_checkpoint(run, step, model, train, config)
    except (OSError, RuntimeError) as error:  # torch.save covers a failed write with a RuntimeError
        while error.__context__ is not None:
            error = error.__context__
        raise UserError(f"{run}: step {step} could not be saved ({error}); earlier ones are untouched\n"
                        "make room, then run the same command again") from None


def write_checkpoint(run: Path, step: int, model: dict, train: dict, config: dict) -> Path:
    folder, temp = run / f"step_{step:08d}", run / f".step_{step:08d}.tmp"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    write_synced(temp / "model.pt", lambda file: torch.save(model, file))
    write_synced(temp / "train.pt", lambda file: torch.save(train, file))
    write_synced(temp / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
    manifest = {name: sha256(temp / name) for name in FILES}
    write_synced(temp / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=2).encode()))
    sync_folder(temp)
    shutil.rmtree(folder, ignore_errors=True)  # an incomplete one: a complete one is never written again
    os.rename(temp, folder)
    sync_folder(run)
    write_synced(run / ".latest.tmp", lambda file: file.write(folder.name.encode()))
    os.replace(run / ".latest.tmp", run / "latest")  # a hint for people; loading looks for itself
    sync_folder(run)
    return folder


# -------------------------------------------------------------------------------------------------- the model

class AbbIE(nn.Module):
    """The model. After `from_checkpoint`, `meta` holds the checkpoint's config.json (run, tokenizer,
    step)."""

    def __init__(self, config: AbbIEConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("vocab_size is not known: set it, or train on data that says it")
        self.config, self.meta = config, {}
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.head = nn.ModuleList(Block(config) for _ in range(config.n_head_blocks))
        self.body = nn.ModuleList(Block(config) for _ in range(config.n_body_blocks))
        self.tail = nn.ModuleList(Block(config) for _ in range(config.n_tail_blocks))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.unembed = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembed.weight = self.embed.weight
        if config.rule == "zero_pt":  # last, and drawn last: the others begin as in every other rule
            self.project = skip_init(nn.Linear, 2 * config.n_embd, config.n_embd, bias=False)
        self._rope = rope_table(config)  # no buffer: the angles stay fp32 when the weights are bf16
        self.activation_checkpointing = False  # recompute each iteration in the backward pass
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initialisation. The paper is silent; we chose GPT-2's at D = 1024 and the same scale of every
        activation at other widths, with depth counted at r = 1, so that every rule starts from the weights of
        the standard Transformer. (A fixed 0.02 costs a narrow model much of a short run.)

            embed (tied or not), unembed         normal, std = sqrt(0.4 / D)  (0.0198 at D = 1024)
            qkv, gate_up                         normal, std
            proj, down (they join the stream)    normal, std / sqrt(2 n_blocks)
            project (zero_pt only)               normal, std 1 / sqrt(2 D), which keeps the scale of [s ; h]
            norms                                ones
        """
        std = math.sqrt(0.4 / self.config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            elif name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_blocks))
            else:
                nn.init.normal_(p, std=(2 * self.config.n_embd) ** -0.5 if name == "project.weight" else std)

    # The recurrence: one iteration, and the loop around it.

    def iterate(self, x, h, k: int, rope, kv=None, backprop=True):
        """Iteration k = 0, 1, ...: the state x and the Head's output h, both (B, T, D) -> (u, next x), u
        being what the Tail reads if this iteration is the last. These are all five rules; u = next x
        except where it says otherwise."""
        body = partial(self._run_body, k=k, rope=rope, kv=kv, backprop=backprop)
        match self.config.rule:
            case "abbie_d":  # the paper's AbbIE-D at its natural size (see the top of this file)
                scale = torch.full((), 2.0 ** -k, dtype=x.dtype, device=x.device)  # tensor: no recompiling
                u = body(x, scale)
                return u, (u + x) / 2
            case "abbie_d_literal":  # the printed formula at every iteration, on the raw scale
                x = body(x) + x
            case "abbie_c":  # no residual between iterations
                x = body(x)
            case "zero_pt":  # after Geiping et al., arXiv 2502.05171: the state starts empty
                s = self.project(torch.cat((x, h), dim=-1))
                x = body(s.to(h.dtype))  # under autocast too, the residual stream keeps its precision
            case "recall":  # ours: damped fixed-point iteration of x = h + Delta(x), full-sized updates
                u = body(x) + (h - x)
                return u, (u + x) / 2
        return x, x

    def forward(self, idx: Tensor, targets: Tensor | None = None, iters: int | None = None):
        """idx (B, T) int64 -> logits (B, T, V) for all positions, and the mean next-token NLL in nats against
        targets (B, T) (-1: not counted), or None. `iters` defaults to the rounded mean of the training
        schedule."""
        iters, rope = self.check_iters(iters), self.rope(idx)
        h = self.run_head(idx, rope)
        x, u = self.start(h), None
        first = iters - (self.config.backprop_iters or iters)  # whose updates get gradients
        for k in range(iters):
            if self.activation_checkpointing and torch.is_grad_enabled():
                u, x = checkpoint(self.iterate, x, h, k, rope, None, k >= first, use_reentrant=False)
            else:
                u, x = self.iterate(x, h, k, rope, None, k >= first)
        z = self.run_tail(u, rope)
        return (self.logits(z), None) if targets is None else self.logits_and_loss(z, targets)

    def states_at(self, idx: Tensor, iters: list[int], rope=None, kv=None):
        """Yield the state that is unembedded, (B, T, D), at each of the ascending iters, from one sweep of
        the Body to the last. rope and kv: where tokens do not simply follow one another from position 0."""
        rope = rope or self.rope(idx)
        h = self.run_head(idx, rope, kv)
        x = self.start(h)
        for k in range(max(iters, default=0)):
            u, x = self.iterate(x, h, k, rope, kv)
            if k + 1 in iters:
                yield self.run_tail(u, rope, kv)

    def logits_at(self, idx: Tensor, iters: list[int]):
        """Yield the logits (B, T, V) at each entry of iters, from one sweep of the Body to the largest."""
        wanted = [self.check_iters(r) for r in iters]
        ascending = sorted(set(wanted))
        states = dict(zip(ascending, self.states_at(idx, ascending)))
        for r in wanted:
            yield self.logits(states[r])

    # The parts.

    def start(self, h):
        """The state before iteration 0."""
        return torch.zeros_like(h) if self.config.rule == "zero_pt" else h

    def run_head(self, idx, rope, kv=None):
        """Token ids (B, T) -> h (B, T, D)."""
        if not torch.compiler.is_compiling() and idx.device.type == "cpu" and idx.numel():
            low, high = idx.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                raise UserError(f"token id {int(low if low < 0 else high)} is not in the vocabulary of "
                                f"{self.config.vocab_size}")
        x = self.embed(idx)
        for i, block in enumerate(self.head):
            x = block(x, rope, kv and kv.at("head", i))
        return x

    def _run_body(self, x, c=1.0, *, k, rope, kv, backprop):
        """B(x, c). Without backprop the updates are constants, but the identity path keeps its gradient."""
        if not backprop and torch.is_grad_enabled():
            with torch.no_grad():
                y = self._run_body(x, c, k=k, rope=rope, kv=kv, backprop=True)
            return y + (x - x.detach())
        for i, block in enumerate(self.body):
            x = block(x, rope, kv and kv.at("body", i, k), c)
        return x

    def run_tail(self, u, rope, kv=None):
        """What the Body hands on, (B, T, D) -> the normed state that is unembedded, (B, T, D)."""
        for i, block in enumerate(self.tail):
            u = block(u, rope, kv and kv.at("tail", i))
        return self.norm(u)

    def logits(self, z):
        """(..., D) -> (..., V); the padded columns are cut here, so no softmax ever sees them."""
        return self.unembed(z)[..., :self.config.vocab_size]

    def logits_and_loss(self, z, targets):
        """(B, T, D), (B, T) -> logits (B, T, V) and the mean NLL; of one piece, so that a compiler can fuse
        it."""
        logits = self.logits(z)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def rope(self, idx):
        """Cosines and sines (T, E/2) for positions 0 .. T-1 of idx (B, T). Raises UserError for bad idx."""
        if idx.dim() != 2 or idx.dtype != torch.int64 or not 1 <= idx.shape[1] <= self.config.block_size:
            raise UserError(f"token ids must be int64 (B, T) with 1 <= T <= {self.config.block_size}, "
                            f"not {idx.dtype} {tuple(idx.shape)}")
        return tuple(t[:idx.shape[1]] for t in self.rope_on(idx.device))

    def rope_on(self, device):
        if self._rope[0].device != device:
            self._rope = tuple(t.to(device) for t in self._rope)
        return self._rope

    def check_iters(self, iters: int | None) -> int:
        """iters, or the default for None. Raises UserError outside the rule's range."""
        iters, most = self.config.mean_iters if iters is None else iters, RULES[self.config.rule]
        if isinstance(iters, bool) or not isinstance(iters, int) or not 1 <= iters <= most:
            raise UserError(f"iters={iters!r}: rule {self.config.rule} runs at any integer from 1 to {most}")
        return iters

    def n_params(self) -> int:
        """All unique parameters, embeddings included: independent of iters."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, iters: int | None = None, context: int | None = None, training=True) -> float:
        """Floating-point operations per token: 2 per weight of every matrix product, r x Body counted, plus
        attention over the context/2 tokens that a causal mask shows on average (context: block_size). The
        backward pass is twice the forward pass, of the updates that it reaches. Elementwise work is not
        counted."""
        config, r = self.config, self.check_iters(iters)
        context = context or config.block_size
        matrices = sum(p.numel() for p in self.body[0].parameters() if p.dim() == 2)
        block = 2 * matrices + 2 * config.n_embd * context
        once = (config.n_head_blocks + config.n_tail_blocks) * block + 2 * self.unembed.weight.numel()
        again = config.n_body_blocks * block
        project = 2 * self.project.weight.numel() if config.rule == "zero_pt" else 0
        if not training:
            return once + r * (again + project)
        reached = min(r, config.backprop_iters or r)
        return 3 * once + r * (again + 3 * project) + 2 * reached * again

    @torch.no_grad()
    def step(self, idx: Tensor, cache: KVCache, iters: int | None = None, n_new: list[int] | None = None,
             rows: list[int] | None = None):
        """Append idx (B, T) to `rows` of a cache (default: all) -> logits (B, V) after each row's last new
        token. Rows may be padded on the right: n_new (default T) says how many tokens of each count."""
        iters, n_new = self.check_iters(iters), n_new or [idx.shape[1]] * idx.shape[0]
        if iters > cache.max_iters:
            raise UserError(f"iters={iters}, but the cache was made for {cache.max_iters} iterations")
        chosen = range(idx.shape[0]) if rows is None else rows
        kv = cache.chunk([cache.lengths[b] for b in chosen], idx.shape[1], rows)
        z = self.run(idx, kv, iters)
        kv.fill_deeper(iters)
        for b, n in zip(chosen, n_new):
            cache.lengths[b] += n
        last = torch.tensor(n_new, device=z.device) - 1
        return self.logits(z[torch.arange(len(n_new), device=z.device), last])

    def run(self, idx, kv: Chunk, iters: int):
        """idx (B, T), whose places in a cache kv knows -> the normed state (B, T, D)."""
        rope = kv.rope(self)
        h = self.run_head(idx, rope, kv)
        x, u = self.start(h), None
        for k in range(iters):
            u, x = self.iterate(x, h, k, rope, kv)
        return self.run_tail(u, rope, kv)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "cpu", **changes) -> "AbbIE":
        """Load a run folder (its newest complete checkpoint), one checkpoint, or "hf:FOLDER" (a Llama, see
        llama.py). `changes` replaces keys of the config: the rule, iters, or where the same blocks are cut
        into Head, Body and Tail. Raises UserError for anything that does not verify."""
        if str(path).startswith("hf:"):
            from llama import load_llama
            return load_llama(str(path), device=device, **changes)
        folder = find_checkpoint(path)
        meta = json.loads((folder / "config.json").read_text())
        saved = AbbIEConfig(**{f.name: meta[f.name] for f in fields(AbbIEConfig) if f.name in meta})
        model = cls(replace(saved, **changes))
        if saved.n_blocks != model.config.n_blocks:
            raise UserError(f"{folder} has {saved.n_blocks} blocks, not {model.config.n_blocks}")
        moved = dict(zip(saved.block_names, model.config.block_names))
        state = load_tensors(folder / "model.pt")
        state = {".".join([moved.get(name, name), *rest]): tensor for key, tensor in state.items()
                 for name, rest in [(".".join(key.split(".")[:2]), key.split(".")[2:])]}
        if model.config.rule == "zero_pt" != saved.rule:  # its own starts afresh
            state["project.weight"] = model.project.weight
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{folder}: its weights do not fit its config\n{reason}") from None
        model.meta = {**meta, "ckpt": str(folder)}
        return model.to(device)
