"""The report of a run: its numbers, the page in a real browser, the figures for paper."""

import html
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import toy
from tests.browser import browser  # noqa: F401 - fixture
from tripletkit import cli, inputs, provenance, stages
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.data.store import open_store
from tripletkit.errors import ConfigError, DataError
from tripletkit.paths import RunPaths, run_paths
from tripletkit.report import curves, maps, measure, page, static
from tripletkit.report import run as runs
from tripletkit.report.panels import Panel, Report, Table, new_figure
from tripletkit.train import retrieval

EVIL = "</script><b>&amp;$x^2$ {{title}} %{y}"  # a building of that name is harmless
EPOCHS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Config:
    """A finished run on small data, with bands; one validation building has an evil name."""
    folder = tmp_path_factory.mktemp("world")
    toy.write_parquet(folder / "train.parquet", buildings=40, images=6, dim=16, noise=1.5)
    val = toy.table(buildings=16, images=8, first=1000, dim=16, noise=1.5)
    names = ["b1000", EVIL]
    buildings = [names[1] if b == names[0] else b for b in val["building_id"].to_pylist()]
    images = [EVIL if i == "img-1000-0" else i for i in val["streetview_image_id"].to_pylist()]
    val = val.set_column(val.column_names.index("building_id"), "building_id", pa.array(buildings))
    val = val.set_column(0, "streetview_image_id", pa.array(images))
    pq.write_table(val, folder / "val.parquet")
    made = configuration.with_values(
        Config(),
        global_={"scratch_dir": folder, "log_dir": folder / "logs"},
        paths={
            "train_parquet_path": folder / "train.parquet",
            "val_parquet_path": folder / "val.parquet",
            "difficulty_metadata_path": folder / "bands.parquet",
            "checkpoint_dir": folder / "run",
        },
        training_model={"hidden_dim": 16, "output_dim": 8},
        training={
            "batch_size": 32, "num_epochs": EPOCHS, "monitor": "map@r", "device": "cpu",
            "retrieval_metric_top_k": [1, 5, 20], "precision": "fp32", "learning_rate": 3e-3,
        },
    )  # fmt: skip
    stages.build_bands(made, neighbors=12, k0=5, force=False)
    stages.train(made, lambda: False)
    return made


@pytest.fixture(scope="module")
def paths(trained) -> RunPaths:
    return run_paths(trained.checkpoint_dir)


@pytest.fixture(scope="module")
def lines(paths) -> list[dict]:
    return [json.loads(line) for line in paths.metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def report(trained, paths) -> Report:
    with pytest.MonkeyPatch.context() as patch:  # which has its own test below, and takes long
        patch.setattr(maps, "umap_installed", lambda: False)
        return runs.run_report(trained, paths)


def panel(report: Report, name: str) -> Panel:
    (found,) = [each for each in report.panels() if each.id == name]
    return found


def trace(figure: go.Figure, name: str) -> tuple[list, list]:
    (found,) = [each for each in figure.data if each.name == name]
    return list(found.x), list(found.y)


def moved(config: Config, folder: Path, **training) -> tuple[Config, RunPaths]:
    """The same, for a run in another folder."""
    changed = configuration.with_values(
        config, paths={"checkpoint_dir": folder}, training=training or {}
    )
    return changed, run_paths(folder)


def missing(report: Report) -> dict[str, str]:
    return {each.title: each.text for each in report.groups.get(runs.MISSING, ())}


# --- numbers -----------------------------------------------------------------------------------


def test_learning_curves_are_those_of_the_metrics(report, lines):
    loss = panel(report, "loss").figure
    assert trace(loss, "training") == ([1, 2, 3], [line["train_loss"] for line in lines[1:]])
    assert trace(loss, "validation") == ([0, 1, 2, 3], [line["val_loss"] for line in lines])
    monitor = panel(report, "monitor").figure
    assert trace(monitor, "map@r")[1] == [line["map@r"] for line in lines]
    assert set(trace(monitor, "raw map@r")[1]) == {lines[0]["raw"]["map@r"]}
    recall = panel(report, "recall-over-epochs").figure
    assert trace(recall, "recall@5") == ([0, 1, 2, 3], [line["recall@5"] for line in lines])


def test_the_best_epoch_is_marked(report, lines):
    best = max(lines, key=lambda line: line["map@r"])
    figure = panel(report, "monitor").figure
    assert trace(figure, f"best epoch, {best['epoch']}") == ([best["epoch"]], [best["map@r"]])
    assert [shape.x0 for shape in figure.layout.shapes] == [best["epoch"]]
    assert report.facts["best"].startswith(f"map@r {best['map@r']:.4f} in epoch {best['epoch']}")


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [("map@r", [0.2, 0.5, 0.5], 1), ("val_loss", [0.4, 0.1, 0.1], 1), ("mrr", [0.9, 0.1], 0)],
)
def test_of_equal_epochs_the_earliest_is_best(monitor, values, best):
    history = curves.History([{"epoch": i, monitor: v} for i, v in enumerate(values)], monitor)
    assert history.best["epoch"] == best


