"""The main job: about three minutes on two CPU cores, bytes of the Python standard library."""
data = "data/stdlib"
block_size = 256
n_embd = 128
n_attn_heads = 4
ffn_dim = 352
n_head_blocks = 1
n_body_blocks = 2
n_tail_blocks = 1
rule = "abbie_d"
iters = 2
tokens_per_step = 4096
micro_batch = 16
max_steps = 500
lr = 2e-3
eval_every = 250
eval_iters = "1,2,3,4,8,16,32"
eval_tokens = 2 ** 15
