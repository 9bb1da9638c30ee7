"""Reading the configuration from TOML, the environment and the command line, and writing it.

Order of precedence: command line > environment > file > default.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import tomli_w
from pydantic import ValidationError

from tripletkit.config.sections import DEFAULT_SPACE, Config, Section
from tripletkit.errors import ConfigError
from tripletkit.log import logger

ENV_PREFIX = "TRIPLET_TRAINING_"
DEFAULT_FILE = Path("config.toml")
LONGEST = 200  # characters of a wrong value in a message
MAY_HOLD_A_PASSWORD = ("storage_url", "storage_path", "setup")  # by mistake; never repeated


def sections() -> dict[str, type[Section]]:
    """Section name in the file -> its model, in the order of the file."""
    return {
        field.alias or name: field.annotation  # type: ignore[misc]
        for name, field in Config.model_fields.items()
    }


def load(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Read the configuration.

    `path` defaults to config.toml in the current folder, if there is one. `overrides` are
    `section.key=value` strings. Raises `ConfigError` naming the file, section and key.
    """
    if path is None and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    raw: dict[str, Any] = {}
    origin: dict[tuple[str, str], str] = {}  # where a value came from, for the error message
    if path is not None:
        raw = _read_file(path)
        origin = {(s, k): f"{path}, [{s}] {k}" for s, table in raw.items() for k in table}
    for section, key, text, source in [*_from_environment(environ), *_from_flags(overrides)]:
        _assign(raw, section, key, text, source)
        origin[section, key] = source
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, origin) from None


def dump(config: Config) -> str:
    """The effective configuration as TOML; reading it gives an equal `Config`."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def describe(config: Config) -> dict[str, Any]:
    """The keys that shape a run's result, as plain values for trackers."""
    return config.model_dump(
        mode="json",
        by_alias=True,
        include={"global_": {"seed"}, "training_model": True, "training": True},
    )


def with_values(config: Config, **sections_: Mapping[str, Any]) -> Config:
    """A copy with some keys replaced, validated anew: `with_values(c, training={"margin": 1})`."""
    raw = config.model_dump(by_alias=True)
    for section, values in sections_.items():
        raw[section.rstrip("_")].update(values)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, {}) from None


def template(values: Mapping[str, Mapping[str, object]] | None = None) -> str:
    """A commented config.toml that holds every key; `values` replaces some defaults."""
    lines = [
        "# tripletkit configuration. Every key is shown with its default; keys without one are",
        "# commented out. TRIPLET_TRAINING_<KEY> in the environment and --set section.key=value",
        "# on the command line take precedence. `~` and `$VARS` expand in paths.",
    ]
    for name, model in sections().items():
        lines += ["", f"# {model.__doc__}", f"[{name}]"]
        for key, field in model.model_fields.items():
            if key == "space":
                continue
            lines.append(f"# {field.description}")
            value = (values or {}).get(name, {}).get(key, field.get_default())
            lines.append(f"# {key} =" if value is None else f"{key} = {toml_value(value)}")
    for key, range_ in DEFAULT_SPACE.items():
        lines += ["", f"[tuning.space.{key}]"]
        table = range_.model_dump(exclude_defaults=True)
        lines += [f"{k} = {toml_value(v)}" for k, v in table.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: object) -> str:
    """One value as TOML, on one line."""
    if isinstance(value, Path):
        value = str(value)
    return (
        tomli_w.dumps({"v": value}, multiline_strings=False)
        .removeprefix("v = ")
        .strip()
        .replace("[\n    ", "[")
        .replace(",\n    ", ", ")
        .replace(",\n]", "]")
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {path}", hint="`tripletkit init` writes one"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML: it is nested too deeply") from None
    except ValueError as error:  # not text, not TOML, or a number of thousands of digits
        twice = "a section stands once in the file: put its keys below the one that is there"
        raise ConfigError(
            f"{path} is not valid TOML: {error}", hint=twice if "twice" in str(error) else None
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    known = sections()
    for name, table in list(raw.items()):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            logger.warning(
                "%s: section [%s] is not one of ours and is ignored%s",
                path,
                name,
                f" (did you mean [{near[0]}]?)" if near else "",
            )
            del raw[name]
        elif not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} must be a section, written as [{name}]")
        else:
            for key in table:
                _check_key(name, key, f"{path}, section [{name}]")
    return raw