def test_recall_at_k_is_raw_against_the_best_epoch(report, lines):
    best = max(lines, key=lambda line: line["map@r"])
    figure = panel(report, "recall-at-k").figure
    for name, values in (("raw", lines[0]["raw"]), (f"trained, epoch {best['epoch']}", best)):
        assert trace(figure, name) == ([1, 5, 20], [values[f"recall@{k}"] for k in (1, 5, 20)])


def test_the_shares_of_the_bands_are_stacked_to_one(report, lines):
    figure = panel(report, "band-share").figure
    for band, drawn in enumerate(figure.data):
        assert list(drawn.y) == [line["bands"]["share"][band] for line in lines[1:]]
    assert np.sum([each.y for each in figure.data], axis=0) == pytest.approx(1)
    assert figure.data[0].name == "band 0 (hardest)"
    assert figure.data[-1].name == "random"


@pytest.mark.parametrize(
    ("name", "key"),
    [("band-reward", "reward"), ("band-loss", "loss"), ("band-violations", "violation_rate")],
)
def test_what_the_bands_did_by_epoch(report, lines, name, key):
    for band, drawn in enumerate(panel(report, name).figure.data):
        assert list(drawn.y) == [line["bands"][key][band] for line in lines[1:]]


def test_a_band_without_triplets_is_a_gap():
    bands = {"share": [0, 1], "reward": [None, 1.0], "loss": [None, 1], "violation_rate": [None, 1]}
    history = curves.History([{"epoch": 0}, {"epoch": 1, "bands": bands}], "map@r")
    figure = next(p for p in curves.band_panels(history) if p.id == "band-reward").figure
    assert [each.name for each in figure.data] == ["random"]


def test_the_curve_of_ranks_goes_through_recall_at_k(report, lines):
    """Training measured recall by other code, over all queries; so did the report here."""
    best = max(lines, key=lambda line: line["map@r"])
    figure = panel(report, "first-hit-rank").figure
    for name, values in (("raw", lines[0]["raw"]), ("trained", best)):
        x, y = trace(figure, name)
        for k in (1, 5, 20):
            assert y[x.index(k)] == pytest.approx(values[f"recall@{k}"], abs=1e-12)


