"""What is read from parquet files, and what every kind of bad input is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import toy
from tripletkit.data import parquet
from tripletkit.data.store import Store, open_store
from tripletkit.errors import DataError


def store_of(path: Path, **options: int) -> Store:
    return open_store(path, path.parent / "cache", **options)


def refusal(path: Path, table: pa.Table | None = None, **options: int) -> str:
    """The message and hint that the file, or this table written to it, is refused with."""
    if table is not None:
        pq.write_table(table, path)
    with pytest.raises(DataError) as caught:
        store_of(path, **options)
    left = [p.name for p in (path.parent / "cache").glob("*") if not p.name.endswith(".lock")]
    assert left == [], "a refused file leaves no cache"
    return f"{caught.value.message} | {caught.value.hint}"


def change(table: pa.Table, column: str, values: object) -> pa.Table:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return table.set_column(table.column_names.index(column), column, array)


def edit(table: pa.Table, column: str, **at: object) -> pa.Table:
    """The column with some values replaced: r3=None puts a null into row 3."""
    values = table[column].to_pylist()
    for row, value in at.items():
        values[int(row[1:])] = value
    return change(table, column, pa.array(values, table[column].type))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "train.parquet"


# --- what is accepted ------------------------------------------------------------------------


@pytest.mark.parametrize("lists", ["list", "large", "fixed"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("integer_buildings", [False, True])
@pytest.mark.parametrize("ids", ["streetview", "dataset", "hash"])
def test_every_schema_gives_the_same_store(
    path: Path, lists: str, dtype: str, integer_buildings: bool, ids: str
) -> None:
    options = {"lists": lists, "dtype": dtype, "integer_buildings": integer_buildings, "ids": ids}
    table = toy.write_parquet(path, row_group_size=7, **options)
    store = store_of(path, dim=8)
    np.testing.assert_array_equal(store.embeddings, toy.vectors_of(table).astype(np.float16))
    buildings = [str(b) for b in table["building_id"].to_pylist()]
    assert [store.building_ids[c].as_py() for c in store.building.tolist()] == buildings
    if ids == "dataset":
        expected = [
            f"{d:04d}_{p}"
            for d, p in zip(
                table["dataset_id"].to_pylist(), table["patch_id"].to_pylist(), strict=True
            )
        ]
    else:
        expected = table.column(0).to_pylist()
    assert store.ids.to_pylist() == expected


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_ids_may_be_large_strings_or_categories(path: Path, kind: pa.DataType) -> None:
    table = toy.table()
    plain = table["building_id"].to_pylist()
    table = change(table, "building_id", table["building_id"].combine_chunks().cast(kind))
    pq.write_table(table, path)
    store = store_of(path)
    assert [store.building_ids[c].as_py() for c in store.building.tolist()] == plain


def test_a_numeric_and_a_text_dataset_id_give_the_same_image_id(path: Path) -> None:
    table = toy.table(ids="dataset")
    pq.write_table(
        change(table, "dataset_id", [str(d) for d in table["dataset_id"].to_pylist()]), path
    )
    other = path.with_name("other.parquet")
    pq.write_table(table, other)
    assert store_of(path).ids.equals(store_of(other).ids)


def test_the_street_view_id_wins_over_the_others(path: Path) -> None:
    table = toy.table().append_column("target_coord_hash", pa.array(["x"] * 80))
    pq.write_table(table, path)
    assert store_of(path).ids.to_pylist() == table["streetview_image_id"].to_pylist()


def test_a_folder_a_glob_and_the_files_joined_give_the_same_rows(tmp_path: Path) -> None:
    tables = [
        toy.write_parquet(tmp_path / "parts" / f"p{i}.parquet", first=3 * i, buildings=3)
        for i in range(4)
    ]
    (tmp_path / "parts" / "notes.txt").write_text("not data")
    (tmp_path / "parts" / ".half.parquet").write_text("still being written")
    pq.write_table(pa.concat_tables(tables), tmp_path / "whole.parquet")
    whole = store_of(tmp_path / "whole.parquet")
    for source in (
        tmp_path / "parts",
        tmp_path / "parts" / "p*.parquet",
        tmp_path / "**/p?.parquet",
    ):
        store = store_of(source)
        assert store.ids.equals(whole.ids)
        np.testing.assert_array_equal(store.embeddings, whole.embeddings)
        np.testing.assert_array_equal(store.by_building, whole.by_building)


def test_batches_are_bounded_however_large_the_row_group_is(path: Path) -> None:
    toy.write_parquet(path, buildings=100)
    table = parquet.open_table([path], [])
    sizes = [len(batch.data) for batch in parquet.batches(table, ["embedding"], rows=64)]
    assert sum(sizes) == 400
    assert max(sizes) == 64


# --- which files -----------------------------------------------------------------------------


def test_a_missing_file_is_named_with_its_nearest_neighbour(path: Path) -> None:
    toy.write_parquet(path)
    message = refusal(path.with_name("trian.parquet"))
    assert "trian.parquet: no such file" in message
    assert f"did you mean {path}?" in message


def test_a_pattern_or_a_folder_without_files_says_so(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "deep" / "er" / "x.parquet")
    assert "no file matches this pattern" in refusal(tmp_path / "y*.parquet")
    message = refusal(tmp_path / "deep")
    assert "no *.parquet files in this folder" in message
    assert "deep/**/*.parquet" in message


def test_an_unset_variable_in_the_path_is_named() -> None:
    message = refusal(Path("$NO_SUCH_VARIABLE/train.parquet"))
    assert "$NO_SUCH_VARIABLE is not set" in message


# --- broken files ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 50, -1, -500])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    toy.write_parquet(path)
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(path)
    assert str(path) in message
    assert ("is empty" if keep == 0 else "not a parquet file, or one that was cut off") in message


def test_a_file_that_is_not_parquet_is_refused(path: Path) -> None:
    path.write_text("building_id,embedding\n" * 10)
    assert "not a parquet file" in refusal(path)


def test_damaged_pages_are_refused_with_the_row(path: Path) -> None:
    pq.write_table(toy.table(buildings=2000), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    message = refusal(path)
    assert f"{path}: cannot be read from row" in message


def test_damaged_footers_are_refused(path: Path) -> None:
    toy.write_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[:-60] + bytes(50) + content[-10:])
    assert f"{path}: cannot be read" in refusal(path)


def test_a_file_without_rows_is_refused(path: Path) -> None:
    assert "has no rows" in refusal(path, toy.table().slice(0, 0))


# --- wrong columns ---------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["building_id", "embedding"])
def test_a_missing_column_is_named_with_those_there_are(path: Path, column: str) -> None:
    table = toy.table()
    names = [f"{name}s" if name == column else name for name in table.column_names]
    message = refusal(path, table.rename_columns(names))
    assert f"{path}: there is no column {column!r}" in message
    assert ", ".join(names) in message
    assert f"is it '{column}s'?" in message


def test_no_image_id_column_lists_the_possible_ones(path: Path) -> None:
    message = refusal(path, toy.table().drop_columns("streetview_image_id"))
    assert "streetview_image_id; dataset_id + patch_id; target_coord_hash" in message
    assert "building_id, embedding" in message


def test_a_building_id_of_a_wrong_type_is_refused(path: Path) -> None:
    message = refusal(path, change(toy.table(), "building_id", [1.0, None] * 40))
    assert "'building_id' has the type double, not string or integer" in message
    assert "pandas turns integers into floats" in message


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["[0.1, 0.2]"] * 80, "string"),
        ([[1, 2]] * 80, "list<element: int64>"),
        ([1.5] * 80, "double"),
        ([[[1.0]]] * 80, "list<element: list<element: double>>"),
    ],
)
def test_an_embedding_of_a_wrong_type_is_refused(
    path: Path, values: list[object], kind: str
) -> None:
    message = refusal(path, change(toy.table(), "embedding", values))
    assert f"column 'embedding' has the type {kind}, not a list of float16" in message


# --- wrong values ----------------------------------------------------------------------------


def test_vectors_of_other_lengths_are_named(path: Path) -> None:
    table = edit(toy.table(), "embedding", r3=[1.0] * 7, r11=[1.0] * 9, r12=[])
    message = refusal(path, table)
    assert "vectors of other lengths than 8 in rows 3, 11, 12 (row 3 has 7 numbers)" in message


def test_an_empty_first_vector_is_named(path: Path) -> None:
    assert "empty vector in row 0" in refusal(path, edit(toy.table(), "embedding", r0=[]))


def test_vectors_of_another_length_than_configured_are_refused(path: Path) -> None:
    toy.write_parquet(path)
    assert "has vectors of 8 numbers, not 16" in refusal(path, dim=16)


def test_a_warm_cache_still_checks_the_length(path: Path) -> None:
    toy.write_parquet(path)
    store_of(path)
    with pytest.raises(DataError, match="has vectors of 8 numbers, not 16"):
        store_of(path, dim=16)


def test_files_with_vectors_of_different_lengths_are_both_named(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "data" / "a.parquet", dim=8)
    toy.write_parquet(tmp_path / "data" / "b.parquet", dim=6, first=50)
    message = refusal(tmp_path / "data")
    assert "b.parquet: column 'embedding' has vectors of 6 numbers, not 8" in message
    assert "a.parquet" in message


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(path: Path, dtype: str, value: float) -> None:
    table = toy.table(dtype=dtype)
    vectors = toy.vectors_of(table).astype(dtype)
    vectors[5, 2] = vectors[40, 0] = value
    message = refusal(path, change(table, "embedding", toy.as_lists(vectors)))
    assert "NaN or infinite elements in rows 5, 40" in message


def test_rows_are_counted_within_their_file(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "data" / "a.parquet")
    table = edit(toy.table(first=50), "embedding", r7=[np.nan] * 8)
    pq.write_table(table, tmp_path / "data" / "b.parquet", row_group_size=3)
    message = refusal(tmp_path / "data")
    assert (
        "b.parquet: column 'embedding' has vectors with NaN or infinite elements in row 7"
        in message
    )


def test_rows_are_counted_across_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_BYTES", 10 * 4 * 8)  # ten vectors
    message = refusal(path, edit(toy.table(), "embedding", r37=[np.nan] * 8))
    assert "in row 37" in message


def test_float64_beyond_float32_is_refused(path: Path) -> None:
    table = edit(toy.table(dtype="float64"), "embedding", r9=[1e200] * 8)
    assert "leaves the range of float32 in row 9" in refusal(path, table)


@pytest.mark.parametrize(
    ("options", "column"),
    [
        ({}, "streetview_image_id"),
        ({}, "building_id"),
        ({"integer_buildings": True}, "building_id"),
        ({"ids": "dataset"}, "dataset_id"),
        ({"ids": "dataset"}, "patch_id"),
        ({}, "embedding"),
    ],
)
def test_nulls_are_named(path: Path, options: dict[str, object], column: str) -> None:
    at = {f"r{row}": None for row in (2, 4, 8, 16, 32, 64)}
    message = refusal(path, edit(toy.table(**options), column, **at))
    assert f"{path}: column {column!r} is null in rows 2, 4, 8, 16, 32 and more" in message


def test_a_null_in_the_first_vector_is_named(path: Path) -> None:
    assert "column 'embedding' is null in row 0" in refusal(
        path, edit(toy.table(), "embedding", r0=None)
    )


def test_null_elements_are_named(path: Path) -> None:
    table = edit(toy.table(), "embedding", r6=[1.0, None] * 4)
    assert "vectors with null elements in row 6" in refusal(path, table)


def test_null_categories_are_named(path: Path) -> None:
    codes = pa.array([0, None] * 40, pa.int8())
    ids = pa.DictionaryArray.from_arrays(codes, pa.array(["a", "b"]))
    assert "column 'building_id' is null in rows 1, 3, 5" in refusal(
        path, change(toy.table(), "building_id", ids)
    )


def test_empty_ids_are_named(path: Path) -> None:
    assert "column 'building_id' is empty in row 1" in refusal(
        path, edit(toy.table(), "building_id", r1="")
    )


def test_duplicate_images_are_named_with_both_places(path: Path) -> None:
    table = toy.table()
    image = table["streetview_image_id"][10].as_py()
    message = refusal(path, edit(table, "streetview_image_id", r70=image))
    assert (
        f"1 rows repeat an image id: {image!r} (train.parquet row 10 and train.parquet row 70)"
        in message
    )


def test_duplicate_images_across_files_are_named_with_both_files(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "data" / "a.parquet")
    toy.write_parquet(tmp_path / "data" / "b.parquet", seed=1)
    message = refusal(tmp_path / "data")
    assert "80 rows repeat an image id" in message
    assert "(a.parquet row 0 and b.parquet row " in message


def test_images_whose_hashes_collide_are_not_duplicates(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "hash_texts", lambda texts, _: np.zeros(len(texts), np.uint64))
    toy.write_parquet(path)
    assert len(store_of(path).ids) == 80


def test_ids_are_checked_before_a_long_read_of_the_vectors(path: Path) -> None:
    table = edit(toy.table(), "embedding", r6=[np.nan] * 8)
    assert "'building_id' is null" in refusal(path, edit(table, "building_id", r60=None))


def test_buildings_with_one_image_each_are_refused(path: Path) -> None:
    message = refusal(path, toy.table(images=1, buildings=30))
    assert f"{path}: no building has two images" in message


# --- fingerprint -----------------------------------------------------------------------------


def key(*files: Path) -> str:
    return parquet.fingerprint(files)


def test_a_moved_file_keeps_its_fingerprint(path: Path, tmp_path: Path) -> None:
    toy.write_parquet(path)
    before = key(path)
    assert key(path.rename(tmp_path / "elsewhere.parquet")) == before


@pytest.mark.parametrize("cell", [(0, 0), (79, 7), (40, 3)])
def test_a_file_rewritten_with_the_same_size_and_statistics_has_a_new_fingerprint(
    path: Path, cell: tuple[int, int]
) -> None:
    table = toy.table()
    vectors = toy.vectors_of(table).astype(np.float32)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    keys, sizes = set(), set()
    for step in range(2):
        vectors[cell] += np.float32(step)
        pq.write_table(change(table, "embedding", toy.as_lists(vectors)), path, **options)
        keys.add(key(path))
        sizes.add(path.stat().st_size)
    assert len(sizes) == 1
    assert len(keys) == 2


def test_a_large_file_with_its_rows_in_another_order_has_a_new_fingerprint(path: Path) -> None:
    # 16 MB in one row group, of which a quarter is sampled; the statistics stay the same.
    vectors = np.random.default_rng(0).normal(size=(4000, 1024)).astype(np.float32)
    keys, sizes = set(), set()
    for order in (slice(None), slice(None, None, -1)):
        table = pa.table({"embedding": toy.as_lists(vectors[order])})
        pq.write_table(table, path, compression="none", use_dictionary=False)
        keys.add(key(path))
        sizes.add(path.stat().st_size)
    assert len(sizes) == 1
    assert len(keys) == 2


def test_the_order_and_borders_of_files_count(tmp_path: Path) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    toy.write_parquet(a)
    toy.write_parquet(b, first=50)
    assert len({key(a), key(b), key(a, b), key(b, a)}) == 4


# --- hashes ----------------------------------------------------------------------------------


def slow_hash(text: str, salt: str) -> int:
    """The definition, one string and one Python integer at a time."""
    import hashlib

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    seed = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little")
    total = seed
    for place, byte in enumerate(text.encode()):
        total += (byte + 1) * mix(((place + 1) * 0x9E3779B97F4A7C15 + seed) % 2**64)
    return mix(total % 2**64)


def test_hashes_follow_their_definition_whatever_the_chunks() -> None:
    texts = ["", "a", "b", "ab", "ba", "\0", "\0\0", "Straße 5", "x" * 1000, *map(str, range(90))]
    expected = [slow_hash(text, "s") for text in texts]
    whole = pa.array(texts, pa.large_string())
    chunked = pa.chunked_array([whole.slice(0, 3), whole.slice(3, 0), whole.slice(3)])
    assert parquet.hash_texts(whole, "s").tolist() == expected
    assert parquet.hash_texts(chunked, "s").tolist() == expected
    assert parquet.hash_texts(whole, "t").tolist() != expected
    assert len(parquet.hash_texts(whole.slice(0, 0), "s")) == 0


def test_hashes_never_change_between_versions() -> None:
    # Splits of data that grows rely on it.
    texts = pa.array(["b0001", "12345"], pa.large_string())
    assert parquet.hash_texts(texts, "split 42").tolist() == [
        4507916974568261078,
        9149749281442854308,
    ]


def test_hashes_are_uniform_and_do_not_collide() -> None:
    hashes = parquet.hash_texts(pa.array([f"b{i}" for i in range(100_000)], pa.large_string()), "s")
    assert len(np.unique(hashes)) == 100_000
    for shift in (0, 30, 56):  # low, middle and high byte
        counts = np.bincount((hashes >> np.uint64(shift)).astype(np.uint8), minlength=256)
        chi2 = ((counts - 100_000 / 256) ** 2 / (100_000 / 256)).sum()
        assert chi2 < 350  # 255 degrees of freedom: p < 1e-4
