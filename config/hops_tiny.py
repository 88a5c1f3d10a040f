"""Chains of variables (experiments/hops.py): what iterations of the Body are for. By itself this stays on a
plateau for very long; `python -m experiments.hops --train` leads it there in stages."""

data = "data/hops"
block_size = 128
n_embd = 64
n_attn_heads = 4
ffn_dim = 176
n_head_blocks = 1
n_body_blocks = 2
n_tail_blocks = 0
rule = "recall"
iters = "2-6"
tokens_per_step = 2048
micro_batch = 64
max_steps = 1000
lr = 2e-3
warmup_steps = 50
weight_decay = 0.01
eval_every = 0
eval_iters = "1,2,4,8"
eval_tokens = 2**14
save_every = 100
dtype = "float32"
