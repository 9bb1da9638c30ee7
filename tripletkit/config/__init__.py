"""The configuration: typed sections, and the files and variables that they are read from.

Only the command line and the stages see the whole `Config`; everything below takes the section
it needs.
"""

from tripletkit.config.files import (
    DEFAULT_FILE,
    ENV_PREFIX,
    describe,
    dump,
    load,
    sections,
    template,
    toml_value,
    with_values,
)
from tripletkit.config.sections import (
    DEFAULT_SPACE,
    Choice,
    Config,
    FloatRange,
    Global,
    IntRange,
    Logging,
    Paths,
    Range,
    Reward,
    Slurm,
    Training,
    TrainingModel,
    Tuning,
    section_of,
)

__all__ = [
    "DEFAULT_FILE",
    "DEFAULT_SPACE",
    "ENV_PREFIX",
    "Choice",
    "Config",
    "FloatRange",
    "Global",
    "IntRange",
    "Logging",
    "Paths",
    "Range",
    "Reward",
    "Slurm",
    "Training",
    "TrainingModel",
    "Tuning",
    "describe",
    "dump",
    "load",
    "section_of",
    "sections",
    "template",
    "toml_value",
    "with_values",
]
