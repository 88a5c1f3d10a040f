"""About 201M parameters, trained at r = 2."""

from config.abbie_350m import *  # noqa: F403

n_embd = 896
ffn_dim = 2432
n_attn_heads = 14
n_head_blocks = 5
n_body_blocks = 6
n_tail_blocks = 5
lr = 7e-4
