"""359.8M parameters, r = 2: 7.2B tokens of C4 (20 per parameter), 2^19 tokens per step. Made for 8 GPUs."""

data = "data/c4"
block_size = 1024
n_embd = 1024
ffn_dim = 2816
n_attn_heads = 16
n_head_blocks = 8
n_body_blocks = 8
n_tail_blocks = 8
rule = "abbie_d"
iters = 2
tokens_per_step = 2**19
micro_batch = 16
tokens_per_param = 20.0
lr = 6e-4
eval_every = 500
save_every = 2000
