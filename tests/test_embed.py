"""`tripletkit embed`: what comes out, row by row, and that it comes out once, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fleet, toy
from tripletkit import cli, fsio, stages
from tripletkit import config as configuration
from tripletkit.apply import embed, outputs, pooling, projection
from tripletkit.apply.embed import Request, Result
from tripletkit.config import Config, TrainingModel
from tripletkit.data import parquet
from tripletkit.data.store import open_store
from tripletkit.errors import ConfigError, DataError, Interrupted, RunError
from tripletkit.paths import LogPaths, run_paths, study_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.head import Head

WIDTH, DIM = 16, 6
CONFIG = configuration.with_values(Config(), training={"device": "cpu", "precision": "fp32"})
MODEL = TrainingModel(hidden_dim=32, output_dim=DIM)

# A server that has torch loaded and forks: a process starts in milliseconds.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["tests.test_embed"])


def write_head(
    path: Path, *, seed: int = 0, width: int = WIDTH, model=MODEL, epoch: int = 3
) -> Path:
    """A checkpoint of ours, with a random head."""
    torch.manual_seed(seed)
    section = model.model_copy(update={"input_dim": width})
    head = Head(section, width)
    checkpoints.save(
        {
            "model_state_dict": head.state_dict(), "epoch": epoch, "progress": {},
            "config": {"training_model": section.model_dump()},
        },
        path,
    )  # fmt: skip
    return path


def by_hand(checkpoint: Path, vectors: np.ndarray, model=MODEL) -> np.ndarray:
    """The head applied to one vector after the other."""
    head = Head(model, vectors.shape[1])
    head.load_state_dict(checkpoints.load(checkpoint)["model_state_dict"])
    head.eval()
    with torch.no_grad():
        rows = [head(torch.tensor(row, dtype=torch.float32)[None])[0] for row in vectors]
    return torch.stack(rows).numpy()


@pytest.fixture
def head(tmp_path) -> Path:
    return write_head(tmp_path / "run" / "checkpoint_best.pt")


@pytest.fixture
def small_steps(monkeypatch) -> None:
    take_small_steps(monkeypatch.setattr)


def take_small_steps(put=setattr) -> None:
    """Blocks of 16 rows, segments of two of them, and row groups of about 50 rows."""
    put(projection, "BLOCK_BYTES", 16 * 4 * WIDTH)
    put(projection, "SEGMENT_BYTES", 32 * 4 * WIDTH)
    put(outputs, "GROUP_BYTES", 50 * (4 * DIM + 30))


def never() -> bool:
    return False


def make(source: Path, destination: Path, head: Path, should_stop=never, **options) -> Result:
    request = Request(source, destination, head, **options)
    embed.check(CONFIG, request)
    return embed.run(CONFIG, request, should_stop)


def refusal(*arguments, kind=DataError, **options) -> str:
    """The message and hint that it ends with."""
    with pytest.raises(kind) as caught:
        make(*arguments, **options)
    return f"{caught.value.message} | {caught.value.hint}"


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def leftovers(folder: Path) -> list[str]:
    """What is hidden there, but for locks, which stay."""
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return [name for name in hidden if not name.endswith(".lock")]


# --- what comes out --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lists", "dtype"),
    [("list", "float16"), ("large", "float32"), ("fixed", "float64"), ("fixed", "float16")],
)
@pytest.mark.parametrize(
    ("ids", "integer_buildings"), [("streetview", False), ("dataset", True), ("hash", False)]
)
def test_every_schema_comes_out_with_its_ids_and_the_heads_vectors(
    tmp_path, head, ids, integer_buildings, dtype, lists
):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    table = toy.write_parquet(
        source, dim=WIDTH, ids=ids, integer_buildings=integer_buildings, dtype=dtype, lists=lists
    )
    result = make(source, out, head)
    assert result == Result(made=(out,), rows=80, dim=DIM, skipped=0, elsewhere=0)
    made = pq.read_table(out)
    assert made.drop_columns(["embedding"]).equals(table.drop_columns(["embedding"]))
    assert made.schema.field("embedding").type == pa.list_(pa.float32(), DIM)
    np.testing.assert_allclose(
        toy.vectors_of(made), by_hand(head, toy.vectors_of(table)), atol=2e-6
    )
    np.testing.assert_allclose(np.linalg.norm(toy.vectors_of(made), axis=1), 1, atol=1e-6)


@pytest.mark.usefixtures("small_steps")
def test_many_blocks_and_row_groups_keep_the_order_of_the_rows(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    table = toy.write_parquet(source, dim=WIDTH, buildings=75, row_group_size=37)
    make(source, out, head)
    made, footer = pq.read_table(out), pq.read_metadata(out)
    assert made["streetview_image_id"].equals(table["streetview_image_id"])
    expected = by_hand(head, toy.vectors_of(table))
    np.testing.assert_allclose(toy.vectors_of(made), expected, atol=2e-6)
    groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    assert len(groups) > 3
    assert all(40 < group < 90 for group in groups[:-1])


def test_half_floats_are_the_same_vectors_rounded(tmp_path, head):
    source = tmp_path / "in.parquet"
    toy.write_parquet(source, dim=WIDTH)
    whole, half = tmp_path / "whole.parquet", tmp_path / "half.parquet"
    make(source, whole, head)
    make(source, half, head, dtype="float16")
    assert pq.read_schema(half).field("embedding").type == pa.list_(pa.float16(), DIM)
    np.testing.assert_array_equal(
        toy.vectors_of(pq.read_table(half)),
        toy.vectors_of(pq.read_table(whole)).astype(np.float16),
    )


def with_more_columns(table: pa.Table) -> pa.Table:
    n = table.num_rows
    day = pa.array([1_700_000_000_000 + i if i % 5 else None for i in range(n)])
    more = {
        "city": pa.array([("Paris", "Rome", None)[i % 3] for i in range(n)]).dictionary_encode(),
        "taken": day.cast(pa.timestamp("ms")).cast(pa.timestamp("ms", "Europe/Paris")),
        "camera": pa.array([{"lens": i / 2, "tags": ["x"] * (i % 3)} for i in range(n)]),
        "camera.lens": pa.array([str(i) for i in range(n)], pa.large_string()),
        "price": pa.array(range(n), pa.int32()).cast(pa.decimal128(20, 2)),
        "empty": pa.nulls(n),
    }
    for name, column in more.items():
        table = table.append_column(name, column)
    return table


@pytest.mark.usefixtures("small_steps")
def test_all_columns_can_be_carried_along_unchanged(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    table = with_more_columns(toy.table(dim=WIDTH, buildings=60))
    pq.write_table(table, source, row_group_size=33)
    make(source, out, head, columns=("all",))
    made = pq.read_table(out)
    assert made.column_names == [n for n in table.column_names if n != "embedding"] + ["embedding"]
    for name in made.column_names[:-1]:
        assert made[name].type == table[name].type
        assert made[name].to_pylist() == table[name].to_pylist(), name


def test_named_columns_are_carried_along_in_the_order_of_the_source(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(with_more_columns(toy.table(dim=WIDTH)), source)
    make(source, out, head, columns=("taken", "city"))
    names = ["streetview_image_id", "building_id", "city", "taken", "embedding"]
    assert pq.read_schema(out).names == names


@pytest.mark.usefixtures("small_steps")
def test_row_groups_are_bounded_by_what_they_hold_decoded(tmp_path, head, monkeypatch):
    """Values that repeat themselves take next to nothing in the source."""
    monkeypatch.setattr(outputs, "BATCH_ROWS", 20)
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    shapes = pa.array([str(i % 3) * 1000 for i in range(400)])
    table = toy.table(dim=WIDTH, buildings=100).append_column("shape", shapes)
    pq.write_table(table, source)
    make(source, out, head, columns=("shape",))
    made = pq.ParquetFile(out)
    sizes = [made.read_row_group(i).nbytes for i in range(made.num_row_groups)]
    assert max(sizes) < 25 * 1100 < 400 * 1100 / 10
    assert made.read()["shape"].to_pylist() == shapes.to_pylist()


def test_a_column_that_pyarrow_cannot_read_is_not_called_damage(tmp_path, head):
    source, n = tmp_path / "in.parquet", 400
    tags = pa.array([("a", "b", "c")[i % 3] for i in range(n)]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array(range(n + 1), pa.int32()), tags)
    table = toy.table(dim=WIDTH, buildings=100).append_column("tags", lists)
    pq.write_table(table, source, row_group_size=50)
    said = refusal(source, tmp_path / "out.parquet", head, columns=("all",))
    assert "pyarrow cannot read it" in said
    assert "leave out the column" in said


def test_a_column_that_is_not_there_is_named_with_the_one_that_was_meant(tmp_path, head):
    source = tmp_path / "in.parquet"
    pq.write_table(with_more_columns(toy.table(dim=WIDTH)), source)
    said = refusal(source, tmp_path / "out.parquet", head, columns=("citty",))
    assert "no column 'citty'" in said
    assert "is it 'city'?" in said
    said = refusal(source, tmp_path / "o.parquet", head, columns=("embedding",), kind=ConfigError)
    assert "made anew" in said


def test_new_images_need_neither_a_building_nor_an_id(tmp_path, head, caplog):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    table = toy.table(dim=WIDTH)
    pq.write_table(table.drop_columns(["building_id"]), source)
    make(source, out, head)
    assert pq.read_schema(out).names == ["streetview_image_id", "embedding"]
    assert "order" not in caplog.text
    pq.write_table(table.select(["embedding"]), source)
    make(source, tmp_path / "bare.parquet", head)
    made = pq.read_table(tmp_path / "bare.parquet")
    assert made.column_names == ["embedding"]
    np.testing.assert_allclose(
        toy.vectors_of(made), by_hand(head, toy.vectors_of(table)), atol=2e-6
    )
    assert "only their order tells the rows apart" in caplog.text


def test_the_file_says_what_it_is_made_of(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    toy.write_parquet(source, dim=WIDTH)
    make(source, out, head)
    said = json.loads(pq.read_metadata(out).metadata[b"tripletkit"])
    assert said["checkpoint"] == "run/checkpoint_best.pt"
    assert (said["epoch"], said["precision"], said["dtype"]) == (3, "float32", "float32")
    assert said["sources"] == ["in.parquet"]
    assert said["source_fingerprint"] == parquet.fingerprint([source])
    assert str(tmp_path) not in json.dumps(said)


def test_the_output_is_an_input(tmp_path, head):
    """Of every command: the store, and a training that starts from it."""
    for number, split in enumerate(("train", "val")):
        toy.write_parquet(tmp_path / "raw" / f"{split}.parquet", dim=WIDTH, first=100 * number)
    out = tmp_path / "out"
    make(tmp_path / "raw", out, head, dtype="float16")
    store = open_store(out / "train.parquet", tmp_path / "cache", dim=DIM)
    np.testing.assert_array_equal(
        store.embeddings, toy.vectors_of(pq.read_table(out / "train.parquet"))
    )
    assert open_store(out, tmp_path / "cache").embeddings.shape == (160, DIM)
    assert command(
        "train", f"--set=global.scratch_dir={tmp_path}", f"--set=global.log_dir={tmp_path}/logs",
        *(f"--set=paths.{name}_parquet_path={out}/{name}.parquet" for name in ("train", "val")),
        "--set=training.num_epochs=1", "--set=training.batch_size=16",
        "--set=training_model.hidden_dim=8", "--set=training_model.output_dim=4",
        "--set=training.device=cpu",
    ) == 0  # fmt: skip


def command(*arguments: str | Path) -> int:
    """A command in this process; returns its exit code."""
    words = [str(word) for word in arguments]
    return cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))


# --- which file becomes which ----------------------------------------------------------------


def test_folders_and_globs_become_a_folder_of_files_of_the_same_names(tmp_path, head):
    for name in ("a", "b"):
        toy.write_parquet(tmp_path / "in" / f"{name}.parquet", dim=WIDTH, buildings=3)
    for source in (tmp_path / "in", tmp_path / "in" / "*.parquet"):
        result = make(source, tmp_path / "out", head)
        assert visible(tmp_path / "out") == ["a.parquet", "b.parquet"]
    assert (len(result.made), result.skipped) == (0, 2)
    make(tmp_path / "in" / "a.parquet", tmp_path / "one", head)
    assert visible(tmp_path / "one") == ["a.parquet"]


def test_what_cannot_be_meant_is_refused(tmp_path, head):
    for name in ("x/a", "y/a", "x/b"):
        toy.write_parquet(tmp_path / f"{name}.parquet", dim=WIDTH, buildings=3)
    many = tmp_path / "**" / "a.parquet"
    said = refusal(many, tmp_path / "out", head, kind=ConfigError)
    assert "x/a.parquet" in said
    assert "y/a.parquet" in said
    said = refusal(tmp_path / "x", tmp_path / "out.parquet", head, kind=ConfigError)
    assert "must be a folder" in said
    said = refusal(tmp_path / "x", tmp_path / "x", head, kind=ConfigError, force=True)
    assert "replaced by its own embeddings" in said
    said = refusal(tmp_path / "x", tmp_path / "out", head, kind=ConfigError, per_building=True)
    assert "ends in .parquet" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "out.parquet"):
        said = refusal(tmp_path / "x" / "a.parquet", path, head, kind=ConfigError)
        assert f"{tmp_path / 'file'} is a file" in said


def test_what_came_out_is_no_source_the_next_time(tmp_path, head):
    """Though a glob or folder holds it; a job may begin when others have made files already."""
    for name in ("a", "sub/b"):
        toy.write_parquet(tmp_path / "in" / f"{name}.parquet", dim=WIDTH, buildings=3)
    everything = tmp_path / "in" / "**" / "*.parquet"
    for number in range(2):
        result = make(everything, tmp_path / "in" / "out", head)
        assert (len(result.made), result.skipped) == ((2, 0), (0, 2))[number]
    mean = tmp_path / "in" / "sub" / "mean.parquet"
    for number in range(2):
        result = make(mean.parent, mean, head, per_building=True)
        assert (result.rows, result.skipped) == ((3, 0), (0, 1))[number]
    foreign = tmp_path / "in" / "sub" / "b.parquet"
    said = refusal(foreign.parent, foreign.parent, head, kind=ConfigError, force=True)
    assert f"{foreign} would be replaced by its own embeddings" in said


def test_options_that_exclude_each_other_are_usage_errors(tmp_path, head, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.write_parquet(tmp_path / "in.parquet", dim=WIDTH)
    for options, says in (
        (["--workers", "2"], "--workers is about jobs"),
        (["--workers", "2", "--cluster", "local", "--per-building"], "one job"),
        (["--per-building", "--columns", "city"], "exclude each other"),
        (["--dtype", "float64"], "float64"),
    ):
        arguments = ["embed", "in.parquet", "out.parquet", "--checkpoint", head, *options]
        assert command(*arguments) == 2
        assert says in capsys.readouterr().err
    assert visible(tmp_path) == ["in.parquet", "run"]


# --- what was there before -------------------------------------------------------------------


def test_what_is_there_is_done_and_what_was_made_otherwise_is_refused(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    toy.write_parquet(source, dim=WIDTH)
    make(source, out, head)
    before = identity(out)
    shutil.copy(head, tmp_path / "renamed.pt")
    assert make(source, out, tmp_path / "renamed.pt").skipped == 1
    assert identity(out) == before
    other = write_head(tmp_path / "run" / "other.pt", seed=1)
    said = refusal(source, out, other, kind=ConfigError)
    assert "another checkpoint (run/checkpoint_best.pt)" in said
    assert "--force" in said
    assert "another --dtype (float32)" in refusal(
        source, out, head, kind=ConfigError, dtype="float16"
    )
    pq.write_table(with_more_columns(toy.table(dim=WIDTH)), tmp_path / "more.parquet")
    said = refusal(tmp_path / "more.parquet", out, head, kind=ConfigError, columns=("city",))
    assert "another --columns and another source (in.parquet)" in said
    assert identity(out) == before
    assert make(source, out, other, force=True).rows == 80
    expected = by_hand(other, toy.vectors_of(pq.read_table(source)))
    np.testing.assert_allclose(toy.vectors_of(pq.read_table(out)), expected, atol=2e-6)
    assert make(source, out, other, force=True).skipped == 1, "so that a job can go on with it"


def test_an_earlier_state_of_the_same_checkpoint_is_called_so(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    toy.write_parquet(source, dim=WIDTH)
    make(source, out, head)
    write_head(head, seed=1, epoch=5)
    said = refusal(source, out, head, kind=ConfigError)
    assert "an earlier state of run/checkpoint_best.pt (epoch 3; it is now of epoch 5)" in said
    write_head(head, seed=2, epoch=3)
    said = refusal(source, out, head, kind=ConfigError)
    assert "another state of run/checkpoint_best.pt (epoch 3; it is now of epoch 3)" in said


def test_the_best_epoch_so_far_is_named_while_its_run_is_not_over(tmp_path, head, caplog):
    source, run = tmp_path / "in.parquet", run_paths(head.parent)
    toy.write_parquet(source, dim=WIDTH)
    config = configuration.with_values(CONFIG, training={"num_epochs": 9})
    fsio.write_text(run.config, configuration.dump(config))
    says = f"{head} is of epoch 3 of 9: its run is not over, and a later epoch may be better"

    def warned(name: str, checkpoint: Path = head) -> bool:
        caplog.clear()
        make(source, tmp_path / f"{name}.parquet", checkpoint)
        return says in caplog.text

    assert warned("before the first end")
    write_head(run.final)
    assert not warned("over")
    write_head(run.last)
    assert warned("longer")
    write_head(run.epoch(3))
    assert not warned("by name", run.epoch(3))


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_a_work_folder_that_outlived_its_file_is_removed(tmp_path, head, monkeypatch):
    """Its maker was killed just then."""
    monkeypatch.chdir(tmp_path)
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    toy.write_parquet(source, dim=WIDTH)
    make(source, out, head)
    (tmp_path / ".out.parquet.embed" / "some").mkdir(parents=True)
    assert command("embed", source, out, "--checkpoint", head, "--set=training.device=cpu") == 0
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("content", ["parquet", "text"])
def test_a_foreign_file_is_not_replaced(tmp_path, head, content):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    toy.write_parquet(source, dim=WIDTH)
    if content == "parquet":
        toy.write_parquet(out, dim=4)
    else:
        out.write_text("mine")
    before = out.read_bytes()
    assert "is not from `tripletkit embed`" in refusal(source, out, head, kind=ConfigError)
    assert out.read_bytes() == before
    make(source, out, head, force=True)
    assert pq.read_metadata(out).num_rows == 80


class StopAfter:
    """Asks to stop at the `count`-th look."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("other", ["checkpoint", "source", "precision"])
