"""`tripletkit evaluate`: intervals that mean what they say, and reports that others can read."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt

from tests import toy
from tests.test_retrieval import gaussian
from tripletkit import cli, log, stages
from tripletkit import config as configuration
from tripletkit.apply import confusion, intervals
from tripletkit.apply.evaluate import column_names
from tripletkit.apply.tables import markdown
from tripletkit.paths import run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.retrieval import retrieve, summarize

TOP_K = [1, 5, 10]
METRICS = ["recall@1", "recall@5", "recall@10", "map@r", "mrr", "r_precision"]


# --- intervals -------------------------------------------------------------------------------


def test_the_sums_of_buildings_have_the_means_of_the_queries():
    embeddings, building = gaussian(np.random.default_rng(0).integers(40, size=150))
    for limit in (0, 60):
        found = retrieve(embeddings, building, max_queries=limit)
        sums = intervals.by_building(found, building.numpy(), TOP_K)
        asked = building[found.query_rows].unique()
        assert sums.building.tolist() == asked.tolist()
        assert sums.queries.sum() == len(found.query_rows)
        means = {name: each.sum() / sums.queries.sum() for name, each in sums.scores.items()}
        expected = summarize(found, TOP_K)
        assert expected.pop("queries") == sums.queries.sum()
        assert means == pytest.approx(expected, rel=1e-12)


def test_each_resample_draws_as_many_buildings_as_there_are_whatever_the_block():
    whole = np.concatenate(list(intervals.weights(37, 50, seed=3)))
    assert whole.shape == (50, 37)
    assert (whole.sum(1) == 37).all()
    assert len(np.unique(whole, axis=0)) == 50
    for block in (1, 37, 200):
        assert (np.concatenate(list(intervals.weights(37, 50, 3, block=block))) == whole).all()
    assert (np.concatenate(list(intervals.weights(37, 50, seed=4))) != whole).any()


def test_resamples_are_those_of_a_loop_that_draws_buildings_with_all_their_queries():
    random = np.random.default_rng(0)
    building = np.sort(random.integers(25, size=120))
    scores = random.random((120, 3))
    _, which = np.unique(building, return_inverse=True)
    sums = np.stack([np.bincount(which, column) for column in scores.T], axis=1)
    queries = np.bincount(which).astype(float)
    drawn = np.concatenate(list(intervals.weights(len(queries), 40, seed=1)))
    expected = []
    for times in drawn.astype(int):
        rows = [
            row
            for b, count in enumerate(times)
            for _ in range(count)
            for row in np.flatnonzero(which == b)
        ]
        expected.append(scores[rows].mean(0))
    for block in (1, 77, 2**20):
        found = intervals.resample(queries, sums, 40, 1, block=block)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def simulated(random, buildings):
    """Queries and hits of buildings that differ: most do well, some fail as a whole."""
    queries = random.integers(2, 12, size=buildings).astype(float)
    chance = random.beta(0.8, 0.4, size=buildings)
    return queries, random.binomial(queries.astype(int), chance).astype(float)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    truth = 0.8 / 1.2  # size and chance are independent
    covered = naive = 0
    for seed in range(300):
        queries, hits = simulated(random, 80)
        low, high = intervals.interval(intervals.resample(queries, hits[:, None], 300, seed)[:, 0])
        covered += low <= truth <= high
        mean = hits.sum() / queries.sum()  # as if each image were on its own
        naive += abs(mean - truth) < 1.96 * np.sqrt(mean * (1 - mean) / queries.sum())
    assert 0.91 < covered / 300 < 0.98
    assert naive / 300 < 0.8


def test_a_difference_is_surer_than_the_two_it_is_between():
    random = np.random.default_rng(1)
    queries, hits = simulated(random, 200)
    better = np.minimum(hits + random.binomial(1, 0.3, size=200), queries)
    draws = intervals.resample(queries, np.stack((hits, better), 1), 1000, 0)
    one, two = (intervals.interval(draws[:, c]) for c in (0, 1))
    low, high = intervals.interval(draws[:, 1] - draws[:, 0])
    assert one[1] > two[0]  # they overlap
    assert low > 0
    assert high - low < (one[1] - one[0]) / 2


def test_memory_stays_bounded():
    queries = np.full(200_000, 5.0)
    tracemalloc.start()
    try:
        intervals.resample(queries, queries[:, None] * 0.5, 100, 0, block=10**6)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6  # a few blocks of 8 MB and the columns; all the weights are 160 MB


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with data, a config.toml and two trained runs, as a user has it."""
    folder = tmp_path_factory.mktemp("site")
    for number, split in enumerate(("train", "val")):
        toy.write_parquet(folder / f"{split}.parquet", buildings=40, first=100 * number, dim=16)
    noise = {"dim": 16, "noise": 0.6}
    alone = toy.table(buildings=9, images=1, first=400, seed=1, **noise)
    pq.write_table(
        pa.concat_tables([toy.table(buildings=40, first=300, **noise), alone]),
        folder / "test.parquet",
    )
    values = {
        "global": {"log_dir": folder / "logs", "scratch_dir": folder},
        "paths": {f"{split}_parquet_path": folder / f"{split}.parquet" for split in stages.SPLITS}
        | {"checkpoint_dir": folder / "run"},
        "training": {
            "num_epochs": 2,
            "batch_size": 32,
            "monitor": "map@r",
            "retrieval_metric_top_k": TOP_K,
            "device": "cpu",
        },
        "training_model": {"hidden_dim": 16, "output_dim": 8},
    }
    (folder / "config.toml").write_text(configuration.template(values))
    for name, more in (("run", []), ("other", ["--set=training_model.output_dim=4"])):
        arguments = [
            "-c",
            str(folder / "config.toml"),
            f"--set=paths.checkpoint_dir={folder}/{name}",
        ]
        assert call("train", *arguments, *more) == 0
    return folder


