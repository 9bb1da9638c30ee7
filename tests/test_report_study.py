"""The report of a study: what its panels show, against the trials and attempts put into it."""

import json
import math
import re
import shutil
import subprocess
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import optuna
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.errors import StorageError
from tripletkit.monitor import study as studies
from tripletkit.monitor.inventory import Inventory
from tripletkit.paths import StudyPaths
from tripletkit.report import page, static, study, study_parameters, study_trials, study_workers
from tripletkit.report.panels import Panel, Report
from tripletkit.tune import claims, cost
from tripletkit.tune import study as tuning
from tripletkit.tune.cost import Attempt

EPOCHS = 6
BEGUN = datetime(2026, 3, 1, 12, tzinfo=UTC)
RANGES = {
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "margin": FloatDistribution(0.1, 1.0),
    "hidden_dim": IntDistribution(16, 4096),
    "activation": CategoricalDistribution(["relu", "gelu"]),
    "use_layer_norm": CategoricalDistribution([True, False]),
}
SPACE = {
    "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
    "margin": {"type": "float", "low": 0.1, "high": 1.0},
    "hidden_dim": {"type": "int", "low": 16, "high": 4096},
    "activation": {"type": "categorical", "choices": ["relu", "gelu"]},
    "use_layer_norm": {"type": "categorical", "choices": [True, False]},
}
WORDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def frozen(number: int, value: float | None, state: str = "COMPLETE", epochs: int = EPOCHS):
    """A trial with reports up to its value, and parameters that follow from its number."""
    shown = 0.0 if value is None else value
    trial = create_trial(
        state=TrialState[state],
        value=value if state in ("COMPLETE", "PRUNED") else None,
        params={
            "learning_rate": 1e-5 * 10 ** (number % 40 / 10),
            "margin": 0.1 + number * 7 % 30 / 40,
            "hidden_dim": 16 + number % 4000,
            "activation": ["relu", "gelu"][number % 2],
            "use_layer_norm": number % 3 == 0,
        },
        distributions=RANGES,
        intermediate_values={e: shown * e / epochs for e in range(1, epochs + 1)},
    )
    trial.number = number
    return trial


def listed(values: list[float | None]) -> list:
    """Trials of these values; None failed."""
    return [frozen(n, v, "COMPLETE" if v is not None else "FAIL") for n, v in enumerate(values)]


class World(NamedTuple):
    inventory: Inventory
    trials: list
    attempts: list[dict]
    report: Report

    def panel(self, name: str) -> Panel:
        return next(each for each in self.report.panels() if each.id == name)

    def rows(self, name: str) -> list[dict]:
        table = self.panel(name).table
        return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def configured(folder: Path, **changes) -> Config:
    return configuration.with_values(
        Config(),
        global_={"log_dir": folder / "logs"},
        paths={"val_parquet_path": folder / "val.parquet"},
        tuning={
            "study_name": "facades", "storage_path": folder / "study.db", "n_trials": 40,
            "output_dir": folder / "trials", "objective": "map@r", "max_epochs": EPOCHS,
            "space": SPACE, **changes,
        },
        slurm={"gpus": 2},
    )  # fmt: skip


