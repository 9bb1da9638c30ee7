"""`tripletkit study show | best | export`: what they say of real studies, and of none.

What is expected is computed here from the list of trials that each test puts into its study.
"""

import csv
import json
import math
import os
import resource
import shutil
import sqlite3
import tomllib
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from tripletkit import cli, fsio, log
from tripletkit import config as configuration
from tripletkit.cli.options import load_study
from tripletkit.config import Config
from tripletkit.errors import ConfigError
from tripletkit.paths import StudyPaths
from tripletkit.tune import claims, storage, study

BEGUN = datetime(2026, 1, 31, 23, 59, 58, 250000)  # noqa: DTZ001 - Optuna's times are local
RANGES: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "margin": FloatDistribution(0.0, 1.0),
    "hidden_dim": IntDistribution(16, 4096),
    "dropout": FloatDistribution(0.0, 0.5),
    "activation": CategoricalDistribution(["relu", "gelu"]),
    "use_layer_norm": CategoricalDistribution([True, False]),
    "negative_sampler": CategoricalDistribution(["ucb", "fixed:2"]),
}


class Made(NamedTuple):
    """A trial of a test's study."""

    value: float | None
    params: Mapping[str, Any] = MappingProxyType({})
    state: str = "COMPLETE"
    reports: Mapping[int, float] = MappingProxyType({})
    attributes: Mapping[str, Any] = MappingProxyType({})
    seconds: float = 1.5


class Studio:
    """A folder with a config.toml, the study that it names, and the commands."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder = folder
        self.database = database
        self.file = folder / "config.toml"
        self.config = Config()

    def configure(self, **tuning: Any) -> None:
        """Write config.toml; nothing else is there yet."""
        values = {
            "study_name": "s", "storage_path": self.folder / "study.db", "n_trials": 30,
            "output_dir": self.folder / "trials", "objective": "map@r", "max_epochs": 15,
            "sampler": "random", "pruner": "none",
        }  # fmt: skip
        self.config = configuration.with_values(
            Config(),
            global_={"log_dir": self.folder / "logs"},
            paths={"val_parquet_path": self.folder / "val.parquet"},
            tuning={**values, **tuning},
        )
        fsio.write_text(self.file, configuration.dump(self.config))

    @property
    def paths(self) -> StudyPaths:
        return StudyPaths(self.config.output_dir / self.config.tuning.study_name)

    def study(self, trials: list[Made], **tuning: Any) -> optuna.Study:
        """Prepare a study as `tripletkit tune` does, with these trials."""
        self.configure(**tuning)
        path = self.config.tuning.storage_path
        if path.suffix == ".db" and not path.exists():
            shutil.copy(self.database, path)
        shared = study.prepare(self.config, self.paths)
        for made in trials:
            trial = create_trial(
                state=TrialState[made.state],
                value=made.value,
                params={**made.params},
                distributions={key: RANGES[key] for key in made.params},
                intermediate_values={**made.reports},
                user_attrs={**made.attributes},
            )
            trial.datetime_start = None if made.state == "WAITING" else BEGUN
            if trial.state.is_finished():
                trial.datetime_complete = BEGUN + timedelta(seconds=made.seconds)
            shared.study.add_trial(trial)
        return shared.study

    def run(self, *arguments: str | Path) -> int:
        """A command in this process; its exit code."""
        words = [*map(str, arguments), "--config", str(self.file)]
        return cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))


def copy(database: Path, to: Path) -> None:
    """Copy a database that is in use."""
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("VACUUM INTO ?", (str(to),))


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A storage with its tables, which take a while, and without a study of ours."""
    folder = tmp_path_factory.mktemp("database")
    tuning = {"study_name": "nobodys", "storage_path": folder / "study.db"}
    storage.create(configuration.with_values(Config(), tuning=tuning).tuning)
    copy(folder / "study.db", folder / "template.db")
    return folder / "template.db"


