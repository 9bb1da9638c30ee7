"""Reading embedding tables in parquet: which files, what is in them, and what is wrong with them.

Row numbers in messages count from 0 within a file.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tripletkit import fsio
from tripletkit.errors import DataError

BUILDING = "building_id"
EMBEDDING = "embedding"
# The image id: the first of these whose columns are all there.
IMAGE_ID_COLUMNS = (("streetview_image_id",), ("dataset_id", "patch_id"), ("target_coord_hash",))
DATASET_DIGITS = 4

SHOWN = 5  # offending rows named in a message
BATCH_BYTES = 2 * 2**20  # of decoded vectors: they stay in a core's cache until they are written
BATCH_ROWS = 65_536
AHEAD = 4  # batches that are decoded ahead: neither side waits for a slow one of the other
HASH_ROWS = 8_192  # the arrays of one pass fit into a core's cache
SAMPLES = 64
SAMPLE_BYTES = 64 * 2**10
MAGIC = b"PAR1"


@dataclass(frozen=True)
class Table:
    """Parquet files with one schema, read one after the other."""

    files: tuple[Path, ...]
    rows: tuple[int, ...]  # of each file

    @property
    def name(self) -> str:
        """For messages: the file, or the folder of several."""
        first = self.files[0]
        many = len(self.files) > 1
        return f"{first.parent} ({len(self.files)} files)" if many else str(first)

    @property
    def total(self) -> int:
        """Rows of all files."""
        return sum(self.rows)

    def locate(self, row: int) -> tuple[Path, int]:
        """The file and the row in it of row number `row` of the whole table."""
        for path, rows in zip(self.files, self.rows, strict=True):
            if row < rows:
                return path, row
            row -= rows
        raise AssertionError("row number beyond the table")


@dataclass(frozen=True)
class Batch:
    """Some rows of one file."""

    path: Path
    start: int  # row of the file that is the first here
    data: pa.RecordBatch

    def rows(self, bad: NDArray[Any]) -> str:
        """`rows 3, 17 and more`: the first rows of the file that the mask `bad` marks."""
        found = np.flatnonzero(bad)
        shown = ", ".join(str(self.start + row) for row in found[:SHOWN])
        more = " and more" if len(found) > SHOWN else ""
        return f"row{'s' if len(found) > 1 else ''} {shown}{more}"


# --- files -----------------------------------------------------------------------------------


def find_files(source: Path) -> tuple[Path, ...]:
    """The files behind a path: itself, the *.parquet of a folder, or what a glob matches; sorted.

    Raises `DataError` when there are none.
    """
    text = str(source)
    if text.startswith("$"):
        raise DataError(
            f"{text}: the environment variable {source.parts[0]} is not set",
            hint="export it, or write the path in full",
        )
    if source.is_dir():
        found = list(source.glob("*.parquet"))
        problem, hint = f"{source}: no *.parquet files in this folder", None
        if not found and any(source.rglob("*.parquet")):
            hint = f'its subfolders have some: "{source}/**/*.parquet" matches them'
    elif source.exists():
        return (source,)
    elif glob.has_magic(text):
        first = next(i for i, part in enumerate(source.parts) if glob.has_magic(part))
        pattern = Path(*source.parts[first:])
        try:
            found = list(Path(*source.parts[:first]).glob(str(pattern)))
        except ValueError as error:
            raise DataError(f"{source}: {error}", hint="for example data/**/*.parquet") from None
        problem, hint = f"{source}: no file matches this pattern", None
    else:
        problem, found = f"{source}: no such file or folder", []
        names = [path.name for path in source.parent.glob("*")]
        near = difflib.get_close_matches(source.name, names, 1)
        hint = f"did you mean {source.parent / near[0]}?" if near else None
    found = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    if not found:
        raise DataError(problem, hint=hint)
    return tuple(found)


def fingerprint(files: Sequence[Path]) -> str:
    """A key of the files' content, whatever their names: sizes, footers and spread samples.

    The footer alone would not do: a file rewritten in place can keep its size and statistics.
    """
    samples = max(2, SAMPLES // len(files))
    parts: list[bytes | str] = []
    for path in files:
        with _readable(path), path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise DataError(f"{path}: the file is empty (0 bytes)")
            file.seek(max(0, size - 8))
            tail = file.read(8)
            if size < 12 or tail[4:] != MAGIC:
                raise DataError(
                    f"{path}: not a parquet file, or one that was cut off ({size:,} bytes)",
                    hint="write or copy it again",
                )
            footer = min(size, int.from_bytes(tail[:4], "little") + 8)
            parts.append(size.to_bytes(8, "little"))
            last = max(0, size - footer - SAMPLE_BYTES)
            for place in sorted({last * i // (samples - 1) for i in range(samples)}):
                file.seek(place)
                parts.append(file.read(SAMPLE_BYTES))
            file.seek(size - footer)
            parts.append(file.read(footer))
    return fsio.digest(parts)


@contextlib.contextmanager
def unchanged(files: Sequence[Path], is_same: Callable[[], bool]) -> Iterator[None]:
    """Raise `DataError` if the files that the block reads are others when it ends, or has failed.

    Each pass opens them anew, so what came of it may be half of one and half of the other.
    """
    try:
        yield
    except Exception:
        _check_same(files, is_same)
        raise
    _check_same(files, is_same)


def _check_same(files: Sequence[Path], is_same: Callable[[], bool]) -> None:
    with contextlib.suppress(DataError):  # not whole, or gone
        if is_same():
            return
    where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    raise DataError(
        f"{where} was changed while it was read",
        hint="wait until it is written; the same command then begins with it anew",
    ) from None


def open_table(files: Sequence[Path], columns: Sequence[str]) -> Table:
    """Read the footers. Raises `DataError` for broken or empty files and missing `columns`."""
    rows = []
    for path in files:
        with _open(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise _missing_column(path, column, names)
                if names.count(column) > 1:
                    raise DataError(f"{path}: there are {names.count(column)} columns {column!r}")
            rows.append(file.metadata.num_rows)
        if rows[-1] <= 0:
            raise DataError(f"{path}: the file has no rows")
    return Table(tuple(files), tuple(rows))


def batches(
    table: Table, columns: Sequence[str] | None, rows: int = BATCH_ROWS, first: int = 0
) -> Iterator[Batch]:
    """Stream `columns` (None: all) in batches of at most `rows`, in constant memory.

    Begins with row `first` of the table. A thread decodes the next batches while the caller works
    on this one.
    """
    items = _read(table, columns, rows, first)
    with ThreadPoolExecutor(1, "parquet") as reader:
        coming = deque(reader.submit(next, items, None) for _ in range(AHEAD))
        while (batch := coming.popleft().result()) is not None:
            coming.append(reader.submit(next, items, None))
            yield batch


def _read(
    table: Table, columns: Sequence[str] | None, rows: int, first: int = 0
) -> Iterator[Batch]:
    for path, count in zip(table.files, table.rows, strict=True):
        skipped = min(first, count)
        first -= skipped
        if skipped == count:
            continue
        with _open(path) as file:
            group, start = _group_of(file, skipped)
            groups = range(group, file.num_row_groups)
            stream = file.iter_batches(batch_size=rows, columns=columns, row_groups=groups)
            while True:
                with _readable(path, f"from row {start} on"):
                    data = next(stream, None)
                if data is None:
                    break
                if (cut := max(0, skipped - start)) < data.num_rows:
                    yield Batch(path, start + cut, data.slice(cut) if cut else data)
                start += data.num_rows
            if start != count:
                raise DataError(
                    f"{path}: says that it has {count:,} rows, and has {start:,}",
                    hint="the file is damaged: write or copy it again",
                )


def _group_of(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """The row group that holds `row`, and the first row of it."""
    group = start = 0
    while start + (rows := file.metadata.row_group(group).num_rows) <= row:
        start += rows
        group += 1
    return group, start


@contextlib.contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    with _readable(path):
        # Buffered columns: by default pyarrow loads whole row groups, which may be the file.
        file = pq.ParquetFile(path, buffer_size=SAMPLE_BYTES, pre_buffer=False)
    with file:
        yield file


@contextlib.contextmanager
def _readable(path: Path, where: str = "") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except pa.ArrowNotImplementedError as error:
        raise DataError(
            f"{path}: pyarrow cannot read it {where}".rstrip() + f": {error}",
            hint="leave out the column of that type, or write it as another one",
        ) from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: cannot be read {where}".rstrip() + f": {reason}",
            hint="the file is damaged, incomplete or not parquet: write or copy it again",
        ) from None


@contextlib.contextmanager
def usable(path: Path) -> Iterator[None]:
    """Raise `DataError` when pyarrow cannot work with what it has read from this file."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: pyarrow cannot use it: {reason}",
            hint="leave out the column, or write it as another type",
        ) from None


