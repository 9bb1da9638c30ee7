"""Difficulty bands: the nearest buildings of each image, sorted into bands of distance.

Reading and checking the metadata file, and building it by exact search.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from tripletkit import fsio, log
from tripletkit.data import damage, parquet
from tripletkit.data.flat import map_array
from tripletkit.data.neighbors import nearest_buildings
from tripletkit.data.parquet import Batch, Table
from tripletkit.data.store import Store, cached, whole, writing_to
from tripletkit.errors import ConfigError, DataError
from tripletkit.log import logger

FORMAT = 1
ANCHOR = "target_coord_hash"  # holds the image id; a legacy name
BUILDINGS = "neighbor_building_ids"
BANDS = "neighbor_bands"
DISTANCES = "neighbor_distances"

SCHEMA = pa.schema(
    [
        (ANCHOR, pa.string()),
        (BUILDINGS, pa.list_(pa.string())),
        (BANDS, pa.list_(pa.int32())),
        (DISTANCES, pa.list_(pa.float32())),
    ]
)

PERCENTILES = (5, 10, 20, 40, 60, 85)
MAX_BANDS = 256  # kept as bytes
READ_ROWS = 16_384
GATHER_ROWS = 65_536
EDGE_VALUES = 2**25  # distances that the percentiles are taken of


@dataclass(frozen=True)
class Bands:
    """Neighbour buildings of each row of a store, by band; 0 is the hardest (nearest)."""

    count: int  #: K
    neighbors: NDArray[np.int32]  #: building codes of the store
    offsets: NDArray[np.int64]  #: [N * K + 1] row i, band b: offsets[i * K + b] to [i * K + b + 1]
    key: str = ""  #: of the metadata's content and the store's


# --- reading ---------------------------------------------------------------------------------


def open_bands(path: Path, store: Store, cache_dir: Path) -> Bands:
    """Open the metadata for `store`; the first time, join them into a cache.

    Keeps neighbours that are in the store (and in the sample, if it is one) and not the anchor's
    own building; a building named twice for one anchor counts in its hardest band. Raises
    `DataError` for a file that cannot be used or that describes under half of the store's rows.
    """
    files = parquet.find_files(path)
    key = content_key(files, store.fingerprint)
    folder = cache_dir / key
    facts = cached(folder, partial(_build, files, key, store), partial(_check, store))
    bands = Bands(
        count=facts["bands"],
        neighbors=map_array(folder / "neighbors.i32"),
        offsets=map_array(folder / "offsets.i64"),
        key=key,
    )
    return bands if len(store.by_building) == len(store.building) else _restrict(bands, store)


def _check(store: Store, folder: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError when the files cannot be what was written."""
    if not 0 < facts["bands"] <= MAX_BANDS:
        raise ValueError("not the facts that were written")
    neighbors, offsets = (map_array(folder / name) for name in ("neighbors.i32", "offsets.i64"))
    cells = len(store.building) * facts["bands"]
    damage.check_cells(offsets, neighbors, cells, len(store.building_ids))


def content_key(files: Sequence[Path], store: str) -> str:
    """The key of the bands in these files for the store with that fingerprint."""
    return fsio.digest([f"bands {FORMAT}", parquet.fingerprint(files), store])


def _restrict(bands: Bands, store: Store) -> Bands:
    """Drop the rows and neighbours that are not in the sample."""
    K, rows = bands.count, len(store.building)
    present = np.diff(store.starts) > 0
    offsets = np.zeros(len(bands.offsets), np.int64)  # like a map it would be written twice
    neighbors = []
    for start in range(0, rows, GATHER_ROWS):
        inside = store.building[start : start + GATHER_ROWS] >= 0
        ends = bands.offsets[start * K : (start + len(inside)) * K + 1]
        found = bands.neighbors[ends[0] : ends[-1]]
        keep = present[found] & np.repeat(inside, np.diff(ends[::K]))
        neighbors.append(found[keep])
        kept = np.concatenate([[0], np.cumsum(keep)])
        offsets[start * K + 1 : (start + len(inside)) * K + 1] = (
            offsets[start * K] + kept[ends[1:] - ends[0]]
        )
    return Bands(K, np.concatenate(neighbors), offsets, bands.key)


def _build(files: Sequence[Path], key: str, store: Store, aside: Path) -> dict[str, Any]:
    """`_join` the content with that key, and no other."""
    with parquet.unchanged(files, lambda: content_key(files, store.fingerprint) == key):
        return _join(files, store, aside)


