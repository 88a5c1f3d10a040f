"""abbie_tiny under the rule recall, with r drawn per step, mean 6, and gradients through the updates of the
last 3 iterations only: the model whose loss falls with r. 8000 steps, for which 2e-3 is the best learning
rate of three: 10 to 40 minutes on two CPU cores."""

from config.abbie_tiny import *  # noqa: F403

rule = "recall"
iters = "poisson:6"
backprop_iters = 3
max_steps = 8000
lr = 2e-3
