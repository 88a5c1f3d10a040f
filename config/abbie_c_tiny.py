"""abbie_tiny under the rule abbie_c."""

from config.abbie_tiny import *  # noqa: F403

rule = "abbie_c"
