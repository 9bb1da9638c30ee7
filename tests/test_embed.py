"""`tripletkit embed`: what comes out, row by row, and that it comes out once, whatever happens."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
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
from tripletkit import cli
from tripletkit import config as configuration
from tripletkit.apply import embed, outputs, projection
from tripletkit.apply.embed import Request, Result
from tripletkit.config import Config, TrainingModel
from tripletkit.data import parquet
from tripletkit.data.store import open_store
from tripletkit.errors import ConfigError, DataError, Interrupted, RunError
from tripletkit.paths import LogPaths
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
    """Blocks of 16 rows, row groups of about 50, and every block synced."""
    put(projection, "BLOCK_BYTES", 16 * 4 * WIDTH)
    put(projection, "SYNC_SECONDS", 0.0)
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
    assert len(set(groups[:-1])) == 1, "equal but for the last"


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
    mean = tmp_path / "x" / "mean.parquet"
    said = refusal(tmp_path / "x", mean, head, kind=ConfigError, per_building=True)
    assert "one of the sources itself" in said
    assert not (tmp_path / "out").exists()


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
    said = refusal(source, out, other)
    assert "another checkpoint (run/checkpoint_best.pt)" in said
    assert "--force" in said
    assert "another --dtype (float32)" in refusal(source, out, head, dtype="float16")
    pq.write_table(with_more_columns(toy.table(dim=WIDTH)), tmp_path / "more.parquet")
    said = refusal(tmp_path / "more.parquet", out, head, columns=("city",))
    assert "another --columns and another source (in.parquet)" in said
    assert identity(out) == before
    assert make(source, out, other, force=True).rows == 80
    expected = by_hand(other, toy.vectors_of(pq.read_table(source)))
    np.testing.assert_allclose(toy.vectors_of(pq.read_table(out)), expected, atol=2e-6)
    assert make(source, out, other, force=True).skipped == 1, "so that a job can go on with it"


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


@pytest.mark.parametrize("content", ["parquet", "text"])
def test_a_foreign_file_is_not_replaced(tmp_path, head, content):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    toy.write_parquet(source, dim=WIDTH)
    if content == "parquet":
        toy.write_parquet(out, dim=4)
    else:
        out.write_text("mine")
    before = out.read_bytes()
    assert "is not from `tripletkit embed`" in refusal(source, out, head)
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


@pytest.mark.usefixtures("small_steps")
def test_what_was_begun_otherwise_is_refused(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    toy.write_parquet(source, dim=WIDTH)
    with pytest.raises(Interrupted):
        make(source, out, head, StopAfter(3))
    other = write_head(tmp_path / "run" / "other.pt", seed=1)
    assert "was begun with another checkpoint" in refusal(source, out, other)
    toy.write_parquet(source, dim=WIDTH, seed=1)
    assert "was begun with another source" in refusal(source, out, head)
    make(source, out, head, force=True)
    expected = by_hand(head, toy.vectors_of(pq.read_table(source)))
    np.testing.assert_allclose(toy.vectors_of(pq.read_table(out)), expected, atol=2e-6)


def test_a_login_node_need_not_have_the_gpu_of_the_job(tmp_path, head):
    source = tmp_path / "in.parquet"
    toy.write_parquet(source, dim=WIDTH)
    elsewhere = configuration.with_values(CONFIG, training={"device": "cuda:63"})
    request = Request(source, tmp_path / "out.parquet", head)
    assert embed.check(elsewhere, request) == 1
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
    make(source, out, head, force=True)
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


def test_a_full_disk_says_how_much_is_needed_and_leaves_no_file(tmp_path, head):
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    toy.write_parquet(source, dim=WIDTH, buildings=3000)
    result = child(limited, source, out, head)
    assert result.startswith(f"{out}/in.parquet: cannot be written: File too large; ")
    assert "each row takes twice 24" in result
    assert visible(out) == []


def limited(source: Path, out: Path, head: Path) -> str:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))
    with pytest.raises(RunError) as caught:
        make(source, out, head)
    return caught.value.message


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
def test_stopped_anywhere_it_goes_on_without_doing_a_block_twice(tmp_path, head, monkeypatch):
    source, through, outputs_of = sources(tmp_path / "in"), [], projection._outputs

    def counted(*arguments):
        for values in outputs_of(*arguments):
            through.append(len(values))
            yield values

    monkeypatch.setattr(projection, "_outputs", counted)
    make(source, tmp_path / "whole", head)
    once, rounds = sum(through), 0
    assert once == 300
    for count in (6, 7, 11):
        out, before = tmp_path / f"out-{count}", 0
        through.clear()
        while (stopped := interruption(source, out, head, StopAfter(count))) is not None:
            assert stopped.exit_code == 130
            assert stopped.progress or sum(through) == before
            before = sum(through)
            rounds += 1
        assert sum(through) == once
        assert same_bytes(out, tmp_path / "whole")
        assert leftovers(out) == []
    assert rounds > 8


@pytest.mark.usefixtures("small_steps")
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


def touching(source: Path, out: Path, head: Path, at: int, number: int, options: dict) -> int:
    """Embed in small steps; a signal comes before the `at`-th change of files. Returns how many."""
    take_small_steps()
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
    make(source, out, head, **options)
    return seen


@pytest.mark.parametrize("per_building", [False, True])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, head, per_building):
    source, options = sources(tmp_path / "in", 2), {"per_building": per_building}
    name = "b.parquet" if per_building else ""
    whole = tmp_path / "whole-1" / name
    points = child(touching, source, whole, head, 0, 0, options)
    assert points > 40
    for at in range(1, points, 9):
        out = tmp_path / f"out-{at}" / name
        assert child(touching, source, out, head, at, signal.SIGKILL, options) is None
        child(touching, source, out, head, 5, signal.SIGKILL, options)  # if it gets so far
        assert child(touching, source, out, head, 0, 0, options) <= points
        folders = [each.parent if per_building else each for each in (out, whole)]
        assert same_bytes(*folders), at
        assert leftovers(folders[0]) == [], at


def result_of(source: Path, out: Path, head: Path) -> Result:
    take_small_steps()
    return make(source, out, head)


def test_two_at_once_share_the_files(tmp_path, head):
    source, out = sources(tmp_path / "in", 6), tmp_path / "out"
    results = fork.SimpleQueue()
    both = [
        fork.Process(target=answer, args=(results, result_of, (source, out, head)))
        for _ in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [0, 0]
    one, two = results.get(), results.get()
    assert sorted(one.made + two.made) == sorted(out / path.name for path in source.iterdir())
    assert one.elsewhere == two.elsewhere == 0, "each ends when all is there"
    child(result_of, source, tmp_path / "whole", head)
    assert same_bytes(out, tmp_path / "whole")
    assert leftovers(out) == []


def test_the_work_of_one_that_is_killed_is_taken_over_by_one_that_waits(tmp_path, head):
    source, out = sources(tmp_path / "in", 2), tmp_path / "out"
    results = fork.SimpleQueue()
    call = (touching, (source, out, head, 6, signal.SIGSTOP, {}))
    stuck = fork.Process(target=answer, args=(results, *call))
    stuck.start()
    process = psutil.Process(stuck.pid)
    fleet.until(
        lambda: process.status() == psutil.STATUS_STOPPED, lambda: "it runs on", deadline=60
    )
    other = fork.Process(target=answer, args=(results, result_of, (source, out, head)))
    other.start()
    fleet.until((out / "part-1.parquet").exists, lambda: "no second file", deadline=60)
    assert not (out / "part-0.parquet").exists()
    stuck.kill()
    stuck.join()
    other.join()
    assert results.get().made == (out / "part-1.parquet", out / "part-0.parquet")
    child(result_of, source, tmp_path / "whole", head)
    assert same_bytes(out, tmp_path / "whole")


def test_elements_of_an_array_begin_with_their_own_share(tmp_path, head, monkeypatch):
    """And without locks on the file system they leave it at that."""
    import errno
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    source = sources(tmp_path / "in", 5)
    monkeypatch.setattr(fcntl, "flock", none)
    made = []
    for task in (3, 4):
        for name, value in (("ID", task), ("MIN", 3), ("COUNT", 2)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        result = make(source, tmp_path / "out", head)
        made.append([path.name for path in result.made])
    assert made == [[f"part-{i}.parquet" for i in share] for share in ((0, 2, 4), (1, 3))]
    assert len(visible(tmp_path / "out")) == 5


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


def test_an_array_shares_the_files_and_goes_on_when_killed_or_requeued(slurm, tmp_path):
    model = TrainingModel(hidden_dim=512, num_hidden_layers=2, output_dim=8)
    head = write_head(tmp_path / "run" / "checkpoint_best.pt", width=64, model=model)
    vectors = np.random.default_rng(0).normal(size=(36_000, 64)).astype(np.float16)
    (tmp_path / "in").mkdir()
    for number in range(4):
        table = pa.table({"embedding": toy.as_lists(vectors + np.float16(number), "fixed")})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    config, out = fleet.write_config(tmp_path), tmp_path / "out"
    arguments = (
        "embed", tmp_path / "in", out, "-c", config, "--checkpoint", head,
        "--cluster", "slurm", "--workers", "2",
    )  # fmt: skip
    array = re.search(r"slurm job (\d+), 2 elements", fleet.tripletkit(*arguments))[1]
    logs = LogPaths(tmp_path / "logs")
    caught: dict[int, int] = {}

    def catch() -> bool:
        """Stop each element in the middle of its first file; says whether we have both."""
        for i in {0, 1} - caught.keys():
            part = out / f".{i}.parquet.embed" / "rows" / "vectors"
            if part.exists() and part.stat().st_size:
                caught[i] = json.loads(logs.record(f"{array}_{i}").read_text())["pid"]
                os.kill(caught[i], signal.SIGSTOP)
        return len(caught) == 2

    fleet.until(catch, lambda: slurm.run("squeue"), deadline=120)
    assert len(visible(out)) < 4
    slurm.run("scancel", "--signal=USR2", f"{array}_0.0")
    os.kill(caught[1], signal.SIGKILL)
    os.kill(caught[0], signal.SIGCONT)
    fleet.wait_for_empty_queue(slurm, logs.root, deadline=240)
    requeued = json.loads(logs.record(f"{array}_0").read_text())
    assert (requeued["restart"], requeued["exit_code"]) == (1, 0)
    # The one that was killed left a file, unless the other took it over. It needs one job now.
    if len(visible(out)) < 4:
        fleet.tripletkit(*arguments)
        fleet.wait_for_empty_queue(slurm, logs.root, deadline=240)
    assert "nothing to do" in fleet.tripletkit(*arguments)
    child(in_one_go, config, Request(tmp_path / "in", tmp_path / "whole", head))
    assert same_bytes(out, tmp_path / "whole")
    assert leftovers(out) == []


def in_one_go(config: Path, request: Request) -> Result:
    return embed.run(configuration.load(config, environ={}), request, never)
