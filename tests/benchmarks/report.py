"""What a run leaves: JSON and a table in its folder, and on request figures and tables in `docs`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks import measure

DOCS = Path(__file__).parent.parent.parent / "docs"
RESULTS, TABLE = "benchmarks.json", "benchmarks.md"

# {"machine": {...}, "sections": {name: {"rows": [...], "seconds": s, "left_out": why}},
#  "curves": {name: {...}}}
Results = dict[str, Any]


def load(out: Path, machine: Mapping[str, str] | None = None) -> Results:
    """What is in the folder already; nothing if that is another machine's."""
    path = out / RESULTS
    if path.exists():
        found: Results = json.loads(path.read_text())
        if machine is None or found["machine"] == machine:
            return found
    return {"machine": dict(machine or {}), "sections": {}, "curves": {}}


def save(out: Path, results: Results) -> None:
    """Write both files; called after every section, so that a run cut short leaves its part."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    (out / TABLE).write_text(table(results))


def table(results: Results) -> str:
    """The machine, the rows, and what was left out."""
    sections = results["sections"]
    lines = [
        describe(results["machine"]),
        "",
        measure.markdown([row for section in sections.values() for row in section["rows"]]),
    ]
    left_out = {n: s["left_out"] for n, s in sections.items() if s["left_out"]}
    if left_out:
        lines += ["Left out: " + "; ".join(f"`{n}` ({why})" for n, why in left_out.items()) + ".\n"]
    return "\n".join(lines)


def describe(machine: Mapping[str, str]) -> str:
    """The machine in one line."""
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"torch {machine['torch']}"
    )


# --- docs ------------------------------------------------------------------------------------


def write_docs(results: Results) -> list[Path]:
    """Put the table between its markers in docs/benchmarks.md and draw the curves that are there.

    The CPU's results and a CUDA device's have each their place.
    """
    device = results["machine"]["device"]
    page = DOCS / "benchmarks.md"
    begin, end = f"<!-- {device}: written by --write-docs -->\n", f"<!-- {device}: end -->\n"
    text = page.read_text()
    if begin not in text:
        raise SystemExit(f"{page} has no marker {begin!r}")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{begin}\n{table(results)}\n{end}", text))
    written = [page]
    for name, curve in results["curves"].items():
        path = DOCS / f"images/benchmarks-{name}{'' if device == 'cpu' else f'-{device}'}.svg"
        draw(curve, results["machine"], path)
        written.append(path)
    return written


def draw(curve: Mapping[str, Any], machine: Mapping[str, str], path: Path) -> None:
    """One figure: medians as lines, lowest to highest as bands."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart by all
    style = {
        "svg.fonttype": "none", "svg.hashsalt": curve["name"], "font.family": "sans-serif",
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    plain = FuncFormatter(lambda value, _: short(value))
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(6.4, 3.8), facecolor="white", layout="constrained")
        points = list(curve["series"].items())
        for (name, values), color in zip(points, colors, strict=False):
            x, low, middle, high = zip(*values, strict=True)
            reference = name.startswith(("forward", "plain"))
            axes.plot(
                x, middle, marker="o", markersize=4, color=color, label=name,
                linestyle="--" if reference else "-",
            )  # fmt: skip
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ticks = sorted({point[0] for _, values in points for point in values})
        axes.set_xscale("log")
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_locator(NullLocator())
        levels = [point[2] for _, values in points for point in values]
        if max(levels) > 10 * min(levels):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(plain)
        axes.set(xlabel=curve["x"], ylabel=curve["y"])
        axes.set_title(curve["title"], loc="left", fontsize=10)
        axes.text(
            1, -0.17, machine.get("gpu", machine["cpu"]), transform=axes.transAxes,
            ha="right", va="top", fontsize=7, color="#666666",
        )  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def short(value: float) -> str:
    """5 M, 20 k, 0.1."""
    for size, letter in ((1e6, " M"), (1e3, " k")):
        if value >= size and value % (size / 100) == 0:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
