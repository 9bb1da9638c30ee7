"""A trained head as files for other programs: safetensors, ONNX, and a model card."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tripletkit import __version__, fsio, inputs
from tripletkit.apply import card, facts
from tripletkit.config import Config, TrainingModel
from tripletkit.data import parquet
from tripletkit.device import as_tensor, full_precision
from tripletkit.errors import ConfigError, DataError, RunError
from tripletkit.log import logger
from tripletkit.paths import run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.head import Head, hidden_dims

FORMAT = "tripletkit-head"
FORMAT_VERSION = 1
WEIGHTS, ONNX, CONFIG, CARD = "model.safetensors", "model.onnx", "config.json", "README.md"
NAMES = (WEIGHTS, ONNX, CARD, CONFIG)  # CONFIG, the mark of a folder of ours, comes last
UNFINISHED = {"format": FORMAT, "incomplete": True}  # CONFIG while the files are being replaced
NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxruntime")}
FORMATS = tuple(NEEDS)

# The oldest opset that has LayerNormalization, and the file version that came with it: what older
# programs read, newer ones do too.
OPSET, IR_VERSION = 17, 8
ONNX_MOST = 2**31 - 2**20  # bytes of a file; more needs a second one beside it
TOLERANCE = 1e-5  # of each number, in vectors of unit length
WORSE = 16  # times torch's own error is allowed, where that is more; 4.7 is the most that was seen
ROWS = 256  # that onnxruntime and torch are compared on
# The floor is that of torch.nn.functional.normalize.
CONSTANTS = {"half": 0.5, "one": 1.0, "sqrt_half": 0.5**0.5, "norm_floor": 1e-12}


def export(
    config: Config,
    folder: Path,
    *,
    checkpoint: Path | None = None,
    formats: Collection[str] = FORMATS,
    force: bool = False,
) -> list[Path]:
    """Write the head of a checkpoint into `folder`, whole or not at all; returns the files.

    Raises ConfigError (a package is missing, the folder exists), DataError (no good checkpoint)
    and RunError (ONNX and torch do not agree, the folder cannot be written).
    """
    for kind in formats:
        _require(kind)
    folder = folder.resolve()
    _check_target(folder, force=force)
    checkpoint = checkpoint or inputs.best_checkpoint(config)
    state, sha256 = checkpoints.load_with_sha256(checkpoint)
    with checkpoints.understood(checkpoint):
        section = inputs.head_section(config, state)
        head = inputs.head_of(state, section, checkpoint)
    if not all(bool(p.isfinite().all()) for p in head.parameters()):
        raise DataError(f"{checkpoint} has weights that are NaN or infinite")
    with checkpoints.understood(checkpoint):
        known = facts.gather(config, checkpoint, state, sha256, section)
    inputs.warn_if_unfinished(checkpoint, known.epoch)
    labels = facts.labels(known)

    contents: dict[str, bytes] = {}
    if "safetensors" in formats:
        contents[WEIGHTS] = _safetensors(head)
    if "onnx" in formats:
        contents[ONNX] = onnx_model(head, section, labels)
        check_onnx(contents[ONNX], head, _rows(config, checkpoint, head))
    contents[CARD] = card.render(folder.name, known, contents).encode()
    contents[CONFIG] = (json.dumps(head_config(head, section, labels), indent=2) + "\n").encode()
    return _publish(folder, contents)


def head_config(head: Head, section: TrainingModel, labels: Mapping[str, str]) -> dict[str, Any]:
    """All that is needed to build the head again, as `config.json` holds it."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "input_dim": head.input_layer.in_features,
        "hidden_dims": hidden_dims(section),
        "output_dim": section.output_dim,
        "activation": section.activation,
        "use_layer_norm": section.use_layer_norm,
        "layer_norm_eps": _epsilon(head),
        "use_residual": section.use_residual,
        "normalized": True,
        "dtype": "float32",
        "dropout": section.dropout,
        "provenance": dict(labels),
    }


