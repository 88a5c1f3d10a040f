"""abbie_tiny with the printed formula at every iteration, on the raw scale."""

from config.abbie_tiny import *  # noqa: F403

rule = "abbie_d_literal"
