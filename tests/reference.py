"""`make reference`: write what is generated from the code: config.toml, the keys, the commands."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tests import reference_cli
from tripletkit import config

REPOSITORY = Path(__file__).parent.parent


INTRODUCTION = """\
The file is TOML. A value is taken from the command line (`--set section.key=value`), else from the
environment (`TRIPLET_TRAINING_` and the key in capitals: `TRIPLET_TRAINING_NUM_EPOCHS=20`), else from
the file, else the default. Without `--config`, `config.toml` in the current folder is read if it is
there; the environment alone is enough.
`~` and `$VARS` expand in paths. Lists are written `[1, 5, 10]` in the file, and also `1,5,10`
elsewhere.

An unknown key in a known section is an error; an unknown section is a warning, since the file may
be shared with other programs. The effective configuration of a run is kept as `config.toml` in its
folder, and reproduces it.

The commands that look at a study (`status`, `logs`, `submit-best`, ...) take its `[tuning]` from the
study's folder, as `tune` left it there: flags of `tune` need not be given again.
"""

SPACE = """\
The range of a `training` or `training_model` key. Naming one in the file replaces the whole default
space; `--set tuning.space.margin.high=2` changes one bound.
"""


def configuration_page() -> str:
    """The reference of every configuration key, as markdown."""
    lines = [
        "# Configuration",
        "",
        "<!-- Generated from tripletkit/config/sections.py by `make reference`; do not edit. -->",
        "",
        INTRODUCTION.rstrip(),
    ]
    for name, model in config.sections().items():
        lines += ["", f"## [{name}]", "", str(model.__doc__), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in model.model_fields.items():
            if key == "space":
                continue
            default = field.get_default()
            shown = "" if default is None else f"`{config.toml_value(default)}`"
            text = str(field.description).replace("|", "\\|")
            lines.append(f"| `{key}` | {_type(field.annotation)} | {shown} | {text} |")
    lines += [
        "",
        "## [tuning.space.KEY]",
        "",
        SPACE.rstrip(),
        "",
        "| type | keys |",
        "|---|---|",
        "| `float` | `low`, `high`, `log` (false) |",
        "| `int` | `low`, `high`, `log` (false), `step` (1) |",
        "| `categorical` | `choices` |",
        "",
        "Default:",
        "",
        "```toml",
        config.template().partition("\n[tuning.space.")[2].join(["[tuning.space.", ""]).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_type(a) for a in get_args(annotation) if a is not type(None))
    if origin is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is not None:  # Annotated
        return _type(get_args(annotation)[0])
    return {"str": "text", "Path": "path", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


GENERATED = {
    REPOSITORY / "config.toml": config.template,
    REPOSITORY / "docs/reference/configuration.md": configuration_page,
    REPOSITORY / "docs/reference/cli.md": reference_cli.page,
}

if __name__ == "__main__":
    for path, page in GENERATED.items():
        path.write_text(page())
