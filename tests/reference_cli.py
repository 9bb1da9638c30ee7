"""docs/reference/cli.md: what the commands say about themselves, around `reference_cli.md`.

The template has the words of people. Each `<!-- generated: ... -->` in it is replaced; the sections
after `<!-- notes: ... -->` go below the generated part of the command that they are called after.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from tripletkit import config, stages
from tripletkit.cli import app
from tripletkit.cli.options import SLURM_FLAGS

TEMPLATE = Path(__file__).with_suffix(".md")
SHARED = ("--config", "--set")
KINDS = {
    bool: "", int: "integer", float: "number", Path: "path", str: "text",
    "str": "text", "int": "integer", "float": "number", "Path": "path",
}  # fmt: skip


def tree(command: Any, name: str = "tripletkit") -> Iterator[tuple[str, Any]]:
    """The command and everything below it, with full names; hidden ones left out."""
    yield name, command
    for child, below in getattr(command, "commands", {}).items():
        if not getattr(below, "hidden", False):
            yield from tree(below, f"{name} {child}")


def page() -> str:
    """The whole page."""
    text, notes = TEMPLATE.read_text().split("<!-- notes:")
    sections = re.split(r"^## (.+)\n", notes, flags=re.MULTILINE)[1:]
    below = dict(zip(sections[::2], (body.strip() for body in sections[1::2]), strict=True))
    everything = dict(tree(typer.main.get_command(app)))
    root = everything["tripletkit"]
    leaves = {name: c for name, c in everything.items() if not hasattr(c, "commands")}
    if unknown := below.keys() - everything.keys():
        raise SystemExit(f"{TEMPLATE}: notes on commands that are not there: {sorted(unknown)}")
    any_slurm = next(c for c in leaves.values() if has_slurm_flags(c))
    parts = {
        "overview": overview(everything),
        "root options": table(root.params),
        "configuration options": table(p for p in any_slurm.params if p.opts[0] in SHARED),
        "slurm options": table(p for p in any_slurm.params if p.name in SLURM_FLAGS),
        "commands": "\n\n".join(section(n, c, below.get(n)) for n, c in leaves.items()),
        "stages": ", ".join(f"`{stage}`" for stage in stages.JOBS),
    }
    for name, part in parts.items():
        mark = f"<!-- generated: {name} -->"
        if mark not in text:
            raise SystemExit(f"{TEMPLATE}: no {mark}")
        text = text.replace(mark, part)
    return text.rstrip() + "\n"


def overview(everything: dict[str, Any]) -> str:
    """Each command and group in one line."""
    lines = ["| command | does |", "|---|---|"]
    for name, command in everything.items():
        if name != "tripletkit":
            anchor = name.replace(" ", "-")
            shown = f"`{name}`" if hasattr(command, "commands") else f"[`{name}`](#{anchor})"
            lines.append(f"| {shown} | {words(command.help).partition(chr(10) * 2)[0]} |")
    return "\n".join(lines)


def section(name: str, command: Any, note: str | None) -> str:
    """A command: what it does, usage, arguments and options, and what people add."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([name, "[OPTIONS]", *map(as_used, arguments)])
    parts = [f"## {name}", words(command.help), f"```text\n{usage}\n```"]
    slurm = has_slurm_flags(command)
    own = [p for p in command.params if p.opts[0] not in SHARED]
    own = [p for p in own if not (slurm and p.name in SLURM_FLAGS)]
    if own:
        parts.append(table([*arguments, *(p for p in own if p not in arguments)]))
    also = []
    if any(p.opts[0] in SHARED for p in command.params):
        also.append("[`--config`, `--set`](#options-of-every-command)")
    if slurm:
        first, last = (list(SLURM_FLAGS)[i].replace("_", "-") for i in (0, -1))
        also.append(f"the [options of jobs](#options-of-jobs) from `--{first}` to `--{last}`")
    if also:
        parts.append(("Also " if own else "Options: ") + ", and ".join(also) + ".")
    return "\n\n".join([*parts, *([note] if note else [])])


def has_slurm_flags(command: Any) -> bool:
    """Whether it has all of them, with the common words."""
    return SLURM_FLAGS.items() <= {(p.name, p.help) for p in command.params}


def table(parameters: Iterable[Any]) -> str:
    """A row per argument or option."""
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for p in parameters:
        if not getattr(p, "hidden", False):
            cells = (names(p), value(p), default(p), words(p.help))
            lines.append("| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def names(p: Any) -> str:
    if p.param_type_name == "argument":
        return f"`{as_used(p).strip('[]')}`"
    off = [f"`{name}`" for name in p.secondary_opts]
    return ", ".join(f"`{name}`" for name in p.opts) + (f" / {', '.join(off)}" if off else "")


def as_used(p: Any) -> str:
    """An argument in a line of usage: FILE, [FILE], FILE..."""
    name = (p.metavar or str(p.name).upper()).strip("[]")
    name += "..." if p.nargs == -1 or getattr(p, "multiple", False) else ""
    return name if p.required else f"[{name}]"


def value(p: Any) -> str:
    """What may stand there."""
    if getattr(p, "is_flag", False) or getattr(p, "count", False):
        return ""
    annotation: Any = key_type(p) or p.type_descriptor.annotation
    while get_origin(annotation) in (list, tuple):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        shown = ", ".join(f"`{each}`" for each in get_args(annotation))
    elif hasattr(annotation, "__members__"):
        shown = ", ".join(f"`{each.value}`" for each in annotation)
    elif p.metavar and p.metavar != "VALUE" and p.param_type_name == "option":
        shown = f"`{p.metavar}`"
    else:
        shown = KINDS.get(annotation, str(getattr(annotation, "__name__", annotation)))
    told = "repeat" in (p.help or "") or not getattr(p, "multiple", False)
    return shown if told else f"{shown}, repeatable"


def key(p: Any) -> tuple[str, Any] | None:
    """The section and field of the configuration that a flag sets."""
    if p.metavar != "VALUE":
        return None
    for name in ("tuning", "slurm"):
        if p.name in config.sections()[name].model_fields:
            return name, config.sections()[name].model_fields[p.name]
    return None


def key_type(p: Any) -> Any:
    """The type of that field, without None, bounds and validators."""
    found = key(p)
    annotation = found[1].annotation if found else None
    while get_origin(annotation) not in (None, Literal, list):
        annotation = get_args(annotation)[0]
    return annotation


def default(p: Any) -> str:
    if found := key(p):
        return f"`{found[0]}.{p.name}`"
    if p.default in (None, False, (), []) or callable(p.default) or not p.show_default:
        return ""
    return f"`{p.default}`"


def words(text: str | None) -> str:
    """A help text as markdown: as it is, but nothing outside of backticks is markup."""
    pieces = re.split(r"(`[^`]*`)", (text or "").replace("\b", "").partition("\f")[0].strip())
    pieces[::2] = [re.sub(r"([*<\\])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces).replace("|", "\\|")
