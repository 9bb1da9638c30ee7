"""The differences of two runs as lines for people: what matters first, what is the same in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from tripletkit import log
from tripletkit.compare import CODE, is_identical
from tripletkit.train.collapse import NO_METRICS

SHOWN = 40  # lines of a patch
NAMED = 10  # files of it
NAMES = ("paths.checkpoint_dir", "logging.wandb_run_name")  # of the run: the first lines say it


def show(found: Mapping[str, Any]) -> None:
    """Print what `compare` found."""
    for side in ("a", "b"):
        log.out.print(f"{side}: {found[side]}: {_how_far(found['result'][side])}", soft_wrap=True)
    _print(result_lines(found))
    _show_metrics(found["result"])
    for lines in (_configuration, _data, _code, _machine):
        _print(lines(found))


def result_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Whether two runs came to the same, and if not, how far apart they are."""
    result = found["result"]
    a, b = result["a"], result["b"]
    if is_identical(found):
        yield "result: identical, every epoch and every weight"
        return
    monitor = a["monitor"]
    if monitor == b["monitor"] and {monitor} <= a["best"].keys() & b["best"].keys():
        here, there = a["best"][monitor], b["best"][monitor]
        change = f"{there - here:+.4f}" if here != there else "the same"
        yield f"result: best {monitor} {here:.4f} -> {there:.4f} ({change})"
    else:
        yield f"result: not judged by the same: {monitor}, {b['monitor']}"
    epochs = result["history"]["epochs"]
    match result["history"]["same"]:
        case "all":
            yield "  metrics: the same in every epoch"
        case "common":
            yield f"  metrics: the same up to epoch {epochs}, where one of them ends"
        case "some":
            yield f"  metrics: the same up to epoch {epochs}, different from {epochs + 1} on"
        case _:
            yield "  metrics: different from the start"
    for name, apart in result["weights"].items():
        if apart["identical"]:
            yield f"  {name}: the same weights"
        elif apart["largest"] is None:
            yield f"  {name}: heads of other shapes"
        else:
            yield (
                f"  {name}: weights differ by up to {apart['largest']:.2g}, "
                f"where the largest is {apart['scale']:.2g}"
            )


def _how_far(outcome: Mapping[str, Any]) -> str:
    took = "" if outcome["seconds"] is None else f", {outcome['seconds']:,.0f} s"
    epochs = outcome["epochs"]
    return f"{outcome['status']}, {epochs} epoch{'' if epochs == 1 else 's'}{took}"


def _show_metrics(result: Mapping[str, Any]) -> None:
    """A table per state of which both runs have metrics, unless all are the same."""
    for when, title in (("raw", "raw embeddings"), ("best", "best epoch"), ("last", "last epoch")):
        a, b = result["a"][when], result["b"][when]
        names = [name for name in a if name in b and name not in ("epoch", *NO_METRICS)]
        if when == "last" and (a, b) == (result["a"]["best"], result["b"]["best"]):
            continue
        if not names or all(a[name] == b[name] for name in names):
            continue
        headers = [f"{side}, {each['epoch']}" if "epoch" in each else side
                   for side, each in (("a", a), ("b", b))]  # fmt: skip
        table = Table(title, *headers, "b - a")
        for name in names:
            apart = "same" if a[name] == b[name] else f"{b[name] - a[name]:+.4f}"
            table.add_row(name, f"{a[name]:.4f}", f"{b[name]:.4f}", apart)
        log.out.print(table)


def _configuration(found: Mapping[str, Any]) -> Iterator[str]:
    kinds = found["configuration"]
    yield from _pairs("configuration", kinds["settings"])
    if kinds["other"]:
        yield from _pairs("other keys", kinds["other"])
    yield from _pairs("paths", {k: v for k, v in kinds["paths"].items() if k not in NAMES})


def _data(found: Mapping[str, Any]) -> Iterator[str]:
    data = found["data"]
    if data and all(each["same"] for each in data.values()):
        yield "data: the same (" + ", ".join(_amount(n, e["a"]) for n, e in data.items()) + ")"
        return
    yield "data:" if data else "data: not on file"
    for name, each in data.items():
        if each["same"]:
            yield f"  {_amount(name, each['a'])}: the same"
        elif each["same"] is None:
            yield f"  {name}: not on file of both"
        else:
            yield f"  {name}: {_facts(each['a'])} -> {_facts(each['b'])}"


def _amount(name: str, facts: Mapping[str, Any] | None) -> str:
    return f"{name} {facts['rows']:,}" if facts and "rows" in facts else name


def _facts(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "none"
    parts = [f"{facts[k]:,} {k}" for k in ("rows", "buildings", "bands") if k in facts]
    return ", ".join([*parts, f"fingerprint {facts['fingerprint'][:12]}"])


def _code(found: Mapping[str, Any]) -> Iterator[str]:
    code = found["code"]
    if not code["known"]:
        yield "code: not on file of both"
        return
    repositories = code["repositories"]
    if not code["versions"] and all(each["same"] for each in repositories.values()):
        states = [f"{_commit(each['a'])} of {CODE[name]}" for name, each in repositories.items()]
        yield "code: the same" + (f" ({', '.join(states)})" if states else "")
        return
    yield "code:"
    yield from (f"  {name}: {a} -> {b}" for name, (a, b) in code["versions"].items())
    for name, each in repositories.items():
        if each["same"]:
            yield f"  {CODE[name]}: the same ({_commit(each['a'])})"
            continue
        yield f"  {CODE[name]}: {_commit(each['a'])} -> {_commit(each['b'])}"
        if each["lost"]:
            yield "    changes that were not committed are no longer on file"
        lines = each["patch"].splitlines()
        a, b = ((each[side] or {}).get("commit") for side in "ab")
        if not lines and not each["lost"] and a == b:
            yield "    changes that were not committed differ only in what is blanked"
        files = [line.removeprefix("--- a: ") for line in lines if line.startswith("--- a: ")]
        if files:
            more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
            names = ", ".join(files[:NAMED]) + more
            yield f"    changes that were not committed differ in {names}"
        yield from (f"    {line}" for line in lines[:SHOWN])
        if len(lines) > SHOWN:
            yield f"    ... {len(lines) - SHOWN} more lines; --json has them"


def _commit(state: Mapping[str, Any] | None) -> str:
    if state is None:
        return "no repository"
    commit = f"commit {state['commit'][:12]}" if state.get("commit") else "no commit"
    if state.get("diff"):
        return f"{commit} and changes{' (cut)' if state.get('diff_cut') else ''}"
    return f"{commit}, changes unknown" if state.get("changes", 0) is None else commit


def _machine(found: Mapping[str, Any]) -> Iterator[str]:
    if found["code"]["known"]:
        yield from _pairs("machine", found["machine"])
    else:
        yield "machine: not on file of both"


def _pairs(title: str, pairs: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    if not pairs:
        yield f"{title}: the same"
        return
    yield f"{title}:"
    yield from (f"  {key}: {_value(a)} -> {_value(b)}" for key, (a, b) in pairs.items())


def _value(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        log.out.print(line, soft_wrap=True)
