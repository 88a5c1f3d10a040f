"""abbie_tiny under the rule recall."""

from config.abbie_tiny import *  # noqa: F403

rule = "recall"
