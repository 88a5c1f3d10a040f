"""AbbIE: a decoder-only Transformer whose middle part is applied r times with the same weights.

A Transformer is cut into Head, Body and Tail, each a few ordinary blocks (arXiv 2507.08567):

    idx -> embed -> Head -> h -> Body, Body, ... (r times) -> u -> Tail -> norm -> unembed -> logits

What differs from a textbook GPT is `AbbIE.iterate`, one iteration of the Body, and the loop around it,
`AbbIE.advance`. The block is Llama's: RMSNorm before each sublayer, rotary embedding, SwiGLU, no biases, tied
embeddings. At r = 1 it is exactly a standard Transformer (rules abbie_d, abbie_c and recall). This file needs
nothing but PyTorch.

One letter, one meaning. r: iterations in all; k = 0 ... r - 1: the one at hand; h: what the Head hands on;
x: the state between iterations (within a block: its residual stream); u: what the Tail reads; z: what is
unembedded; c: what an iteration's updates are multiplied by; Delta(x): the sum of the Body's updates, so that
B(x) = x + Delta(x). Shapes: B batch, T tokens, D n_embd, H n_attn_heads, K n_kv_heads, E attn_head_dim,
M ffn_dim, V vocab_size, S positions in a cache. "head" alone is always the paper's Head, never an attention
head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

# The largest r of each rule. The state of abbie_d_literal doubles, and is squared by RMSNorm: 48 suits fp32.
RULES = {"abbie_d": 128, "abbie_d_literal": 48, "abbie_c": 128, "zero_pt": 128, "recall": 128}


class UserError(ValueError):
    """An error that the user can mend: at most three lines, what is wrong and what to do."""


def check(condition: bool, message: str):
    if not condition:
        raise UserError(message)


# ---------------------------------------------------------------------------------------------- configuration


def key(default, about: str, least=None, most=None, choices=()):
    """A field of a configuration: its meaning, which `train.py --help` prints, and its bounds."""
    return field(default=default, metadata={"about": about, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True)
class AbbIEConfig:
    """The shape of a model and its recurrence. Raises UserError where a value is out of bounds."""

    vocab_size: int = key(50257, "tokens of the vocabulary (0 in a run's config: as its data says)", least=0)
    block_size: int = key(1024, "longest context in tokens", least=2)
    n_embd: int = key(1024, "width D of the residual stream", least=1)
    n_attn_heads: int = key(16, "attention heads, of n_embd / n_attn_heads channels each", least=1)
    n_kv_heads: int | None = key(None, "heads of keys and values (None: n_attn_heads)", least=1)
    ffn_dim: int = key(2816, "hidden width of the SwiGLU MLP", least=1)
    n_head_blocks: int = key(8, "blocks of the Head, applied once", least=0)
    n_body_blocks: int = key(8, "blocks of the Body, applied `iters` times", least=1)
    n_tail_blocks: int = key(8, "blocks of the Tail, applied once", least=0)
    rope_base: float = key(10000.0, "base of the rotary embedding's wavelengths", least=1e-9)
    rope_scaling: dict | None = key(None, "Llama-3 stretching of rotary wavelengths, as in Hugging Face")
    norm_eps: float = key(1e-5, "epsilon of every RMSNorm", least=1e-30)
    tie_embeddings: bool = key(True, "the unembedding is the embedding")
    rule: str = key("abbie_d", "how one iteration follows another", choices=tuple(RULES))
    iters: int | str = key(2, "iterations of the Body in training: 2, a range '1-3', or 'poisson:4'")
    backprop_iters: int = key(0, "gradients reach the last N iterations' updates only (0: all)", least=0)

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_attn_heads)
        for f in fields(self):
            name, value = f.name, getattr(self, f.name)
            least, most, choices = (f.metadata[bound] for bound in ("least", "most", "choices"))
            check(least is None or value >= least, f"{name}={value} must be at least {least}")
            check(most is None or value <= most, f"{name}={value} must be at most {most}")
            check(value not in (math.inf, -math.inf), f"{name}={value} must be finite")
            check(not choices or value in choices, f"{name}={value!r} is none of {', '.join(choices)}")
        D, H, K, most = self.n_embd, self.n_attn_heads, self.n_kv_heads, RULES[self.rule]
        check(D % (2 * H) == 0, f"n_embd={D} is no even multiple of n_attn_heads={H}")
        check(H % K == 0, f"n_kv_heads={K} must divide n_attn_heads={H}")
        _, _, high = parse_iters(self.iters)
        check(high <= most, f"rule {self.rule} allows iters up to {most}, not {self.iters} (up to {high})")

    @property
    def attn_head_dim(self) -> int:
        return self.n_embd // self.n_attn_heads

    @property
    def n_blocks(self) -> int:
        """Blocks with weights of their own: the depth of the model at r = 1."""
        return self.n_head_blocks + self.n_body_blocks + self.n_tail_blocks

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of 64, which matrix units prefer."""
        return -(-self.vocab_size // 64) * 64

    @property
    def mean_iters(self) -> int:
        """The rounded mean of `iters`: what a model does when no iters is given."""
        kind, low, high = parse_iters(self.iters)
        mean = low if kind == "poisson" else (low + high) / 2
        return int(mean + 0.5)


# -------------------------------------------------------------------------------------------------- the block


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + E/2) of x (B, H, T, E) by their position's angle (arXiv 2104.09864)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: AbbIEConfig):
        super().__init__()
        self.config = config
        D, E, H, K = config.n_embd, config.attn_head_dim, config.n_attn_heads, config.n_kv_heads
        self.qkv = nn.Linear(D, (H + 2 * K) * E, bias=False)
        self.proj = nn.Linear(H * E, D, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], kv=None) -> Tensor:
        """x (B, T, D) -> (B, T, D). rope: cosines and sines, (T, E/2) each, or (B, 1, T, E/2) where every row
        has positions of its own. kv: None, or this block's slot of a cache: `kv.store(keys, values)` keeps
        what is new and returns all there is, `kv.mask` and `kv.causal` say who sees what (decode.Chunk)."""
        B, T, D = x.shape
        E, H, K = self.config.attn_head_dim, self.config.n_attn_heads, self.config.n_kv_heads
        qkv = self.qkv(x).split((H * E, K * E, K * E), dim=-1)
        q, keys, values = (part.view(B, T, -1, E).transpose(1, 2) for part in qkv)
        q, keys = rotate(q, *rope), rotate(keys, *rope)  # (B, H, T, E), (B, K, T, E)
        mask, causal = None, True
        if kv is not None:
            keys, values = kv.store(keys, values)  # (B, K, S, E) each
            mask, causal = kv.mask, kv.causal
        y = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=causal, enable_gqa=H != K)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))  # (B, H, T, E) -> (B, T, D)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: AbbIEConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, M) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x (B, T, D) -> (B, T, D). Each sublayer's update is multiplied by c before it joins the stream."""

    def __init__(self, config: AbbIEConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], kv, c: Tensor) -> Tensor:
        x = x + c * self.attn(self.attn_norm(x), rope, kv)
        return x + c * self.mlp(self.mlp_norm(x))


