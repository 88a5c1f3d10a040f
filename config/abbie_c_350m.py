"""abbie_350m without the residual between iterations."""

from config.abbie_350m import *  # noqa: F403

rule = "abbie_c"
