"""AbbIE: a decoder-only Transformer whose middle part is applied r times with the same weights.

A Transformer is cut into Head, Body and Tail, each a few ordinary blocks (arXiv 2507.08567):

    idx -> embed -> Head -> h -> Body, Body, ... (r times) -> u -> Tail -> norm -> unembed -> logits

What differs from a textbook GPT is `AbbIE.one_iteration`, one application of the Body, and `AbbIE.iterate`,
the loop around it. The block is Llama's: RMSNorm before each sublayer, rotary embedding, SwiGLU, no biases,
tied embeddings. At r = 1 the model is exactly a standard Transformer (rules abbie_d, abbie_c and recall).
This file needs nothing but PyTorch.

One letter, one meaning. r: iterations in all; k = 0 ... r - 1: the one at hand; h: what the Head hands on;
x: the state between iterations (within a block: its residual stream); u: what the Tail reads; z: what is
unembedded; c: what an iteration's updates are multiplied by; Delta(x): the sum of the Body's updates, so that
B(x) = x + Delta(x). Shapes: B batch, T tokens, D n_embd, H n_attn_heads, K n_kv_heads, E attn_head_dim,
M ffn_dim, V vocab_size, S positions in a cache. "head" alone is always the paper's Head, never an attention
head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

# The rules, and the largest r of each. The raw state of abbie_d_literal doubles with every iteration and is
# squared by RMSNorm: 48 suits fp32.
MAX_ITERS = {"abbie_d": 128, "abbie_d_literal": 48, "abbie_c": 128, "zero_pt": 128, "recall": 128}


class UserError(ValueError):
    """An error that the user can mend: at most three lines, what is wrong and what to do."""


def check(condition: bool, message: str):
    if not condition:
        raise UserError(message)


def check_range(config, low: float, high: float, *names: str):
    """Raises UserError for a value of config outside low ... high, or one that is not finite."""
    for name in names:
        value = getattr(config, name)
        bounds = f"at least {low} and finite" if high == math.inf else f"from {low} to {high}"
        check(low <= value <= high and value < math.inf, f"{name}={value} must be {bounds}")


@dataclass(frozen=True)
class AbbIEConfig:
    """The shape of a model and its recurrence. Raises UserError where a value is out of bounds."""

    # `train.py --help` prints these comments.
    vocab_size: int = 50257  # tokens of the vocabulary
    block_size: int = 1024  # longest context in tokens
    n_embd: int = 1024  # width D of the residual stream
    n_attn_heads: int = 16  # attention heads, of n_embd / n_attn_heads channels each
    n_kv_heads: int | None = None  # heads of keys and values (None: n_attn_heads)
    ffn_dim: int = 2816  # hidden width of the SwiGLU MLP
    n_head_blocks: int = 8  # blocks of the Head, applied once
    n_body_blocks: int = 8  # blocks of the Body, applied `iters` times
    n_tail_blocks: int = 8  # blocks of the Tail, applied once
    rope_base: float = 10000.0  # base of the rotary embedding's wavelengths
    rope_scaling: dict | None = None  # Llama 3's stretching of rotary wavelengths, as in Hugging Face
    norm_eps: float = 1e-5  # epsilon of every RMSNorm
    tie_embeddings: bool = True  # the unembedding is the embedding
    rule: str = "abbie_d"  # abbie_d, abbie_d_literal, abbie_c, zero_pt or recall
    iters: int = 2  # r, the iterations of the Body where a call does not say

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_attn_heads)
        D, H, K = self.n_embd, self.n_attn_heads, self.n_kv_heads
        check_range(self, 1, math.inf, "vocab_size", "block_size", "n_embd", "n_attn_heads", "ffn_dim")
        check_range(self, 1, math.inf, "n_body_blocks", "rope_base")
        check_range(self, 0, math.inf, "n_head_blocks", "n_tail_blocks", "norm_eps")
        check(D % (2 * H) == 0, f"n_embd={D} is no even multiple of n_attn_heads={H}")
        check(1 <= K <= H and H % K == 0, f"n_kv_heads={K} must divide n_attn_heads={H}")
        check(self.rule in MAX_ITERS, f"rule={self.rule!r} is none of {', '.join(MAX_ITERS)}")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)
        self.check_iters(self.iters)

    def check_iters(self, iters: int) -> int:
        """iters, as an int. Raises UserError outside the rule's range."""
        most = MAX_ITERS[self.rule]
        valid = isinstance(iters, Integral) and 1 <= iters <= most
        check(valid, f"iters={iters!r}: rule {self.rule} runs at any integer from 1 to {most}")
        return int(iters)

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


