"""recall_350m with r drawn per step, mean 4, and gradients through the last 4 iterations' updates only."""

from config.recall_350m import *  # noqa: F403

iters = "poisson:4"
backprop_iters = 4