@pytest.fixture
def studio(tmp_path, monkeypatch, database) -> Studio:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(configuration.ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(log.out, "_width", 250)  # temporary folders have long names
    return Studio(tmp_path, database)


def ramp(count: int, **changes: Any) -> list[Made]:
    """Trials whose value is decided by the learning rate; the margin means nothing."""
    return [
        Made(
            value=i / count,
            params={"learning_rate": 1e-5 * 10 ** (4 * i / count), "margin": (7 * i % count) / count},
        )._replace(**changes)
        for i in range(count)
    ]  # fmt: skip


def facts(printed: str) -> dict[str, str]:
    """The table at the top of `study show`."""
    rows = [line.split(maxsplit=1) for line in printed.split("\n\n")[0].splitlines()]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def tables(printed: str) -> dict[str, list[list[str]]]:
    """The tables below it, by the first word of their headline: rows of cells."""
    found = {}
    for part in printed.split("\n\n")[1:]:
        rows = [line.split() for line in part.splitlines() if line.strip(" ─")]
        found[rows[0][0]] = rows
    return found


# study show


def test_show_says_what_the_study_is_about(studio, capsys):
    studio.study(
        [
            *ramp(3),
            Made(0.1, state="PRUNED"),
            Made(None, state="FAIL"),
            Made(None, state="RUNNING"),
            Made(None, state="WAITING"),
        ],
        space={
            "learning_rate": {"type": "float", "low": 5e-5, "high": 0.005, "log": True},
            "margin": {"type": "float", "low": 0.25, "high": 1.5},
            "hidden_dim": {"type": "int", "low": 128, "high": 1024, "step": 128},
            "ucb_warmup_samples": {"type": "int", "low": 1, "high": 1234567},
            "activation": {"type": "categorical", "choices": ["relu", "gelu"]},
        },
        pruner="successive_halving",
    )
    assert studio.run("study", "show") == 0
    assert facts(capsys.readouterr().out) == {
        "study": "s",
        "storage": str(studio.folder / "study.db"),
        "objective": "map@r, maximize",
        "sampler": "random",
        "pruner": "successive_halving",
        "trials": "1 running, 1 waiting, 3 complete, 1 pruned, 1 failed, of 30",
        "epochs": "15",
        "folder": str(studio.folder / "trials" / "s"),
        "learning_rate": "5e-05 to 0.005 (log)",
        "margin": "0.25 to 1.5",
        "hidden_dim": "128 to 1024 (step 128)",
        "ucb_warmup_samples": "1 to 1234567",
        "activation": "one of relu, gelu",
    }


@pytest.mark.parametrize(
    ("objective", "direction"), [("map@r", "maximize"), ("val_loss", "minimize")]
)
def test_show_ranks_the_five_best(studio, capsys, objective, direction):
    made = [Made(v, {"margin": v / 2}) for v in (0.5, 0.25, 0.75, 0.125, 1.0, 0.625, 0.375)]
    # Neither can be the best: a trial that was pruned, and one that some other study allows.
    made += [Made(9.0, state="PRUNED"), Made(-9.0, state="PRUNED"), Made(0.5, {"hidden_dim": 64})]
    studio.study(made, objective=objective)
    assert studio.run("study", "show") == 0
    printed = capsys.readouterr().out
    ranked = sorted(
        (trial for trial in enumerate(made) if trial[1].state == "COMPLETE"),
        key=lambda trial: trial[1].value,
        reverse=direction == "maximize",
    )
    assert facts(printed)["objective"] == f"{objective}, {direction}"
    assert tables(printed)["trial"] == [
        ["trial", objective, "margin", "hidden_dim"],
        *(
            [str(number), f"{trial.value:.4f}", *(str(value) for value in trial.params.values())]
            for number, trial in ranked[:5]
        ),
    ]


@pytest.mark.parametrize(
    ("objective", "best"), [("map@r", lambda i: i), ("val_loss", lambda i: -i)]
)
def test_show_tells_which_parameters_matter(studio, capsys, objective, best):
    studio.study(
        [trial._replace(value=best(i)) for i, trial in enumerate(ramp(20))], objective=objective
    )
    assert studio.run("study", "show") == 0
    headline, *rows = tables(capsys.readouterr().out)["parameter"]
    assert headline[1] == "importance"
    assert [name for name, _ in rows] == ["learning_rate", "margin"]
    shares = [float(share) for _, share in rows]
    assert shares[0] > 0.9
    assert sum(shares) == pytest.approx(1, abs=0.01)


def test_show_waits_for_enough_trials_before_it_tells(studio, capsys):
    shared = studio.study([*ramp(9), *ramp(9, state="PRUNED")])
    later = "importance of the parameters: after 10 complete trials"
    studio.run("study", "show")
    printed = capsys.readouterr().out
    assert later in printed
    assert "PED-ANOVA" not in printed
    shared.add_trial(create_trial(value=0.9, params={"learning_rate": 0.05, "margin": 0.5},
                                  distributions={k: RANGES[k] for k in ("learning_rate", "margin")}))  # fmt: skip
    studio.run("study", "show")
    printed = capsys.readouterr().out
    assert later not in printed
    assert "PED-ANOVA" in printed


@pytest.mark.parametrize(
    "made",
    [
        ramp(10, value=0.5),  # all alike
        ramp(10, params={}),  # nothing was tuned
        ramp(10, value=math.inf),
        [*ramp(10, value=-math.inf), *ramp(1)],
    ],
    ids=["alike", "no parameters", "infinite", "one finite"],
)
def test_show_is_silent_about_what_cannot_be_told(studio, capsys, made):
    studio.study(made)
    assert studio.run("study", "show") == 0
    printed = capsys.readouterr()
    assert "importance" not in printed.out
    assert printed.err == ""


def test_an_empty_study_is_shown(studio, capsys):
    studio.study([])
    assert studio.run("study", "show") == 0
    printed = capsys.readouterr().out
    assert facts(printed)["trials"] == "none yet, of 30"
    assert not tables(printed).keys() & {"trial", "parameter"}


# study best

PARAMS = {
    "learning_rate": 1.2345678901234567e-05,
    "margin": 1.0,
    "hidden_dim": 2048,
    "dropout": 0.1,
    "activation": "relu",
    "use_layer_norm": False,
    "negative_sampler": "fixed:2",
}


@pytest.mark.parametrize("objective", ["map@r", "val_loss"])
def test_best_is_a_piece_of_config_toml(studio, capsys, objective):
    better, worse = (0.75, 0.25) if objective == "map@r" else (0.25, 0.75)
    beyond = better + better - worse
    studio.study(
        [
            Made(worse, {"margin": 0.25}),
            Made(better, PARAMS, reports={1: worse, 2: better, 3: worse, 4: better}),
            Made(beyond, {"margin": 0.5}, state="PRUNED"),
            Made(better, {"margin": 0.75}),  # as good, and later
            Made(None, {"margin": 0.5}, state="FAIL"),
        ],
        objective=objective,
    )
    assert studio.run("study", "best") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == f"# study s, trial 1: {objective} {better:.4f} in epoch 2"
    sections = tomllib.loads(printed)
    assert sections.keys() == {"training", "training_model"}
    assert sections["training"] | sections["training_model"] == PARAMS

    piece = studio.folder / "piece.toml"
    piece.write_text(printed)
    loaded = configuration.load(piece, environ={})
    for section in (loaded.training, loaded.training_model):
        chosen = {key: value for key, value in section if key in PARAMS}
        assert chosen == {key: PARAMS[key] for key in chosen}
    assert loaded.training_model.hidden_dim == 2048
    assert loaded.training.learning_rate == PARAMS["learning_rate"]


def test_best_has_only_the_sections_that_it_needs(studio, capsys):
    studio.study([Made(0.5, {"margin": 0.25})])
    studio.run("study", "best")
    assert capsys.readouterr().out.splitlines() == [
        "# study s, trial 0: map@r 0.5000", "[training]", "margin = 0.25",
    ]  # fmt: skip


def test_best_for_programs(studio, capsys):
    studio.study([Made(0.5, {"margin": 0.25}), Made(0.625, PARAMS, reports={3: 0.625})])
    assert studio.run("study", "best", "--json") == 0
    assert strict(capsys.readouterr().out) == {
        "number": 1, "metric": "map@r", "value": 0.625, "epoch": 3, "params": PARAMS,
    }  # fmt: skip


# Where there is nothing


def test_there_is_no_study(studio, capsys):
    studio.configure(study_name="lost")
    table = studio.folder / "out.csv"
    for command in (["show"], ["best"], ["export", table]):
        assert studio.run("study", *command) == 5
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"there is no study 'lost' in {studio.folder / 'study.db'}" in printed.err
        assert "`tripletkit tune` creates it" in printed.err
    assert list(studio.folder.iterdir()) == [studio.file]  # looking for it made nothing


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ([], "no trial at all"),
        (
            [Made(None, state="RUNNING"), Made(None, state="FAIL"), Made(0.5, state="PRUNED"),
             Made(None, state="FAIL")],
            "2 failed, 1 pruned, 1 running",
        ),
    ],
)  # fmt: skip
def test_no_trial_is_complete(studio, capsys, made, found):
    studio.study(made)
    for flags in ([], ["--json"]):
        assert studio.run("study", "best", *flags) == 5
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"study s has no complete trial: {found}" in printed.err
    assert studio.run("study", "show") == 0
    assert not tables(capsys.readouterr().out).keys() & {"trial", "parameter"}