def _join(files: Sequence[Path], store: Store, aside: Path) -> dict[str, Any]:
    """Write neighbors and offsets of the whole store into `aside`."""
    store = whole(store)
    table = parquet.open_table(files, [ANCHOR, BUILDINGS, BANDS])
    anchors = _match(table, store)
    entries = _count_values(table, BUILDINGS)
    with writing_to(aside.parent, 9 * entries + 64 * len(store.building)):
        count, where, length = _encode(table, store, anchors, aside)
        _sort_by_row(count, where, length, aside)
    logger.info("%s: %d bands for %s", table.files[0], count, store.source)
    return {"format": FORMAT, "bands": count}


def _match(table: Table, store: Store) -> NDArray[np.int64]:
    """The store's row for each row of the metadata, -1 for images it has not got."""
    ids = pa.chunked_array(
        [parquet.text(batch, ANCHOR) for batch in parquet.batches(table, [ANCHOR])]
    )
    found = pc.index_in(ids, value_set=store.ids).fill_null(-1)
    anchors: NDArray[np.int64] = found.to_numpy().astype(np.int64)
    times = np.bincount(anchors[anchors >= 0], minlength=len(store.building))
    matched, rows = int(np.count_nonzero(times)), len(store.building)
    name = table.files[0]
    if 2 * matched < rows:
        raise DataError(
            f"{name}: {matched:,} of the {rows:,} images of {store.source} "
            f"({matched / rows:.0%}) are in column {ANCHOR!r}; "
            f"ids there: {_some(ids)}; ids of the images: {_some(store.ids)}",
            hint="the bands were built for other data, or with another kind of image id; "
            "`tripletkit data bands` builds them anew",
        )
    if times.max() > 1:
        twice = np.flatnonzero(times[np.maximum(anchors, 0)] * (anchors >= 0) > 1)[:2]
        where = " and ".join(f"{p.name} row {row}" for p, row in map(table.locate, twice.tolist()))
        raise DataError(
            f"{name}: column {ANCHOR!r} repeats {np.count_nonzero(times > 1):,} images, "
            f"the first one in {where}"
        )
    return anchors


