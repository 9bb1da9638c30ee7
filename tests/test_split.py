"""Splitting by building: disjoint, seeded, and stable when data is added."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import toy
from tripletkit.data.split import split_parquet
from tripletkit.data.store import check_leakage, open_store, subsample
from tripletkit.errors import ConfigError, DataError

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


def split(source: Path, out: Path, seed: int = 1) -> dict[str, pa.Table]:
    split_parquet(source, out, fractions=FRACTIONS, seed=seed)
    return {name: pq.read_table(out / f"{name}.parquet") for name in FRACTIONS}


def owner(tables: dict[str, pa.Table]) -> dict[str, str]:
    """building -> split; fails if one is in two."""
    owners: dict[str, str] = {}
    for name, table in tables.items():
        for building in set(table["building_id"].to_pylist()):
            assert owners.setdefault(str(building), name) == name
    return owners


def test_every_row_is_in_one_split_with_all_its_columns(tmp_path: Path) -> None:
    table = toy.table(buildings=200).append_column("year", pa.array(range(800)))
    table = table.replace_schema_metadata({"origin": "survey"})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=100)
    rows = split_parquet(tmp_path / "x.parquet", tmp_path / "out", fractions=FRACTIONS, seed=1)
    parts = {name: pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in FRACTIONS}
    assert rows == {name: part.num_rows for name, part in parts.items()}
    owner(parts)
    assert all(part.schema.equals(table.schema) for part in parts.values())
    assert parts["train"].schema.metadata == {b"origin": b"survey"}
    assert pa.concat_tables(parts.values()).sort_by("year").equals(table.combine_chunks())
    for part in parts.values():  # the order of the source stays
        assert part["year"].to_pylist() == sorted(part["year"].to_pylist())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "test.parquet",
        "train.parquet",
        "val.parquet",
    ]


def test_fractions_are_about_right(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "x.parquet", buildings=3000, images=1)
    for seed in range(3):
        owners = list(owner(split(tmp_path / "x.parquet", tmp_path / str(seed), seed)).values())
        for name, fraction in FRACTIONS.items():
            spread = (fraction * (1 - fraction) / 3000) ** 0.5
            assert abs(owners.count(name) / 3000 - fraction) < 4 * spread


def test_added_rows_never_move_a_building(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "a.parquet", buildings=300, images=2)
    toy.write_parquet(tmp_path / "b.parquet", buildings=500, images=3, seed=9)
    before = owner(split(tmp_path / "a.parquet", tmp_path / "a"))
    after = owner(split(tmp_path / "b.parquet", tmp_path / "b"))
    assert len(after) == 500
    assert {building: after[building] for building in before} == before


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "x.parquet", buildings=300)
    first, again, other = (
        split(tmp_path / "x.parquet", tmp_path / name, seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert owner(first) == owner(again) != owner(other)
    for name in FRACTIONS:
        paths = [tmp_path / run / f"{name}.parquet" for run in ("first", "again")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_integer_buildings_fall_like_their_text(tmp_path: Path) -> None:
    table = toy.write_parquet(tmp_path / "a.parquet", buildings=300, integer_buildings=True)
    text = table["building_id"].combine_chunks().cast(pa.string())
    pq.write_table(table.set_column(1, "building_id", text), tmp_path / "b.parquet")
    assert owner(split(tmp_path / "a.parquet", tmp_path / "a")) == owner(
        split(tmp_path / "b.parquet", tmp_path / "b")
    )


def test_files_of_a_folder_are_split_as_one(tmp_path: Path) -> None:
    parts = [
        toy.write_parquet(tmp_path / "in" / f"{i}.parquet", buildings=100, first=100 * i)
        for i in range(3)
    ]
    pq.write_table(pa.concat_tables(parts), tmp_path / "whole.parquet")
    from_folder = split(tmp_path / "in", tmp_path / "a")
    from_file = split(tmp_path / "whole.parquet", tmp_path / "b")
    assert all(from_folder[name].equals(from_file[name]) for name in FRACTIONS)


def test_splits_open_without_leakage_and_sample_independently(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "x.parquet", buildings=2000, images=2, dim=2)
    split(tmp_path / "x.parquet", tmp_path / "out", seed=1)
    stores = {
        name: open_store(tmp_path / "out" / f"{name}.parquet", tmp_path / "cache")
        for name in FRACTIONS
    }
    check_leakage(stores)
    # One hash for both would give a tenth of the training set or nothing at all.
    for store in stores.values():
        sample = subsample(store, fraction=0.5, seed=1)
        share = np.count_nonzero(np.diff(sample.starts)) / len(store.building_ids)
        assert 0.35 < share < 0.65


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "x.parquet", buildings=200)
    (tmp_path / "val.parquet").write_text("precious")
    with pytest.raises(ConfigError, match=r"val\.parquet exists"):
        split(tmp_path / "x.parquet", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"x.parquet", "val.parquet"}
    assert (tmp_path / "val.parquet").read_text() == "precious"


@pytest.mark.parametrize(
    "fractions", [{}, {"train": 0.5}, {"train": 0.8, "val": 0.3}, {"train": 1.2, "val": -0.2}]
)
def test_fractions_must_be_shares(tmp_path: Path, fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be positive and add up to 1"):
        split_parquet(tmp_path / "x.parquet", tmp_path, fractions=fractions, seed=1)


def test_a_split_that_stays_empty_is_refused(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "x.parquet", buildings=2)
    with pytest.raises(DataError, match="no building fell into"):
        split(tmp_path / "x.parquet", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    table = toy.table(buildings=200)
    buildings = table["building_id"].to_pylist()
    buildings[700] = None
    pq.write_table(table.set_column(1, "building_id", pa.array(buildings)), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="column 'building_id' is null in row 700"):
        split(tmp_path / "x.parquet", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_with_different_columns_are_refused(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "in" / "a.parquet")
    toy.write_parquet(tmp_path / "in" / "b.parquet", first=50, dtype="float64")
    with pytest.raises(
        DataError, match=r"b\.parquet: its columns differ from those of .*a\.parquet"
    ):
        split(tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    toy.write_parquet(tmp_path / "x.parquet", buildings=2000, dim=64)
    code = f"""
import resource, sys
from pathlib import Path
from tripletkit.data.split import split_parquet
from tripletkit.errors import RunError
resource.setrlimit({resource.RLIMIT_FSIZE}, (2**20, 2**20))
folder = Path(sys.argv[1])
try:
    split_parquet(folder / "x.parquet", folder / "out", fractions={FRACTIONS}, seed=1)
except RunError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "out: cannot be written: File too large" in done.stdout, done.stderr
    assert list((tmp_path / "out").iterdir()) == []