# study export

OWNER = {"job": "4711_3", "restart": 1, "host": "n1", "pid": 7, "attempt": 2, "since": "now"}
CAUSE = {"kind": "nan", "message": 'a "loss", which\nis no number'}
EVERY_KIND = [
    Made(0.75, PARAMS, reports={1: 0.75}, attributes={claims.OWNER: OWNER}, seconds=90.25),
    Made(0.5, {"margin": 0.125}, state="PRUNED", attributes={"loss": math.nan, "ranks": [1, 2]}),
    Made(
        None, state="FAIL", attributes={claims.OWNER: OWNER | {"attempt": 1}, claims.CAUSE: CAUSE}
    ),
    Made(None, {"margin": 1.0}, state="RUNNING"),
    Made(None, state="WAITING"),
    Made(math.inf, {"hidden_dim": 16, "use_layer_norm": True}),
]


def strict(text: str) -> Any:
    """JSON as other languages read it, which know no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def expected(number: int, made: Made) -> dict[str, Any]:
    """The row of a trial: times as times, `params` and `user_attrs` as they are."""
    owner = made.attributes.get(claims.OWNER, {})
    finished = made.state in ("COMPLETE", "PRUNED", "FAIL")
    return {
        "number": number,
        "state": made.state,
        "value": made.value,
        "datetime_start": BEGUN if made.state != "WAITING" else None,
        "datetime_complete": BEGUN + timedelta(seconds=made.seconds) if finished else None,
        "duration": made.seconds if finished else None,
        "params": {**made.params},
        "user_attrs": {**made.attributes},
        "job": owner.get("job"),
        "attempts": owner.get("attempt"),
    }


def flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with a column for each parameter and attribute, in alphabetical order."""
    found = []
    for row in rows:
        flattened: dict[str, Any] = {}
        for name, value in row.items():
            if not isinstance(value, dict):
                flattened[name] = value
                continue
            for key in sorted({key for each in rows for key in each[name]}):
                cell = value.get(key)
                if name == "user_attrs" and cell is not None:
                    cell = json.dumps(finite(cell))
                flattened[f"{name}_{key}"] = cell
        found.append(flattened)
    return found


