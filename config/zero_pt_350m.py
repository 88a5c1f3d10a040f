"""abbie_350m with the state started from zero and projected together with the Head's output."""

from config.abbie_350m import *  # noqa: F403

rule = "zero_pt"