@pytest.mark.usefixtures("small_steps")
def test_what_was_begun_otherwise_is_begun_anew(tmp_path, head, other, caplog):
    """So that a job that runs again on another kind of machine goes on."""
    source, out, config = tmp_path / "in.parquet", tmp_path / "out.parquet", CONFIG
    toy.write_parquet(source, dim=WIDTH)
    with pytest.raises(Interrupted):
        make(source, out, head, StopAfter(6))
    if other == "checkpoint":
        head = write_head(tmp_path / "run" / "other.pt", seed=1)
    elif other == "source":
        toy.write_parquet(source, dim=WIDTH, seed=1)
    else:
        config = configuration.with_values(CONFIG, training={"precision": "bf16"})
    embed.run(config, Request(source, out, head), never)
    assert "anew" in caplog.text
    expected = by_hand(head, toy.vectors_of(pq.read_table(source)))
    atol = 3e-2 if other == "precision" else 2e-6
    np.testing.assert_allclose(toy.vectors_of(pq.read_table(out)), expected, atol=atol)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("small_steps")
def test_a_small_correction_is_what_force_is_for(tmp_path, head, monkeypatch, caplog):
    """One that the samples of the fingerprint do not see; it is not mixed into what was begun."""
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    monkeypatch.setattr(parquet, "fingerprint", lambda files: files[0].name)
    toy.write_parquet(source, dim=WIDTH)
    make(source, out, head)
    table = toy.write_parquet(source, dim=WIDTH, seed=1)
    newer = out.stat().st_mtime_ns + 1
    os.utime(source, ns=(newer, newer))
    assert make(source, out, head).skipped == 1
    assert "older than its source" in caplog.text
    with pytest.raises(Interrupted):
        make(source, out, head, StopAfter(6), force=True)
    table = toy.write_parquet(source, dim=WIDTH, seed=2)
    os.utime(source, ns=(newer + 1, newer + 1))
    assert make(source, out, head, force=True).rows == 80
    expected = by_hand(head, toy.vectors_of(table))
    np.testing.assert_allclose(toy.vectors_of(pq.read_table(out)), expected, atol=2e-6)
    assert make(source, out, head, force=True).skipped == 1, "so that a job can go on with it"


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("when", ["through the head", "put together"])
@pytest.mark.usefixtures("small_steps")
def test_a_source_that_changes_meanwhile_is_refused(tmp_path, head, monkeypatch, when, back):
    """And nothing is kept of the other one, should the first one come back."""
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    table = toy.write_parquet(source, dim=WIDTH)
    module, name = (projection, "_outputs") if when == "through the head" else (outputs, "_lists")
    before = getattr(module, name)

    def replacing(*arguments):
        monkeypatch.undo()
        take_small_steps(monkeypatch.setattr)
        source.rename(tmp_path / "old")
        pq.write_table(table.take(list(range(79, -1, -1))), source)
        return before(*arguments)

    monkeypatch.setattr(module, name, replacing)
    assert f"{source} was changed while it was read" in refusal(source, out, head)
    assert not out.exists()
    if back:
        (tmp_path / "old").replace(source)
    make(source, out, head)
    expected = by_hand(head, toy.vectors_of(pq.read_table(source)))
    np.testing.assert_allclose(toy.vectors_of(pq.read_table(out)), expected, atol=2e-6)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("seed", "code"), [(0, 0), (9, 3)])
