"""The baseline: abbie_350m at r = 1, a standard Transformer."""

from config.abbie_350m import *  # noqa: F403

iters = 1