# --- columns ---------------------------------------------------------------------------------


def column_names(path: Path) -> list[str]:
    """The columns of this file, in its order. Raises `DataError`."""
    with _open(path) as file:
        names: list[str] = file.schema_arrow.names
    return names


def image_id_columns(path: Path) -> tuple[str, ...]:
    """The columns that make up the image id in this file."""
    names = column_names(path)
    for columns in IMAGE_ID_COLUMNS:
        if all(column in names for column in columns):
            return columns
    styles = "; ".join(" + ".join(columns) for columns in IMAGE_ID_COLUMNS)
    raise DataError(
        f"{path}: no column for the image id (one of {styles})",
        hint=f"the file has the columns {', '.join(names)}",
    )


def image_ids(batch: Batch, columns: Sequence[str]) -> pa.Array:
    """Image ids as large_string: one column, or dataset_id padded to 4 digits + _ + patch_id."""
    parts = [text(batch, column) for column in columns]
    if len(parts) == 1:
        return parts[0]
    dataset, patch = parts
    return pc.binary_join_element_wise(
        pc.utf8_lpad(dataset, DATASET_DIGITS, "0"), patch, pa.scalar("_", pa.large_string())
    )


def text(batch: Batch, column: str) -> pa.Array:
    """A column of strings, categories or integers as large_string; neither null nor empty."""
    array = batch.data.column(column)
    with usable(batch.path):
        texts = as_text(array)
        if texts is not None:
            texts.validate(full=True)  # bytes that are no text
    if texts is None:
        hint = None
        if pa.types.is_floating(array.type):
            hint = "pandas turns integers into floats when some are missing"
        raise DataError(
            f"{batch.path}: column {column!r} has the type {array.type}, not string or integer",
            hint=hint,
        )
    for state, bad in (("null", texts.is_null()), ("empty", pc.equal(pc.binary_length(texts), 0))):
        if pc.any(bad).as_py():
            mask = bad.fill_null(False).to_numpy(zero_copy_only=False)
            raise DataError(f"{batch.path}: column {column!r} is {state} in {batch.rows(mask)}")
    return texts