def call(*arguments: str) -> int:
    return cli.run(lambda: cli.app(arguments, prog_name="tripletkit", standalone_mode=False))


@pytest.fixture
def evaluate(site, tmp_path):
    """Run the command in this process; returns its exit code."""

    def run(*arguments: object) -> int:
        return call("evaluate", "-c", str(site / "config.toml"), *map(str, arguments))

    return run


def test_the_best_checkpoint_beside_raw(site, evaluate, capsys):
    capsys.readouterr()
    assert evaluate() == 0
    printed = capsys.readouterr()
    assert "160 queries of 40 buildings in a gallery of 169 images" in printed.out
    assert "run/best" in printed.out
    assert re.search(r"recall@1 +│ 0\.\d{4} \[0\.\d{4},[01]\.\d{4}\] +│", printed.out)
    place = run_paths(site / "run").evaluation("test")
    assert str(place.markdown) in printed.out

    report = json.loads(place.report.read_text())
    assert report["format"] == 1
    assert (report["split"], report["epoch"]) == ("test", report["columns"][1]["epoch"])
    assert report["checkpoint"] == str(run_paths(site / "run").best)
    assert report["data"] == {
        "source": str(site / "test.parquet"),
        "fingerprint": report["data"]["fingerprint"],
        "dim": 16,
        "images": 169,
        "buildings": 49,
        "singletons": 9,
        "queries": 160,
        "queried_buildings": 40,
        "max_queries": 0,
    }
    assert report["bootstrap"] == {
        "unit": "building",
        "interval": "percentile",
        "level": 0.95,
        "resamples": 1000,
    }
    raw, head = report["columns"]
    assert (raw["name"], head["name"]) == ("raw", "run/best")
    assert (report["raw"], report["head"]) == (raw["metrics"], head["metrics"])
    assert list(raw["metrics"]) == [*METRICS, "queries"]
    assert list(head["metrics"]) == ["val_loss", *METRICS, "queries"]
    assert head["sha256"] == hashlib.sha256(Path(head["checkpoint"]).read_bytes()).hexdigest()
    for column in report["columns"]:
        assert list(column["intervals"]) == METRICS
        for name, (low, high) in column["intervals"].items():
            assert low <= column["metrics"][name] <= high
    (difference,) = report["differences"]
    assert (difference["of"], difference["minus"]) == ("run/best", "raw")
    for name, value in difference["metrics"].items():
        assert value == pytest.approx(head["metrics"][name] - raw["metrics"][name])
        assert difference["intervals"][name][0] <= value <= difference["intervals"][name][1]
    assert head["mistakes"] == round(160 * (1 - head["metrics"]["recall@1"]))
    assert sum(pair["mistakes"] for pair in head["pairs"]) == head["mistakes"] > 0
    assert set(head["pairs"][0]) == {"building", "other", "mistakes", "similarity", "images"}
    assert set(head["weakest"][0]) == {
        "building", "images", "queries", "recall_at_1", "map_at_r", "taken_for",
    }  # fmt: skip


