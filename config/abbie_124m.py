"""About 124M parameters, trained at r = 2: GPT-2 small's size."""

from config.abbie_350m import *  # noqa: F403

n_embd = 768
ffn_dim = 2048
n_attn_heads = 12
n_head_blocks = 4
n_body_blocks = 4
n_tail_blocks = 4
lr = 8e-4
