"""abbie_350m as a damped fixed-point iteration that recalls the Head's output."""

from config.abbie_350m import *  # noqa: F403

rule = "recall"