def _require(kind: str) -> None:
    if kind not in NEEDS:
        raise ConfigError(f"--format is {kind!r}", hint=f"one of {', '.join(NEEDS)}")
    try:
        for module in NEEDS[kind]:
            importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"--format {kind} needs {' and '.join(NEEDS[kind])}",
            hint="pip install 'tripletkit[export]'",
        ) from None


# --- safetensors and ONNX --------------------------------------------------------------------


def _safetensors(head: Head) -> bytes:
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    return save(weights, {"format": "pt"})


def _epsilon(head: Head) -> float:
    return float(getattr(head.output_norm, "eps", 1e-5))


def onnx_model(head: Head, section: TrainingModel, labels: Mapping[str, str]) -> bytes:
    """The head as an ONNX file: `embedding` [batch, D] to `projection` [batch, d], float32.

    Written node by node: torch's own exporter needs another package, names the tensors by its
    version, and talks. `check_onnx` shows that it is the same function.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    if 4 * sum(p.numel() for p in head.parameters()) > ONNX_MOST:
        raise RunError(
            "the head has more weights than one ONNX file holds (2 GB)",
            hint="--format safetensors",
        )

    def value(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])

    weights = {name: tensor.numpy() for name, tensor in head.state_dict().items()}
    weights |= {name: np.asarray(number, np.float32) for name, number in CONSTANTS.items()}
    nodes = _nodes(section, _epsilon(head))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "head",
        [value("embedding", head.input_layer.in_features)],
        [value("projection", section.output_dim)],
        [numpy_helper.from_array(weights[name], name) for name in weights if name in used],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="tripletkit",
        producer_version=__version__,
    )
    helper.set_model_props(model, dict(labels))
    checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def _nodes(section: TrainingModel, epsilon: float) -> list[Any]:
    """`Head.forward` as ONNX nodes, from `embedding` to `projection`."""
    from onnx import helper

    nodes: list[Any] = []

    def add(kind: str, *names: str, **attributes: Any) -> str:
        """Add a node with these inputs; returns the name of its output."""
        result = f"{kind.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(kind, names, [result], result, **attributes))
        return result

    def linear(x: str, name: str) -> str:
        return add("Gemm", x, f"{name}.weight", f"{name}.bias", transB=1)

    def layer(x: str, name: str, norm: str) -> str:
        y = linear(x, name)
        if not section.use_layer_norm:
            return y
        scale = (f"{norm}.weight", f"{norm}.bias")
        return add("LayerNormalization", y, *scale, axis=-1, epsilon=epsilon)

    def activation(x: str) -> str:
        if section.activation == "relu":
            return add("Relu", x)
        if section.activation == "silu":
            return add("Mul", x, add("Sigmoid", x))
        # gelu, x * (1 + erf(x / sqrt 2)) / 2: a node of its own since opset 20 only
        bend = add("Add", add("Erf", add("Mul", x, "sqrt_half")), "one")
        return add("Mul", add("Mul", x, bend), "half")

    h = activation(layer("embedding", "input_layer", "input_norm"))
    for n in range(section.num_hidden_layers - 1):
        h = activation(layer(h, f"hidden_layers.{n}", f"hidden_norms.{n}"))
    y = layer(h, "output_layer", "output_norm")
    if section.use_residual:
        y = add("Add", y, linear("embedding", "residual_proj"))
    length = add("Max", add("ReduceL2", y, axes=[-1], keepdims=1), "norm_floor")
    nodes.append(helper.make_node("Div", [y, length], ["projection"], "projection"))
    return nodes


def check_onnx(model: bytes, head: Head, rows: NDArray[np.float32]) -> None:
    """Run the ONNX file and the head on `rows` [n, D], in batches of several sizes, 1 among them.

    Both are compared with the head in double precision. Raises RunError when onnxruntime is farther
    from it than TOLERANCE, unless float32 is no better: embeddings may have means far from zero, and
    a LayerNorm of two numbers is steep.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # it talks of devices that it does not find
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with torch.no_grad(), full_precision(torch.device("cpu")):
        exact = copy.deepcopy(head).double()(as_tensor(rows).double()).numpy()
        ours = _apart(head(as_tensor(rows)).numpy(), exact)
    if ours > TOLERANCE:
        logger.warning(
            "in float32 the numbers of this head are exact to %.0e only, here and elsewhere; "
            "embeddings with means far from zero do that",
            ours,
        )
    for size in sorted({1, 2, min(33, len(rows)), len(rows)}):
        (theirs,) = session.run(["projection"], {"embedding": rows[:size]})
        apart = _apart(theirs, exact[:size])
        if not apart <= max(TOLERANCE, WORSE * ours):  # NaN is not
            raise RunError(
                f"onnxruntime {onnxruntime.__version__} and torch {torch.__version__} do not agree "
                f"on the exported head: numbers of a batch of {size} are wrong by {apart:.1e}, those "
                f"of torch by {ours:.1e}",
                hint="--format safetensors leaves ONNX out; please report it",
            )


