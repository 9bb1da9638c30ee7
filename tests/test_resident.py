"""A table that is on the device already: the same training, and what it is not used for."""

import functools
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_loop import make_config
from tests.worlds import clustered, near_and_far
from tripletkit import processes
from tripletkit.data.store import Store
from tripletkit.device import choose_device
from tripletkit.paths import run_paths
from tripletkit.train import assembly, loop, resident
from tripletkit.train.assembly import Data
from tripletkit.train.resident import Parcel

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def world(shared: resident.Resident | None = None) -> Data:
    store, val = clustered(buildings=30, seed=0), clustered(buildings=20, seed=1, name="val")
    return Data(store, near_and_far(store), val, near_and_far(val), shared)


def half(store: Store) -> Store:
    """A sample of every other building."""
    sizes = np.diff(store.starts)
    keep = np.arange(len(sizes)) % 2 == 0
    building = np.where(keep[store.building], store.building, -1).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.where(keep, sizes, 0))])
    rows = store.by_building[keep[store.building[store.by_building]]]
    return replace(store, building=building, by_building=rows, starts=starts)


def loaded(data: Data, device: torch.device = CPU) -> resident.Resident:
    return resident.load(data.train, data.bands, device, torch.float32)


def bytes_of(folder: Path, data: Data, **training) -> bytes:
    paths = run_paths(folder)
    loop.train(make_config(paths, num_epochs=2, **training), data, paths)
    return paths.metrics.read_bytes()


def assembled(folder: Path, data: Data, **training) -> assembly.Pieces:
    return assembly.assemble(make_config(run_paths(folder), **training), data, fresh=True)


def test_with_a_resident_table_a_run_gives_the_same_bytes(tmp_path):
    shared = loaded(world())
    expected = bytes_of(tmp_path / "own", world())
    assert bytes_of(tmp_path / "shared", world(shared)) == expected


def test_it_is_used_as_it_is(tmp_path):
    shared = loaded(world())
    step = assembled(tmp_path, world(shared)).step
    assert step.table is shared.table
    assert step.index is shared.index


def test_a_sample_uses_the_table_with_an_index_of_its_own(tmp_path):
    whole = replace(world(), bands=None)
    sample = replace(whole, train=half(whole.train))
    shared = loaded(whole)
    step = assembled(tmp_path, replace(sample, resident=shared)).step
    assert step.table is shared.table
    assert step.index is not shared.index
    assert len(step.index.anchors) == len(shared.index.anchors) // 2
    same = bytes_of(tmp_path / "shared", replace(sample, resident=shared))
    assert same == bytes_of(tmp_path / "own", sample)


def test_other_bands_get_an_index_of_their_own(tmp_path):
    shared = loaded(world())
    step = assembled(tmp_path, replace(world(shared), bands=None)).step
    assert step.index is not shared.index
    assert step.index.bands == 0


@pytest.mark.parametrize("why", ["another table", "another type", "on the host"])
def test_what_does_not_serve_is_not_used(tmp_path, why):
    shared, placement = loaded(world()), "auto"
    if why == "another table":
        shared = replace(shared, table_key="another")
    elif why == "another type":
        shared = replace(shared, table=shared.table.to(torch.bfloat16))
    else:
        placement = "host"
    step = assembled(tmp_path, world(shared), placement=placement).step
    assert step.index is not shared.index
    assert bytes_of(tmp_path / "a", world(shared), placement=placement) == bytes_of(
        tmp_path / "b", world(), placement=placement
    )


def train_elsewhere(parcel: Parcel, folder: Path, device: str, _stop) -> tuple[int, bytes]:
    """In another process; its first start is killed while it holds the memory."""
    torch.set_num_threads(1)
    choose_device(device)
    shared = parcel.open()
    folder.mkdir(exist_ok=True)
    started = folder / "started"
    if not started.exists():
        started.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return shared.table.untyped_storage().nbytes(), bytes_of(folder, world(shared), device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_parcel_is_opened_by_several_processes_and_again_after_a_kill(tmp_path, device):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = bytes_of(tmp_path / "here", world(), device=device)
    finally:
        torch.set_num_threads(threads)
    shared = loaded(world(), choose_device(device))
    parcel = Parcel(shared)
    works = [
        functools.partial(train_elsewhere, parcel, tmp_path / str(number), device)
        for number in range(2)
    ]
    before = shared.table.clone()
    ended = processes.run(works, [{}] * 2, should_stop=lambda: False, together=False, restarts=1)
    results = processes.results(ended)
    assert [trained for _, trained in results] == [expected] * 2
    assert torch.equal(shared.table, before)
