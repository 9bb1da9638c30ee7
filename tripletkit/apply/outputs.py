"""Files of embeddings as `embed` writes them: what goes along, in which form, and made of what."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tripletkit import fsio
from tripletkit.apply import pooling
from tripletkit.apply.projection import Vectors
from tripletkit.data import parquet
from tripletkit.data.parquet import BUILDING, EMBEDDING, IMAGE_ID_COLUMNS, Batch, Table
from tripletkit.errors import ConfigError, DataError
from tripletkit.log import logger

IMAGES = "images"
KEY = b"tripletkit"  # of the provenance in a file's metadata
MADE_BY = "tripletkit embed"
ALL = "all"  # --columns: every one
IDS = (*dict.fromkeys(name for names in IMAGE_ID_COLUMNS for name in names), BUILDING)
GROUP_BYTES = 32 * 2**20  # of a row group, decoded
# Of what is decoded at once. Values that repeat themselves are far larger decoded than in the file.
BATCH_ROWS = 2_048


def provenance_of(path: Path) -> dict[str, Any] | None:
    """What a file says it was made of; None if it is not one of ours."""
    try:
        found = fsio.parse_json((pq.read_metadata(path).metadata or {})[KEY])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    return found if isinstance(found, dict) and found.get("made_by") == MADE_BY else None


def carried(source: Path, columns: Sequence[str]) -> list[str]:
    """The columns of a source that go along unchanged, in its order: ids, building and `columns`.

    Raises ConfigError and DataError for columns that cannot.
    """
    names = parquet.column_names(source)
    if EMBEDDING in columns:
        raise ConfigError(f"--columns {EMBEDDING}: that is the one that is made anew")
    for name in columns:
        if name != ALL and name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise DataError(
                f"{source}: there is no column {name!r}",
                hint=f"the file has the columns {', '.join(names)}"
                + (f"; is it {near[0]!r}?" if near else ""),
            )
    wanted = {*names} if ALL in columns else {*IDS, *columns}
    found = [name for name in names if name in wanted and name != EMBEDDING]
    for name in (*found, EMBEDDING):
        if names.count(name) > 1:
            raise DataError(f"{source}: there are {names.count(name)} columns {name!r}")
    return found


def write_images(
    path: Path,
    source: Table,
    columns: Sequence[str],
    vectors: Vectors,
    provenance: Mapping[str, Any],
    check: Callable[[], None],
) -> int:
    """A row per image of a source file: these columns of it, and the vectors [N, d].

    `check` is called after each row group, and may end it.
    """
    (file,) = source.files
    if not set(IDS) & set(columns):
        logger.warning(
            "%s has none of the columns %s: only their order tells the rows apart",
            file, ", ".join(IDS),
        )  # fmt: skip
    size = _bytes_per_row(file, columns)
    batches = parquet.batches(source, columns, max(1, min(BATCH_ROWS, GROUP_BYTES // 8 // size)))

    def groups() -> Iterator[pa.Table]:
        start = 0
        for held in _in_groups(batches, vectors.dtype.itemsize * vectors.dim):
            # The dictionaries of categories may differ from batch to batch.
            group = pa.Table.from_batches(held).unify_dictionaries()
            part = vectors.part(start, group.num_rows)
            yield group.append_column(EMBEDDING, _lists(part))
            start += group.num_rows

    return _write(path, groups(), provenance, check)


def write_buildings(
    path: Path,
    source: Table,
    vectors: Sequence[Vectors],
    dtype: np.dtype[Any],
    provenance: Mapping[str, Any],
    check: Callable[[], None],
) -> int:
    """A row per building, in the order in which they appear first; `vectors` [N, d] of each file.

    `check` is called after each batch and row group, and may end it.
    """
    kind = _building_type(source.files)
    means = pooling.mean_by_building(source, vectors, check)
    ids = pa.array(list(means.codes), pa.large_string())

    def groups() -> Iterator[pa.Table]:
        for start, counts, units in means.groups(max(1, GROUP_BYTES // (8 * means.dim))):
            part = ids[start : start + len(counts)].cast(kind)
            columns = (part, pa.array(counts), _lists(units.astype(dtype)))
            yield pa.table(dict(zip((BUILDING, IMAGES, EMBEDDING), columns, strict=True)))

    return _write(path, groups(), provenance, check)


def _building_type(files: Iterable[Path]) -> pa.DataType:
    """An integer type that holds those of all files, or string."""
    kinds = {pq.read_schema(file).field(BUILDING).type for file in files}
    if all(map(pa.types.is_integer, kinds)):
        common = np.result_type(*map(str, kinds))
        if common.kind in "iu":  # numpy makes floats of int64 beside uint64
            return pa.from_numpy_dtype(common)
    return pa.string()


def _write(
    path: Path,
    groups: Iterable[pa.Table],
    provenance: Mapping[str, Any],
    check: Callable[[], None],
) -> int:
    """Write a file whole, each table as a row group; returns its rows.

    Unit vectors are noise to a compressor: zstd takes 8 % off, and reading takes longer. So they
    are written as they are, without dictionary and statistics; all else is compressed.
    """
    rows = 0
    with fsio.atomic_write(path) as file, contextlib.ExitStack() as stack:
        writer = None
        for group in groups:
            if writer is None:
                schema = group.schema.with_metadata({KEY: json.dumps(provenance, sort_keys=True)})
                others = [each for each in _leaves(schema) if not each.startswith(EMBEDDING + ".")]
                writer = stack.enter_context(
                    pq.ParquetWriter(
                        file,
                        schema,
                        compression=dict.fromkeys(others, "zstd"),
                        use_dictionary=others,
                        write_statistics=others,
                    )
                )
            writer.write_table(group, row_group_size=max(1, group.num_rows))
            rows += group.num_rows
            check()
    return rows


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths of the columns as parquet stores them."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    stored = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    return [stored.column(i).path for i in range(len(stored))]


def _lists(vectors: NDArray[Any]) -> pa.Array:
    """[n, d] as fixed_size_list, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def _in_groups(batches: Iterable[Batch], more: int) -> Iterator[list[pa.RecordBatch]]:
    """The record batches put together to groups of GROUP_BYTES; `more` bytes go with each row."""
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        held.append(batch.data)
        size += batch.data.nbytes + more * len(batch.data)
        if size >= GROUP_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def _bytes_per_row(source: Path, columns: Sequence[str]) -> int:
    """What these columns take in the file, before compression; at least 1."""
    footer = pq.read_metadata(source)
    prefixes = tuple(f"{name}." for name in columns)
    total = sum(
        chunk.total_uncompressed_size
        for group in map(footer.row_group, range(footer.num_row_groups))
        for chunk in map(group.column, range(group.num_columns))
        if f"{chunk.path_in_schema}.".startswith(prefixes)
    )
    return max(1, int(total // footer.num_rows))
