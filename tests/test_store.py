"""The cache of embeddings: what it holds, who builds it, and what it survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import toy
from tripletkit.data import parquet
from tripletkit.data.store import (
    Store,
    check_leakage,
    describe,
    open_store,
    subsample,
    whole,
    writing_to,
)
from tripletkit.errors import DataError, RunError

BIG_ROWS, BIG_DIM = 100_000, 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.parquet"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "cache"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # some are large


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """410 MB of float32 in one row group."""
    path = tmp_path_factory.mktemp("big") / "big.parquet"
    flat = np.resize(
        np.random.default_rng(0).normal(size=2**20).astype(np.float32), BIG_ROWS * BIG_DIM
    )
    table = pa.table(
        {
            "streetview_image_id": [f"image-{i}" for i in range(BIG_ROWS)],
            "building_id": [f"building-{i // 4}" for i in range(BIG_ROWS)],
            "embedding": toy.as_lists(flat.reshape(BIG_ROWS, BIG_DIM)),
        }
    )
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=BIG_ROWS)
    yield path
    path.unlink()


def visible(cache: Path) -> list[str]:
    """What a user sees in the cache folder; locks stay, hidden."""
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


def run(code: str, *args: object) -> subprocess.Popen[str]:
    program = "import sys, logging\nfrom pathlib import Path\nlogging.basicConfig(level=20)\n"
    return subprocess.Popen(
        [sys.executable, "-c", program + code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- contents --------------------------------------------------------------------------------


def check_against(store: Store, images: list[str], buildings: list[str]) -> None:
    """Compare every index of the store with plain dictionaries."""
    assert store.ids.to_pylist() == images
    names = store.building_ids.to_pylist()
    assert [names[code] for code in store.building.tolist()] == buildings
    assert len(store.starts) == len(names) + 1 == len(set(buildings)) + 1
    for code, name in enumerate(names):
        rows = store.by_building[store.starts[code] : store.starts[code + 1]]
        assert rows.tolist() == [row for row, b in enumerate(buildings) if b == name]


texts = st.text(min_size=1, max_size=12)


@given(
    vectors=hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-1e5, 1e5, width=32))
    ),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_what_goes_in_comes_out(vectors: np.ndarray, data: st.DataObject) -> None:
    count = len(vectors)
    images = data.draw(st.lists(texts, min_size=count, max_size=count, unique=True))
    buildings = data.draw(st.lists(texts, min_size=count - 1, max_size=count - 1))
    buildings.append(buildings[0])
    table = pa.table(
        {
            "streetview_image_id": images,
            "building_id": buildings,
            "embedding": toy.as_lists(vectors),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "x.parquet"
        pq.write_table(table, source, row_group_size=data.draw(st.integers(1, 4)))
        store = open_store(source, Path(folder) / "cache")
        check_against(store, images, buildings)
        peaks = np.abs(vectors).max(1)
        fits = (peaks <= 65504).all() and ((peaks == 0) | (peaks >= 2**-14)).all()
        assert store.embeddings.dtype == (np.float16 if fits else np.float32)
        np.testing.assert_array_equal(store.embeddings, vectors.astype(store.embeddings.dtype))


def test_a_store_is_read_only_and_aligned(path: Path, cache: Path) -> None:
    toy.write_parquet(path)
    store = open_store(path, cache)
    assert store.embeddings.ctypes.data % 64 == 0
    for array in (store.embeddings, store.building, store.by_building, store.starts):
        assert not array.flags.writeable
    assert store.source == path
    assert store.folder == cache / store.fingerprint
    assert store.building.dtype == np.int32
    assert store.by_building.dtype == store.starts.dtype == np.int64
    assert store.ids.type == store.building_ids.type == pa.large_string()


def test_many_rows_in_many_batches_keep_their_places(path: Path, cache: Path) -> None:
    table = toy.write_parquet(path, buildings=50_000, images=3, dim=2, row_group_size=40_000)
    store = open_store(path, cache)
    assert store.ids.to_pylist() == table["streetview_image_id"].to_pylist()
    names = np.array(store.building_ids.to_pylist())
    assert (names[store.building] == np.array(table["building_id"].to_pylist())).all()
    np.testing.assert_array_equal(store.embeddings, toy.vectors_of(table).astype(np.float16))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (65504.0, None),
        (65505.0, "leaves the range of float16"),
        (-1e6, "leaves the range of float16"),
        (6.2e-5, None),
        (6e-5, "is too small for float16"),
        (0.0, None),
    ],
)
def test_float32_is_kept_only_for_what_float16_cannot_hold(
    path: Path, cache: Path, value: float, why: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    table = toy.table(buildings=2000)
    vectors = toy.vectors_of(table).astype(np.float32)
    vectors[7777] = value
    pq.write_table(table.set_column(2, "embedding", toy.as_lists(vectors)), path)
    store = open_store(path, cache)
    dtype = np.float16 if why is None else np.float32
    assert store.embeddings.dtype == dtype
    np.testing.assert_array_equal(store.embeddings, vectors.astype(dtype))
    assert f"kept as {np.dtype(dtype)}" in caplog.text
    if why:
        assert f"the vector in row 7777 of train.parquet {why}" in caplog.text
        assert (store.folder / "embeddings.f32").stat().st_size == vectors.nbytes
        assert not (store.folder / "embeddings.f16").exists()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_that_of_numpy_whatever_the_batches(
    path: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every half, its neighbours and the points half-way between two, normal or not."""
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(dtype)
    middles = (halves[1:] + halves[:-1]) / 2
    points = np.concatenate([halves, middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9)])
    points = np.concatenate([points, -points])[: 320 * 780].reshape(-1, 780)
    points[:, 0] = 1  # so that no vector is too small
    table = toy.table(buildings=len(points) // 4).set_column(2, "embedding", toy.as_lists(points))
    pq.write_table(table, path, row_group_size=37)
    contents = set()
    for number, size in enumerate((1, 100_000, 2**21)):
        monkeypatch.setattr(parquet, "BATCH_BYTES", size)
        folder = open_store(path, tmp_path / f"cache{number}").folder
        contents.add((folder / "embeddings.f16").read_bytes())
    assert contents == {points.astype(np.float16).tobytes()}


@pytest.mark.parametrize("value", [65504.002, 65519.9, -65519.9, 65520.0, 1e30, 6.1034e-5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_value_that_rounds_into_the_range_of_float16_is_outside_all_the_same(
    path: Path, cache: Path, dtype: str, value: float
) -> None:
    vectors = toy.vectors_of(toy.table()).astype(dtype)
    vectors[7] = value
    pq.write_table(toy.table().set_column(2, "embedding", toy.as_lists(vectors)), path)
    store = open_store(path, cache)
    assert store.embeddings.dtype == np.float32
    np.testing.assert_array_equal(store.embeddings, vectors.astype(np.float32))


def test_float16_sources_stay_as_they_are_however_small(path: Path, cache: Path) -> None:
    table = toy.table(dtype="float16")
    vectors = toy.vectors_of(table).astype(np.float16)
    vectors[3] = 1e-7
    pq.write_table(table.set_column(2, "embedding", toy.as_lists(vectors)), path)
    store = open_store(path, cache)
    assert store.embeddings.dtype == np.float16
    np.testing.assert_array_equal(store.embeddings, vectors)


def test_describe_counts(path: Path, cache: Path) -> None:
    tables = [toy.table(buildings=3, images=5), toy.table(buildings=4, images=1, first=50)]
    pq.write_table(pa.concat_tables(tables), path)
    assert describe(open_store(path, cache)) == {
        "rows": 19,
        "buildings": 7,
        "buildings with 2 or more images": 3,
        "images per building, fewest": 1,
        "images per building, median": 1,
        "images per building, most": 5,
        "dim": 8,
        "dtype": "float16",
    }


# --- life of the cache -----------------------------------------------------------------------


def test_a_warm_cache_is_opened_not_built(path: Path, cache: Path) -> None:
    toy.write_parquet(path)
    first = open_store(path, cache)
    written = (first.folder / "embeddings.f16").stat().st_mtime_ns
    moved = path.rename(path.with_name("other.parquet"))
    again = open_store(moved, cache)
    assert again.folder == first.folder
    assert (again.folder / "embeddings.f16").stat().st_mtime_ns == written


def test_a_changed_file_is_never_served_stale(path: Path, cache: Path) -> None:
    toy.write_parquet(path)
    before = open_store(path, cache)
    table = toy.write_parquet(path, seed=1)
    after = open_store(path, cache)
    assert after.fingerprint != before.fingerprint
    np.testing.assert_array_equal(after.embeddings, toy.vectors_of(table).astype(np.float16))


@pytest.mark.parametrize("file", ["embeddings.f16", "images.arrow", "starts.i64", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "foreign"])
def test_a_damaged_cache_is_built_again(
    path: Path, cache: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = toy.write_parquet(path)
    victim = open_store(path, cache).folder / file
    if how == "cut":
        os.truncate(victim, victim.stat().st_size // 2)
    elif how == "gone":
        victim.unlink()
    else:
        victim.write_text('["not ours"]')
    store = open_store(path, cache)
    np.testing.assert_array_equal(store.embeddings, toy.vectors_of(table).astype(np.float16))
    assert "is damaged: building it again" in caplog.text
    assert visible(cache) == [store.fingerprint]


def test_the_cache_tells_what_it_was_built_from(path: Path, cache: Path) -> None:
    toy.write_parquet(path)
    facts = json.loads((open_store(path, cache).folder / "meta.json").read_text())
    assert facts["sources"] == ["train.parquet"]
    assert (facts["rows"], facts["dim"], facts["dtype"]) == (80, 8, "f16")
    assert facts["why"] == "every value fits"


def test_processes_that_start_together_build_once(path: Path, cache: Path, tmp_path: Path) -> None:
    toy.write_parquet(path, buildings=5000, dim=64)
    code = """
import time
from tripletkit.data.store import open_store
path, cache, go = map(Path, sys.argv[1:])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
store = open_store(path, cache)
print(store.fingerprint, float(store.embeddings[:].astype("f8").sum()))
"""
    workers = [run(code, path, cache, tmp_path / "go") for _ in range(4)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    ends = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert len({out for out, _ in ends}) == 1
    assert sum("kept as float16" in err for _, err in ends) == 1
    assert len(visible(cache)) == 1


def test_a_killed_builder_leaves_nothing_that_matters(
    big: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = run(
        "from tripletkit.data.store import open_store; open_store(*map(Path, sys.argv[1:]))",
        big,
        cache,
    )
    while not any(p.stat().st_size > 2**20 for p in cache.glob(".*.tmp/embeddings.f16")):
        time.sleep(0.001)
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    (left,) = visible(cache)
    assert left.endswith(".tmp"), "the builder was killed in the middle"

    store = open_store(big, cache)
    assert visible(cache) == [store.fingerprint]
    assert "left behind by a process that was killed" in caplog.text
    assert store.embeddings.shape == (BIG_ROWS, BIG_DIM)
    assert store.ids[BIG_ROWS - 1].as_py() == f"image-{BIG_ROWS - 1}"


def test_building_takes_little_memory_whatever_the_size(big: Path, cache: Path) -> None:
    code = """
import tripletkit.data.embeddings  # with torch
from tripletkit.data.store import open_store
def peak():  # not ru_maxrss, which starts with the size of the process that forked us
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
before = peak()
open_store(*map(Path, sys.argv[1:]))
print(peak() - before)
"""
    out, err = run(code, big, cache).communicate(timeout=60)
    assert float(out) < 250, err  # MB; the file has 410 in one row group


def test_a_full_disk_says_how_much_is_needed_and_leaves_nothing(path: Path, cache: Path) -> None:
    toy.write_parquet(path, buildings=5000, dim=64)
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
from tripletkit.data.store import open_store
from tripletkit.errors import RunError
try:
    open_store(*map(Path, sys.argv[1:]))
except RunError as error:
    print(error.message, "|", error.hint)
"""
    out, err = run(code, path, cache).communicate(timeout=60)
    assert out.startswith(f"{cache}: cannot be written: File too large; 3,840,000 bytes"), err
    assert "cache_dir" in out
    assert visible(cache) == []


def test_a_disk_without_room_is_found_before_any_work(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="No space left on device; 1,000,000,000,000,000,000 bytes"),
        writing_to(tmp_path, needed=10**18),
    ):
        raise AssertionError("not reached")


def test_a_cache_folder_that_cannot_be_made_is_named(path: Path, tmp_path: Path) -> None:
    toy.write_parquet(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/cache: the cache cannot be written: "):
        open_store(path, tmp_path / "file" / "cache")


# --- leakage ---------------------------------------------------------------------------------


def test_a_building_in_two_splits_is_named(tmp_path: Path, cache: Path) -> None:
    stores = {}
    for split, first in (("train", 0), ("val", 18), ("test", 100)):
        toy.write_parquet(tmp_path / f"{split}.parquet", first=first)
        stores[split] = open_store(tmp_path / f"{split}.parquet", cache)
    with pytest.raises(DataError) as caught:
        check_leakage(stores)
    message = caught.value.message
    assert "2 buildings are in both train" in message
    assert "train.parquet" in message
    assert "val.parquet" in message
    assert message.endswith(("b0018, b0019", "b0019, b0018"))
    check_leakage({"train": stores["train"], "test": stores["test"]})


def test_buildings_left_out_of_a_sample_do_not_leak(tmp_path: Path, cache: Path) -> None:
    toy.write_parquet(tmp_path / "train.parquet")
    store = open_store(tmp_path / "train.parquet", cache)
    few = subsample(store, buildings=5, seed=1)
    rest = [b for b in range(20) if few.starts[b] == few.starts[b + 1]]
    table = toy.table().filter(
        pa.array(
            [
                b in {store.building_ids[c].as_py() for c in rest}
                for b in toy.table()["building_id"].to_pylist()
            ]
        )
    )
    pq.write_table(table, tmp_path / "val.parquet")
    val = open_store(tmp_path / "val.parquet", cache)
    check_leakage({"train": few, "val": val})
    with pytest.raises(DataError, match="15 buildings are in both"):
        check_leakage({"train": store, "val": val})


# --- samples ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """A store, and one with more buildings, more images and another order of rows."""
    folder = tmp_path_factory.mktemp("grown")
    toy.write_parquet(folder / "a.parquet", buildings=1000, images=2)
    toy.write_parquet(folder / "b.parquet", buildings=1500, images=3, seed=3)
    small, large = (open_store(folder / f"{n}.parquet", folder / "cache") for n in "ab")
    return small, large


def chosen(store: Store) -> set[str]:
    return {store.building_ids[c].as_py() for c in np.flatnonzero(np.diff(store.starts)).tolist()}


@given(
    fraction=st.floats(0.05, 1.0),
    buildings=st.integers(0, 1200),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=50, deadline=None)
def test_a_sample_is_whole_buildings_of_the_same_store(
    grown: tuple[Store, Store], fraction: float, buildings: int, seed: int
) -> None:
    store, _ = grown
    sample = subsample(store, fraction=fraction, buildings=buildings, seed=seed)
    sizes, full = np.diff(sample.starts), np.diff(store.starts)
    assert ((sizes == 0) | (sizes == full)).all()
    assert len(sizes) == len(full)
    if buildings:
        assert np.count_nonzero(sizes) <= buildings
    inside = sizes[store.building] > 0
    np.testing.assert_array_equal(sample.building, np.where(inside, store.building, -1))
    assert sorted(sample.by_building.tolist()) == np.flatnonzero(inside).tolist()
    for code in np.flatnonzero(sizes)[:20]:
        np.testing.assert_array_equal(
            sample.by_building[sample.starts[code] : sample.starts[code + 1]],
            store.by_building[store.starts[code] : store.starts[code + 1]],
        )
    assert (sample.building.dtype, sample.by_building.dtype, sample.starts.dtype) == (
        np.int32,
        np.int64,
        np.int64,
    )


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_fraction_is_about_that_many_buildings(
    grown: tuple[Store, Store], fraction: float
) -> None:
    store, _ = grown
    for seed in range(5):
        share = len(chosen(subsample(store, fraction=fraction, seed=seed))) / 1000
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 1000) ** 0.5


def test_added_data_does_not_change_who_is_in(grown: tuple[Store, Store]) -> None:
    small, large = grown
    old = set(small.building_ids.to_pylist())
    inside = chosen(subsample(large, fraction=0.3, seed=5))
    assert inside & old == chosen(subsample(small, fraction=0.3, seed=5))
    # A fixed number can only lose members to newcomers.
    assert chosen(subsample(large, buildings=100, seed=5)) & old < chosen(
        subsample(small, buildings=100, seed=5)
    )


def test_smaller_samples_lie_in_larger_ones_and_seeds_differ(grown: tuple[Store, Store]) -> None:
    store, _ = grown
    samples = [chosen(subsample(store, buildings=n, seed=5)) for n in (10, 100, 500)]
    assert [len(s) for s in samples] == [10, 100, 500]
    assert samples[0] < samples[1] < samples[2]
    assert chosen(subsample(store, buildings=500, seed=6)) != samples[2]


def test_both_limits_hold(grown: tuple[Store, Store]) -> None:
    store, _ = grown
    tenth = chosen(subsample(store, fraction=0.1, seed=5))
    assert chosen(subsample(store, fraction=0.1, buildings=900, seed=5)) == tenth
    assert len(chosen(subsample(store, fraction=0.1, buildings=7, seed=5))) == 7


def test_a_sample_of_a_sample_stays_inside(grown: tuple[Store, Store]) -> None:
    store, _ = grown
    half = subsample(store, fraction=0.5, seed=5)
    assert chosen(subsample(half, buildings=700, seed=6)) == chosen(half)
    assert chosen(subsample(half, buildings=100, seed=6)) < chosen(half)


def test_no_limit_is_the_store_itself(grown: tuple[Store, Store]) -> None:
    store, _ = grown
    assert subsample(store, fraction=1.0, buildings=0, seed=5) is store


def test_the_whole_of_a_sample_is_the_store(grown: tuple[Store, Store]) -> None:
    store, _ = grown
    again = whole(subsample(store, buildings=7, seed=5))
    np.testing.assert_array_equal(again.building, store.building)
    np.testing.assert_array_equal(again.by_building, store.by_building)
    np.testing.assert_array_equal(again.starts, store.starts)


def test_a_sample_without_pairs_is_refused(path: Path, cache: Path) -> None:
    tables = [toy.table(buildings=1, images=2), toy.table(buildings=200, images=1, first=50)]
    pq.write_table(pa.concat_tables(tables), path)
    store = open_store(path, cache)
    with pytest.raises(DataError, match="no building with two images in a sample of 2 of 201"):
        subsample(store, buildings=2, seed=0)
    assert chosen(subsample(store, buildings=200, seed=0)) >= {"b0000"}