def test_the_numbers_are_those_of_the_training(site, evaluate, capsys):
    capsys.readouterr()
    assert evaluate("--split=val", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    state = checkpoints.load(run_paths(site / "run").best)
    trained = state["metrics"]["val_metrics"]
    for name in METRICS:
        assert report["head"][name] == pytest.approx(trained[name], abs=1e-9)
    first = json.loads(run_paths(site / "run").metrics.read_text().splitlines()[0])
    for name in METRICS:
        assert report["raw"][name] == pytest.approx(first["raw"][name], abs=1e-9)


def test_several_checkpoints_are_columns_and_each_difference_is_there(
    site, evaluate, tmp_path, capsys
):
    paths = [run_paths(site / "run").best, run_paths(site / "other").final]
    given = [f"--checkpoint={path}" for path in (*paths, paths[0])]  # one of them twice
    capsys.readouterr()
    assert evaluate(*given, f"--output={tmp_path}/out", "--top=3", "--json", "--resamples=200") == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == report
    assert [each["name"] for each in report["columns"]] == ["raw", "run/best", "other/final"]
    assert [(each["of"], each["minus"]) for each in report["differences"]] == [
        ("run/best", "raw"),
        ("other/final", "raw"),
        ("other/final", "run/best"),
    ]
    assert report["checkpoint"] == str(paths[0])
    assert all(len(each["pairs"]) == len(each["weakest"]) == 3 for each in report["columns"][1:])
    again = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert evaluate(*given, f"--output={tmp_path}/out", "--top=3", "--json", "--resamples=200") == 0
    assert {**json.loads(capsys.readouterr().out), "created": again["created"]} == again


def test_the_markdown_holds_the_tables(site, evaluate, tmp_path):
    assert evaluate(f"--output={tmp_path}/out") == 0
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    text = (tmp_path / "out/evaluation.md").read_text()
    assert text == markdown(report)
    low, high = report["columns"][1]["intervals"]["map@r"]
    cell = f"{report['head']['map@r']:.4f} [{low:.4f},{high:.4f}]"
    assert re.search(rf"^\| map@r \| [^|]+ \| {re.escape(cell)} \|$", text, re.MULTILINE)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # tables are rectangular
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    pair = report["columns"][1]["pairs"][0]
    assert f"| {pair['building']} | {pair['other']} | {pair['mistakes']} |" in text


NASTY = "a|b <b>:key:</b> *c* _d_ [/red](f) `g` \\ $j$"


def test_names_are_shown_as_they_are(site, evaluate, tmp_path, capsys):
    buildings = toy.table(buildings=20, images=3, dim=16, noise=0.9)
    names = pa.array([f"{NASTY}{each}" for each in buildings["building_id"].to_pylist()])
    buildings = buildings.set_column(1, "building_id", names)
    source = tmp_path / "data `*x*`.parquet"
    pq.write_table(buildings, source)
    given = [f"--set=paths.test_parquet_path={source}", f"--output={tmp_path}/out"]
    capsys.readouterr()
    assert evaluate(*given, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    column = report["columns"][1]
    assert {each["building"] for each in column["weakest"] + column["pairs"]} <= set(
        names.to_pylist()
    )

    (tmp_path / "out/evaluation.json").write_text("the tables come from another try")
    assert evaluate(*given) == 0
    assert ":key:" in capsys.readouterr().out
    text = (tmp_path / "out/evaluation.md").read_text()
    inline = [
        token
        for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
        if token.type == "inline"
    ]
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "text_special", "softbreak", "code_inline"}
    shown = ["".join(child.content for child in token.children) for token in inline]
    for each in column["pairs"]:
        assert {each["building"], each["other"], *each["images"]} <= set(shown)
    assert any(f"data: {source}, fingerprint" in line for line in shown)


LONG = ("runs_of_the_spring/lambda_0.1", "runs_of_the_spring/lambda_0.2_and_a_half", "x" * 90)


@pytest.fixture
def long_names(site, tmp_path) -> list[Path]:
    """Checkpoints in folders with long names."""
    paths = [run_paths(tmp_path / name).best for name in LONG]
    for path in paths:
        path.parent.mkdir(parents=True)
        shutil.copy(run_paths(site / "run").best, path)
    return paths


@pytest.mark.parametrize("count", [1, 2, 3])
def test_in_80_columns_every_number_is_whole(
    long_names, evaluate, tmp_path, capsys, monkeypatch, count
):
    monkeypatch.setattr(log.out, "_width", 80)
    out = tmp_path / "out"
    given = [f"--checkpoint={path}" for path in long_names[-count:]]
    capsys.readouterr()
    assert evaluate(*given, f"--output={out}") == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "evaluation.json").read_text())
    labels = dict(zip((each["name"] for each in report["columns"]), ["raw", *"ABC"], strict=False))
    for each in report["columns"][1:]:
        assert f"{labels[each['name']]}, {each['name']}: {each['checkpoint']}, epoch" in printed
    assert max(len(line) for line in printed.splitlines() if line[:1] in set("┏┃┡│├└")) <= 80
    text = (out / "evaluation.md").read_text()
    numbers = text[text.index("## Metrics") : text.index("## Most confused")]
    assert max(map(len, numbers.splitlines())) <= 80

    expected = []
    for each in report["columns"]:
        for name, (low, high) in each["intervals"].items():
            value = each["metrics"][name]
            expected.append((name, labels[each["name"]], f"{value:.4f} [{low:.4f},{high:.4f}]"))
    for each in report["differences"]:
        called = f"{labels[each['of']]} - {labels[each['minus']]}"
        for name, (low, high) in each["intervals"].items():
            value = each["metrics"][name]
            expected.append((name, called, f"{value:+.4f} [{low:+.4f},{high:+.4f}]"))
    for page, mark in ((printed, "┃│"), (numbers, "|")):
        assert sorted(numbers_of(page, mark)) == sorted(expected)


