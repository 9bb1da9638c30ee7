"""Rows about the cache, the bands, retrieval and the start, measured in `*_rates.py`."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks import measure
from tests.benchmarks.measure import SLICES, Bench, Row


def cache(bench: Bench) -> Iterator[Row]:
    """Building the cache of a parquet file, against reading the file."""
    import tests.benchmarks.data_rates as data_rates

    rows, dim = 150_000, 768
    ours, reference = data_rates.cache_build(bench.folder, dim, rows, SLICES)
    yield measure.ratio(
        f"cache build, {rows // 1000} k x {dim} float32",
        ours,
        reference,
        unit="MB/s",
        beside="pyarrow reading the file",
        target=0.8,
    )
    rows = 500_000 if bench.seconds > 2 else 100_000
    yield measure.absolute(
        f"cache build, peak RSS, {rows // 1000} k x {dim} float32 ({rows * dim * 4 / 1e9:.1f} GB)",
        [data_rates.cache_build_rss(bench.folder, dim, rows)],
        unit="GB",
        target=1.0,
    )


def bands(bench: Bench) -> Iterator[Row]:
    """Exact nearest buildings, against bare matrix products of the same tiles."""
    import tests.benchmarks.data_rates as data_rates

    rows, dim = (200_000, 768) if bench.on_gpu else (10_000, 768)
    ours, gemm = data_rates.bands(bench.folder, dim, rows, SLICES, bench.device)
    yield measure.ratio(
        f"exact bands, {rows // 1000} k x {dim}",
        [rate / 1e9 for rate in ours],
        [rate / 1e9 for rate in gemm],
        unit="GFLOP/s",
        beside="matrix products alone",
        target=0.5,
    )


def retrieval(bench: Bench) -> Iterator[Row]:
    """Recall over the full gallery, against bare matrix products."""
    import tests.benchmarks.evaluation_rates as evaluation_rates

    rows, dim = (200_000, 256) if bench.on_gpu else (20_000, 256)
    for skewed in (False, True):
        ours, gemm = evaluation_rates.retrieval(rows, dim, SLICES, bench.device, skewed=skewed)
        yield measure.ratio(
            f"full-gallery recall, {rows // 1000} k x {dim}"
            + (", some buildings with 500 images" if skewed else ""),
            ours,
            gemm,
            unit="pairs/s",
            beside="matrix products alone",
            target=None if bench.on_gpu else 0.5,
        )


def gpu_retrieval(bench: Bench) -> Iterator[Row]:
    """Half a million images against each other."""
    import tests.benchmarks.evaluation_rates as evaluation_rates

    seconds = evaluation_rates.retrieval_seconds(500_000, 256, bench.gpu())
    yield measure.absolute("full-gallery recall, 500 k x 256", [seconds], unit="s", target=5)


def start(bench: Bench) -> Iterator[Row]:
    """From a command to its first step."""
    import tests.benchmarks.evaluation_rates as evaluation_rates

    for what, seconds in evaluation_rates.import_seconds().items():
        target = 0.3 if "--help" in what else None
        yield measure.absolute(f"start-up, `{what}`", [seconds], unit="s", target=target)
    seconds = evaluation_rates.first_step_seconds(bench.folder)
    yield measure.absolute(
        "`tripletkit train`, from its imports to the end of the first step, 20 k x 64, warm cache",
        [seconds],
        unit="s",
    )
    import tests.benchmarks.data_rates as data_rates

    # Writing the files takes minutes, which a rented GPU is too dear for.
    rows = 5_000_000 if bench.seconds > 2 and not bench.on_gpu else 500_000
    dim, neighbors = 64, 20
    yield measure.absolute(
        f"warm start, {rows / 1e6:g} M x {dim}, imports left out",
        [data_rates.warm_start(bench.folder, rows, dim, neighbors)],
        unit="s",
        target=2,
    )