def test_the_work_keeps_to_the_weights_that_the_checkpoint_had(
    tmp_path, head, monkeypatch, seed, code, capsys
):
    """A training may replace it while jobs wait in the queue, or begin one after the other."""
    source, check = sources(tmp_path / "in", 1), embed.check

    def check_and_train(*arguments):
        plan = check(*arguments)
        write_head(head, seed=seed, epoch=4)
        return plan

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embed, "check", check_and_train)
    out = tmp_path / "out"
    assert command("embed", source, out, "--checkpoint", head, "--set=training.device=cpu") == code
    assert ("was replaced since" in capsys.readouterr().err) == (code == 3)
    assert out.exists() == (code == 0)


def test_a_login_node_need_not_have_the_gpu_of_the_job(tmp_path, head):
    source = tmp_path / "in.parquet"
    toy.write_parquet(source, dim=WIDTH)
    elsewhere = configuration.with_values(CONFIG, training={"device": "cuda:63"})
    request = Request(source, tmp_path / "out.parquet", head)
    assert embed.check(elsewhere, request).left == 1
    with pytest.raises(RunError, match="cuda:63"):
        embed.run(elsewhere, request, never)


# --- bad input -------------------------------------------------------------------------------


def bad(table: pa.Table, row: int, vector: object) -> pa.Table:
    vectors = table["embedding"].to_pylist()
    vectors[row] = vector
    column = pa.array(vectors, pa.list_(pa.float64()))
    return table.set_column(table.column_names.index("embedding"), "embedding", column)


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        ([1.0] * (WIDTH - 1) + [float("nan")], "NaN or infinite elements in row 61"),
        ([1.0] * (WIDTH - 1) + [float("-inf")], "NaN or infinite elements in row 61"),
        ([1.0] * (WIDTH - 1) + [1e300], "leaves the range of float32 in row 61"),
        ([1.0] * (WIDTH - 1) + [None], "null elements in row 61"),
        ([1.0] * (WIDTH - 1), "other lengths than 16 in row 61"),
        (None, "null in row 61"),
        ([3e38] * WIDTH, "the head makes NaN or infinite numbers of row 61"),
    ],
)
@pytest.mark.usefixtures("small_steps")
def test_bad_vectors_are_named_and_no_file_comes_out(tmp_path, head, vector, says):
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    table = toy.table(dim=WIDTH)
    pq.write_table(bad(table, 61, vector), source, row_group_size=25)
    said = refusal(source, out, head)
    assert says in said
    assert str(source) in said
    assert visible(out) == []
    pq.write_table(table, source)  # mended, it is another source
    make(source, out, head)
    assert leftovers(out) == []