# -------------------------------------------------------------------------------------------------- the model


class AbbIE(nn.Module):
    """The model. After `checkpoint.load_model`, `meta` holds the checkpoint's config.json.

    The paper's formula (AbbIE-D).     X_0 = h,  X_{k+1} = B(X_k) + X_k
    A residual joins consecutive iterations. B is the Body with its own residual stream, B(X) = X + Delta(X),
    where Delta is the sum of its sublayers' updates. At r = 1 AbbIE is to be exactly a standard Transformer,
    so the Tail reads B(X_{r-1}), before the residual is added.

    Our form of it.                    x_0 = h,  u = B(x, 2^-k),  x <- (u + x) / 2,  and the Tail reads u
    B(x, c) is the Body with every sublayer update multiplied by c. This is the same function at its natural
    size: let x_k = X_k / 2^k. RMSNorm reads the same direction, so every update is the same, and dividing
    X + Delta by 2^k divides Delta by 2^k; hence u = B(X_k) / 2^k and x_{k+1} = (u + x_k) / 2. (The same up to
    the norm's epsilon.) The raw state X doubles at every iteration: its square, which RMSNorm takes, would
    overflow near r = 64, and the Tail's updates would fade beside it as r grows.

    The geometric weights.             u = h + sum_{k<r-1} 2^-(k+1) Delta_k + 2^-(r-1) Delta_{r-1}
    where Delta_k = Delta(X_k). The weights sum to 1 at every r: (1), (1/2, 1/2), (1/2, 1/4, 1/4), (1/2, 1/4,
    1/8, 1/8). So the Tail meets the same scale at every r, and u converges as r grows, by construction,
    trained or not: the change of x halves with each iteration, that of u, 2^-(k+1) (Delta_{k+1} - Delta_k),
    quarters. It also means that later iterations can refine, but hardly compute. AbbIE-C has the weights (1,
    1, 1, ...), and does not converge.
    """

    def __init__(self, config: AbbIEConfig):
        super().__init__()
        check(config.vocab_size > 0, "vocab_size is not known: set it, or train on data that says it")
        self.config, self.meta = config, {}
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.head = nn.ModuleList(Block(config) for _ in range(config.n_head_blocks))
        self.body = nn.ModuleList(Block(config) for _ in range(config.n_body_blocks))
        self.tail = nn.ModuleList(Block(config) for _ in range(config.n_tail_blocks))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.unembed = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembed.weight = self.embed.weight
        if config.rule == "zero_pt":
            # skip_init: Linear's own draw would change all that init_weights draws after it.
            self.project = skip_init(nn.Linear, 2 * config.n_embd, config.n_embd, bias=False)
        self._rope = rope_table(config)  # no buffer: the angles stay fp32 when the weights are bf16
        self.activation_checkpointing = False  # recompute each iteration in the backward pass
        self.init_weights()

    # The recurrence: one iteration, the loop around it, and the model around the loop.

    def iterate(self, x: Tensor, h: Tensor, k: int, body) -> tuple[Tensor, Tensor]:
        """Iteration k from the state x and the Head's output h, (B, T, D) each -> (u, next x), u being what
        the Tail reads if this iteration is the last. `body(x, c=1.0)` is B(x, c)."""
        match self.config.rule:
            case "abbie_d":  # the paper's AbbIE-D, at its natural size
                u = body(x, 2.0**-k)
                return u, (u + x) / 2
            case "abbie_d_literal":  # the printed formula at every iteration, on the raw scale
                u = body(x) + x
                return u, u
            case "abbie_c":  # no residual between iterations
                u = body(x)
                return u, u
            case "zero_pt":  # after Geiping et al., arXiv 2502.05171: an empty state, into which h is mixed
                s = self.project(torch.cat((x, h), dim=-1))
                u = body(s.to(h.dtype))  # under autocast too, the residual stream keeps its precision
                return u, u
            case "recall":  # ours: u = h + Delta(x), and x goes half of the way there: a damped iteration to
                # x = h + Delta(x). At r = 2 it is the explicit midpoint method for dx/dt = Delta(x).
                u = body(x) + (h - x)
                return u, (u + x) / 2

    def advance(self, x: Tensor, h: Tensor, first: int, end: int, rope, kv=None, backprop_from: int = 0):
        """Iterations first, ..., end - 1 -> (u, next x). Training, evaluation, decoding: all come here."""
        u = None
        for k in range(first, end):
            body = partial(self.run_body, k=k, rope=rope, kv=kv, backprop=k >= backprop_from)
            if self.activation_checkpointing and torch.is_grad_enabled():
                u, x = checkpoint(self.iterate, x, h, k, body, use_reentrant=False)
            else:
                u, x = self.iterate(x, h, k, body)
        return u, x

    def forward(self, idx: Tensor, targets: Tensor | None = None, iters: int | None = None):
        """idx (B, T) int64 -> logits (B, T, V) for all positions, and the mean next-token NLL in nats against
        targets (B, T) (-1: not counted), or None. iters: by default the rounded mean of training's."""
        iters, rope = self.check_iters(iters), self.rope(idx)
        h = self.run_head(idx, rope)
        u, _ = self.advance(self.start(h), h, 0, iters, rope, backprop_from=self.backprop_from(iters))
        z = self.run_tail(u, rope)
        return (self.logits(z), None) if targets is None else self.logits_and_loss(z, targets)

    def states_at(self, idx: Tensor, iters: list[int], rope=None, kv=None) -> Iterator[Tensor]:
        """Yield the state that is unembedded, (B, T, D), at each of the strictly ascending iters, from one
        sweep of the Body. rope and kv: where tokens do not simply follow one another from position 0."""
        rope = rope or self.rope(idx)
        h = self.run_head(idx, rope, kv)
        x, done = self.start(h), 0
        for r in iters:
            u, x = self.advance(x, h, done, r, rope, kv)
            done = r
            yield self.run_tail(u, rope, kv)

    def logits_at(self, idx: Tensor, iters: list[int]) -> Iterator[Tensor]:
        """Yield the logits (B, T, V) at each entry of iters, from one sweep of the Body to the largest."""
        ascending = sorted({self.check_iters(r) for r in iters})
        states = dict(zip(ascending, self.states_at(idx, ascending)))
        for r in iters:
            yield self.logits(states[r])

    # The parts.

    def start(self, h: Tensor) -> Tensor:
        """The state before iteration 0."""
        return torch.zeros_like(h) if self.config.rule == "zero_pt" else h

    def run_head(self, idx: Tensor, rope, kv=None) -> Tensor:
        """Token ids (B, T) -> h (B, T, D)."""
        x = self.embed(idx)
        c = x.new_ones(())  # a tensor everywhere: a compiled block that meets a number too compiles again
        for i, block in enumerate(self.head):
            x = block(x, rope, kv and kv.at("head", i), c)
        return x

    def run_body(self, x: Tensor, c: float = 1.0, *, k: int, rope, kv=None, backprop: bool = True) -> Tensor:
        """B(x, c) in iteration k. Without backprop the updates are constants; the identity path keeps its
        gradient (truncated backpropagation, as in arXiv 2502.05171, section 3.3)."""
        if not backprop and torch.is_grad_enabled():
            with torch.no_grad():
                y = self.run_body(x, c, k=k, rope=rope, kv=kv)
            # Older PyTorch keeps the bf16 weights of here, which have no gradient, for later (issue #65766).
            torch.clear_autocast_cache()
            return y + (x - x.detach())  # the value of y, the gradient of x
        c = x.new_full((), c)  # a tensor, so that one compiled block serves every iteration
        for i, block in enumerate(self.body):
            x = block(x, rope, kv and kv.at("body", i, k), c)
        return x

    def run_tail(self, u: Tensor, rope, kv=None, k: int = 0) -> Tensor:
        """What the Body hands on, (B, T, D) -> the normed state that is unembedded, (B, T, D). k: iteration
        after which early exit looks at it."""
        c = u.new_ones(())
        for i, block in enumerate(self.tail):
            u = block(u, rope, kv and kv.at("tail", i, k), c)
        return self.norm(u)

    def logits(self, z: Tensor) -> Tensor:
        """(..., D) -> (..., V); the padded columns are cut here, so no softmax ever sees them."""
        return self.unembed(z)[..., : self.config.vocab_size]

    def logits_and_loss(self, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D), (B, T) -> logits (B, T, V), mean NLL; of one piece, so that a compiler can fuse it."""
        logits = self.logits(z)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits.detach(), loss  # a gradient of zeros for the logits would be as large as they are

    def rope(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, E/2) for positions 0 .. T-1 of idx (B, T). Raises UserError for bad idx."""
        V, S = self.config.vocab_size, self.config.block_size
        fits = idx.dim() == 2 and idx.dtype == torch.int64 and 1 <= idx.shape[1] <= S
        check(fits, f"token ids must be int64 (B, T) with 1 <= T <= {S}, not {idx.dtype} {tuple(idx.shape)}")
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait
            low, high = idx.aminmax()
            wrong = low if low < 0 else high
            check(0 <= low and high < V, f"token id {wrong} is not in the vocabulary of {V}")
        return tuple(table[: idx.shape[1]] for table in self.rope_on(idx.device))

    def rope_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The whole tables, (block_size, E/2) each."""
        if self._rope[0].device != device:
            self._rope = tuple(table.to(device) for table in self._rope)
        return self._rope

    def check_iters(self, iters: int | None) -> int:
        """iters, or the default for None. Raises UserError outside the rule's range."""
        if iters is None:
            iters = self.config.mean_iters
        most = RULES[self.config.rule]
        valid = type(iters) is int and 1 <= iters <= most
        check(valid, f"iters={iters!r}: rule {self.config.rule} runs at any integer from 1 to {most}")
        return iters

    def backprop_from(self, iters: int) -> int:
        """The first of `iters` iterations whose updates get gradients."""
        return max(0, iters - (self.config.backprop_iters or iters))

    @torch.no_grad()
    def init_weights(self):
        """All initialisation. The paper is silent; we chose GPT-2's at D = 1024 and the same scale of every
        activation at other widths, with depth counted at r = 1, so that every rule starts from the weights of
        the standard Transformer. (A fixed 0.02 costs a narrow model much of a short run.)

            embed (tied or not), unembed         normal, std = sqrt(0.4 / D)  (0.0198 at D = 1024)
            qkv, gate_up                         normal, std
            proj, down (they join the stream)    normal, std / sqrt(2 n_blocks)
            project (zero_pt only)               normal, std 1 / sqrt(2 D), which keeps the scale of [x ; h]
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

    def n_params(self) -> int:
        """All unique parameters, embeddings included: independent of iters."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, iters: int | None = None, context: int | None = None, training=True) -> float:
        """Floating-point operations per token: 2 per weight of every matrix product, r x Body counted, plus
        attention over the context/2 tokens that a causal mask shows on average (context: block_size). The
        backward pass is twice the forward pass, of the updates that it reaches. No elementwise work."""
        config, r = self.config, self.check_iters(iters)
        matrices = sum(p.numel() for p in self.body[0].parameters() if p.dim() == 2)
        block = 2 * matrices + 2 * config.n_embd * (context or config.block_size)
        once = (config.n_head_blocks + config.n_tail_blocks) * block + 2 * self.unembed.weight.numel()
        again = config.n_body_blocks * block
        project = 2 * self.project.weight.numel() if config.rule == "zero_pt" else 0
        if not training:
            return once + r * (again + project)
        reached = r - self.backprop_from(r)
        return 3 * once + r * (again + 3 * project) + 2 * reached * again


