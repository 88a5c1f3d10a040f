"""recall_tiny with r drawn per step from 1, 2, 3."""

from config.recall_tiny import *  # noqa: F403

iters = "1-3"