def _check_key(section: str, key: str, where: str) -> None:
    known = sections()[section].model_fields
    if key in known:
        return
    elsewhere = [name for name, model in sections().items() if key in model.model_fields]
    if elsewhere:
        hint = f"{key!r} belongs to [{elsewhere[0]}]"
    else:
        near = difflib.get_close_matches(key, known, 1, cutoff=0)
        hint = f"did you mean {near[0]!r}?"
    raise ConfigError(f"{where}: there is no key {key!r}", hint=hint)


def _from_environment(environ: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    owner = {key.upper(): (s, key) for s, model in sections().items() for key in model.model_fields}
    found = []
    for variable in sorted(v for v in environ if v.startswith(ENV_PREFIX)):
        name = variable.removeprefix(ENV_PREFIX)
        if name not in owner:
            near = difflib.get_close_matches(name, owner, 1, cutoff=0)[0]
            raise ConfigError(
                f"environment variable {variable} matches no key",
                hint=f"did you mean {ENV_PREFIX}{near}?",
            )
        found.append((*owner[name], environ[variable], f"environment variable {variable}"))
    return found


def _from_flags(overrides: Sequence[str]) -> list[tuple[str, str, str, str]]:
    found = []
    for text in overrides:
        where = "--set " + re.split(r"[^\w.-]", text, maxsplit=1)[0]  # the value may be secret
        match = re.fullmatch(r"([a-z_]+)\.([a-z0-9_.]+)=(.*)", text, re.DOTALL)
        if match is None:
            raise ConfigError(f"{where}: not of the form section.key=value")
        section, key, value = match.groups()
        if section not in sections():
            near = difflib.get_close_matches(section, sections(), 1, cutoff=0)[0]
            raise ConfigError(f"{where}: no section {section!r}", hint=f"did you mean {near!r}?")
        name, _, rest = key.partition(".")
        _check_key(section, name, where)
        if rest and name != "space":
            raise ConfigError(f"{where}: {name!r} is a value, not a table")
        found.append((section, key, value, where))
    return found


def _assign(raw: dict[str, Any], section: str, key: str, text: str, source: str) -> None:
    """Put `text` at its place; text becomes a list or table only where the key holds one."""
    name, _, rest = key.partition(".")
    table = raw.setdefault(section, {})
    if name == "storage_path":  # asks for that one, not for an address of lower precedence
        table.pop("storage_url", None)
    if rest:  # tuning.space.learning_rate.low=1e-5
        if key.startswith("space."):  # change one range, keep the others
            table.setdefault("space", {k: r.model_dump() for k, r in DEFAULT_SPACE.items()})
        *folders, name = key.split(".")
        for folder in folders:
            table = table.setdefault(folder, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{source}: {folder!r} is a value, not a table")
        table[name] = _parse(text)
        return
    annotation = sections()[section].model_fields[name].annotation
    if _holds(annotation, list):
        value = _parse(text)
        table[name] = (
            value if isinstance(value, list) else [part.strip() for part in text.split(",")]
        )
    elif _holds(annotation, dict):
        table[name] = _parse(text)
    elif text == "" and _holds(annotation, type(None)):
        table[name] = None
    else:
        table[name] = text


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text


def _holds(annotation: Any, kind: type) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_holds(part, kind) for part in get_args(annotation))
    return annotation is kind or get_origin(annotation) is kind


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested too deeply
        return "more than can be shown"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _explain(error: ValidationError, origin: Mapping[tuple[str, str], str]) -> ConfigError:
    lines = []
    for problem in error.errors(include_url=False):
        place = [str(part) for part in problem["loc"]]
        section, key = [*place, "", ""][:2]
        where = origin.get((section, key), f"[{section}] {'.'.join(place[1:])}".strip())
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"].startswith("union_tag"):  # of a range
            where = f"{where}.{place[2]}"
            message = 'needs a type: "float", "int" or "categorical"'
        message = message[0].lower() + message[1:]
        if key and key not in MAY_HOLD_A_PASSWORD and not isinstance(problem["input"], dict):
            message += f" (got {_shown(problem['input'])})"
        lines.append(f"{where}: {message}" if section else message)
    return ConfigError("\n".join(lines))