# ------------------------------------------------------------------- what `iters` says, and the rotary table


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


def rope_table(config: AbbIEConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (block_size, E/2) in fp32 of the rotary embedding (arXiv 2104.09864, eq. 15), with
    the wavelengths stretched as in Llama 3.1 where rope_scaling says so."""
    E, scaling = config.attn_head_dim, config.rope_scaling
    freq = 1 / config.rope_base ** (torch.arange(0, E, 2, dtype=torch.int64).float() / E)  # (E/2,) per token
    if scaling is not None:
        wanted = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        numbers = all(type(scaling.get(name)) in (int, float) and scaling[name] > 0 for name in wanted)
        known = scaling.get("rope_type") == "llama3" and numbers
        check(known, f"rope_scaling needs rope_type 'llama3' and positive {', '.join(sorted(wanted))}")
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # in the first context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        check(low < high, f"rope_scaling: low_freq_factor={low} must be below high_freq_factor={high}")
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelengths, kept; 0: long, stretched
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    angle = torch.outer(torch.arange(config.block_size).float(), freq)
    # The first call of MKL's vector functions in a process settles which kernels all later ones take. Where
    # two threads share it, one may take a kernel of low accuracy (pytorch #188792): so one thread makes it.
    torch.zeros(1).cos()
    return angle.cos(), angle.sin()