def check_rope_scaling(scaling: dict):
    names = ("low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings")
    numbers = [scaling.get(name) for name in names]
    positive = all(isinstance(number, (int, float)) and number > 0 for number in numbers)
    valid = scaling.get("rope_type") == "llama3" and positive and numbers[0] < numbers[1]
    check(
        valid, f"rope_scaling needs rope_type 'llama3' and positive {', '.join(names)}, the first the least"
    )


# -------------------------------------------------------------------------------------------------- the block


def cos_sin_table(config: AbbIEConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (block_size, E/2) in fp32 of the rotary embedding (arXiv 2104.09864, eq. 15), with
    the wavelengths stretched as in Llama 3.1 where rope_scaling says so."""
    E, scaling = config.attn_head_dim, config.rope_scaling
    freq = 1 / config.rope_base ** (torch.arange(0, E, 2, dtype=torch.int64).float() / E)  # (E/2,) per token
    if scaling is not None:
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # in the first context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelengths, kept; 0: long, stretched
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    angle = torch.outer(torch.arange(config.block_size).float(), freq)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + E/2) of x (B, H, T, E) by their position's angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: AbbIEConfig):
        super().__init__()
        self.config = config
        D, E, H, K = config.n_embd, config.attn_head_dim, config.n_attn_heads, config.n_kv_heads
        self.qkv = nn.Linear(D, (H + 2 * K) * E, bias=False)
        self.out = nn.Linear(H * E, D, bias=False)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], kv=None) -> Tensor:
        """x (B, T, D) -> (B, T, D). kv: None, or this block's slot of a cache, whose `extend(keys, values)`
        keeps what is new and returns all keys and values, (B, K, S, E) each, and who sees whom: a mask
        (B, 1, T, S) of bool, or None where that is causal (T new tokens alone) or all (one new token)."""
        B, T, D = x.shape
        E, H, K = self.config.attn_head_dim, self.config.n_attn_heads, self.config.n_kv_heads
        qkv = self.qkv(x).split((H * E, K * E, K * E), dim=-1)
        q, keys, values = (part.view(B, T, -1, E).transpose(1, 2) for part in qkv)
        q, keys = rotate(q, *cos_sin), rotate(keys, *cos_sin)  # (B, H, T, E), (B, K, T, E)
        mask = None
        if kv is not None:
            keys, values, mask = kv.extend(keys, values)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=causal, enable_gqa=H != K)
        return self.out(y.transpose(1, 2).reshape(B, T, D))  # (B, H, T, E) -> (B, T, D)


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
    """x (B, T, D) -> (B, T, D). Each sublayer's update is multiplied by c before it joins the stream. c is a
    tensor, so that one compiled block serves every iteration."""

    def __init__(self, config: AbbIEConfig, index: int):
        super().__init__()
        self.index = index
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, c: Tensor, cos_sin: tuple[Tensor, Tensor], kv=None) -> Tensor:
        x = x + c * self.attn(self.attn_norm(x), cos_sin, kv)
        return x + c * self.mlp(self.mlp_norm(x))


# -------------------------------------------------------------------------------------------------- the model


class AbbIE(nn.Module):
    """The model. After `checkpoint.load_model`, `meta` holds the checkpoint's config.json.

    The paper's formula (AbbIE-D).     X_0 = h,  X_{k+1} = B(X_k) + X_k
    A residual joins consecutive iterations. B is the Body with its own residual stream, B(X) = X + Delta(X),
    where Delta is the sum of its sublayers' updates. At r = 1 AbbIE is to be exactly a standard Transformer,
    so the Tail reads B(X_{r-1}), before the residual is added.

    Our form of it.                    x_0 = h,  u = B(x, 2^-k),  x <- (u + x) / 2,  and the Tail reads u
    The raw state X doubles at every iteration. So we divide the whole stream by 2^k, within the Body too:
    x_k = X_k / 2^k. RMSNorm ignores scale, so a sublayer that reads the divided stream returns the same
    update as before. To join a stream that is 2^k times smaller, the update has to be divided as well: that
    is c. B(x, c) is the Body with every sublayer's update multiplied by c = 2^-k. Hence u = B(X_k) / 2^k and
    x_{k+1} = (u + x_k) / 2: the same function, up to the norm's epsilon. On the raw scale RMSNorm's squares
    would overflow near r = 64, and the Tail's updates would fade beside the stream as r grows.

    The geometric weights.             u = h + sum_{k<r-1} 2^-(k+1) Delta_k + 2^-(r-1) Delta_{r-1}
    where Delta_k = Delta(X_k). The weights sum to 1 at every r: (1), (1/2, 1/2), (1/2, 1/4, 1/4), (1/2, 1/4,
    1/8, 1/8). So the Tail meets the same scale at every r, and u converges as r grows, by construction,
    trained or not: the change of x halves with each iteration, that of u, 2^-(k+1) (Delta_{k+1} - Delta_k),
    quarters. It also means that later iterations can refine, but hardly compute. AbbIE-C has the weights (1,
    1, 1, ...), and does not converge.
    """

    def __init__(self, config: AbbIEConfig):
        super().__init__()
        self.config, self.meta = config, {}
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd)
        # One list of all blocks, so that a checkpoint fits every cut, and its three stretches.
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_blocks))
        body, tail = config.n_head_blocks, config.n_head_blocks + config.n_body_blocks
        blocks = list(self.blocks)
        self.head, self.body, self.tail = blocks[:body], blocks[body:tail], blocks[tail:]
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.unembed = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembed.weight = self.embed.weight
        if config.rule == "zero_pt":
            # skip_init: Linear's own draw would change all that init_weights draws after it.
            self.adapter = skip_init(nn.Linear, 2 * config.n_embd, config.n_embd, bias=False)
        self.activation_checkpointing = False  # recompute each iteration in the backward pass
        self._cos_sin = None  # no buffer: the angles stay fp32 when the weights are bf16
        self.init_weights()

    # The recurrence: a stretch of blocks, one iteration, the loop around it, Head and Tail around the loop.

    def run(self, blocks: list[Block], x: Tensor, cos_sin, kv=None, k: int = 0, c: float = 1.0) -> Tensor:
        """x (B, T, D) through a stretch of blocks in iteration k -> (B, T, D)."""
        c = x.new_full((), c)
        for block in blocks:
            x = block(x, c, cos_sin, kv.at(block.index, k) if kv else None)
        return x

    def one_iteration(self, x: Tensor, h: Tensor, k: int, body) -> tuple[Tensor, Tensor]:
        """Iteration k from the state x and the Head's output h, (B, T, D) each -> (u, next x), u being what
        the Tail reads if this iteration is the last. `body(x, c=1.0)` is B(x, c)."""
        match self.config.rule:
            case "abbie_d":  # the paper's AbbIE-D, at its natural size
                u = body(x, c=2.0**-k)
                return u, (u + x) / 2  # the residual join B(x) + x, halved
            case "abbie_d_literal":  # the printed formula at every iteration, on the raw scale
                u = body(x) + x
                return u, u
            case "abbie_c":  # no residual between iterations
                u = body(x)
                return u, u
            case "zero_pt":  # after Geiping et al., arXiv 2502.05171: an empty state, into which h is mixed
                s = self.adapter(torch.cat((x, h), dim=-1))
                u = body(s.to(h.dtype))  # under autocast too, the residual stream keeps its precision
                return u, u
            case "recall":  # ours: u = h + Delta(x), and x goes half of the way there: a damped iteration to
                # x = h + Delta(x). At r = 2 it is the explicit midpoint method for dx/dt = Delta(x).
                u = body(x) + (h - x)
                return u, (u + x) / 2

    def iterate(self, x: Tensor, h: Tensor, first: int, end: int, cos_sin, kv=None, backprop_from: int = 0):
        """Iterations first, ..., end - 1 of the Body -> (u, next x). Those before backprop_from make their
        updates constants."""
        for k in range(first, end):
            body = partial(self.run, self.body, cos_sin=cos_sin, kv=kv, k=k)
            if k < backprop_from:
                body = partial(with_constant_updates, body)
            if self.activation_checkpointing and torch.is_grad_enabled():
                u, x = checkpoint(self.one_iteration, x, h, k, body, use_reentrant=False)
            else:
                u, x = self.one_iteration(x, h, k, body)
        return u, x

    def start(self, h: Tensor) -> Tensor:
        """The state before iteration 0."""
        return torch.zeros_like(h) if self.config.rule == "zero_pt" else h

    def sweep(self, x: Tensor, iters: list[int], cos_sin, kv=None, backprop_from=0) -> Iterator[Tensor]:
        """Embeddings x (B, T, D) -> at each of the strictly ascending iters the state that is unembedded,
        (B, T, D); the Body runs as often as the largest says. Training, evaluation and plain decoding."""
        h = self.run(self.head, x, cos_sin, kv)
        x, done = self.start(h), 0
        for r in iters:
            u, x = self.iterate(x, h, done, r, cos_sin, kv, backprop_from)
            done = r
            yield self.finish(u, cos_sin, kv)

    def finish(self, u: Tensor, cos_sin, kv=None) -> Tensor:
        """What the Tail reads, (B, T, D) -> the state that is unembedded, z."""
        return self.norm(self.run(self.tail, u, cos_sin, kv))

    def forward(self, idx: Tensor, targets: Tensor | None = None, iters: int | None = None, backprop_iters=0):
        """idx (B, T) int64 -> logits (B, T, V) for all positions, and the mean next-token NLL in nats against
        targets (B, T) (-1: not counted), or None. iters: r, by default the config's. backprop_iters:
        gradients reach the last so many iterations' updates only (0: all)."""
        self.check_ids(idx)
        iters = self.check_iters(iters)
        backprop_from = max(0, iters - (backprop_iters or iters))
        [z] = self.sweep(self.embed(idx), [iters], self.cos_sin(idx), backprop_from=backprop_from)
        return (self.logits(z), None) if targets is None else self.logits_and_loss(z, targets)

    def states_at(self, idx: Tensor, iters: list[int]) -> Iterator[Tensor]:
        """Yield the state that is unembedded, (B, T, D), at each of the strictly ascending iters, from one
        sweep of the Body."""
        self.check_ids(idx)
        return self.sweep(self.embed(idx), iters, self.cos_sin(idx))

    def logits_at(self, idx: Tensor, iters: list[int]) -> Iterator[Tensor]:
        """Yield the logits (B, T, V) at each entry of iters, from one sweep of the Body to the largest."""
        ascending = sorted({self.check_iters(r) for r in iters})
        states = dict(zip(ascending, self.states_at(idx, ascending)))
        for r in iters:
            yield self.logits(states[r])

    # The parts.

    def logits(self, z: Tensor) -> Tensor:
        """(..., D) -> (..., V); the padded columns are cut here, so no softmax ever sees them."""
        return self.unembed(z)[..., : self.config.vocab_size]

    def logits_and_loss(self, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D), (B, T) -> logits (B, T, V), mean NLL; of one piece, so that a compiler can fuse it."""
        logits = self.logits(z)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits.detach(), loss  # a gradient of zeros for the logits would be as large as they are

    def cos_sin(self, idx: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rotary embedding's cosines and sines for idx (B, T): (T, E/2) each at positions 0 ... T - 1, or
        (B, 1, T, E/2) at positions (B, T)."""
        if self._cos_sin is None or self._cos_sin[0].device != idx.device:
            self._cos_sin = tuple(table.to(idx.device) for table in cos_sin_table(self.config))
        if positions is None:
            return tuple(table[: idx.shape[1]] for table in self._cos_sin)
        return tuple(table[positions][:, None] for table in self._cos_sin)

    def check_ids(self, idx: Tensor):
        """Raises UserError for token ids that are no int64 (B, T) of the vocabulary, or too many."""
        V, longest = self.config.vocab_size, self.config.block_size
        fits = idx.dim() == 2 and idx.dtype == torch.int64 and 1 <= idx.shape[1] <= longest
        shape = f"int64 (B, T) with 1 <= T <= {longest}, not {idx.dtype} {tuple(idx.shape)}"
        check(fits, f"token ids must be {shape}")
        if idx.device.type == "cpu":  # a GPU would have to wait
            low, high = idx.aminmax()
            check(0 <= low and high < V, f"a token id of {low} to {high} is not in the vocabulary of {V}")

    def check_iters(self, iters: int | None) -> int:
        """iters, or the config's for None. Raises UserError outside the rule's range."""
        return self.config.iters if iters is None else self.config.check_iters(iters)

    @torch.no_grad()
    def init_weights(self):
        """All initialisation. The paper is silent; we chose GPT-2's at D = 1024 and the same scale of every
        activation at other widths, with depth counted at r = 1, so that every rule starts from the weights of
        the standard Transformer. (A fixed 0.02 costs a narrow model much of a short run.)

            embed (tied or not), unembed         normal, std = sqrt(0.4 / D)  (0.0198 at D = 1024)
            qkv, gate_up                         normal, std
            out, down (they join the stream)     normal, std / sqrt(2 n_blocks)
            adapter (zero_pt only)               normal, std 1 / sqrt(2 D), which keeps the scale of [x ; h]
            norms                                ones
        """
        std = math.sqrt(0.4 / self.config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            elif name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_blocks))
            elif name == "adapter.weight":
                nn.init.normal_(p, std=1 / math.sqrt(2 * self.config.n_embd))
            else:
                nn.init.normal_(p, std=std)

    def n_params(self) -> int:
        """All unique parameters, embeddings included: independent of iters."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, iters: int, backprop_iters: int = 0) -> float:
        """Floating-point operations of training, per token: 2 per weight of every matrix product, r x Body
        counted, plus attention over the block_size / 2 tokens that a causal mask shows on average. The
        backward pass is twice the forward pass, of the updates that it reaches. No elementwise work."""
        config, r = self.config, self.check_iters(iters)
        matrices = sum(p.numel() for p in self.body[0].parameters() if p.dim() == 2)
        block = 2 * matrices + 2 * config.n_embd * config.block_size
        once = (config.n_head_blocks + config.n_tail_blocks) * block + 2 * self.unembed.weight.numel()
        again = config.n_body_blocks * block
        adapter = 2 * self.adapter.weight.numel() if config.rule == "zero_pt" else 0
        reached = min(r, backprop_iters or r)
        return 3 * once + r * (again + 3 * adapter) + 2 * reached * again


def with_constant_updates(body, x: Tensor, c: float = 1.0) -> Tensor:
    """B(x, c) whose updates are constants; only the identity path keeps its gradient (truncated
    backpropagation, as in arXiv 2502.05171, section 3.3)."""
    with torch.no_grad():
        y = body(x, c=c)
    # Older PyTorch keeps the bf16 weights of here, which have no gradient, for later (issue #65766).
    torch.clear_autocast_cache()
    return y + (x - x.detach())  # the value of y, the gradient of x