def brute_ranks(x: np.ndarray, codes: np.ndarray, queries: np.ndarray) -> list[int]:
    """By sorting all similarities of each query; ties go to the negatives."""
    found = []
    for query in queries:
        similarity = x @ x[query]
        own = (codes == codes[query]) & (np.arange(len(x)) != query)
        found.append(1 + int((similarity[codes != codes[query]] >= similarity[own].max()).sum()))
    return found


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.sampled_from([64, 100, 2048]))
@settings(max_examples=25, deadline=None)
def test_streamed_ranks_are_those_of_sorting(seed, width, step):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 40, 230)
    x = random.normal(size=(230, width)).astype(np.float32)
    x[:20] = x[20:40]  # ties
    x = torch.nn.functional.normalize(torch.from_numpy(x), dim=1)
    codes[codes == codes[0]] = codes[1]
    able = np.flatnonzero(np.bincount(codes)[codes] > 1)
    queries = np.sort(random.choice(able, min(len(able), 150), replace=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_rows", lambda _width: step)
        rank, nearest = measure.ranks(lambda places: x[places], width, codes, queries)
    close = 1e-5 * np.ones(len(queries))
    exact = x.double().numpy()
    low = brute_ranks(exact, codes, queries)
    whole = retrieval.retrieve(x, torch.from_numpy(codes))
    place = np.searchsorted(whole.query_rows.numpy(), queries)
    assert rank.tolist() == whole.first_hit_rank.numpy()[place].tolist()
    assert (rank >= low).all()  # what is within rounding of a tie goes to the negative
    assert np.mean(rank == low) > 0.9
    others = [exact[codes != codes[q]] @ exact[q] for q in queries]
    assert np.abs(nearest - [each.max() for each in others]).max() < close.max()


@given(st.lists(st.integers(0, 5), min_size=4, max_size=60), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_pairs_are_of_one_building_and_of_two(codes, seed):
    codes = np.array(codes)
    queries = np.flatnonzero(np.bincount(codes)[codes] > 1)
    if not len(queries):
        return
    anchor, positive, negative = measure._draw_pairs(codes, queries, seed)
    assert set(anchor) <= set(queries)
    assert (codes[anchor] == codes[positive]).all()
    assert (anchor != positive).all()
    if len(set(codes)) > 1:
        assert (codes[anchor] != codes[negative]).all()
        # Every image of another building may come.
        assert set(negative) == set(range(len(codes))) - (
            set(queries) if len(set(codes[queries])) == 1 else set()
        )
    else:
        assert len(negative) == 0


def test_distances_are_a_density_of_real_pairs(report, trained):
    figure = panel(report, "distances").figure
    raw, after = figure.frames
    assert (raw.name, after.name) == ("before (raw)", "after (trained)")
    assert [t.y.tolist() for t in figure.data] == [t.y.tolist() for t in after.data]
    for frame in figure.frames:
        for drawn in frame.data:
            assert np.sum(drawn.y) * (drawn.x[1] - drawn.x[0]) == pytest.approx(1)
    store = open_store(trained.paths.val_parquet_path, trained.cache_dir)
    x = store.embeddings.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    apart = np.sqrt(np.maximum(2 - 2 * x @ x.T, 0))
    same = (store.building[:, None] == store.building) & ~np.eye(len(x), dtype=bool)
    other = store.building[:, None] != store.building
    nearest = np.where(other, apart, np.inf).min(1)
    for drawn, values in zip(raw.data, (apart[same], nearest, apart[other]), strict=True):
        mean = np.average(drawn.x, weights=drawn.y)
        assert mean == pytest.approx(values.mean(), abs=0.02), drawn.name


def test_the_map_shows_the_same_images_before_and_after(report):
    figure = panel(report, "map-pca").figure
    before, after = figure.frames
    assert len(before.data) == 1 + 16
    assert [t.name for t in before.data] == [t.name for t in after.data]
    for one, other in zip(before.data, after.data, strict=True):
        assert one.customdata == other.customdata
        assert len(one.x) == len(one.customdata)
        assert np.abs([one.x, one.y, other.x, other.y]).max(initial=0) <= 1
    shown = [point for t in before.data for point in t.customdata]
    assert len({image for _, image in shown}) == len(shown) == 128
    assert (html.escape(EVIL), html.escape(EVIL)) in {tuple(point) for point in shown}


def test_pca_keeps_the_two_largest_variances(trained):
    store = open_store(trained.paths.val_parquet_path, trained.cache_dir)
    rows = np.arange(len(store.building))
    points = maps.Points.choose(store, rows, store.building.astype(np.int64), 0)
    x = store.embeddings[points.places].astype(np.float32)
    points = maps.Points(**{**vars(points), "raw": x, "trained": x[:, :5]})
    for name, flat in maps.pca(points).items():
        values = np.linalg.eigvalsh(np.cov(getattr(points, name)[points.shown >= 0].T))
        drawn = np.linalg.eigvalsh(np.cov(flat[points.shown >= 0].T))
        assert drawn[1] / drawn[0] == pytest.approx(values[-1] / values[-2], rel=1e-3)


def test_umap_keeps_clusters_together(monkeypatch):
    # numba, which nothing here has loaded before, would compile for a minute what takes seconds
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    random = np.random.default_rng(0)
    shown = np.repeat(np.arange(3), 15)
    x = (np.eye(8)[shown] + 0.05 * random.normal(size=(45, 8))).astype(np.float32)
    points = maps.Points(np.arange(45), shown, ["a", "b", "c"], [""] * 45, [""] * 45, x, x[:, :3])
    flat = maps.umap(points, seed=0)["trained"]
    middle = np.stack([flat[shown == k].mean(0) for k in range(3)])
    nearest = np.linalg.norm(flat[:, None] - middle, axis=2).argmin(1)
    assert (nearest == shown).all()


def test_confused_pairs_are_nearest_images_of_other_buildings(report, trained, paths):
    store = open_store(trained.paths.val_parquet_path, trained.cache_dir)
    head, _ = inputs.load_head(trained, paths.best)
    with torch.no_grad():
        y = head(torch.from_numpy(store.embeddings.astype(np.float32))).numpy()
    similarity = y @ y.T - 3 * np.eye(len(y))
    nearest = similarity.argmax(1)
    wrong = [i for i, j in enumerate(nearest) if store.building[i] != store.building[j]]
    table = panel(report, "confused-pairs").table
    counts = table.columns.index("mistakes")
    assert sum(row[counts] for row in table.rows) == len(wrong) > 0
    assert table.rows == sorted(table.rows, key=lambda row: -row[counts])


def test_a_large_split_is_sampled_and_says_so(trained, paths, monkeypatch):
    monkeypatch.setattr(measure, "PAIRS", 0)
    monkeypatch.setattr(measure, "FEWEST", 20)
    monkeypatch.setattr(measure, "OUTPUT_BYTES", 4 * 8 * 64)  # half of the 128 images
    monkeypatch.setattr(maps, "umap_installed", lambda: False)
    made = runs.run_report(trained, paths)
    said = re.search(
        r"(\d+) images of (\d+) buildings \(a sample: (\d+) other buildings .*; 20 of the (\d+) ",
        made.facts["embeddings"],
    )
    assert said, made.facts["embeddings"]
    images, buildings, left_out, could = map(int, said.groups())
    assert buildings + left_out == 16
    assert images == could == 8 * buildings


def test_an_evaluation_is_shown_with_its_intervals(trained, paths, tmp_path):
    stages.JOBS["evaluate"](
        trained, lambda: False, split="val", checkpoint=str(paths.best), resamples=50
    )  # fmt: skip
    found = json.loads(paths.evaluation("val").report.read_text())
    panels = runs.intervals.panels(paths, lacks=lambda *_: pytest.fail("nothing is missing"))
    figure = panels[0].figure
    for drawn, column in zip(figure.data, found["columns"], strict=True):
        names = list(figure.layout.xaxis.ticktext)
        assert list(drawn.y) == [column["metrics"][name] for name in names]
        bounds = np.array([column["intervals"][name] for name in names])
        assert drawn.y - np.array(drawn.error_y.arrayminus) == pytest.approx(bounds[:, 0])
        assert drawn.y + np.array(drawn.error_y.array) == pytest.approx(bounds[:, 1])
    rows = {row[1]: row[2:] for row in panels[1].table.rows}
    difference = found["differences"][0]
    assert rows["mrr"] == [difference["metrics"]["mrr"], *difference["intervals"]["mrr"]]


def test_the_facts_say_what_ran_where(report, trained, paths):
    start = provenance.newest(provenance.read(paths.root))
    assert start["host"] in report.facts["machine"]
    assert start["machine"]["cpu"] in report.facts["machine"]
    weights = torch.load(paths.best, weights_only=True)["model_state_dict"].values()
    assert f"{sum(map(torch.numel, weights)):,} parameters" in report.facts["head"]
    said = f"{trained.paths.val_parquet_path}: 128 images of 16 buildings, fingerprint "
    assert report.facts["val data"].startswith(said)


# --- what is missing ---------------------------------------------------------------------------


def test_a_run_without_validation_has_its_loss(trained, tmp_path):
    config = configuration.with_values(
        trained,
        paths={
            "val_parquet_path": None, "checkpoint_dir": tmp_path / "blind",
            "difficulty_metadata_path": None,
        },
        training={"num_epochs": 1, "monitor": "val_loss"},
    )  # fmt: skip
    stages.train(config, lambda: False)
    made = runs.run_report(config, run_paths(tmp_path / "blind"))
    assert len(trace(panel(made, "loss").figure, "training")[0]) == 1
    said = missing(made)
    assert "no validation data" in said["retrieval metrics and validation loss"]
    assert "random negatives only" in said["difficulty bands over time"]
    assert any("paths.val_parquet_path is not set" in why for why in said.values())
    page.render(made)


def test_a_run_that_goes_on_has_what_there_is(trained, paths, tmp_path):
    config, here = moved(trained, tmp_path / "young")
    here.root.mkdir()
    text = paths.metrics.read_text().splitlines(keepends=True)
    here.metrics.write_text(text[0] + text[1][:40])  # the second line is being written
    made = runs.run_report(config, here)
    assert made.facts["state"] == f"epoch 0 of {EPOCHS} so far"
    assert any("there is no checkpoint yet" in why for why in missing(made).values())
    assert panel(made, "recall-at-k").figure is not None
    page.render(made)


def test_data_that_is_gone_leaves_the_curves(trained, paths, tmp_path):
    config = configuration.with_values(
        trained, paths={"val_parquet_path": tmp_path / "gone.parquet"}
    )
    made = runs.run_report(config, paths)
    (why,) = [why for what, why in missing(made).items() if "val split" in what]
    assert "gone.parquet" in why
    assert panel(made, "loss").figure is not None


def test_a_torn_line_in_the_middle_is_an_error(paths, tmp_path):
    torn = tmp_path / "metrics.jsonl"
    torn.write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        runs.read_history(torn, "map@r")


# --- the page ----------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Checks that tags close in order; collects ids, links and addresses."""

    VOID = ("meta", "input", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.links += [given["href"]] if tag == "a" else []
        self.fetched += [v for k, v in given.items() if k in ("src", "srcset", "data")]
        self.fetched += [given["href"]] if tag == "link" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def parsed(text: str) -> Tags:
    found = Tags()
    found.feed(text)
    found.close()
    return found


def test_the_page_is_whole_and_asks_for_nothing(report):
    text = page.render(report)
    tags = parsed(text)
    assert text.startswith("<!DOCTYPE html>")
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert tags.fetched == []
    assert {link.removeprefix("#") for link in tags.links} <= set(tags.ids)
    assert "default-src 'none'" in text
    assert len(text) < 8e6


def test_names_of_the_users_are_text(report, tmp_path):
    evil = Report(
        EVIL, {EVIL: EVIL}, {EVIL: [Panel("a", EVIL, EVIL, table=Table([EVIL], [[EVIL]]))]}
    )
    for made in (report, evil):
        tags = parsed(page.render(made))
        assert "b" not in tags.open
        assert EVIL not in page.render(made)
    figures = json.loads(next(s for s in parsed(page.render(report)).scripts if '"loss"' in s))
    assert html.escape(EVIL) in json.dumps(figures["map-pca"]).replace('\\"', '"')
    assert page.render(evil).count(html.escape(EVIL)) == 11


def test_without_plotly_the_way_out_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="needs plotly") as caught:
        page.write(report, tmp_path / "x.html")
    assert "tripletkit[plots]" in caught.value.hint
    with pytest.raises(ConfigError, match="needs matplotlib"):
        static.write(report, tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "\u2013"), (12345, "12,345"), (0.12345, "0.1235"), (1e-5, "1e-05"), (0.0, "0.0000"),
     ("<", "<")],
)  # fmt: skip
def test_cells_are_for_people(value, text):
    assert page.shown(value) == text


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(report, tmp_path_factory, browser):  # noqa: F811
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(report, path)
    browser.open(path)
    yield browser
    assert browser.logs() == []
    assert browser.requested() == [path.as_uri()]


def test_every_figure_is_drawn(opened, report):
    drawn = opened.js(
        "return [...document.querySelectorAll('.plot')].map("
        "p => [p.id, p.querySelectorAll('.main-svg').length, p.clientHeight])"
    )
    wanted = [f"plot-{each.id}" for each in report.panels() if each.figure is not None]
    assert [name for name, *_ in drawn] == wanted
    assert all(layers > 0 and height > 200 for _, layers, height in drawn)


def test_a_click_in_the_legend_hides_a_curve(opened):
    def curves_shown() -> int:
        return opened.js(
            "return document.querySelectorAll('#plot-loss .scatterlayer .trace').length"
        )

    before = curves_shown()
    opened.click("#plot-loss .legend .traces .legendtoggle")
    opened.until(lambda: curves_shown() == before - 1)
    assert opened.js("return document.getElementById('plot-loss').data[0].visible") == "legendonly"


def test_the_switch_moves_the_points_to_before_and_back(opened, report):
    before, after = panel(report, "map-pca").figure.frames
    name = "[data-plot=plot-map-pca]"

    def shown() -> list[float]:
        return opened.js(
            "return [...document.getElementById('plot-map-pca').calcdata[1]].map(p => p.x)"
        )

    def places() -> list[float]:
        return opened.js(
            "return [...document.querySelectorAll('#plot-map-pca .scatterlayer .point')]"
            ".flatMap(p => p.getAttribute('transform').match(/[-0-9.e]+/g).map(Number))"
        )

    at_first = places()
    assert shown() == pytest.approx(after.data[1].x.tolist())
    opened.click(f"{name} button:first-child")
    opened.until(lambda: shown() == pytest.approx(before.data[1].x.tolist()))
    opened.until(lambda: places() != pytest.approx(at_first, abs=1))
    pressed = f"return [...document.querySelectorAll('{name} button')].map(b => b.ariaPressed)"
    assert opened.js(pressed) == ["true", "false"]
    opened.click(f"{name} button:last-child")
    opened.until(lambda: places() == pytest.approx(at_first, abs=1e-3))
    assert opened.js(pressed) == ["false", "true"]


def test_a_table_sorts_by_numbers_and_filters(opened, report):
    table = panel(report, "weakest-buildings").table
    column = table.columns.index("map@r") + 1

    def cells(place: int) -> list[str]:
        return opened.js(
            "return [...document.querySelectorAll('#table-weakest-buildings tbody tr')]"
            f".filter(r => !r.hidden).map(r => r.cells[{place - 1}].textContent)"
        )

    def head() -> str:
        return f"#table-weakest-buildings th:nth-child({column})"

    values = sorted((row[column - 1] for row in table.rows), reverse=True)
    assert len(values) > 1
    opened.click(f"{head()} button")
    assert cells(column) == [page.shown(value) for value in values]
    opened.click(f"{head()} button")
    assert cells(column) == [page.shown(value) for value in reversed(values)]
    assert (
        opened.driver.find_element("css selector", head()).get_attribute("aria-sort") == "ascending"
    )
    if len(table.rows) > page.FILTERED:
        opened.type("[data-table=table-weakest-buildings]", EVIL[:11])
        assert len(cells(1)) <= sum(EVIL in map(str, row) for row in table.rows)


def test_evil_names_are_read_as_they_are(opened):
    """In the legend of the map, and nowhere as a tag."""
    texts = opened.js(
        "return [...document.querySelectorAll('#plot-map-pca .legendtext')].map(t => t.textContent)"
    )
    assert EVIL in texts
    assert opened.js("return document.querySelectorAll('b, main script').length") == 0


def test_nothing_is_wider_than_a_phone(opened):
    opened.width(390)
    opened.until(
        lambda: opened.js("return document.querySelector('.plot .main-svg').clientWidth < 390")
    )
    assert opened.js("return document.documentElement.scrollWidth") <= 390
    opened.width(1400)


def test_in_the_dark_text_is_light(opened):
    ink = "return getComputedStyle(document.querySelector('#plot-loss .xtick text')).fill"
    dark = "rgb(230, 237, 243)"
    assert opened.js(ink) != dark
    opened.scheme("dark")
    opened.until(lambda: opened.js(ink) == dark)
    opened.scheme("light")
    opened.until(lambda: opened.js(ink) != dark)


# --- figures for paper -------------------------------------------------------------------------


def test_every_figure_is_there_as_png_and_pdf(report, tmp_path):
    static.write(report, tmp_path)
    wanted = [each.id for each in report.panels() if each.figure is not None]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}.{suffix}" for name in wanted for suffix in ("pdf", "png")
    )
    for name in wanted:
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            width = image.width / 300
            assert width == pytest.approx(static.SINGLE) or width == pytest.approx(static.DOUBLE)
            assert len(image.convert("L").getcolors()) > 20  # something is drawn
        pdf = (tmp_path / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert pdf.rstrip().endswith(b"%%EOF")
        assert b"/FontFile2" in pdf
        assert b"/Type3" not in pdf
        assert b"/Image" not in pdf.replace(b"/ImageB", b"").replace(b"/ImageC", b"").replace(
            b"/ImageI", b""
        )


def test_paper_has_the_numbers_of_the_page(report):
    figure = panel(report, "loss").figure
    (ax,) = static.draw(figure).axes
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    for name in ("training", "validation"):
        x, y = trace(figure, name)
        assert lines[name].get_xdata().tolist() == x
        assert lines[name].get_ydata().tolist() == y
    assert ax.get_xlabel() == "epoch"


def test_views_are_side_by_side_on_the_same_axes(report):
    before, after = static.draw(panel(report, "map-pca").figure).axes
    assert [before.get_title(loc="left"), after.get_title(loc="left")] == [
        "before (raw)", "after (trained)",
    ]  # fmt: skip
    assert before.get_xlim() == after.get_xlim() == (-1.05, 1.05)


def test_names_are_no_mathematics():
    assert static.text(html.escape("<a> $x^2$")) == r"<a> \$x^2\$"


@pytest.mark.parametrize(
    "lost",
    [
        go.Pie(values=[1, 2]),
        go.Scatter(x=[1], y=[2], mode="markers+text", text=["lost"]),
        go.Scatter(x=[1], y=[2], error_x={"array": [1]}),
        go.Scatter(x=[1], y=[2], fill="toself"),
        go.Scatter(x=[1], y=[2], yaxis="y2"),
    ],
    ids=lambda trace: trace.type,
)
def test_what_paper_cannot_show_is_an_error(lost):
    with pytest.raises(ValueError, match="static figures"):
        static.draw(new_figure().add_trace(lost))


@pytest.mark.parametrize("orientation", ["h", "v"])
def test_bars_of_categories_keep_their_order(orientation):
    figure = new_figure()
    names, lengths = ["b", "a"], [2.0, 1.0]
    x, y = (lengths, names) if orientation == "h" else (names, lengths)
    figure.add_bar(x=x, y=y, orientation=orientation)
    (ax,) = static.draw(figure).axes
    ticks = ax.get_yticklabels() if orientation == "h" else ax.get_xticklabels()
    assert [tick.get_text() for tick in ticks] == names
    sizes = [p.get_width() if orientation == "h" else p.get_height() for p in ax.patches]
    assert sizes == lengths


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Run the command in this process, with a configuration file for the world; returns its code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maps, "umap_installed", lambda: False)
    (tmp_path / "config.toml").write_text(configuration.dump(trained))

    def call(*words: str) -> int:
        return cli.run(
            lambda: cli.app(["report", *words], prog_name="tripletkit", standalone_mode=False)
        )

    return call