def as_text(array: pa.Array) -> pa.Array | None:
    """Strings, categories and integers as large_string; None for another type."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    # Not every pyarrow that we support has string views.
    stringlike = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if stringlike or pa.types.is_integer(kind) or str(kind) == "string_view":
        return array.cast(pa.large_string())
    return None


def embedding_width(table: Table, expected: int | None = None) -> tuple[int, Any]:
    """The length of the vectors and the widest of their dtypes, from each file's first row.

    Raises `DataError` when it is not `expected`, when files differ, or the column has a wrong type.
    """
    reason = "" if expected is None else "the configuration says so"
    dtypes = []
    for path in table.files:
        first = next(_read(Table((path,), (1,)), [EMBEDDING], rows=1), None)
        if first is None:
            raise DataError(f"{path}: the file has no rows")
        kind = first.data.column(0).type
        dtypes.append(_value_dtype(path, kind))
        lists = _lists(first)
        width = len(lists.flatten())
        if width == 0:
            raise DataError(f"{path}: column {EMBEDDING!r} holds an empty vector in row 0")
        if expected is None:
            expected, reason = width, f"that is the length of those in {path}"
        elif width != expected:
            raise DataError(
                f"{path}: column {EMBEDDING!r} has vectors of {width} numbers, not {expected}",
                hint=f"{reason}; vectors from different models cannot be mixed",
            )
    assert expected is not None
    return expected, np.result_type(*dtypes)


def vectors(batch: Batch, width: int) -> NDArray[Any]:
    """Embeddings [n, width]: the column's own numbers, without a copy.

    Raises `DataError` naming the first rows that are null, of another length, or hold nulls.
    """
    where = f"{batch.path}: column {EMBEDDING!r}"
    lists = _lists(batch)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        odd = int(np.argmax(lengths != width))
        raise DataError(
            f"{where} has vectors of other lengths than {width} in {batch.rows(lengths != width)} "
            f"(row {batch.start + odd} has {lengths[odd]} numbers)"
        )
    flat = lists.flatten()
    if flat.null_count:
        holes = flat.is_null().to_numpy(zero_copy_only=False).reshape(-1, width).any(1)
        raise DataError(f"{where} has vectors with null elements in {batch.rows(holes)}")
    values: NDArray[Any] = flat.to_numpy().reshape(-1, width)
    return values


def peaks(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """The largest absolute value of each row [n]; NaN and Inf come through."""
    if vectors.dtype == np.float16:  # as integers: numpy computes with halves one by one
        largest = (vectors.view(np.uint16) & 0x7FFF).max(1).view(np.float16)
    else:
        largest = np.abs(vectors).max(1)
    return np.asarray(largest, np.float64)


def check_finite(batch: Batch, peaks: NDArray[np.float64]) -> None:
    """Raise `DataError` naming the first rows whose largest absolute value is NaN or Inf."""
    bad = ~np.isfinite(peaks)
    if bad.any():
        raise DataError(
            f"{batch.path}: column {EMBEDDING!r} has vectors with NaN or infinite elements in "
            f"{batch.rows(bad)}"
        )


def _lists(batch: Batch) -> pa.Array:
    lists = batch.data.column(EMBEDDING)
    if lists.null_count:
        bad = lists.is_null().to_numpy(zero_copy_only=False)
        raise DataError(f"{batch.path}: column {EMBEDDING!r} is null in {batch.rows(bad)}")
    return lists


def _value_dtype(path: Path, kind: pa.DataType) -> Any:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if (is_list or pa.types.is_fixed_size_list(kind)) and pa.types.is_floating(kind.value_type):
        # by its width: to_pandas_dtype wants pandas, in older pyarrow
        return np.dtype(f"f{kind.value_type.bit_width // 8}")
    raise DataError(
        f"{path}: column {EMBEDDING!r} has the type {kind}, not a list of float16, float32 or float64"
    )


def _missing_column(path: Path, column: str, names: Sequence[str]) -> DataError:
    near = difflib.get_close_matches(column, names, 1)
    hint = f"the file has the columns {', '.join(names)}"
    if near:
        hint += f"; is it {near[0]!r}?"
    return DataError(f"{path}: there is no column {column!r}", hint=hint)


# --- hashing ---------------------------------------------------------------------------------


def hash_texts(texts: pa.Array | pa.ChunkedArray, salt: str) -> NDArray[np.uint64]:
    """A uniform 64-bit hash of each large_string, the same on every machine and version.

    Bytes weighted by random numbers, one for each position, summed and mixed: strings that differ
    collide with a probability of about 2**-56.
    """
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    seed = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little")
    hashes = [
        _hash(chunk.slice(start, HASH_ROWS), np.uint64(seed))
        for chunk in chunks
        for start in range(0, len(chunk), HASH_ROWS)
    ]
    return np.concatenate(hashes or [np.empty(0, np.uint64)])


def _hash(texts: pa.Array, seed: np.uint64) -> NDArray[np.uint64]:
    _, ends, data = texts.buffers()
    offsets = np.frombuffer(ends, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    raw = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data else np.empty(0, np.uint8)
    offsets = offsets - offsets[0]
    lengths = np.diff(offsets)
    place = np.arange(len(raw)) - np.repeat(offsets[:-1], lengths)
    weights = _mix(np.arange(1, lengths.max(initial=0) + 1, dtype=np.uint64) * _GOLDEN + seed)
    # Sums of segments as differences of one running sum, which may wrap around.
    sums = np.zeros(len(raw) + 1, np.uint64)
    np.cumsum((raw.astype(np.uint64) + np.uint64(1)) * weights[place], out=sums[1:])
    return _mix(sums[offsets[1:]] - sums[offsets[:-1]] + seed)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
