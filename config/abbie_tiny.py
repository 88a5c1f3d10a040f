"""The main job: three to five minutes on two CPU cores, bytes of the Python standard library. Batch,
heads, learning rate and schedule won by measurement."""

data = "data/stdlib"
block_size = 256
n_embd = 128
n_attn_heads = 2
ffn_dim = 352
n_head_blocks = 1
n_body_blocks = 2
n_tail_blocks = 1
rule = "abbie_d"
iters = 2
tokens_per_step = 1024
micro_batch = 4
max_steps = 2000
lr = 1e-3
warmup_steps = 100
decay_frac = 0.5
eval_every = 1000
eval_iters = "1,2,4,32"
eval_tokens = 2**14
