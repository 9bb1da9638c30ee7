"""Checkpoints: torn, foreign, malicious, and with a content that is not what ours have."""

from __future__ import annotations

import functools
import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.draw import Draw
from tests.fuzz.judge import CANARY, Target
from tests.worlds import clustered, near_and_far
from tripletkit import inputs
from tripletkit.apply import facts
from tripletkit.config import Config
from tripletkit.data.store import Store
from tripletkit.errors import TripletkitError
from tripletkit.train import assembly, checkpoint, state
from tripletkit.train.state import Progress

FILE = Path("checkpoint_last.pt")


@functools.cache
def config() -> Config:
    return Config(
        training={
            "init": "random",
            "device": "cpu",
            "precision": "fp32",
            "placement": "device",
            "batch_size": 4,
        },  # type: ignore[arg-type]
        training_model={"hidden_dim": 4, "output_dim": 2},  # type: ignore[arg-type]
    )


@functools.cache
def data() -> assembly.Data:
    found: Store = clustered(4, 2, 3)
    return assembly.Data(found, near_and_far(found, 1))


def pieces() -> assembly.Pieces:
    return assembly.assemble(config(), data(), fresh=False)


@functools.cache
def good() -> bytes:
    state.save(
        pieces(),
        Progress(epoch=1, global_step=3, metrics={"mrr": 0.5}, raw={"mrr": 0.4}),
        Path("x.pt"),
    )
    found = Path("x.pt").read_bytes()
    Path("x.pt").unlink()
    return found


class Bomb:
    """Whoever unpickles it makes the canary."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


def _raw(content: bytes) -> None:
    """A first byte, and what it says: the bytes of the file, or of the pickle in it."""
    kind, rest = content[:1], content[1:]
    if kind == b"z":
        rest = zipped(rest)
    FILE.write_bytes(rest)
    read_all()


def zipped(pickled: bytes) -> bytes:
    """The good checkpoint with another pickle in it."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good())) as source, zipfile.ZipFile(sink, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return sink.getvalue()


def read_all() -> None:
    """Everything that reads a checkpoint. Raises the first error."""
    errors = []
    for look in (_resume, _head, _tell, _newest):
        try:
            look()
        except (TripletkitError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _resume() -> None:
    loaded = checkpoint.load(FILE)
    progress = state.restore(pieces(), FILE, loaded)
    assert progress.epoch >= 0


def _head() -> None:
    head, _ = inputs.load_head(config(), FILE, 3)
    head(torch.zeros(2, 3))


def _tell() -> None:
    loaded, sha = checkpoint.load_with_sha256(FILE)
    with checkpoint.understood(FILE):  # as export has it
        section = inputs.head_section(config(), loaded)
        facts.labels(facts.gather(config(), FILE.absolute(), loaded, sha, section))


def _newest() -> None:
    checkpoint.newest([FILE])


def _state(content: bytes) -> None:
    """A checkpoint of ours with a few things in it replaced or left out."""
    draw = Draw(content)
    loaded = torch.load(io.BytesIO(good()), weights_only=True)
    try:
        for _ in range(1 + draw.below(3)):
            loaded = _changed(draw, loaded)
        if draw.below(8) == 0 and isinstance(loaded, dict):
            command = f"open({CANARY!r}, 'w').close()"
            loaded[draw.text().encode(errors="replace").decode()] = Bomb(eval, command)
        sink = io.BytesIO()
        torch.save(loaded, sink)
    except Exception:  # noqa: BLE001 - torch does not make or write such a thing
        return
    FILE.write_bytes(sink.getvalue())
    read_all()


def _changed(draw: Draw, value: Any) -> Any:
    if isinstance(value, dict) and value and draw.below(5):
        key = draw.of(sorted(value, key=str))
        if draw.below(6) == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw.flag():
        return [*value[:-1], _changed(draw, value[-1])]
    if draw.flag():
        shape = [draw.of((0, 1, 2, 3, 4, 100)) for _ in range(draw.below(4))]
        kinds = (
            torch.float32,
            torch.float16,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.float64,
        )
        tensor = torch.full(shape, draw.of((0.0, 1.0, float("nan"), float("inf"), -1e30))).to(
            draw.of(kinds)
        )
        if isinstance(value, torch.Tensor) and draw.flag():
            return (
                torch.full_like(value, draw.of((0, 1)))
                if value.dtype != torch.float32
                else value * float("nan")
            )
        if draw.below(6) == 0:
            return tensor.to_sparse() if tensor.dim() else torch.nn.Parameter(tensor.float())
        return tensor
    return draw.value()


def _files() -> list[bytes]:
    command = f"touch {CANARY}"
    bombs = [
        pickle.dumps(Bomb(eval, f"open({CANARY!r}, 'w').close()")), pickle.dumps({"model_state_dict": Bomb(exec, f"open({CANARY!r}, 'w')")}),
        f"cos\nsystem\n(S'{command}'\ntR.".encode(), f"(S'{command}'\nios\nsystem\n.".encode(),
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x08\x00\x00\x00\x00\x00\x01\x00\x00\x85R.",
        b"\x80\x02ctorch\nload\nX\x05\x00\x00\x00other\x85R.", b"\x80\x02}q\x00" + b"(" * 5000 + b".", b"N.", b"\x80\x02}.",
    ]  # fmt: skip
    with zipfile.ZipFile(io.BytesIO(good())) as source:
        pickled = next(source.read(n) for n in source.namelist() if n.endswith("data.pkl"))
    old = io.BytesIO()
    torch.save({"model_state_dict": {}}, old, _use_new_zipfile_serialization=False)
    foreign = io.BytesIO()
    torch.save(torch.zeros(3), foreign)
    return [b"r" + good(), b"z" + pickled, b"r" + old.getvalue(), b"r" + foreign.getvalue(), b"r" + good()[:-100], b"r",
            *(b"z" + bomb for bomb in bombs), *(b"r" + bomb for bomb in bombs), b"rPK\x03\x04", b"z"]  # fmt: skip


def _draws() -> list[bytes]:
    source = random.Random(4)
    return [source.randbytes(n) for n in range(3, 60) for _ in range(2)]


CHECKPOINT = Target(
    _raw,
    _files,
    [
        b"cos\nsystem\n",
        b"R.",
        b"\x85",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"PK\x01\x02",
        b"PK\x05\x06",
    ],
)
STATE = Target(_state, _draws)
