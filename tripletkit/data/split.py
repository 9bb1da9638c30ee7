"""Splitting a table by building, so that no building is in two splits."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tripletkit import fsio, log
from tripletkit.data import parquet
from tripletkit.data.parquet import BUILDING, Table
from tripletkit.data.store import writing_to
from tripletkit.errors import ConfigError, DataError, RunError

BATCH_BYTES = 32 * 2**20


def split_parquet(
    source: Path, out: Path, *, fractions: Mapping[str, float], seed: int
) -> dict[str, int]:
    """Write `out/<split>.parquet` for each split, with all columns; return the rows of each.

    A hash of the building id and the seed decides, so that rows added later never move a building
    that was there before. The files appear together, when all are whole. Raises `ConfigError` for
    fractions that do not add up to 1 and for existing files, `DataError` for bad input, `RunError`
    while another process splits into `out`: of two seeds a building could end up in two splits.
    """
    if min(fractions.values(), default=0) <= 0 or not math.isclose(sum(fractions.values()), 1):
        raise ConfigError(
            f"fractions {dict(fractions)}: must be positive and add up to 1",
            hint="for example train 0.8, val 0.1, test 0.1",
        )
    _check_absent(out, fractions)
    files = parquet.find_files(source)
    table, key = parquet.open_table(files, [BUILDING]), parquet.fingerprint(files)
    with (
        writing_to(out, needed=sum(path.stat().st_size for path in files)),
        fsio.passing_lock(out / ".split.lock") as lock,
    ):
        if not lock.ours:
            raise RunError(
                f"another process is splitting into {out}",
                hint="wait for it, or choose another folder",
            )
        _check_absent(out, fractions)  # meanwhile
        if lock.sure:
            fsio.remove_leftovers(out, ".split.*.tmp")
        aside = Path(tempfile.mkdtemp(prefix=".split.", suffix=".tmp", dir=out))
        try:
            with parquet.unchanged(files, lambda: parquet.fingerprint(files) == key):
                rows = _write(table, aside, fractions, seed)
            for split, count in rows.items():
                if count == 0:
                    raise DataError(
                        f"{source}: no building fell into {split!r}",
                        hint="the data has too few buildings for such a small fraction",
                    )
            for split in fractions:
                (aside / f"{split}.parquet").rename(out / f"{split}.parquet")
            fsio.sync_folder(out)
        finally:
            shutil.rmtree(aside)
    return rows


def _check_absent(out: Path, splits: Iterable[str]) -> None:
    for split in splits:
        target = out / f"{split}.parquet"
        if target.exists():
            raise ConfigError(f"{target} exists", hint="remove it, or choose another folder")


def _write(table: Table, aside: Path, fractions: Mapping[str, float], seed: int) -> dict[str, int]:
    ends = np.cumsum(list(fractions.values())[:-1])
    rows = dict.fromkeys(fractions, 0)
    writers: dict[str, pq.ParquetWriter] = {}
    schema = None
    done = 0
    with (
        contextlib.ExitStack() as stack,
        log.progress(table.total, "splitting") as update,
    ):
        for batch in parquet.batches(table, None, _rows_per_batch(table)):
            if schema is None:
                schema = batch.data.schema
                for split in fractions:
                    file = stack.enter_context(fsio.atomic_write(aside / f"{split}.parquet"))
                    writer = pq.ParquetWriter(file, schema, compression="zstd")
                    writers[split] = stack.enter_context(writer)
            if not batch.data.schema.equals(schema):
                raise DataError(
                    f"{batch.path}: its columns differ from those of {table.files[0]}",
                    hint="split files with one schema at a time",
                )
            hashes = parquet.hash_texts(parquet.text(batch, BUILDING), f"split {seed}")
            part = np.searchsorted(ends, hashes / 2.0**64, side="right")
            for number, split in enumerate(fractions):
                with parquet.usable(batch.path):
                    chosen = batch.data.filter(pa.array(part == number))
                    if len(chosen):
                        writers[split].write_batch(chosen)
                rows[split] += len(chosen)
            done += len(batch.data)
            update(done, "splitting")
    return rows


def _rows_per_batch(table: Table) -> int:
    size = 0
    for path in table.files:
        footer = pq.read_metadata(path)
        size += sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    return max(1, min(parquet.BATCH_ROWS, BATCH_BYTES * table.total // max(1, size)))