def numbers_of(page: str, mark: str) -> list[tuple[str, str, str]]:
    """(metric, embeddings, value and interval) of the first two tables, whichever way they lie."""
    found, header, metric = [], [], ""
    page = page[page.index("Metrics") :].partition("Most confused")[0]
    for line in page.splitlines():
        if line[:1] not in tuple(mark) or line.startswith("|--"):
            continue
        cells = [cell.strip() for cell in re.split(f"[{mark}]", line)[1:-1]]
        if cells[0] == "metric":
            header = cells
            continue
        metric = cells[0] or metric
        if header[-1] == "95% interval":
            found.append((metric, cells[1], " ".join(cells[2:])))
        else:
            found += [(metric, *pair) for pair in zip(header[1:], cells[1:], strict=True)]
    return found


def test_where_there_is_room_the_columns_have_their_names(
    long_names, evaluate, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(log.out, "_width", 200)
    given = [f"--checkpoint={path}" for path in long_names[:2]]
    capsys.readouterr()
    assert evaluate(*given, f"--output={tmp_path}/out") == 0
    printed = capsys.readouterr().out
    first, second = (f"{name.partition('/')[2]}/best" for name in LONG[:2])
    assert re.search(rf"┃ metric +┃ raw +┃ {first} +┃ {second} ┃", printed)
    assert f"{first}: {long_names[0]}, epoch" in printed


def test_without_lists_nothing_is_searched_for_them(site, evaluate, capsys, monkeypatch):
    capsys.readouterr()
    assert evaluate("--json") == 0
    full = json.loads(capsys.readouterr().out)["columns"][1]
    monkeypatch.setattr(confusion, "nearest", None)
    assert evaluate("--top=0", "--json") == 0
    column = json.loads(capsys.readouterr().out)["columns"][1]
    assert column == {**full, "weakest": [], "pairs": []}
    assert evaluate("--top=0") == 0
    printed = capsys.readouterr().out
    assert "Differences, paired" in printed
    for absent in ("Most confused", "Weakest", "none"):
        assert absent not in printed
        assert absent not in run_paths(site / "run").evaluation("test").markdown.read_text()


def test_a_report_is_of_the_file_that_was_read(site, evaluate, tmp_path, monkeypatch, capsys):
    """A run on its way saves a better checkpoint under the same name."""
    run = run_paths(tmp_path / "run")
    run.root.mkdir()
    run.best.write_bytes(run_paths(site / "run").best.read_bytes())
    before = hashlib.sha256(run.best.read_bytes()).hexdigest()
    load = checkpoints.load_with_sha256

    def load_and_replace(path):
        found = load(path)
        checkpoints.save(found[0] | {"epoch": 9}, path)
        return found

    monkeypatch.setattr(checkpoints, "load_with_sha256", load_and_replace)
    capsys.readouterr()
    assert evaluate(f"--checkpoint={run.best}", "--json") == 0
    column = json.loads(capsys.readouterr().out)["columns"][1]
    assert hashlib.sha256(run.best.read_bytes()).hexdigest() != before
    assert column["sha256"] == before
    assert column["epoch"] != 9


def test_a_limit_of_queries_is_heeded_and_the_gallery_stays(site, evaluate, capsys):
    capsys.readouterr()
    assert evaluate("--json", "--set=training.retrieval_metric_max_queries=50") == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["queries"], data["images"], data["singletons"]) == (50, 169, 9)
    assert data["queried_buildings"] <= 40