def test_files_that_do_not_fit_are_found_before_the_work_begins(tmp_path, head):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in "ab":
        toy.write_parquet(folder / f"{name}.parquet", dim=WIDTH)
    toy.write_parquet(folder / "c.parquet", dim=WIDTH + 1)
    said = refusal(folder, out, head)
    assert "c.parquet: column 'embedding' has vectors of 17 numbers, the head of" in said
    assert str(head) in said
    whole = (folder / "a.parquet").read_bytes()
    (folder / "c.parquet").write_bytes(whole[: len(whole) // 2])
    assert "c.parquet: cannot be read" in refusal(folder, out, head)
    pq.write_table(toy.table(dim=WIDTH).drop_columns(["embedding"]), folder / "c.parquet")
    assert "c.parquet: there is no column 'embedding'" in refusal(folder, out, head)
    assert not out.exists()


@pytest.mark.parametrize("small", [False, True])
def test_a_full_disk_says_how_much_is_needed_and_with_room_it_goes_on(
    tmp_path, head, monkeypatch, small
):
    """It is full in the first segment, or, with small ones, when the file is put together."""
    if small:
        take_small_steps(monkeypatch.setattr)
    source, out = tmp_path / "in.parquet", tmp_path / "out" / "in.parquet"
    toy.write_parquet(source, dim=WIDTH, buildings=300 if small else 3000)
    make(source, tmp_path / "whole" / "in.parquet", head)
    with limited_files(2**14 if small else 2**17):
        said = refusal(source, out, head, kind=RunError)
    assert said.startswith(f"{out}: cannot be written: File too large; ")
    assert "each row takes twice 24" in said
    assert visible(out.parent) == []
    make(source, out, head)
    assert same_bytes(out.parent, tmp_path / "whole")
    assert leftovers(out.parent) == []


@contextlib.contextmanager
def limited_files(size: int):
    """No file gets larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_steps")
def test_a_segment_of_another_size_is_made_again(tmp_path, head):
    """A file system that loses power may lose what it promised to keep."""
    source, out = tmp_path / "in.parquet", tmp_path / "out" / "in.parquet"
    toy.write_parquet(source, dim=WIDTH, buildings=60)
    make(source, tmp_path / "whole" / "in.parquet", head)
    with pytest.raises(Interrupted):
        make(source, out, head, StopAfter(12))
    segments = sorted(out.parent.glob(".in.parquet.embed/*/*"))
    assert len(segments) > 3
    os.truncate(segments[1], 10)
    make(source, out, head)
    assert same_bytes(out.parent, tmp_path / "whole")


# --- stopped, killed, and two at once --------------------------------------------------------


def sources(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        toy.write_parquet(
            folder / f"part-{number}.parquet", dim=WIDTH, buildings=25, row_group_size=30,
            first=1000 * number,
        )  # fmt: skip
    return folder


def same_bytes(a: Path, b: Path) -> bool:
    return visible(a) == visible(b) != [] and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in visible(a)
    )


@pytest.mark.usefixtures("small_steps")
def test_stopped_anywhere_it_goes_on_without_doing_a_segment_twice(tmp_path, head, monkeypatch):
    source, through, outputs_of = sources(tmp_path / "in"), [], projection._outputs

    def counted(*arguments):
        for values in outputs_of(*arguments):
            through.append(len(values))
            yield values

    monkeypatch.setattr(projection, "_outputs", counted)
    make(source, tmp_path / "whole", head)
    assert sum(through) == 300
    rounds = 0
    for count in (6, 7, 11):
        out, stops = tmp_path / f"out-{count}", 0
        through.clear()
        while (stopped := interruption(source, out, head, StopAfter(count))) is not None:
            assert stopped.exit_code == 130
            assert stopped.progress
            stops += 1
        assert 300 <= sum(through) <= 300 + 16 * stops, "the first half of a segment"
        assert same_bytes(out, tmp_path / "whole")
        assert leftovers(out) == []
        rounds += stops
    assert rounds > 8


@pytest.mark.usefixtures("small_steps")
def test_what_goes_on_says_after_how_many_rows(tmp_path, head, small_steps, caplog):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    toy.write_parquet(source, dim=WIDTH)
    with pytest.raises(Interrupted):
        make(source, out, head, StopAfter(3))
    assert "going on" not in caplog.text
    make(source, out, head)
    assert f"{source}: going on after 32 of 80 rows" in caplog.text


def test_stopped_before_it_got_anywhere_it_says_so(tmp_path, head):
    stopped = interruption(sources(tmp_path / "in"), tmp_path / "out", head, lambda: True)
    assert stopped is not None
    assert not stopped.progress


def interruption(*arguments) -> Interrupted | None:
    try:
        make(*arguments)
    except Interrupted as stopped:
        return stopped
    return None


def child(work, *arguments):
    """What `work(*arguments)` returns in a process of its own; None if that died."""
    results = fork.SimpleQueue()
    process = fork.Process(target=answer, args=(results, work, arguments))
    process.start()
    process.join()
    return None if results.empty() else results.get()


def answer(results, work, arguments) -> None:
    torch.set_num_threads(1)
    results.put(work(*arguments))


def touching(
    source: Path, out: Path, head: Path, at: int, number: int, options: dict, locks: bool = True
) -> tuple[Result, int]:
    """Embed in small steps; a signal comes before the `at`-th change of files. And how many."""
    take_small_steps()
    if not locks:
        fcntl.flock = no_locks
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if (changes or opens) and out.name in str(arguments[0]):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return make(source, out, head, **options), seen


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("per_building", [False, True])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, head, per_building):
    source, options = sources(tmp_path / "in", 2), {"per_building": per_building}
    name = "b.parquet" if per_building else ""
    whole = tmp_path / "whole-1" / name
    _, points = child(touching, source, whole, head, 0, 0, options)
    assert points > 25
    for at in range(1, points, points // 5):
        out = tmp_path / f"out-{at}" / name
        assert child(touching, source, out, head, at, signal.SIGKILL, options) is None
        child(touching, source, out, head, 5, signal.SIGKILL, options)  # if it gets so far
        assert child(touching, source, out, head, 0, 0, options)[1] <= points
        folders = [each.parent if per_building else each for each in (out, whole)]
        assert same_bytes(*folders), at
        assert leftovers(folders[0]) == [], at


def result_of(source: Path, out: Path, head: Path, locks: bool = True) -> Result:
    return touching(source, out, head, 0, 0, {}, locks)[0]


def started(work, *arguments):
    """A process of its own that does `work(*arguments)`, and where its result will be."""
    results = fork.SimpleQueue()
    process = fork.Process(target=answer, args=(results, work, arguments))
    process.start()
    return process, results


def stopped_at(at: int, *arguments, **options):
    """One that embeds and stopped itself before the `at`-th change of files."""
    started_one = started(touching, *arguments, at, signal.SIGSTOP, {}, *options.values())
    process = psutil.Process(started_one[0].pid)
    fleet.until(
        lambda: process.status() == psutil.STATUS_STOPPED, lambda: "it runs on", deadline=60
    )
    return started_one


def test_two_at_once_share_the_files(tmp_path, head):
    source, out = sources(tmp_path / "in", 6), tmp_path / "out"
    one, result_of_one = stopped_at(6, source, out, head)
    two, result_of_two = started(result_of, source, out, head)
    fleet.until((out / "part-1.parquet").exists, lambda: "no second file", deadline=60)
    os.kill(one.pid, signal.SIGCONT)
    for each in (one, two):
        each.join()
        assert each.exitcode == 0
    both = [result_of_one.get()[0], result_of_two.get()]
    assert out / "part-0.parquet" in both[0].made
    assert out / "part-1.parquet" in both[1].made
    assert sorted(both[0].made + both[1].made) == sorted(out / p.name for p in source.iterdir())
    assert {each.elsewhere for each in both} == {0}, "each ends when all is there"
    child(result_of, source, tmp_path / "whole", head)
    assert same_bytes(out, tmp_path / "whole")
    assert leftovers(out) == []


def test_the_work_of_one_that_is_killed_is_taken_over_by_one_that_waits(tmp_path, head):
    source, out = sources(tmp_path / "in", 2), tmp_path / "out"
    stuck, _ = stopped_at(6, source, out, head)
    other, result = started(result_of, source, out, head)
    fleet.until((out / "part-1.parquet").exists, lambda: "no second file", deadline=60)
    assert not (out / "part-0.parquet").exists()
    stuck.kill()
    stuck.join()
    other.join()
    assert other.exitcode == 0
    assert result.get().made == (out / "part-1.parquet", out / "part-0.parquet")
    child(result_of, source, tmp_path / "whole", head)
    assert same_bytes(out, tmp_path / "whole")


def test_one_that_waits_says_so_once(tmp_path, head, caplog, monkeypatch):
    source, out = sources(tmp_path / "in", 2), tmp_path / "out"
    monkeypatch.setattr(embed, "ASK_SECONDS", 0.0)
    caplog.set_level("INFO", "tripletkit")
    with fsio.exclusive_lock(out / ".part-1.parquet.lock"), pytest.raises(Interrupted):
        make(source, out, head, StopAfter(12))
    assert caplog.text.count("waiting for other processes") == 1


@pytest.mark.parametrize("at", [1, 4, 9, 15, 20])
def test_without_locks_two_may_do_the_same_and_do_not_harm_each_other(tmp_path, head, at):
    """Wherever one of them is when the other one comes, does it all, and tidies up."""
    source, out = sources(tmp_path / "in", 1), tmp_path / "out"
    slow, result = stopped_at(at, source, out, head, locks=False)
    assert child(result_of, source, out, head, False).rows in (0, 100)
    child(result_of, source, tmp_path / "whole", head)
    assert same_bytes(out, tmp_path / "whole")
    os.kill(slow.pid, signal.SIGCONT)
    slow.join()
    assert slow.exitcode == 0
    assert result.get()[0].skipped in (0, 1)
    assert same_bytes(out, tmp_path / "whole")
    assert leftovers(out) == []


@pytest.mark.parametrize("locks", [True, False])
def test_an_element_of_an_array_begins_with_its_own_share(tmp_path, head, monkeypatch, locks):
    """And leaves nothing to others that may not be there: it may be an array of the user's own."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    source, out = sources(tmp_path / "in", 5), tmp_path / "out"
    for name, value in (("ID", 4), ("MIN", 3), ("COUNT", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    result = make(source, out, head)
    assert result.made == tuple(out / f"part-{i}.parquet" for i in (1, 3, 0, 2, 4))
    one = tmp_path / "one.parquet"
    assert make(source / "part-0.parquet", one, head).made == (one,)


# --- one vector per building -----------------------------------------------------------------


def slow_means(table: pa.Table, vectors: np.ndarray) -> dict:
    """building: (images, unit mean), one image after the other."""
    found: dict = {}
    for building, vector in zip(table["building_id"].to_pylist(), vectors, strict=True):
        found.setdefault(building, []).append(vector.astype(np.float64))
    means = {b: (len(each), sum(each) / len(each)) for b, each in found.items()}
    return {b: (count, mean / np.linalg.norm(mean)) for b, (count, mean) in means.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("integer_buildings", [False, True])
@pytest.mark.usefixtures("small_steps")
def test_a_building_gets_the_mean_of_its_images(
    tmp_path, head, integer_buildings, dtype, monkeypatch
):
    monkeypatch.setattr(parquet, "BATCH_ROWS", 17)
    monkeypatch.setattr(pooling, "CHUNK_BYTES", 7 * 8 * DIM)
    tables = [
        toy.write_parquet(
            tmp_path / "in" / f"{number}.parquet",
            dim=WIDTH,
            first=10 * number,
            images=number + 2,
            integer_buildings=integer_buildings,
            seed=number,
            row_group_size=23,
        )
        for number in range(3)  # buildings 10 to 19 are in two files, and so are 20 to 29
    ]
    whole = pa.concat_tables(tables)
    out = tmp_path / "out.parquet"
    result = make(tmp_path / "in", out, head, per_building=True, dtype=dtype)
    assert result.rows == 40
    made = pq.read_table(out)
    expected = slow_means(whole, by_hand(head, toy.vectors_of(whole)))
    assert made["building_id"].to_pylist() == list(expected), "in order of first appearance"
    assert made["building_id"].type == whole["building_id"].type
    assert made["images"].to_pylist() == [count for count, _ in expected.values()]
    assert made.schema.field("embedding").type == pa.list_(pa.from_numpy_dtype(dtype), DIM)
    np.testing.assert_allclose(
        toy.vectors_of(made),
        np.stack([mean for _, mean in expected.values()]),
        atol=2e-6 if dtype == "float32" else 5e-4,
    )


@pytest.mark.parametrize(
    ("kinds", "comes_out"),
    [(("int32", "int64"), "int64"), (("int16", "uint16"), "int32"), (("int8", "string"), "string")],
)
def test_buildings_of_several_types_get_one_that_holds_all(tmp_path, head, kinds, comes_out):
    for number, kind in enumerate(kinds):
        table = toy.table(dim=WIDTH, integer_buildings=True, first=100 * number)
        ids = table["building_id"].cast(pa.type_for_alias(kind))
        table = table.set_column(table.column_names.index("building_id"), "building_id", ids)
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    make(tmp_path / "in", tmp_path / "out.parquet", head, per_building=True)
    made = pq.read_table(tmp_path / "out.parquet")["building_id"]
    assert made.type == pa.type_for_alias(comes_out)
    assert sorted(map(int, made.to_pylist())) == [*range(20), *range(100, 120)]


def test_buildings_need_an_id(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    table = toy.table(dim=WIDTH)
    pq.write_table(table.drop_columns(["building_id"]), source)
    assert "no column 'building_id'" in refusal(source, out, head, per_building=True)
    ids = table["building_id"].to_pylist()
    ids[5] = None
    pq.write_table(table.set_column(1, "building_id", pa.array(ids)), source)
    said = refusal(source, out, head, per_building=True)
    assert "column 'building_id' is null in row 5" in said
    assert not out.exists()
    make(source, tmp_path / "images.parquet", head)  # there it is only carried along
    assert pq.read_table(tmp_path / "images.parquet")["building_id"].to_pylist() == ids


# --- reading from the middle -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    group=st.integers(1, 15),
    rows=st.integers(1, 50),
    data=st.data(),
)
def test_batches_begin_at_any_row(tmp_path_factory, sizes, group, rows, data):
    folder = tmp_path_factory.mktemp("files")
    total = sum(sizes)
    numbers = iter(range(total))
    for index, size in enumerate(sizes):
        column = pa.table({"n": [next(numbers) for _ in range(size)]})
        pq.write_table(column, folder / f"{index}.parquet", row_group_size=group)
    table = parquet.open_table(parquet.find_files(folder), ["n"])
    first = data.draw(st.integers(0, total))
    found = []
    for batch in parquet.batches(table, ["n"], rows, first):
        start = int(batch.path.stem)
        assert batch.data["n"][0].as_py() == sum(sizes[:start]) + batch.start
        assert 1 <= len(batch.data) <= rows
        found += batch.data["n"].to_pylist()
    assert found == list(range(first, total))


# --- on other devices and on a cluster -------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_makes_the_same_vectors_and_goes_on_to_the_same_bytes(
    tmp_path, head, precision, small_steps
):
    source = sources(tmp_path / "in", 2)
    on_gpu = configuration.with_values(CONFIG, training={"device": "cuda", "precision": precision})
    embed.run(on_gpu, Request(source, tmp_path / "whole", head), never)
    make(source, tmp_path / "cpu", head)
    for name in visible(tmp_path / "cpu"):
        np.testing.assert_allclose(
            toy.vectors_of(pq.read_table(tmp_path / "whole" / name)),
            toy.vectors_of(pq.read_table(tmp_path / "cpu" / name)),
            atol=1e-5 if precision == "fp32" else 3e-2,
        )
    with pytest.raises(Interrupted):
        embed.run(on_gpu, Request(source, tmp_path / "out", head), StopAfter(4))
    embed.run(on_gpu, Request(source, tmp_path / "out", head), never)
    assert same_bytes(tmp_path / "whole", tmp_path / "out")


# A job of an array that stops itself before it keeps its first segment, once.
STOPS = """
import os, signal, sys

def hook(event, arguments):
    if event == "os.rename" and "parquet.embed" in str(arguments[0]):
        mark = os.path.join({folder!r}, os.environ["SLURM_ARRAY_TASK_ID"])
        if os.path.exists(mark):
            return
        with open(mark + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(mark + ".new", mark)
        os.kill(os.getpid(), signal.SIGSTOP)

if "SLURM_ARRAY_TASK_ID" in os.environ:
    sys.addaudithook(hook)
"""


def test_an_array_shares_the_files_and_goes_on_when_killed_or_requeued(
    slurm, tmp_path, head, monkeypatch, capsys
):
    source, out = sources(tmp_path / "in", 4), tmp_path / "out"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(STOPS.format(folder=str(tmp_path)))
    config, logs = fleet.write_config(tmp_path), LogPaths(tmp_path / "logs")
    arguments = (
        "embed", source, out, "-c", config, "--checkpoint", head,
        "--cluster", "slurm", "--workers", "2",
    )  # fmt: skip
    assert command(*arguments) == 0
    printed = capsys.readouterr().out
    array = re.search(r"^embed:run: slurm job (\d+), 2 elements", printed, re.MULTILINE)[1]
    assert f"`tripletkit logs {array} -f` follows its log" in printed
    marks = [tmp_path / "0", tmp_path / "1"]
    fleet.until(
        lambda: all(map(Path.exists, marks)), lambda: slurm.run("squeue"), deadline=240
    )  # both are in the middle of their first file
    assert visible(out) == []
    assert command(*arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"jobs {array}_0, {array}_1 run or wait for {out} already",
        "no more are needed: `tripletkit wait JOB` waits for the end of one",
    ]
    assert command(*arguments, "--dtype=float16") == 2
    assert "already, with another --dtype" in capsys.readouterr().err
    assert len(slurm.run("squeue", "--noheader", "--array").splitlines()) == 2
    first, second = (int(mark.read_text()) for mark in marks)
    slurm.run("scancel", "--signal=USR2", f"{array}_0.0")
    os.kill(second, signal.SIGKILL)
    os.kill(first, signal.SIGCONT)
    fleet.wait_for_empty_queue(slurm, logs.root, deadline=240)
    requeued = json.loads(logs.record(f"{array}_0").read_text())
    assert (requeued["restart"], requeued["exit_code"]) == (1, 0)
    # The file of the one that was killed was free, so the other one took it over.
    with one_thread():
        loaded = configuration.load(config, environ={})
        assert embed.check(loaded, Request(source, out, head)).left == 0
        embed.run(loaded, Request(source, tmp_path / "whole", head), never)
    assert same_bytes(out, tmp_path / "whole")
    assert leftovers(out) == []
    assert command(*arguments) == 0
    assert capsys.readouterr().out == f"{out} is there already: nothing to do\n"
    assert slurm.run("squeue", "--noheader") == ""


def test_a_job_is_called_after_the_run_whose_head_it_uses(tmp_path):
    config = configuration.with_values(
        Config(), paths={"checkpoint_dir": tmp_path / "checkpoints"},
        tuning={"output_dir": tmp_path, "study_name": "fonts"},
    )  # fmt: skip
    study = study_paths(config)
    fsio.write_json(study.identity, {})
    for run, name in (
        (run_paths(tmp_path / "checkpoints/best_fonts_00004"), "best_fonts_00004"),
        (study.trial(7), "fonts/trial_00007"),
    ):
        assert stages.job_name("embed", config, {"checkpoint": str(run.best)}) == f"embed:{name}"
        options = {"checkpoint": [str(run.best), "/other/checkpoint_best.pt"]}
        assert stages.job_name("evaluate", config, options) == f"evaluate:{name}"
    assert stages.job_name("evaluate", config, {"checkpoint": []}) == "evaluate:checkpoints"


@contextlib.contextmanager
def one_thread():
    """As the jobs; the bytes depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
