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
GROUP_BYTES = 32 * 2**20  # of a row group


def provenance_of(path: Path) -> dict[str, Any] | None:
    """What a file says it was made of; None if it is not one of ours."""
    try:
        found = json.loads((pq.read_metadata(path).metadata or {})[KEY])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    return found if isinstance(found, dict) and found.get("made_by") == MADE_BY else None


def carried(source: Path, columns: Sequence[str]) -> list[str]:
    """The columns of a source that go along unchanged, in its order: ids, building and `columns`.

    Raises ConfigError and DataError for columns that cannot.
    """
    names = pq.read_schema(source).names
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
    check_stop: Callable[[], None],
) -> int:
    """A row per image of a source file: these columns of it, and the vectors [N, d]."""
    (file,) = source.files
    if not set(IDS) & set(columns):
        logger.warning(
            "%s has none of the columns %s: only their order tells the rows apart",
            file, ", ".join(IDS),
        )  # fmt: skip
    size = vectors.dtype.itemsize * vectors.dim + _bytes_per_row(file, columns)
    rows = max(1, GROUP_BYTES // size)

    def groups() -> Iterator[pa.Table]:
        start = 0
        batches = parquet.batches(source, columns, min(rows, parquet.BATCH_ROWS))
        for held in _in_groups(batches, rows):
            check_stop()
            # The dictionaries of categories may differ from batch to batch.
            group = pa.Table.from_batches(held).unify_dictionaries()
            part = vectors.part(start, group.num_rows)
            yield group.append_column(EMBEDDING, _lists(part))
            start += group.num_rows

    return _write(path, groups(), provenance)


def write_buildings(
    path: Path,
    source: Table,
    vectors: Sequence[Vectors],
    dtype: np.dtype[Any],
    provenance: Mapping[str, Any],
    check_stop: Callable[[], None],
) -> int:
    """A row per building, in the order in which they appear first; `vectors` [N, d] of each file."""
    kinds = {pq.read_schema(file).field(BUILDING).type for file in source.files}
    kind = kinds.pop()
    if kinds or not pa.types.is_integer(kind):
        kind = pa.string()
    means = pooling.mean_by_building(source, vectors, check_stop)
    ids = pa.array(list(means.codes), pa.large_string())
    rows = max(1, GROUP_BYTES // (8 * vectors[0].dim))

    def groups() -> Iterator[pa.Table]:
        for start in range(0, len(ids), rows):
            check_stop()
            part = ids[start : start + rows]
            counts, units = means.rows(start, start + len(part))
            columns = (part.cast(kind), pa.array(counts), _lists(units.astype(dtype)))
            yield pa.table(dict(zip((BUILDING, IMAGES, EMBEDDING), columns, strict=True)))

    return _write(path, groups(), provenance)


def _write(path: Path, groups: Iterable[pa.Table], provenance: Mapping[str, Any]) -> int:
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


def _in_groups(batches: Iterable[Batch], rows: int) -> Iterator[list[pa.RecordBatch]]:
    """The record batches cut and put together to so many rows; fewer only at the end."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        data = batch.data
        while count + data.num_rows >= rows:
            cut = rows - count
            yield [*held, data.slice(0, cut)]
            data, held, count = data.slice(cut), [], 0
        if data.num_rows:
            held.append(data)
            count += data.num_rows
    if held:
        yield held


def _bytes_per_row(source: Path, columns: Sequence[str]) -> int:
    """What these columns take, before compression."""
    footer = pq.read_metadata(source)
    prefixes = tuple(f"{name}." for name in columns)
    total = sum(
        chunk.total_uncompressed_size
        for group in map(footer.row_group, range(footer.num_row_groups))
        for chunk in map(group.column, range(group.num_columns))
        if f"{chunk.path_in_schema}.".startswith(prefixes)
    )
    return int(total // max(1, footer.num_rows))