def test_a_job_queued_by_an_earlier_version_names_one_checkpoint_as_text(site, capsys):
    config = configuration.load(site / "config.toml", environ={})
    path = run_paths(site / "other").best
    capsys.readouterr()
    options = {"split": "test", "checkpoint": str(path), "as_json": True}
    assert stages.JOBS["evaluate"](config, lambda: False, **options) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(path)


def test_a_checkpoint_that_cannot_be_used_stops_it_before_the_work(
    site, evaluate, tmp_path, capsys
):
    torn = tmp_path / "torn.pt"
    torn.write_bytes(run_paths(site / "run").best.read_bytes()[:500])
    good = run_paths(site / "run").best
    output = tmp_path / "out"
    assert evaluate(f"--checkpoint={good}", f"--checkpoint={torn}", f"--output={output}") == 3
    error = capsys.readouterr().err
    assert f"{torn} is torn" in error
    assert not output.exists()
    fresh = f"--set=global.scratch_dir={tmp_path}/scratch"  # the split has not been read yet
    assert evaluate(f"--checkpoint={good}", f"--checkpoint={torn}", fresh) == 3
    assert not (tmp_path / "scratch").exists()


def test_a_job_is_not_queued_for_files_that_are_not_there(site, evaluate, tmp_path, capsys):
    background = [f"--set=global.log_dir={tmp_path}/logs", "--cluster=local"]
    assert evaluate(f"--checkpoint={tmp_path}/no.pt", *background) == 3
    assert f"there is no checkpoint {tmp_path}/no.pt" in capsys.readouterr().err
    assert evaluate(f"--set=paths.checkpoint_dir={tmp_path}", *background) == 3
    assert "holds neither checkpoint_best.pt nor" in capsys.readouterr().err
    assert evaluate(f"--set=paths.test_parquet_path={tmp_path}/no.parquet", *background) == 3
    assert f"{tmp_path}/no.parquet: no such file" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert evaluate(f"--output={tmp_path}/file/out", *background) == 2
    assert f"{tmp_path}/file is no folder" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_an_interrupt_is_one_line_and_leaves_no_file(site, tmp_path):
    command = [
        sys.executable, "-m", "tripletkit", "evaluate", "-c", site / "config.toml",
        "--resamples=1000000", f"--output={tmp_path}/out",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stderr is not None
        for line in it.stderr:
            if "the raw embeddings of" in line:
                break
        it.send_signal(signal.SIGINT)
        out, err = it.communicate()
    assert it.returncode == 130
    assert err.endswith("error: interrupted\n")
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(site, evaluate, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert evaluate(f"--output={tmp_path}/file/out") == 2
    assert f"{tmp_path}/file is no folder" in capsys.readouterr().err
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluation").touch()  # the default place is only a default
    (run / "checkpoint_best.pt").symlink_to(run_paths(site / "run").best)
    assert evaluate(f"--checkpoint={run}/checkpoint_best.pt") == 0
    captured = capsys.readouterr()
    assert "the report is not kept" in captured.err
    assert "recall@1" in captured.out


def test_a_full_disk_leaves_neither_file(site, tmp_path):
    """A limit on the size of files does what a full disk does: the write fails."""
    command = [sys.executable, "-m", "tripletkit", "evaluate", "-c", str(site / "config.toml")]
    limited = ["bash", "-c", 'ulimit -f 2; exec "$@"', "bash", *command, f"--output={tmp_path}/out"]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_names_tell_checkpoints_apart():
    def names(*paths):
        return column_names([Path(path) for path in paths])

    assert names("/a/run/checkpoint_best.pt") == ["run/best"]
    assert names("/a/run/checkpoint_best.pt", "/a/run/checkpoint_epoch_3.pt") == [
        "run/best",
        "run/epoch_3",
    ]
    assert names("/a/run/checkpoint_best.pt", "/b/run/checkpoint_best.pt") == [
        "a/run/best",
        "b/run/best",
    ]
    assert names("/x.pt", "/run/x.pt") == ["/x", "run/x"]
    assert names("/run/best.pt", "/run/checkpoint_best.pt") == [
        "/run/best.pt",
        "/run/checkpoint_best.pt",
    ]


def test_few_buildings_are_warned_about(site, evaluate, tmp_path, capsys):
    toy.write_parquet(tmp_path / "few.parquet", buildings=5, first=900, dim=16)
    assert evaluate(f"--set=paths.test_parquet_path={tmp_path}/few.parquet", "--json") == 0
    assert "5 buildings with two or more images" in capsys.readouterr().err


def test_embeddings_of_another_width_are_refused(site, evaluate, tmp_path, capsys):
    toy.write_parquet(tmp_path / "narrow.parquet", buildings=5, dim=8)
    assert evaluate(f"--set=paths.test_parquet_path={tmp_path}/narrow.parquet") == 3
    assert "vectors of 8 numbers, not 16" in capsys.readouterr().err


def test_a_checkpoint_projects_the_split_once(site, evaluate, monkeypatch):
    from tripletkit.train import evaluation

    rows = []
    project = evaluation.project

    def counted(head, table, asked, precision):
        rows.append(len(asked))
        return project(head, table, asked, precision)

    monkeypatch.setattr(evaluation, "project", counted)
    assert evaluate() == 0
    assert rows == [169]
