"""Flat files of numbers and of texts, written once and then mapped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

DTYPES = {"f16": np.float16, "f32": np.float32, "i32": np.int32, "i64": np.int64, "u8": np.uint8}


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write the bare numbers; the file's suffix says the dtype (see `DTYPES`)."""
    with path.open("wb") as file:
        file.write(np.ascontiguousarray(array, DTYPES[path.suffix[1:]]).data)


def map_array(path: Path) -> NDArray[Any]:
    """Map what `write_array` wrote, read-only and flat."""
    return np.memmap(path, DTYPES[path.suffix[1:]], mode="r")


def map_texts(path: Path) -> pa.ChunkedArray:
    """Map what `text_writer` wrote."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().column(0)


@contextlib.contextmanager
def text_writer(path: Path) -> Iterator[Callable[[pa.Array], None]]:
    """A function that appends large_strings."""
    schema = pa.schema([("id", pa.large_string())])
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        yield lambda texts: writer.write_batch(pa.record_batch([texts], schema=schema))