CAUSE = {"kind": "cuda_oom", "message": "CUDA out of memory: <b>& more</b>"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """24 trials by two jobs, one of them with two slots: most complete, some not."""
    folder = tmp_path_factory.mktemp("study")
    config = configured(folder)
    paths = StudyPaths(config.output_dir / "facades")
    shared = tuning.prepare(config, paths)
    states = {5: "PRUNED", 11: "PRUNED", 7: "FAIL", 23: "RUNNING"}
    workers = [("41_0", 0), ("41_1", 0), ("41_1", 1)]
    free = dict.fromkeys(workers, BEGUN)
    attempts, trials = [], []
    for number in range(24):
        state = states.get(number, "COMPLETE")
        value = 0.5 + 0.4 * math.sin(number)
        epochs = EPOCHS if state == "COMPLETE" else 2
        job, slot = workers[number % 3]
        mark = {"job": job, "slot": slot, "host": f"node{number % 2}", "restart": 0, "pid": 1}
        lines = []
        if number == 4:  # was stopped, and went on elsewhere
            begun = free[workers[0]]
            free[workers[0]] = ended = begun + timedelta(minutes=3)
            stopped = {"job": "41_0", "slot": 0, "host": "node0", "attempt": 1}
            lines.append(
                {**stopped, "started": stamp(begun), "from_epoch": 0, "ended": stamp(ended),
                 "outcome": "stopped", "cause": "stopped", "message": "asked to stop"}
            )  # fmt: skip
        begun = free[job, slot]
        free[job, slot] = ended = begun + timedelta(minutes=10 * epochs)
        line = {**mark, "attempt": len(lines) + 1, "started": stamp(begun), "from_epoch": 0}
        if state in WORDS:
            line |= {"ended": stamp(ended), "outcome": WORDS[state]}
        lines.append(line)
        trial = frozen(number, None if state in ("FAIL", "RUNNING") else value, state, epochs)
        trial.set_user_attr(claims.OWNER, {**mark, "attempt": len(lines)})
        if state == "FAIL":
            trial.set_user_attr(claims.CAUSE, CAUSE)
        trials.append(trial)
        attempts += [{"trial": number, **line} for line in lines]
        where = paths.trial(number).attempts
        where.parent.mkdir(parents=True)
        where.write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths.trial(7).log.write_text("out of memory\n")
    shared.study.add_trials(trials)
    inventory = Inventory(configuration.load(paths.config, environ={}), 0)
    return World(inventory, trials, attempts, study.report(inventory))


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def complete(trials) -> list:
    return [t for t in trials if t.state == TrialState.COMPLETE]


# Facts and tables


def test_the_facts_say_what_it_is_and_how_to_go_on(world):
    facts = world.report.facts
    best = max(complete(world.trials), key=lambda t: t.value)
    config = world.inventory.paths.config
    assert world.report.title == "Study facades"
    assert facts["objective"] == "map@r, maximize"
    assert facts["trials"] == "1 running, 20 complete, 2 pruned, 1 failed, of 40"
    assert facts["best"] == f"trial {best.number}, map@r {best.value:.4f} in epoch {EPOCHS}"
    assert facts["to go on"] == f"tripletkit tune --config {config}"
    assert facts["to train with the best"] == f"tripletkit submit-best --config {config}"
    assert facts["why one failed"] == f"tripletkit why 7 --config {config}"
    assert facts["storage"].endswith("study.db")


def test_the_best_parameters_are_a_piece_of_config_toml(world):
    best = max(complete(world.trials), key=lambda t: t.value)
    lines = [row["config.toml"] for row in world.rows("best-parameters")]
    sections = tomllib.loads("\n".join(lines))
    assert sections["training"] | sections["training_model"] == best.params


def test_every_trial_is_in_the_table(world):
    rows = world.rows("trials")
    assert [row["trial"] for row in rows] == [t.number for t in world.trials]
    for row, trial in zip(rows, world.trials, strict=True):
        assert row["state"] == trial.state.name.lower()
        assert row["map@r"] == study_trials.value_of(trial)
        assert row["epoch"] == max(trial.intermediate_values)
        assert row["margin"] == trial.params["margin"]
        assert row["use_layer_norm"] == str(trial.params["use_layer_norm"])
        assert row["job"] == trial.user_attrs[claims.OWNER]["job"]
    assert rows[4]["attempts"] == 2


def test_failures_come_with_their_cause(world):
    assert world.rows("failures") == [
        {"trial": 7, "cause": "cuda_oom", "message": CAUSE["message"], "job": "41_1",
         "host": "node1", "attempts": 1, "log": "trial_00007/train.log"}
    ]  # fmt: skip
    interrupted = [(row["trial"], row["how"]) for row in world.rows("interruptions")]
    assert (4, "stopped") in interrupted
    assert (23, "killed") in interrupted or len(interrupted) == 1  # Slurm may not be there to ask


def test_the_cost_is_that_of_cost(world):
    shared = world.inventory.study().study
    spent = cost.spent(world.inventory.paths, shared)
    rows = {row["what"]: row["GPU-hours"] for row in world.rows("cost")}
    assert rows["spent"] == pytest.approx(spent.gpu_hours, rel=0.01)
    assert rows["spent"] == pytest.approx(rows["useful"] + rows["wasted"])
    assert rows["saved by pruning"] == pytest.approx(spent.saved)
    assert spent.saved > 0
    assert rows["spent per complete trial"] == pytest.approx(rows["spent"] / 20)
    (bar,) = world.panel("cost").figure.data
    assert dict(zip(bar.y, bar.x, strict=True)) == {
        key: rows[key] for key in ("saved by pruning", "wasted", "useful")
    }


# Progress


@settings(deadline=None)
@given(
    st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.sampled_from(["maximize", "minimize"]),
)
def test_the_line_is_the_best_so_far(values, direction):
    figure = study_trials.history(listed(values), "map@r", direction)
    better = max if direction == "maximize" else min
    expected, best = {}, None
    for number, value in enumerate(values):
        if value is not None:
            best = value if best is None else better(best, value)
        if best is not None:
            expected[number] = best
    line = {x: y for trace in figure.data if trace.mode == "lines"
            for x, y in zip(trace.x, trace.y, strict=True)}  # fmt: skip
    drawn = {n: line[max(x for x in line if x <= n)] for n in expected}
    assert drawn == expected


def test_the_history_has_every_trial_with_the_symbol_of_its_state(world):
    figure = world.panel("history").figure
    traces = {trace.name: trace for trace in figure.data}
    for state, name in {"COMPLETE": "complete", "PRUNED": "pruned", "RUNNING": "running"}.items():
        these = [t for t in world.trials if t.state.name == state]
        assert list(traces[name].x) == [t.number for t in these]
        assert list(traces[name].y) == [study_trials.value_of(t) for t in these]
    assert list(traces["failed"].x) == [7]
    lowest = min(min(traces[name].y) for name in ("complete", "pruned", "running"))
    assert traces["failed"].y[0] < lowest
    symbols = [traces[name].marker.symbol for name in ("complete", "pruned", "running", "failed")]
    assert len(set(symbols)) == 4


def strands(figure, name: str) -> dict[int, dict[int, float]]:
    """The curves of a trace, taken apart at its gaps: by trial, value by epoch."""
    found: dict[int, dict[int, float]] = {}
    for trace in figure.data:
        if trace.name == name and "lines" in trace.mode:
            for x, y, number in zip(trace.x, trace.y, trace.customdata, strict=True):
                found.setdefault(number, {}).update({} if x is None else {x: y})
    return found


def test_curves_are_the_reports(world):
    figure = world.panel("intermediate-values").figure
    best = max(complete(world.trials), key=lambda t: t.value).number
    shown = strands(figure, "complete") | strands(figure, f"best, trial {best}")
    assert shown == {t.number: t.intermediate_values for t in complete(world.trials)}
    assert strands(figure, "pruned").keys() == {5, 11}
    ends = next(trace for trace in figure.data if trace.name == "pruned there")
    assert [tuple(each) for each in zip(ends.customdata, ends.x, ends.y, strict=True)] == [
        (n, 2, world.trials[n].value) for n in (5, 11)
    ]


@settings(deadline=None)
@given(
    st.lists(st.none() | st.integers(-50, 50), max_size=60),
    st.integers(3, 40),
    st.sampled_from(["maximize", "minimize"]),
)
def test_thinning_keeps_the_best_and_some_of_all(values, room, direction):
    trials = listed(values)
    kept, said = study_trials.thinned(trials, direction, room)
    assert len(kept) == min(room, len(trials))
    assert [t.number for t in kept] == sorted({t.number for t in kept})
    if len(trials) <= room:
        assert said == ""
        return
    assert f"{room:,} of {len(trials):,} trials" in said
    sign = -1 if direction == "maximize" else 1
    best = sorted(
        (t for t in trials if t.value is not None), key=lambda t: (sign * t.value, t.number)
    )
    assert {t.number for t in best[: room // 3]} <= {t.number for t in kept}


def test_five_thousand_trials_stay_a_page(world):
    trials = [
        frozen(n, math.sin(n), "PRUNED" if n % 2 else "COMPLETE", 2 if n % 2 else EPOCHS)
        for n in range(5000)
    ]
    facts = study.study_of(world.inventory, trials, ())
    large = optuna.create_study(storage=InMemoryStorage(), direction="maximize")
    large.add_trials(trials)
    panels = [
        *study_trials.progress_panels(trials, facts),
        *study_parameters.parameter_panels(large, trials, facts),
    ]
    points = {
        panel.id: sum(len(t.x) for t in panel.figure.data if t.type == "scatter")
        for panel in panels
        if panel.figure is not None
    }
    assert points.pop("history") <= 5000 * 3
    assert max(points.values()) <= study_trials.CURVES * (EPOCHS + 2) + study_trials.CURVES
    texts = {panel.id: panel.text for panel in panels}
    assert "300 of 5,000 trials: the 100 best" in texts["intermediate-values"]
    assert "1,500 of 5,000 trials: the 500 best" in texts["slice-margin"]


# Parameters


def test_importances_are_those_of_study_show(world):
    shared = world.inventory.study().study
    expected = studies.importances(shared, complete(world.trials))
    (bar,) = world.panel("importances").figure.data
    assert dict(zip(bar.y, bar.x, strict=True)) == pytest.approx(expected)
    assert list(bar.x) == sorted(bar.x)  # the longest is at the top
    assert "rough guess" in world.panel("importances").text


def test_parallel_coordinates_stand_where_the_values_are(world):
    (trace,) = world.panel("parallel-coordinates").figure.data
    ranked = sorted(complete(world.trials), key=lambda t: t.value)
    axes = {axis.label: axis for axis in trace.dimensions}
    assert list(axes["map@r"]["values"]) == [t.value for t in ranked]
    assert list(trace.line.color) == sorted(trace.line.color)  # the better the bluer
    assert trace.line.colorscale[-1][1] == study_parameters.BLUE
    assert list(axes["margin"]["values"]) == [t.params["margin"] for t in ranked]
    rates = axes["learning_rate (log)"]
    assert [10**v for v in rates["values"]] == pytest.approx(
        [t.params["learning_rate"] for t in ranked]
    )
    labels = [(10**v, text) for v, text in zip(rates.tickvals, rates.ticktext, strict=True) if text]
    assert [v for v, _ in labels] == pytest.approx([float(text) for _, text in labels])
    assert rates.tickvals[0] == min(rates["values"])
    assert rates.tickvals[-1] == max(rates["values"])
    for name in ("activation", "use_layer_norm"):
        names = dict(zip(axes[name].tickvals, axes[name].ticktext, strict=True))
        assert [names[v] for v in axes[name]["values"]] == [str(t.params[name]) for t in ranked]


def test_slices_stand_where_the_values_are(world):
    ours = {t.number: t for t in world.trials}
    for name in RANGES:
        figure = world.panel(f"slice-{name}").figure
        seen = set()
        for trace in figure.data:
            for x, y, (number, _) in zip(trace.x, trace.y, trace.customdata, strict=True):
                value = ours[number].params[name]
                choices = figure.layout.xaxis.ticktext if name.startswith(("act", "use")) else None
                assert (choices[round(x)] == str(value)) if choices else x == value
                assert y == study_trials.value_of(ours[number])
                seen.add(number)
        assert seen == {t.number for t in world.trials if t.state.name in ("COMPLETE", "PRUNED")}
    assert world.panel("slice-learning_rate").figure.layout.xaxis.type == "log"
    assert world.panel("slice-margin").figure.layout.xaxis.type is None


@settings(deadline=None)
@example(1.0, 1e12, 3)
@given(st.floats(1e-12, 1e12), st.floats(1, 1e12), st.integers(2, 9))
def test_ticks_of_a_logarithm_are_few_and_inside(low, factor, room):
    high = low * factor
    ticks = study_parameters.log_ticks(low, high, room)
    assert 1 <= len(ticks) <= room
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)
    assert len(ticks) > 1 or low == high


# Workers


def test_the_time_line_has_a_bar_per_attempt(world):
    figure = world.panel("timeline").figure
    length = {"hours": 3600, "minutes": 60, "days": 86400}[
        figure.layout.xaxis.title.text.split()[0]
    ]
    assert "since 2026-03-01 12:00 UTC" in figure.layout.xaxis.title.text
    bars = {
        (trial, row, round(base * length), round((base + x) * length)): trace.name
        for trace in figure.data
        for (trial, _), row, base, x in zip(
            trace.customdata, trace.y, trace.base, trace.x, strict=True
        )
        if trace.name not in ("running", "killed")
    }
    expected = {}
    for line in world.attempts:
        if "outcome" in line:
            row = line["job"] if line["job"] == "41_0" else f"{line['job']} #{line['slot']}"
            times = [
                (datetime.fromisoformat(line[key]) - BEGUN).total_seconds()
                for key in ("started", "ended")
            ]
            expected[line["trial"], row, *times] = line["outcome"]
    assert bars == expected
    assert set(figure.layout.yaxis.categoryarray) == {"41_0", "41_1 #0", "41_1 #1"}


def attempt(number: int, **changes) -> Attempt:
    values = {"trial": number, "job": "local-7", "host": "a", "slot": 0, "started": 100.0 * number,
              "ended": 100.0 * number + 50, "outcome": "complete", "gpus": 0.0}  # fmt: skip
    return Attempt(**values | changes)


def test_background_processes_of_two_hosts_are_two_workers():
    figure = study_workers.timeline([attempt(0), attempt(1, host="b"), attempt(2)])
    assert list(figure.layout.yaxis.categoryarray) == ["local-7 on a", "local-7 on b"]
    alone = study_workers.timeline([attempt(0), attempt(1)])
    assert list(alone.layout.yaxis.categoryarray) == ["local-7"]


@pytest.mark.parametrize(
    ("seconds", "unit"),
    [(0, "seconds"), (119, "seconds"), (120, "minutes"), (7199, "minutes"), (7200, "hours"),
     (172800, "days")],
)  # fmt: skip
def test_the_unit_of_time_fits(seconds, unit):
    assert study_workers.unit_of_time(seconds)[1] == unit


# As a whole


def test_an_empty_study_and_one_that_has_just_begun(tmp_path):
    config = configured(tmp_path, objective="val_loss")
    shared = tuning.prepare(config, StudyPaths(config.output_dir / "facades"))
    inventory = Inventory(config, 0)
    empty = study.report(inventory)
    assert [panel.id for panel in empty.panels()] == ["history"]
    assert "no trials yet" in empty.panels()[0].title.lower()
    assert empty.facts["trials"] == "none yet, of 40"

    shared.study.add_trials([frozen(0, None, "RUNNING"), frozen(1, math.inf), frozen(2, 0.5)])
    begun = study.report(inventory)
    panels = {panel.id: panel for panel in begun.panels()}
    assert panels["importances"].figure is None
    assert "after 10 complete trials; there are 1" in panels["importances"].text
    assert panels["timeline"].figure is None
    assert "attempts.jsonl" in panels["timeline"].text
    assert "parallel-coordinates" not in panels
    assert "lower is better" in panels["history"].text
    page.write(begun, tmp_path / "report.html")


def test_without_a_study(tmp_path):
    with pytest.raises(StorageError, match="no study 'facades'"):
        study.report(Inventory(configured(tmp_path), 0))


def test_every_figure_is_drawn_on_paper(world, tmp_path):
    files = {path.name for path in static.write(world.report, tmp_path)}
    ids = {panel.id for panel in world.report.panels() if panel.figure is not None}
    assert files == {f"{name}.{kind}" for name in ids for kind in ("png", "pdf")}


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_every_figure(world, tmp_path):
    page.write(world.report, tmp_path / "report.html")
    dom = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
         "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=30000", "--dump-dom",
         (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=180,
    ).stdout  # fmt: skip
    dom = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    ids = [panel.id for panel in world.report.panels() if panel.figure is not None]
    plots = {
        match[1]: match[0] for match in re.finditer(r'<div[^>]* id="plot-([\w-]+)"[^>]*>', dom)
    }
    assert list(plots) == ids
    assert all('data-drawn="yes"' in tag for tag in plots.values())
    assert "WebGL is not supported" not in dom
    assert "&lt;b&gt;&amp; more&lt;/b&gt;" in dom  # what workers said is text