def _encode(
    table: Table, store: Store, anchors: NDArray[np.int64], aside: Path
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """Write each anchor's neighbours, sorted by band, in the order of the metadata.

    Returns the number of bands, and where the neighbours of each store row begin and how many.
    """
    where = np.zeros(len(store.building), np.int64)
    length = np.zeros(len(store.building), np.int64)
    count = done = written = 0
    with (
        (aside / "unsorted.i32").open("wb") as neighbors_file,
        (aside / "unsorted.u8").open("wb") as bands_file,
        log.progress(table.total, "joining bands") as update,
    ):
        for batch in parquet.batches(table, [BUILDINGS, BANDS], READ_ROWS):
            codes, bands, lengths = _lists(batch, store)
            count = max(count, int(bands.max(initial=-1)) + 1)
            rows = anchors[done : done + len(lengths)]
            parent = np.repeat(np.arange(len(rows)), lengths)
            own = np.where(rows >= 0, store.building[rows], -1)
            keep = (codes >= 0) & (rows >= 0)[parent] & (codes != own[parent])
            parent, codes, bands = _hardest(
                parent[keep], codes[keep], bands[keep], len(store.building_ids)
            )
            neighbors_file.write(codes.data)
            bands_file.write(bands.data)
            kept = np.bincount(parent, minlength=len(rows))
            begin = written + np.cumsum(kept) - kept
            where[rows[rows >= 0]] = begin[rows >= 0]
            length[rows[rows >= 0]] = kept[rows >= 0]
            written += len(codes)
            done += len(rows)
            update(done, "joining bands")
    if written == 0:
        raise DataError(
            f"{table.files[0]}: no neighbour in column {BUILDINGS!r} is a building of {store.source}",
            hint=f"buildings there: {_some(store.building_ids)}",
        )
    return count, where, length


def _hardest(
    parent: NDArray[Any], codes: NDArray[Any], bands: NDArray[Any], buildings: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]:
    """Keep each (anchor, building) once, in its lowest band; sort by anchor, band, building."""
    # Sorting packed integers is several times faster than sorting by three keys.
    by_building = np.sort((parent * buildings + codes) * MAX_BANDS + bands)
    pair, bands = np.divmod(by_building, MAX_BANDS)
    first = np.concatenate([[True], pair[1:] != pair[:-1]])[: len(pair)]
    parent, codes = np.divmod(pair[first], buildings)
    by_band = np.sort((parent * MAX_BANDS + bands[first]) * buildings + codes)
    cell, codes = np.divmod(by_band, buildings)
    parent, bands = np.divmod(cell, MAX_BANDS)
    return parent, codes.astype(np.int32), bands.astype(np.uint8)


def _sort_by_row(
    count: int, where: NDArray[np.int64], length: NDArray[np.int64], aside: Path
) -> None:
    """Bring the neighbours into the order of the store's rows and write the offsets."""
    codes, bands = map_array(aside / "unsorted.i32"), map_array(aside / "unsorted.u8")
    ends = np.zeros(1, np.int64)
    with (
        (aside / "neighbors.i32").open("wb") as neighbors_file,
        (aside / "offsets.i64").open("wb") as offsets_file,
    ):
        offsets_file.write(ends.data)
        for start in range(0, len(where), GATHER_ROWS):
            many = length[start : start + GATHER_ROWS]
            shift = where[start : start + GATHER_ROWS] - (np.cumsum(many) - many)
            source = np.repeat(shift, many) + np.arange(many.sum())
            neighbors_file.write(codes[source].data)
            cell = np.repeat(np.arange(len(many)), many) * count + bands[source]
            ends = ends[-1] + np.cumsum(np.bincount(cell, minlength=len(many) * count))
            offsets_file.write(ends.data)
    (aside / "unsorted.i32").unlink()
    (aside / "unsorted.u8").unlink()


def _lists(batch: Batch, store: Store) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Neighbour codes (-1: not in the store) and bands, flat, and the length of each list."""
    flat, lengths = {}, {}
    for column in (BUILDINGS, BANDS):
        lists = batch.data.column(column)
        where = f"{batch.path}: column {column!r}"
        kind = lists.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not (is_list or pa.types.is_fixed_size_list(kind)):
            raise DataError(f"{where} has the type {kind}, not a list")
        if lists.null_count:
            bad = lists.is_null().to_numpy(zero_copy_only=False)
            raise DataError(f"{where} is null in {batch.rows(bad)}")
        flat[column] = lists.flatten()
        lengths[column] = pc.list_value_length(lists).to_numpy().astype(np.int64)
        if flat[column].null_count:
            bad = flat[column].is_null().to_numpy(zero_copy_only=False)
            raise DataError(
                f"{where} has null elements in {batch.rows(_rows(bad, lengths[column]))}"
            )
    if (lengths[BUILDINGS] != lengths[BANDS]).any():
        bad = lengths[BUILDINGS] != lengths[BANDS]
        raise DataError(
            f"{batch.path}: columns {BUILDINGS!r} and {BANDS!r} have lists of different lengths in "
            f"{batch.rows(bad)}"
        )
    if not pa.types.is_integer(flat[BANDS].type):
        raise DataError(
            f"{batch.path}: column {BANDS!r} is a list of {flat[BANDS].type}, not of integers"
        )
    bands = flat[BANDS].to_numpy()
    bad = (bands < 0) | (bands >= MAX_BANDS)
    if bad.any():
        raise DataError(
            f"{batch.path}: column {BANDS!r} has bands outside 0 to {MAX_BANDS - 1} in "
            f"{batch.rows(_rows(bad, lengths[BANDS]))}"
        )
    encoded = pc.dictionary_encode(flat[BUILDINGS])
    names = parquet.as_text(encoded.dictionary)
    if names is None:
        raise DataError(
            f"{batch.path}: column {BUILDINGS!r} is a list of {flat[BUILDINGS].type}, "
            "not of strings or integers"
        )
    found = pc.index_in(names, value_set=store.building_ids).fill_null(-1).to_numpy()
    codes = found.astype(np.int64)[encoded.indices.to_numpy()]
    return codes, bands.astype(np.int64), lengths[BANDS]


def _rows(bad: NDArray[Any], lengths: NDArray[Any]) -> NDArray[Any]:
    """Which lists have a bad element."""
    return np.bincount(np.repeat(np.arange(len(lengths)), lengths)[bad], minlength=len(lengths)) > 0


def _count_values(table: Table, column: str) -> int:
    total = 0
    for path in table.files:
        with parquet.usable(path):
            footer = pq.read_metadata(path)
            for group in map(footer.row_group, range(footer.num_row_groups)):
                for chunk in map(group.column, range(group.num_columns)):
                    if chunk.path_in_schema.split(".")[0] == column:
                        total += chunk.num_values
    return total


def _some(ids: pa.ChunkedArray) -> str:
    return ", ".join(repr(text) for text in ids.slice(0, 3).to_pylist())


# --- building --------------------------------------------------------------------------------


def build_bands(
    store: Store,
    path: Path,
    *,
    neighbors: int = 150,
    k0: int = 50,
    device: torch.device | str = "cpu",
) -> None:
    """Write the metadata file of `store`: the nearest buildings of every image, exactly.

    The distance to a building is the Euclidean one between unit vectors, to its nearest image.
    Distances are divided by that of the anchor's `k0`-th neighbour; the bands are cut at the
    `PERCENTILES` of all of them. The file is the same for every tile size; parameters and the
    store's fingerprint are in its metadata. Raises `ConfigError` and `DataError`.
    """
    if neighbors < 1 or k0 < 1:
        raise ConfigError(f"neighbors {neighbors} and k0 {k0}: both must be 1 or more")
    others = int(np.count_nonzero(np.diff(store.starts))) - 1
    if others < 1:
        raise DataError(f"{store.source}: bands need two buildings or more")
    k = min(neighbors, others)
    if k < neighbors:
        logger.info(
            "%s has %d buildings: each anchor gets %d neighbours", store.source, others + 1, k
        )
    k0 = min(k0, k)
    rows = np.sort(store.by_building)
    stride = -(-len(rows) * k // EDGE_VALUES)
    sample = []
    with (
        writing_to(path.parent, 16 * k * len(rows)),
        # Nameless files: nothing is left behind, however this process ends.
        tempfile.TemporaryFile(dir=path.parent) as codes_file,
        tempfile.TemporaryFile(dir=path.parent) as distances_file,
    ):
        with log.progress(len(rows), "finding neighbours") as update:
            done = 0
            for codes, distances in nearest_buildings(store, rows, k, torch.device(device)):
                codes_file.write(codes.data)
                distances_file.write(distances.data)
                sample.append(_standardise(distances, k0)[-done % stride :: stride])
                done += len(codes)
                update(done, "finding neighbours")
        edges = np.percentile(np.concatenate(sample), PERCENTILES).astype(np.float32)
        parameters = {
            "neighbors": k,
            "k0": k0,
            "percentiles": PERCENTILES,
            "edges": edges.tolist(),
            "store": store.fingerprint,
        }
        codes_file.seek(0)
        distances_file.seek(0)
        schema = SCHEMA.with_metadata({"tripletkit": json.dumps(parameters)})
        with (
            fsio.atomic_write(path) as out,
            pq.ParquetWriter(out, schema, compression="zstd") as writer,
        ):
            for start in range(0, len(rows), READ_ROWS):
                block = rows[start : start + READ_ROWS]
                size = 4 * k * len(block)
                codes = np.frombuffer(codes_file.read(size), np.int32)
                distances = np.frombuffer(distances_file.read(size), np.float32).reshape(-1, k)
                bands = np.searchsorted(edges, _standardise(distances, k0).ravel())
                writer.write_table(_rows_of_metadata(store, block, codes, bands, distances))


def _rows_of_metadata(
    store: Store,
    rows: NDArray[np.int64],
    codes: NDArray[np.int32],
    bands: NDArray[Any],
    distances: NDArray[np.float32],
) -> pa.Table:
    ends = np.arange(len(rows) + 1, dtype=np.int32) * distances.shape[1]
    flat = (store.building_ids.take(codes).combine_chunks(), bands, distances.ravel())
    # A slice first: taking from a chunked array copies all of its chunks.
    ids = store.ids.slice(rows[0], rows[-1] - rows[0] + 1).take(rows - rows[0])
    lists = [pa.ListArray.from_arrays(ends, pa.array(values)) for values in flat]
    return pa.table([ids, *lists], SCHEMA.names).cast(SCHEMA)


def _standardise(distances: NDArray[np.float32], k0: int) -> NDArray[np.float32]:
    scale = distances[:, k0 - 1 : k0].copy()
    scale[scale == 0] = 1  # the nearest k0 are all the anchor's doubles
    return distances / scale
