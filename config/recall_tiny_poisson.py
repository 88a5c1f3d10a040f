"""recall_tiny with r drawn per step, mean 6, and gradients through the last 3 iterations' updates only: the
model whose loss falls with r. 8000 steps, for which 2e-3 is the best learning rate of three: 10 to 40 minutes
on two CPU cores."""

from config.recall_tiny import *  # noqa: F403

iters = "poisson:6"
backprop_iters = 3
max_steps = 8000
lr = 2e-3
