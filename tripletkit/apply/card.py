"""The model card of an exported head: what it is, what it learned from, how good it is."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tripletkit import __version__
from tripletkit import config as configuration
from tripletkit.apply.facts import Facts, Tested, commit

TAGS = ("embeddings", "feature-extraction", "metric-learning", "projection-head", "triplet-loss")
TASK = "Retrieval of images of the same building"
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "safetensors")

LIMITS = (
    (
        "It knows only vectors of the model, and of the kind of images, that it was trained on. "
        "Others of the same length give numbers, too, but meaningless ones."
    ),
    "It computes in float32; half precision loses accuracy in the last step.",
    (
        "Vectors have unit length: compare them by dot product or Euclidean distance, which order "
        "neighbours alike."
    ),
)
VALIDATION_FLATTERS = (
    "The validation data chose the epoch, and the parameters if they were tuned, so its metrics "
    "flatter a little."
)
TEST_FIRST = "Judge by data that took no part: `tripletkit evaluate --split test`."
GALLERY = "Metrics depend on the size of the gallery: compare only on the same data."

# How to use the files without tripletkit; docs/how-to/use-elsewhere.md has the same text.
WITH_TORCH = '''\
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F


def load_head(folder, device="cpu"):
    """A function from embeddings [n, input_dim] to vectors of unit length [n, output_dim]."""
    config = json.loads((Path(folder) / "config.json").read_text())
    weights = load_file(Path(folder) / "model.safetensors", device=device)
    activation = getattr(F, config["activation"])

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer(x, name, norm):
        y = linear(x, name)
        if not config["use_layer_norm"]:
            return y
        scale, shift = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
        return F.layer_norm(y, scale.shape, scale, shift, config["layer_norm_eps"])

    def head(embeddings):
        x = torch.as_tensor(embeddings, dtype=torch.float32, device=device)
        h = activation(layer(x, "input_layer", "input_norm"))
        for n in range(len(config["hidden_dims"]) - 1):
            h = activation(layer(h, f"hidden_layers.{n}", f"hidden_norms.{n}"))
        y = layer(h, "output_layer", "output_norm")
        if config["use_residual"]:
            y = y + linear(x, "residual_proj")
        return F.normalize(y, dim=-1)

    return head
'''
WITH_ONNX = '''\
from pathlib import Path

import numpy as np
import onnxruntime


def load_head(folder, providers=("CPUExecutionProvider",)):
    """A function from embeddings [n, input_dim] to vectors of unit length [n, output_dim]."""
    session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", providers=providers)

    def head(embeddings):
        return session.run(["projection"], {"embedding": np.asarray(embeddings, np.float32)})[0]

    return head
'''


def render(name: str, facts: Facts, files: Iterable[str]) -> str:
    """The card in markdown, for a model called `name` that has these `files`."""
    section, files = facts.section, list(files)
    about = (
        f"A projection head: it turns embeddings of {section.input_dim} numbers into vectors of "
        f"{section.output_dim} numbers and unit length, in which images of one building are "
        "neighbours. It takes embeddings, not images: those of the model that made its training "
        "data. Made with tripletkit."
    )
    parts = [
        _front_matter(name, facts, files),
        f"# {escape(name)}",
        about,
        "## Results",
        *_results(facts),
        "## Use",
        *_use(files),
        "## Data",
        *_data(facts),
        "## Training",
        *_training(facts),
        "## Provenance",
        _table(("", ""), _provenance_rows(facts)),
        "## Limits",
        *_limits(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(name: str, facts: Facts, files: list[str]) -> str:
    formats = [each for each in ("safetensors", "onnx") if f"model.{each}" in files]
    lines = ["---", "# license: yours to choose, for example mit", "library_name: tripletkit"]
    lines += ["tags:", *(f"- {tag}" for tag in (*TAGS, *formats))]
    results = []
    if facts.tested:
        values = {metric: head for metric, (_, head, _, _) in facts.tested.metrics.items()}
        results += _result("test", facts.tested.name, values)
    if facts.trained:
        names = (each.name for each in facts.sources if each.what == "validation")
        results += _result("validation", next(names, "validation"), facts.trained)
    if results:
        lines += ["model-index:", f"- name: {quote(name)}", "  results:", *results]
    return "\n".join([*lines, "---"])


def _result(split: str, data: str, metrics: Mapping[str, float]) -> list[str]:
    """One of the results in the metadata."""
    lines = [
        "  - task:",
        "      type: image-feature-extraction",
        f"      name: {TASK}",
        "    dataset:",
        f"      name: {quote(data)}",
        "      type: parquet",
        f"      split: {split}",
        "    metrics:",
    ]
    for metric, value in metrics.items():
        lines += [f"    - type: {quote(metric)}", f"      value: {value:.6f}"]
    return lines


def _results(facts: Facts) -> list[str]:
    if not facts.trained and not facts.tested:
        return ["Not recorded for these weights; `tripletkit evaluate` measures them."]
    return [*_test_results(facts.tested), *_validation_results(facts)]


def _test_results(tested: Tested | None) -> list[str]:
    if tested is None:
        return []
    rows = [
        (escape(name), _number(raw), _number(head), f"{low:.4f} to {high:.4f}")
        for name, (raw, head, low, high) in tested.metrics.items()
    ]
    basis = (
        f"{TASK} among the test data, {escape(tested.name)} (fingerprint "
        f"{escape(tested.fingerprint)}): {tested.queries:,} queries of {tested.buildings:,} "
        f"buildings in a gallery of {tested.images:,} images. The interval is over buildings."
    )
    return [
        basis,
        _table(("metric", "raw embeddings", "this head", f"{tested.level:.0%} interval"), rows),
    ]


def _validation_results(facts: Facts) -> list[str]:
    if not facts.trained:
        return []
    both = bool(facts.raw)
    rows = [
        (escape(name), *([_number(facts.raw.get(name))] if both else []), _number(value))
        for name, value in facts.trained.items()
    ]
    head = ("metric", *(["raw embeddings"] if both else []), "this head")
    return [
        f"{TASK} among the validation data{_at(facts.epoch)}.",
        _table(head, rows),
    ]


def _use(files: list[str]) -> list[str]:
    parts = []
    if "model.safetensors" in files:
        parts += ["With torch and safetensors:", _code(WITH_TORCH)]
    if "model.onnx" in files:
        parts += ["With onnxruntime, of which any version since 1.12 will do:", _code(WITH_ONNX)]
    return [*parts, "In this folder:", _code('vectors = load_head(".")(embeddings)\n')]


def _data(facts: Facts) -> list[str]:
    if not facts.sources:
        return ["Not recorded in the checkpoint."]
    rows = [
        (
            each.what,
            escape(each.name),
            _count_of(each.rows),
            _count_of(each.buildings),
            escape(each.key),
        )
        for each in facts.sources
    ]
    parts = [_table(("", "file", "rows", "buildings", "fingerprint"), rows)]
    samples = {
        "sample_fraction": 1.0,
        "sample_buildings": 0,
        "val_sample_fraction": 1.0,
        "val_sample_buildings": 0,
    }
    used = [
        f"{k} = {facts.training[k]}" for k, all_ in samples.items() if facts.training[k] != all_
    ]
    if used:
        parts.append(f"Only a sample of the buildings was used: {escape(', '.join(used))}.")
    return parts


def _training(facts: Facts) -> list[str]:
    rows = [(key, escape(_toml(value))) for key, value in facts.section.model_dump().items()]
    rows += [(key, escape(_toml(facts.training[key]))) for key in _shown(facts.training)]
    about = facts.state or "By another program, which recorded nothing that is read here."
    return [about, _table(("key", "value"), rows)]


def _shown(training: Mapping[str, Any]) -> list[str]:
    """Keys that shape what is learned; where and how fast it ran does not."""
    wanted = (
        "seed", "batch_size", "num_epochs", "learning_rate", "weight_decay", "margin",
        "loss_distance", "init", "negative_sampler", "ucb_reward", "ucb_exploration_constant",
        "ucb_warmup_samples", "ucb_discount", "ucb_floor", "monitor", "early_stopping_patience",
        "precision",
    )  # fmt: skip
    return [key for key in wanted if key in training]


def _provenance_rows(facts: Facts) -> list[tuple[str, str]]:
    start = facts.start
    machine = start.get("machine") or {}
    rows = {
        **facts.origin,
        "checkpoint": f"{facts.checkpoint}, SHA-256 {facts.sha256}",
        "commit of tripletkit": commit(start),
        "started": facts.started,
        "Slurm job": (start.get("slurm") or {}).get("job"),
        "device": ", ".join(gpu["name"] for gpu in machine.get("gpus") or ()) or machine.get("cpu"),
        "trained with": _list_of(start.get("versions") or {}),
        "exported with": _list_of(_versions()),
    }
    return [(key, escape(str(value))) for key, value in rows.items() if value]


def _list_of(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number)


def _versions() -> dict[str, str]:
    found = {"tripletkit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _limits(facts: Facts) -> list[str]:
    shown = [*LIMITS]
    if facts.trained:
        shown.append(VALIDATION_FLATTERS if facts.tested else f"{VALIDATION_FLATTERS} {TEST_FIRST}")
    if facts.trained or facts.tested:
        shown.append(GALLERY)
    return ["\n".join(f"- {limit}" for limit in shown)]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _code(text: str) -> str:
    return f"```python\n{text}```"


def _at(epoch: int | None) -> str:
    return "" if epoch is None else f" after epoch {epoch}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _count_of(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _toml(value: object) -> str:
    return "" if value is None else str(configuration.toml_value(value))


def escape(text: str) -> str:
    """`text` as markdown that shows just that: on one line, nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>#|~$&:@])", r"\\\1", _printable(text))


def quote(text: str) -> str:
    """`text` as a YAML string."""
    plain = _printable(text)
    return '"' + re.sub(r"[^ !#-\[\]-~]", lambda m: f"\\U{ord(m[0]):08x}", plain) + '"'


def _printable(text: str) -> str:
    """Blanks as single spaces, and a mark for what cannot be shown or encoded."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())
    )
