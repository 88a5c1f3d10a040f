"""abbie_350m under the rule recall, with r drawn per step, mean 6, and gradients through the updates of the
last 3 iterations only."""

from config.abbie_350m import *  # noqa: F403

rule = "recall"
iters = "poisson:6"
backprop_iters = 3