ROWS = [expected(number, made) for number, made in enumerate(EVERY_KIND)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, database) -> Path:
    """A folder with trials.json, trials.csv and trials.parquet of one study."""
    studio = Studio(tmp_path_factory.mktemp("exported"), database)
    studio.study(EVERY_KIND)
    for suffix in ("json", "csv", "parquet"):
        assert studio.run("study", "export", studio.folder / f"trials.{suffix}") == 0
    return studio.folder


def test_export_for_programs(exported):
    rows = strict((exported / "trials.json").read_text())
    for row, wanted in zip(rows, ROWS, strict=True):
        for key in ("datetime_start", "datetime_complete"):
            row[key] = row[key] and datetime.fromisoformat(row[key])
        wanted = wanted | {"value": finite(wanted["value"])}
        wanted["user_attrs"] = {key: finite(value) for key, value in wanted["user_attrs"].items()}
        assert list(row) == list(wanted)
        assert row == wanted


def test_export_for_spreadsheets(exported):
    with (exported / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, wanted in zip(rows, flat(ROWS), strict=True):
        assert list(row) == list(wanted)
        for key, value in wanted.items():
            if value is None:
                assert row[key] == "", key
            elif isinstance(value, datetime):
                assert datetime.fromisoformat(row[key]) == value, key
            elif isinstance(value, float):
                assert float(row[key]) == value, key
            else:
                assert row[key] == str(value), key


TYPES = {
    "number": pa.int64(), "state": pa.string(), "value": pa.float64(),
    "datetime_start": pa.timestamp("us"), "datetime_complete": pa.timestamp("us"),
    "duration": pa.float64(), "job": pa.string(), "attempts": pa.int64(),
}  # fmt: skip


def test_export_for_data_frames(exported):
    table = pq.read_table(exported / "trials.parquet")
    assert table.to_pylist() == flat(ROWS)
    types = dict(zip(table.column_names, table.schema.types, strict=True))
    assert types == TYPES | {
        "params_activation": pa.string(),
        "params_dropout": pa.float64(),
        "params_hidden_dim": pa.int64(),
        "params_learning_rate": pa.float64(),
        "params_margin": pa.float64(),
        "params_negative_sampler": pa.string(),
        "params_use_layer_norm": pa.bool_(),
        "user_attrs_loss": pa.string(),
        "user_attrs_ranks": pa.string(),
        f"user_attrs_{claims.CAUSE}": pa.string(),
        f"user_attrs_{claims.OWNER}": pa.string(),
    }


def test_export_says_what_it_wrote_and_makes_the_folder(studio, capsys):
    studio.study(ramp(2))
    for name in ("trials.csv", "new/folder/trials.csv"):  # relative to the current folder
        assert studio.run("study", "export", name) == 0
        assert capsys.readouterr().out == f"wrote {name}: 2 trials\n"
        assert (studio.folder / name).exists()


def test_a_choice_of_several_types_is_a_column_of_text(studio, monkeypatch):
    monkeypatch.setitem(RANGES, "init", CategoricalDistribution([False, "lda", 2]))
    studio.study([Made(0.5, {"init": value}) for value in (False, "lda", 2)] + [Made(0.5)])
    studio.run("study", "export", "trials.parquet")
    table = pq.read_table(studio.folder / "trials.parquet")
    assert table["params_init"].to_pylist() == ["False", "lda", "2", None]


@pytest.mark.parametrize("made", [[], [Made(None, state="WAITING")] * 2], ids=["empty", "waiting"])
def test_where_nothing_is_known_yet_the_columns_are_there(studio, made):
    studio.study(made)
    for suffix in ("csv", "json", "parquet"):
        assert studio.run("study", "export", f"trials.{suffix}") == 0
    assert len(strict((studio.folder / "trials.json").read_text())) == len(made)
    headline, *rows = csv.reader((studio.folder / "trials.csv").read_text().splitlines())
    assert headline == list(TYPES)
    assert [row[:2] for row in rows] == [[str(n), "WAITING"] for n in range(len(made))]
    table = pq.read_table(studio.folder / "trials.parquet")
    assert table.num_rows == len(made)
    assert dict(zip(table.column_names, table.schema.types, strict=True)) == TYPES


@pytest.mark.parametrize("name", ["trials.xlsx", "trials", "trials.CSV", ".csv"])
def test_a_format_that_nobody_writes(studio, capsys, name):
    studio.configure()  # there is no study: what is wrong with the name is said first
    assert studio.run("study", "export", name) == 2
    printed = capsys.readouterr().err
    assert f"{name}: no format has this suffix" in printed
    assert "one of .csv, .json, .parquet" in printed
    assert list(studio.folder.iterdir()) == [studio.file]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_file_that_cannot_be_written_leaves_nothing(studio, capsys):
    studio.study(ramp(3))
    (studio.folder / "file").touch()
    (studio.folder / "folder.json").mkdir()
    before = names(studio.folder)
    for target in ("file/trials.csv", "file/trials.parquet", "folder.json"):
        assert studio.run("study", "export", target) == 1
        printed = capsys.readouterr()
        assert target.partition("/")[0] in printed.err
        assert "Traceback" not in printed.err
        assert printed.out == ""
    assert names(studio.folder) == before


def test_a_disk_that_fills_up_leaves_the_table_of_before(studio, capsys):
    studio.study(ramp(9), storage_path=studio.folder / "study.journal")
    assert studio.run("study", "export", "trials.csv") == 0
    old = (studio.folder / "trials.csv").read_bytes()
    before = names(studio.folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
    try:
        assert studio.run("study", "export", "trials.csv") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in capsys.readouterr().err
    assert (studio.folder / "trials.csv").read_bytes() == old
    assert names(studio.folder) == before


# Whose [tuning] counts


def load(studio: Studio, *overrides: str) -> Config:
    return load_study(studio.file, overrides)


def test_before_there_is_a_study_the_file_and_the_flags_count(studio):
    studio.configure(n_trials=7)
    assert load(studio) == studio.config
    assert load(studio, "tuning.n_trials=8").tuning.n_trials == 8


def test_the_flags_of_tune_need_not_be_given_again(studio):
    """config.toml says something else than the flags that made the study."""
    studio.study([], objective="val_loss", max_epochs=3, n_trials=0, workers=4, trials_per_worker=3)
    prepared = studio.config
    studio.configure()
    fsio.write_text(studio.file, studio.file.read_text() + "\n")
    found = load(studio, "slurm.time=01:00:00")
    assert (found.tuning.objective, found.tuning.max_epochs) == ("val_loss", 3)
    assert found.tuning.total == 12
    assert found.slurm.time == "01:00:00"
    assert found.tuning == prepared.tuning.model_copy(update={"n_trials": 12})
    assert configuration.with_values(found, tuning=studio.config.tuning.model_dump()) == (
        configuration.with_values(studio.config, slurm={"time": "01:00:00"})
    )  # no other section is the study's


def test_what_the_command_line_sets_counts_all_the_same(studio):
    studio.study([], max_epochs=3)
    found = load(studio, "tuning.max_epochs=5")
    assert (found.tuning.max_epochs, found.tuning.n_trials) == (5, 30)


def test_a_storage_path_on_the_command_line_beats_the_address_of_before(studio):
    studio.study([])
    own = configuration.load(studio.paths.config, environ={})
    url = "postgresql://me@nowhere/tuning"
    own = configuration.with_values(own, tuning={"storage_url": url})
    fsio.write_text(studio.paths.config, configuration.dump(own))
    assert load(studio).tuning.storage_url == url
    found = load(studio, f"tuning.storage_path={studio.folder}/study.db")
    assert storage.location(found.tuning) == str(studio.folder / "study.db")
    other = "postgresql://me@there/tuning"
    assert load(studio, f"tuning.storage_url={other}").tuning.storage_url == other


def test_another_study_has_a_tuning_of_its_own(studio):
    studio.study([], study_name="other", max_epochs=3)
    studio.configure(max_epochs=9)
    assert load(studio).tuning.max_epochs == 9
    found = load(studio, "tuning.study_name=other")
    assert (found.tuning.study_name, found.tuning.max_epochs) == ("other", 3)


def test_a_study_folder_that_was_moved_is_where_it_was_found(studio, capsys):
    studio.study([])
    moved = studio.folder / "elsewhere"
    (studio.folder / "trials").rename(moved)
    studio.configure(output_dir=moved)
    assert load(studio).output_dir == moved
    assert studio.run("study", "show") == 0
    assert facts(capsys.readouterr().out)["folder"] == str(moved / "s")


def test_a_broken_configuration_of_the_study_is_named(studio):
    studio.study([])
    studio.paths.config.write_text("[tuning\n")
    with pytest.raises(ConfigError, match=str(studio.paths.config)):
        load(studio)


def test_the_commands_look_where_the_command_line_says(studio, capsys):
    """A copy of the database, in which the study went on."""
    studio.study(ramp(1))
    other = studio.folder / "copy.db"
    copy(studio.folder / "study.db", other)
    aside = configuration.with_values(studio.config, tuning={"storage_path": other})
    shared = storage.open_study(aside.tuning, seed=0, workers=1)
    shared.study.add_trial(create_trial(value=0.75))
    flags = ("--set", f"tuning.storage_path={other}")
    assert studio.run("study", "show", *flags) == 0
    assert facts(capsys.readouterr().out)["storage"] == str(other)
    studio.run("study", "best", *flags, "--json")
    assert strict(capsys.readouterr().out)["number"] == 1
    studio.run("study", "export", "trials.json", *flags)
    assert len(strict((studio.folder / "trials.json").read_text())) == 2
    capsys.readouterr()
    assert studio.run("study", "best", "--json") == 0
    assert strict(capsys.readouterr().out)["number"] == 0


def test_a_study_by_its_name(studio, capsys):
    studio.study([Made(0.25)], study_name="other")
    studio.study([Made(0.5)])
    for flags, value in (([], 0.5), (["--study-name", "other"], 0.25)):
        assert studio.run("study", "best", "--json", *flags) == 0
        assert strict(capsys.readouterr().out)["value"] == value
