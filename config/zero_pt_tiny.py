"""abbie_tiny under the rule zero_pt."""

from config.abbie_tiny import *  # noqa: F403

rule = "zero_pt"
