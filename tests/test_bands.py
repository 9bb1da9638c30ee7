"""Difficulty bands: what is read from the metadata, and exact neighbours when it is built."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import toy
from tripletkit.data import bands as bands_module
from tripletkit.data import neighbors as neighbors_module
from tripletkit.data.bands import Bands, build_bands, open_bands
from tripletkit.data.neighbors import nearest_buildings
from tripletkit.data.store import Store, open_store, subsample
from tripletkit.errors import ConfigError, DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bands")


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    """20 buildings with 4 images each."""
    toy.write_parquet(folder / "train.parquet")
    return open_store(folder / "train.parquet", folder / "cache")


def store_of(path: Path, vectors: np.ndarray, buildings: list[int]) -> Store:
    table = pa.table(
        {
            "streetview_image_id": [f"i{i}" for i in range(len(vectors))],
            "building_id": buildings,
            "embedding": toy.as_lists(vectors),
        }
    )
    pq.write_table(table, path)
    return open_store(path, path.parent / "cache")


Anchor = tuple[str, list[Any], list[int]]  # image id, neighbour buildings, bands


def write_metadata(
    path: Path, anchors: list[Anchor], building: pa.DataType | None = None, large: bool = False
) -> Path:
    many = pa.large_list if large else pa.list_
    images, buildings, bands = zip(*anchors, strict=True)
    table = pa.table(
        {
            "target_coord_hash": pa.array(images),
            "neighbor_bands": pa.array(bands, many(pa.int8())),
            "neighbor_building_ids": pa.array(buildings, many(building or pa.string())),
            "comment": ["ignored"] * len(images),
        }
    )
    pq.write_table(table, path, row_group_size=5)
    return path


def plain(store: Store, count: int = 3) -> list[Anchor]:
    """Every image with three neighbours."""
    names = store.building_ids.to_pylist()
    return [
        (image, [names[(code + step) % len(names)] for step in (1, 2, 3)], [0, 1, count - 1])
        for image, code in zip(store.ids.to_pylist(), store.building.tolist(), strict=True)
    ]


def cells(bands: Bands) -> list[list[list[int]]]:
    """cells[row][band]: neighbour codes, sorted."""
    ends = bands.offsets.tolist()
    flat = [sorted(bands.neighbors[a:b].tolist()) for a, b in pairwise(ends)]
    return [flat[i : i + bands.count] for i in range(0, len(flat), bands.count)]


def slow_cells(anchors: list[Anchor], store: Store, count: int) -> list[list[list[int]]]:
    """The definition, with dictionaries."""
    code_of = {name: code for code, name in enumerate(store.building_ids.to_pylist())}
    sizes = np.diff(store.starts)
    listed = {image: zip(names, levels, strict=True) for image, names, levels in anchors}
    result = []
    for image, own in zip(store.ids.to_pylist(), store.building.tolist(), strict=True):
        hardest: dict[int, int] = {}
        for name, band in listed.get(image, ()) if own >= 0 else ():
            code = code_of.get(str(name))
            if code is not None and code != own and sizes[code]:
                hardest[code] = min(band, hardest.get(code, band))
        result.append([sorted(c for c in hardest if hardest[c] == b) for b in range(count)])
    return result


def refusal(path: Path, store: Store) -> str:
    cache = path.parent / "refused"
    with pytest.raises(DataError) as caught:
        open_bands(path, store, cache)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []
    return f"{caught.value.message} | {caught.value.hint}"


# --- reading ---------------------------------------------------------------------------------


@st.composite
def metadata(draw: st.DrawFn) -> list[Anchor]:
    """Rows in any order, some missing, some foreign; repeated, unknown and own buildings."""
    known = [f"img-{b}-{i}" for b in range(20) for i in range(4)]
    images = draw(st.permutations(known))[: draw(st.integers(40, 80))]
    images += [f"foreign-{i}" for i in range(draw(st.integers(0, 30)))]
    images = draw(st.permutations(images))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 7))
    anchors = []
    for image in images:
        size = int(random.integers(0, 12))
        names = [f"b{b:04d}" for b in random.integers(0, 30, size)]
        anchors.append((image, names, random.integers(0, count, size).tolist()))
    anchors.append(("foreign", ["b0000"], [count - 1]))  # fixes the number of bands
    return anchors


@given(anchors=metadata(), large=st.booleans(), sample=st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_bands_equal_a_dictionary_join(
    anchors: list[Anchor], large: bool, sample: int, store: Store, folder: Path
) -> None:
    path = write_metadata(folder / "meta.parquet", anchors, large=large)
    part = subsample(store, buildings=sample, seed=3)
    with pytest.MonkeyPatch.context() as patch:  # small batches, so that there are borders
        patch.setattr(bands_module, "READ_ROWS", 7)
        patch.setattr(bands_module, "GATHER_ROWS", 9)
        bands = open_bands(path, part, folder / "cache")
    assert bands.count == anchors[-1][2][0] + 1
    assert cells(bands) == slow_cells(anchors, part, bands.count)
    assert bands.neighbors.dtype == np.int32
    assert bands.offsets.dtype == np.int64


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.string(), pa.large_string()], ids=str)
def test_building_ids_compare_as_text(tmp_path: Path, kind: pa.DataType) -> None:
    toy.write_parquet(tmp_path / "x.parquet", integer_buildings=True)
    store = open_store(tmp_path / "x.parquet", tmp_path / "cache")
    anchors = plain(store)
    typed = [
        (image, [int(n) if pa.types.is_integer(kind) else n for n in names], levels)
        for image, names, levels in anchors
    ]
    path = write_metadata(tmp_path / "meta.parquet", typed, building=kind)
    assert cells(open_bands(path, store, tmp_path / "cache")) == slow_cells(anchors, store, 3)


def test_metadata_may_be_several_files(store: Store, tmp_path: Path) -> None:
    anchors = plain(store)
    (tmp_path / "meta").mkdir()
    write_metadata(tmp_path / "meta" / "a.parquet", anchors[:33])
    write_metadata(tmp_path / "meta" / "b.parquet", anchors[33:])
    bands = open_bands(tmp_path / "meta", store, tmp_path / "cache")
    assert cells(bands) == slow_cells(anchors, store, 3)


def test_a_second_opening_uses_the_cache(store: Store, tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "meta.parquet", plain(store))
    open_bands(path, store, tmp_path / "cache")
    (built,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    assert sorted(p.name for p in built.iterdir()) == ["meta.json", "neighbors.i32", "offsets.i64"]
    before = (built / "neighbors.i32").stat().st_mtime_ns
    bands = open_bands(path, subsample(store, buildings=9, seed=1), tmp_path / "cache")
    assert (built / "neighbors.i32").stat().st_mtime_ns == before
    assert len(bands.offsets) == 80 * 3 + 1


def test_other_metadata_or_another_store_gets_another_cache(store: Store, tmp_path: Path) -> None:
    anchors = plain(store)
    first = open_bands(write_metadata(tmp_path / "m.parquet", anchors), store, tmp_path / "cache")
    anchors[0] = (anchors[0][0], [], [])
    again = open_bands(write_metadata(tmp_path / "m.parquet", anchors), store, tmp_path / "cache")
    assert len(again.neighbors) == len(first.neighbors) - 3
    toy.write_parquet(tmp_path / "x.parquet", seed=1)  # the same ids in another order
    other = open_store(tmp_path / "x.parquet", tmp_path / "cache")
    assert cells(open_bands(tmp_path / "m.parquet", other, tmp_path / "cache")) == slow_cells(
        anchors, other, 3
    )


def test_metadata_of_other_images_tells_how_many_match_and_shows_both_kinds(
    store: Store, tmp_path: Path
) -> None:
    anchors = plain(store)
    renamed = [(f"legacy/{image}", *rest) for image, *rest in anchors[:45]] + anchors[45:]
    message = refusal(write_metadata(tmp_path / "meta.parquet", renamed), store)
    assert "35 of the 80 images" in message
    assert "(44%)" in message
    for image, *_ in anchors[:3]:
        assert f"'legacy/{image}'" in message
    assert ", ".join(repr(i) for i in store.ids.to_pylist()[:3]) in message


def test_half_of_the_images_is_enough(store: Store, tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "meta.parquet", plain(store)[:40])
    assert len(open_bands(path, store, tmp_path / "cache").neighbors) == 120


def test_neighbours_that_are_all_unknown_are_refused(store: Store, tmp_path: Path) -> None:
    anchors = [(image, ["x"] * 3, levels) for image, _, levels in plain(store)]
    message = refusal(write_metadata(tmp_path / "meta.parquet", anchors), store)
    assert "no neighbour in column 'neighbor_building_ids' is a building of" in message


def test_an_image_described_twice_is_refused_with_both_rows(store: Store, tmp_path: Path) -> None:
    anchors = plain(store)
    path = write_metadata(tmp_path / "meta.parquet", [*anchors, anchors[7]])
    assert (
        "repeats 1 images, the first one in meta.parquet row 7 and meta.parquet row 80"
        in refusal(path, store)
    )


@pytest.mark.parametrize(
    ("names", "levels", "problem"),
    [
        (["b0001"], [0, 1], "lists of different lengths in row 6"),
        (None, [0], "'neighbor_building_ids' is null in row 6"),
        (["b0001"], None, "'neighbor_bands' is null in row 6"),
        (["b0001", None], [0, 1], "'neighbor_building_ids' has null elements in row 6"),
        (["b0001", "b0002"], [0, None], "'neighbor_bands' has null elements in row 6"),
        (["b0001"], [-1], "bands outside 0 to 255 in row 6"),
    ],
)
def test_bad_lists_are_named_with_their_row(
    store: Store, tmp_path: Path, names: Any, levels: Any, problem: str
) -> None:
    anchors = plain(store)
    anchors[6] = (anchors[6][0], names, levels)
    assert problem in refusal(write_metadata(tmp_path / "meta.parquet", anchors), store)


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("neighbor_bands", ["0"] * 80, "has the type string, not a list"),
        ("neighbor_bands", [[0.5] * 3] * 80, "is a list of double, not of integers"),
        ("neighbor_building_ids", [[0.5] * 3] * 80, "is a list of double, not of strings"),
        ("target_coord_hash", [0.5] * 80, "has the type double, not string or integer"),
        ("target_coord_hash", [None, *["x"] * 79], "is null in row 0"),
    ],
)
def test_columns_of_a_wrong_type_are_refused(
    store: Store, tmp_path: Path, column: str, values: list[Any], problem: str
) -> None:
    path = write_metadata(tmp_path / "meta.parquet", plain(store))
    table = pq.read_table(path)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values)), path)
    message = refusal(path, store)
    assert column in message
    assert problem in message


def test_a_missing_column_is_named(store: Store, tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "meta.parquet", plain(store))
    pq.write_table(pq.read_table(path).drop_columns("neighbor_bands"), path)
    assert "there is no column 'neighbor_bands'" in refusal(path, store)


# --- exact neighbours ------------------------------------------------------------------------


def slow_nearest(store: Store, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair in float64: distances [N, B], and the k nearest by (similarity, code)."""
    x = np.asarray(store.embeddings, np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T
    best = np.full((len(x), len(store.building_ids)), -np.inf)
    for row, code in enumerate(store.building.tolist()):
        if code >= 0:
            best[:, code] = np.maximum(best[:, code], similarity[:, row])
    inside = store.building >= 0
    best[np.flatnonzero(inside), store.building[inside]] = -np.inf
    codes = np.argsort(-best, axis=1, kind="stable")[:, :k]
    distances = np.sqrt(np.maximum(2 - 2 * best, 0))
    return distances, codes, np.take_along_axis(distances, codes, 1)


def search(store: Store, k: int, tiles: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    blocks = nearest_buildings(store, np.sort(store.by_building), k, CPU, tiles)
    codes, distances = zip(*blocks, strict=True)
    return np.concatenate(codes), np.concatenate(distances)


@pytest.fixture(scope="module")
def uneven() -> list[int]:
    """60 buildings with 1 to 7 images, one with 40."""
    random = np.random.default_rng(0)
    sizes = [*random.integers(1, 8, 59), 40]
    return random.permutation(np.repeat(np.arange(60), sizes)).tolist()


TILES = [None, (50, 1), (7, 8), (64, 16), (5, 1000), (1000, 33)]


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("k", [1, 10, 59])
def test_neighbours_are_exact(
    tmp_path: Path, uneven: list[int], k: int, tiles: tuple[int, int] | None
) -> None:
    vectors = np.random.default_rng(1).normal(size=(len(uneven), 12))
    store = store_of(tmp_path / "x.parquet", vectors.astype(np.float32), uneven)
    every, _, expected = slow_nearest(store, k)
    codes, distances = search(store, k, tiles)
    np.testing.assert_allclose(distances, expected, atol=1e-5)
    # Whoever was chosen is that far away: right even where two are equally near.
    np.testing.assert_allclose(np.take_along_axis(every, codes, 1), expected, atol=1e-5)
    assert all(len(set(row)) == k for row in codes.tolist())
    assert (codes != store.building[:, None]).all()


@pytest.mark.parametrize("tiles", TILES)
def test_ties_go_by_building_code_for_every_tile_size(
    tmp_path: Path, uneven: list[int], tiles: tuple[int, int] | None
) -> None:
    # Signs in 16 dimensions: unit vectors and products are exact, and most distances are tied.
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=(len(uneven), 16))
    store = store_of(tmp_path / "x.parquet", signs.astype(np.float32), uneven)
    _, expected_codes, expected = slow_nearest(store, 25)
    codes, distances = search(store, 25, tiles)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(distances, expected.astype(np.float32))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_length_of_vectors_does_not_matter(tmp_path: Path, scale: float) -> None:
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=(40, 16))
    lengths = scale * 2.0 ** (np.arange(40) % 20)[:, None]
    store = store_of(
        tmp_path / "x.parquet", (signs * lengths).astype(np.float32), [i // 2 for i in range(40)]
    )
    assert store.embeddings.dtype == np.float32
    unit = store_of(tmp_path / "y.parquet", signs.astype(np.float32), [i // 2 for i in range(40)])
    np.testing.assert_array_equal(search(store, 5, None)[0], search(unit, 5, None)[0])


def test_vectors_of_zeros_are_far_from_everything(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    vectors[4:6] = 0
    store = store_of(tmp_path / "x.parquet", vectors, [i // 2 for i in range(20)])
    _, distances = search(store, 9, None)
    np.testing.assert_allclose(distances[4:6], 2**0.5)


def test_a_sample_searches_among_itself(store: Store) -> None:
    part = subsample(store, buildings=8, seed=1)
    codes, distances = search(part, 7, None)
    rows = np.sort(part.by_building)
    assert set(codes.ravel().tolist()) <= set(part.building[rows].tolist())
    np.testing.assert_allclose(distances, slow_nearest(part, 7)[2][rows], atol=1e-5)


# --- the file --------------------------------------------------------------------------------


def test_the_file_holds_the_neighbours_and_their_bands(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "meta.parquet"
    build_bands(store, path, neighbors=12, k0=4)
    table = pq.read_table(path)
    assert [f"{f.name}: {f.type}" for f in table.schema] == [
        "target_coord_hash: string",
        "neighbor_building_ids: list<element: string>",
        "neighbor_bands: list<element: int32>",
        "neighbor_distances: list<element: float>",
    ]
    codes, distances = search(store, 12, None)
    assert table["target_coord_hash"].to_pylist() == store.ids.to_pylist()
    names = np.array(store.building_ids.to_pylist())
    assert table["neighbor_building_ids"].to_pylist() == names[codes].tolist()
    np.testing.assert_array_equal(np.array(table["neighbor_distances"].to_pylist()), distances)
    standard = distances / distances[:, 3:4]
    edges = np.percentile(standard, [5, 10, 20, 40, 60, 85])
    levels = np.array(table["neighbor_bands"].to_pylist())
    np.testing.assert_array_equal(levels, (standard[..., None] > edges.astype(np.float32)).sum(-1))
    shares = np.bincount(levels.ravel(), minlength=7) / levels.size
    np.testing.assert_allclose(shares, [0.05, 0.05, 0.1, 0.2, 0.2, 0.25, 0.15], atol=0.04)
    assert json.loads(table.schema.metadata[b"tripletkit"]) == {
        "neighbors": 12,
        "k0": 4,
        "percentiles": [5, 10, 20, 40, 60, 85],
        "edges": [pytest.approx(e) for e in edges],
        "store": store.fingerprint,
    }


def test_what_was_built_can_be_opened(store: Store, tmp_path: Path) -> None:
    build_bands(store, tmp_path / "meta.parquet", neighbors=12, k0=4)
    bands = open_bands(tmp_path / "meta.parquet", store, tmp_path / "cache")
    assert bands.count == 7
    codes, _ = search(store, 12, None)
    found = [sorted(code for cell in row for code in cell) for row in cells(bands)]
    assert found == np.sort(codes).tolist()


def test_images_alone_in_their_building_are_anchors_too(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    store = store_of(tmp_path / "x.parquet", vectors, [0, 0, 1, 2, 3, 4, 5, 6, 7])
    build_bands(store, tmp_path / "meta.parquet", neighbors=3, k0=2)
    assert pq.read_table(tmp_path / "meta.parquet").num_rows == 9


def test_the_bytes_depend_on_nothing_but_the_input(
    tmp_path: Path, uneven: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=(len(uneven), 16))
    store = store_of(tmp_path / "x.parquet", signs.astype(np.float32), uneven)
    contents = set()
    for number, tiles in enumerate([(4096, 8192), (4096, 8192), (10, 7), (33, 100)]):
        monkeypatch.setitem(neighbors_module.TILES, "cpu", tiles)
        path = tmp_path / f"{number}.parquet"
        build_bands(store, path, neighbors=20, k0=5)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert {p.name for p in tmp_path.iterdir()} == {
        "cache",
        "x.parquet",
        *(f"{number}.parquet" for number in range(4)),
    }


def test_edges_of_many_distances_come_from_evenly_spread_anchors(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bands_module, "EDGE_VALUES", 12 * 27)
    monkeypatch.setitem(neighbors_module.TILES, "cpu", (7, 100))
    build_bands(store, tmp_path / "meta.parquet", neighbors=12, k0=4)
    _, distances = search(store, 12, None)
    edges = np.percentile((distances / distances[:, 3:4])[::3], [5, 10, 20, 40, 60, 85])
    written = json.loads(pq.read_schema(tmp_path / "meta.parquet").metadata[b"tripletkit"])
    np.testing.assert_allclose(written["edges"], edges, rtol=1e-6)


def test_neighbours_and_k0_are_clipped_to_the_buildings_there_are(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_bands(store, tmp_path / "meta.parquet")
    table = pq.read_table(tmp_path / "meta.parquet")
    assert {len(row) for row in table["neighbor_bands"].to_pylist()} == {19}
    assert "has 20 buildings: each anchor gets 19 neighbours" in caplog.text


def test_doubles_do_not_divide_by_zero(tmp_path: Path) -> None:
    vectors = np.ones((12, 8), np.float32)
    vectors[8:, 0] = -1
    store = store_of(tmp_path / "x.parquet", vectors, [i // 2 for i in range(12)])
    build_bands(store, tmp_path / "meta.parquet", neighbors=5, k0=2)
    distances = np.array(pq.read_table(tmp_path / "meta.parquet")["neighbor_distances"].to_pylist())
    assert np.isfinite(distances).all()
    assert (distances[:8, :3] == 0).all()


def test_nonsense_parameters_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neighbors 0 and k0 50: both must be 1 or more"):
        build_bands(store, tmp_path / "meta.parquet", neighbors=0)
    one = store_of(tmp_path / "x.parquet", np.ones((2, 8), np.float32), [1, 1])
    with pytest.raises(DataError, match="bands need two buildings or more"):
        build_bands(one, tmp_path / "meta.parquet")


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "x.parquet", buildings=300)
    code = """
import resource, sys
from pathlib import Path
from tripletkit.data.store import open_store
from tripletkit.data.bands import build_bands
from tripletkit.errors import RunError
folder = Path(sys.argv[1])
store = open_store(folder / "x.parquet", folder / "cache")
for limit in (100_000, 800_000):  # during the search, and while writing the result
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        build_bands(store, folder / "out" / "meta.parquet")
    except RunError as error:
        print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.stdout.count("out: cannot be written: File too large") == 2, done.stderr
    assert list((tmp_path / "out").iterdir()) == []
