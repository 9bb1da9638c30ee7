"""A table and its triplet index on a device, for several processes that train at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from tripletkit import fsio
from tripletkit.data.bands import Bands
from tripletkit.data.store import Store
from tripletkit.device import put, type_on
from tripletkit.errors import RunError
from tripletkit.train.sampler import TripletIndex


@dataclass(frozen=True)
class Resident:
    """A table and its index on one device. Others may read them too, so nobody writes into them."""

    table: Tensor
    index: TripletIndex
    table_key: str  # what they were made from; the index also from a sample and bands
    sample_key: str
    bands_key: str | None

    def serves(
        self, placement: str, store: Store, device: torch.device, precision: torch.dtype
    ) -> bool:
        """Whether a run with this store can use the table; it is the same for every sample."""
        fits = self.table_key == store.fingerprint and self.table.device == device
        right = self.table.dtype == type_on(device, store.embeddings, precision)
        return fits and right and placement != "host"


def load(
    store: Store,
    bands: Bands | None,
    device: torch.device,
    precision: torch.dtype,
    there: Resident | None = None,
) -> Resident:
    """Put the table and its index on `device`, as far as `there`, which serves, has not got them."""
    sample, levels = sample_key(store), bands.key if bands else None
    dtype = type_on(device, store.embeddings, precision)
    same = there is not None and (there.sample_key, there.bands_key) == (sample, levels)
    return Resident(
        table=there.table if there else put(store.embeddings, device, dtype),
        index=there.index if there and same else TripletIndex(store, bands, device),
        table_key=store.fingerprint,
        sample_key=sample,
        bands_key=levels,
    )


def sample_key(store: Store) -> str:
    """The key of the embeddings, and of the buildings chosen if the store is a sample."""
    if len(store.by_building) == len(store.building):
        return store.fingerprint
    return fsio.digest([store.fingerprint, store.by_building.tobytes()])


class Parcel:
    """Tensors on their way to a process that is started: `open` there maps the memory of here.

    Whoever made it keeps it until that process has ended. It is packed anew for every start, since
    torch counts who holds what; and opened when the process is ready, not while it is unpickled.
    """

    def __init__(self, content: Any) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Callable[[bytes], object], tuple[bytes]]:
        with _sharing():
            return _Packed, (bytes(ForkingPickler.dumps(self._content)),)

    def open(self) -> Any:
        """What is in it."""
        return self._content


class _Packed(Parcel):
    """A parcel that has arrived."""

    def open(self) -> Any:
        with _sharing():
            return ForkingPickler.loads(self._content)


@contextlib.contextmanager
def _sharing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"processes cannot share the table on the GPU: {str(error).splitlines()[0]}",
            hint="PYTORCH_CUDA_ALLOC_CONF may prevent it (expandable_segments, cudaMallocAsync): "
            'unset it, or set training.placement = "host" or tuning.trials_per_gpu = 1',
        ) from error