def _apart(found: NDArray[Any], exact: NDArray[Any]) -> float:
    return float(np.abs(found - exact).max()) if found.shape == exact.shape else np.inf


def _rows(config: Config, checkpoint: Path, head: Head) -> NDArray[np.float32]:
    """Vectors to compare on: the first of a configured split, else random ones."""
    width = head.input_layer.in_features
    paths = facts.run_config(config, run_paths(checkpoint.absolute().parent)).paths
    for source in (paths.val_parquet_path, paths.test_parquet_path, paths.train_parquet_path):
        if source is not None:
            try:
                table = parquet.open_table(parquet.find_files(source), [parquet.EMBEDDING])
                parquet.embedding_width(table, width)
                batch = next(iter(parquet.batches(table, [parquet.EMBEDDING], rows=ROWS)))
                rows = parquet.vectors(batch, width)
            except DataError as error:
                logger.debug("%s", error.message)
                continue
            if np.isfinite(rows).all():
                logger.info("ONNX is compared with torch on %d rows of %s", len(rows), source)
                return np.ascontiguousarray(rows, np.float32)
    logger.info("ONNX is compared with torch on random rows: no embeddings to read")
    random = np.random.default_rng(0)
    return random.standard_normal((ROWS, width), np.float32)


# --- the folder ------------------------------------------------------------------------------


def _check_target(folder: Path, *, force: bool) -> None:
    """Raise ConfigError unless the folder is new, or its files are ours and may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file", hint="name a folder that does not exist yet")
    if not force:
        raise ConfigError(f"{folder} exists", hint="--force replaces the export in it")
    there = [name for name in NAMES if (folder / name).exists()]
    if there and not _is_ours(folder):
        raise ConfigError(
            f"{folder} holds a {there[0]}, and no {CONFIG} of an export: --force would destroy it",
            hint="name another folder",
        )


def _is_ours(folder: Path) -> bool:
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _publish(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write the files aside, then move them in place: as a folder, or one by one into an old one."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    left = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for each in folder.parent.iterdir():
            if left.fullmatch(each.name) and each.is_dir():  # by an export that was killed
                shutil.rmtree(each, ignore_errors=True)
        aside.mkdir()
        try:
            for name, data in contents.items():
                (aside / name).write_bytes(data)
            _move(aside, folder, contents)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error.strerror or error}",
            hint="make room, or name a folder on another disk",
        ) from None
    return [folder / name for name in contents]


def _move(aside: Path, folder: Path, contents: Mapping[str, bytes]) -> None:
    if not folder.exists():
        fsio.publish_folder(aside, folder)
        return
    for name in contents:
        with (aside / name).open("rb") as file:
            os.fsync(file.fileno())
    # A kill from here on leaves files of two heads: nobody may take them for one, and --force may
    # replace them.
    fsio.write_json(folder / CONFIG, UNFINISHED)
    for name in NAMES:  # what is not written anew belongs to another head
        if name not in contents:
            (folder / name).unlink(missing_ok=True)
    for name in contents:
        (aside / name).replace(folder / name)
    fsio.sync_folder(folder)
