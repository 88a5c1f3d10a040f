"""What several test files need: a tiny model, tokens, a checkpoint of it."""

from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import save_checkpoint
from model import AbbIE, AbbIEConfig

ROOT = Path(__file__).parent.parent
TINY = dict(
    vocab_size=97, block_size=32, n_embd=32, n_attn_heads=4, n_kv_heads=2, ffn_dim=48,
    n_head_blocks=1, n_body_blocks=2, n_tail_blocks=1,
)  # fmt: skip


def make(seed=0, **keys) -> AbbIE:
    """A tiny model with weights of the size that training reaches, so that every sublayer matters."""
    torch.manual_seed(seed)
    model = AbbIE(AbbIEConfig(**{**TINY, **keys}))
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn_like(p)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() == 2 else 1 + 0.2 * noise)
    return model


def tokens(batch=2, length=24, seed=1, vocab=97):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def save(run: Path, step: int, model: AbbIE, **meta) -> Path:
    """A checkpoint as train.py writes it, with an optimizer's state of two numbers per weight."""
    config = {**asdict(model.config), "tokenizer": "bytes", "step": step, **meta}
    moments = {name: [p.detach() + 1, p.detach() ** 2] for name, p in model.named_parameters()}
    return save_checkpoint(run, step, model.state_dict(), {"optimizer": moments, "step": step}, config)
