"""abbie_tiny at r = 1: a standard Transformer."""

from config.abbie_tiny import *  # noqa: F403

iters = 1