def test_the_run_of_the_configuration_is_reported(run, paths, capsys):
    assert run() == 0
    assert capsys.readouterr().out.strip() == str(paths.report)
    assert "Run " in paths.report.read_text()
    paths.report.unlink()


def test_a_run_is_named_by_its_folder_or_its_name(run, paths, tmp_path):
    for number, name in enumerate((str(paths.root), paths.root.name)):
        assert run(name, "--output", f"{number}.html", "--split", "train") == 0
        assert "Embeddings of the train split" in (tmp_path / f"{number}.html").read_text()


def test_figures_are_written_where_asked(run, tmp_path):
    assert run("--output=a.html", "--figures=figures") == 0
    assert (tmp_path / "figures/loss.pdf").exists()


def test_it_runs_in_the_background_as_well(run, tmp_path, capsys):
    gone = "--set=paths.val_parquet_path=gone.parquet"  # a map by UMAP takes long
    assert run("--output=a.html", "--cluster=local", gone) == 0
    job = re.search(r"local job (\S+)", capsys.readouterr().out)[1]
    assert cli.run(
        lambda: cli.app(["wait", job], prog_name="tripletkit", standalone_mode=False)
    ) in (0, None)
    assert (tmp_path / "a.html").exists()


def test_mistakes_are_named(run, tmp_path, capsys):
    for words, said in (
        (["nothing"], "no run or study is called 'nothing'"),
        (["--split=dev"], "--split is 'dev'"),
        (["--set", f"paths.checkpoint_dir={tmp_path}/none"], "there is no run in"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--output", f"{tmp_path}/config.toml/x.html"], "cannot be written"),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]
