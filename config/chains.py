"""Chains of variables (experiments/chains.py): what iterations of the Body are for. The last stage of three:
from fresh weights it stays on a plateau. `python -m experiments.chains` makes its data and leads up to it."""

data = "data/chains"
block_size = 128
n_embd = 64
n_attn_heads = 4
ffn_dim = 176
n_head_blocks = 1
n_body_blocks = 2
n_tail_blocks = 0
rule = "abbie_d"
iters = "2-6"
tokens_per_step = 2048
micro_batch = 16
max_steps = 2000
lr = 1.5e-3
warmup_steps = 50
decay_frac = 0.5
weight_decay = 0.01
eval_every = 0
eval_iters = "1,2,3,4,6,8"
eval_tokens = 2**14
save_every = 500
dtype = "float32"
