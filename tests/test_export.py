"""A trained head as files for other programs: the same function, whole or absent, with its story."""

import copy
import hashlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors import safe_open

from tests import fleet, toy
from tripletkit import cli, fsio, inputs, provenance, stages
from tripletkit import config as configuration
from tripletkit.apply import card, export, facts
from tripletkit.config import Config, TrainingModel
from tripletkit.data.store import open_store
from tripletkit.errors import ConfigError, DataError, Interrupted, RunError
from tripletkit.paths import RunPaths, StudyPaths, run_paths
from tripletkit.train.head import Head

PAGE = Path(__file__).parent.parent / "docs/how-to/use-elsewhere.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
# By what they need, and how to tell.
SNIPPETS = {
    name: next(block for block in BLOCKS if sign in block)
    for name, sign in (
        ("numpy", "from safetensors.numpy"), ("onnxruntime", "import onnxruntime"),
        ("torch", "from safetensors.torch"),
    )
}  # fmt: skip


def load(snippet: str, folder: Path):
    names: dict = {}
    exec(SNIPPETS[snippet], names)
    return names["load_head"](folder)


def configured(folder: Path, **model) -> Config:
    start = {} if model.get("use_residual", True) else {"training": {"init": "random"}}
    return configuration.with_values(
        Config(), global_={"scratch_dir": folder}, training_model=model, **start
    )


def random_head(section: TrainingModel, dim: int, seed: int = 0) -> Head:
    """As after a long training: no weight, also no norm, is what it starts as."""
    torch.manual_seed(seed)
    head = Head(section, dim).eval()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def of_another_trainer(head: Head, folder: Path, **more) -> Path:
    """A checkpoint that holds nothing but weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": head.state_dict(), **more}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def project(head: Head, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return head(torch.from_numpy(rows)).numpy()


def run_onnx(model: bytes, rows: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["projection"], {"embedding": rows})[0]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- the same function -----------------------------------------------------------------------


def test_the_page_has_the_snippets_of_the_card():
    assert SNIPPETS["torch"] == card.WITH_TORCH
    assert SNIPPETS["onnxruntime"] == card.WITH_ONNX


def plain(**changes) -> TrainingModel:
    return TrainingModel(**{"hidden_dim": 20, "output_dim": 6, **changes})


heads = st.builds(
    TrainingModel,
    hidden_dim=st.integers(8, 24),
    num_hidden_layers=st.integers(1, 3),
    hidden_dim_multiplier=st.sampled_from([0.5, 1.0, 1.7]),
    activation=st.sampled_from(["gelu", "silu", "relu"]),
    output_dim=st.integers(4, 9),  # a LayerNorm of two numbers is steep: less exact in float32
    use_residual=st.booleans(),
    use_layer_norm=st.booleans(),
)


@settings(max_examples=15, deadline=None)
@given(heads, st.integers(1, 12), st.lists(st.integers(1, 70), min_size=1, max_size=3))
@example(plain(activation="gelu"), 5, [1])
@example(plain(activation="silu", use_layer_norm=False), 5, [1, 300])
@example(plain(activation="relu", use_residual=False), 5, [2])
@example(plain(num_hidden_layers=2, use_residual=False, use_layer_norm=False), 5, [3])
@example(plain(num_hidden_layers=3, hidden_dim_multiplier=0.5, activation="silu"), 1, [64])
def test_every_file_is_the_same_function_as_the_head(tmp_path_factory, section, dim, sizes):
    folder = tmp_path_factory.mktemp("head")
    head = random_head(section, dim)
    checkpoint = of_another_trainer(head, folder / "run")
    config = configured(folder, **section.model_dump(exclude={"input_dim"}))
    export.export(config, folder / "exported", checkpoint=checkpoint)
    for snippet in SNIPPETS:
        load_again = load(snippet, folder / "exported")
        for size in sizes:
            rows = np.random.default_rng(size).normal(size=(size, dim)).astype(np.float32)
            np.testing.assert_allclose(load_again(rows), project(head, rows), rtol=0, atol=1e-5)


def test_a_vector_of_no_length_stays_one_without_nan(tmp_path):
    section = plain(use_layer_norm=False, use_residual=False)
    head = Head(section, 5).eval()
    with torch.no_grad():
        head.output_layer.weight.zero_()
        head.output_layer.bias.zero_()
    config = configured(tmp_path, **section.model_dump(exclude={"input_dim"}))
    export.export(config, tmp_path / "out", checkpoint=of_another_trainer(head, tmp_path))
    for snippet in SNIPPETS:
        assert (np.asarray(load(snippet, tmp_path / "out")(np.ones((2, 5), np.float32))) == 0).all()


def test_half_precision_rows_are_taken(tmp_path):
    head = random_head(plain(), 5)
    config = configured(tmp_path, hidden_dim=20, output_dim=6)
    export.export(config, tmp_path / "out", checkpoint=of_another_trainer(head, tmp_path))
    rows = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float16)
    for snippet in SNIPPETS:
        again = load(snippet, tmp_path / "out")(rows)
        np.testing.assert_allclose(again, project(head, rows.astype(np.float32)), atol=1e-5)


def test_the_snippets_need_no_tripletkit_and_two_of_them_no_torch(tmp_path):
    head = random_head(plain(), 5)
    config = configured(tmp_path, hidden_dim=20, output_dim=6)
    export.export(config, tmp_path / "fonts-head", checkpoint=of_another_trainer(head, tmp_path))
    rows = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    use = next(block for block in BLOCKS if block.startswith("vectors = "))
    code = "import sys\nimport numpy as np\nembeddings = np.load('rows.npy')\n"
    code += "sys.modules |= {'tripletkit': None, 'torch': None}\n"
    for snippet, text in SNIPPETS.items():
        code += "del sys.modules['torch']\n" if snippet == "torch" else ""
        code += f"{text}\n{use}np.save('{snippet}.npy', np.asarray(vectors))\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for snippet in SNIPPETS:
        again = np.load(tmp_path / f"{snippet}.npy")
        np.testing.assert_allclose(again, project(head, rows), rtol=0, atol=1e-5)


def test_the_onnx_file_says_what_it_is(tmp_path):
    section = plain(num_hidden_layers=2)
    head = random_head(section, 5)
    config = configured(tmp_path, hidden_dim=20, output_dim=6, num_hidden_layers=2)
    export.export(config, tmp_path / "out", checkpoint=of_another_trainer(head, tmp_path, epoch=7))
    model = onnx.load(tmp_path / "out/model.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    ((given_,), (made,)) = model.graph.input, model.graph.output
    for value, name, width in ((given_, "embedding", 5), (made, "projection", 6)):
        tensor = value.type.tensor_type
        assert value.name == name
        assert tensor.elem_type == onnx.TensorProto.FLOAT
        assert [d.dim_param or d.dim_value for d in tensor.shape.dim] == ["batch", width]
    weights = {each.name for each in model.graph.initializer}
    assert weights - {"half", "one", "sqrt_half", "norm_floor"} == set(head.state_dict())
    assert not any(onnx.external_data_helper.uses_external_data(w) for w in model.graph.initializer)
    notes = {each.key: each.value for each in model.metadata_props}
    assert notes["epoch"] == "7"
    assert notes["checkpoint"] == "checkpoint.pt"
    assert re.fullmatch("[0-9a-f]{64}", notes["checkpoint_sha256"])


def test_safetensors_hold_the_weights_as_they_are_and_equal_exports_are_equal(tmp_path):
    head = random_head(plain(), 5)
    config = configured(tmp_path, hidden_dim=20, output_dim=6)
    checkpoint = of_another_trainer(head, tmp_path)
    for name in ("a/head", "b/head"):
        export.export(config, tmp_path / name, checkpoint=checkpoint)
    assert everything_in(tmp_path / "a") == everything_in(tmp_path / "b")
    with safe_open(tmp_path / "a/head/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(head.state_dict())
        assert all(torch.equal(file.get_tensor(k), v) for k, v in head.state_dict().items())


def test_an_onnx_file_that_is_another_function_is_never_left(tmp_path, monkeypatch):
    head = random_head(plain(use_layer_norm=False), 5)
    config = configured(tmp_path, hidden_dim=20, output_dim=6, use_layer_norm=False)
    monkeypatch.setitem(export.CONSTANTS, "sqrt_half", 0.7)  # a gelu that is none
    with pytest.raises(RunError, match="do not agree on the exported head") as caught:
        export.export(config, tmp_path / "out", checkpoint=of_another_trainer(head, tmp_path))
    assert "--format safetensors" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_means_far_from_zero_are_no_reason_to_refuse(tmp_path, caplog):
    """float32 itself is less exact on them, in torch as in onnxruntime."""
    head = random_head(plain(), 512)
    far = torch.zeros(512)
    far[:8] = 4000
    with torch.no_grad():
        for layer in (head.input_layer, head.residual_proj):
            layer.bias.copy_(-(layer.weight.double() @ far.double()).float())
    rows = (far + torch.randn(256, 512)).numpy()
    table = toy.table(buildings=64, dim=512).set_column(2, "embedding", toy.as_lists(rows, "fixed"))
    pq.write_table(table, tmp_path / "val.parquet")
    config = configuration.with_values(
        configured(tmp_path, hidden_dim=20, output_dim=6),
        paths={"val_parquet_path": tmp_path / "val.parquet"},
    )
    export.export(config, tmp_path / "out", checkpoint=of_another_trainer(head, tmp_path))
    assert "compared with torch on 256 rows" in caplog.text
    assert "in float32 the numbers of this head are exact to" in caplog.text
    exact = project(copy.deepcopy(head).double(), rows.astype(np.float64))
    ours = np.abs(project(head, rows) - exact).max()
    assert ours > 1e-5  # else this test shows nothing
    assert np.abs(load("onnxruntime", tmp_path / "out")(rows) - exact).max() < 16 * ours


def test_a_layer_norm_of_two_numbers_is_no_reason_to_refuse():
    rows = np.random.default_rng(0).standard_normal((256, 11), np.float32)
    past = 0
    for seed in range(20):
        section = plain(output_dim=2)
        head = random_head(section, 11, seed)
        model = export.onnx_model(head, section, {})
        export.check_onnx(model, head, rows)
        exact = project(copy.deepcopy(head).double(), rows.astype(np.float64))
        past += np.abs(run_onnx(model, rows) - exact).max() > 1e-5
    assert past  # else this test shows nothing


def test_rows_of_the_configured_data_are_compared_where_there_are_any(tmp_path, caplog):
    head = random_head(plain(), 8)
    checkpoint = of_another_trainer(head, tmp_path)
    toy.write_parquet(tmp_path / "train.parquet", dim=8)
    toy.write_parquet(tmp_path / "val.parquet", dim=9)  # of another model
    paths = {"train_parquet_path": tmp_path / "train.parquet",
             "val_parquet_path": tmp_path / "val.parquet"}  # fmt: skip
    config = configuration.with_values(
        configured(tmp_path, hidden_dim=20, output_dim=6), paths=paths
    )
    export.export(config, tmp_path / "with", checkpoint=checkpoint)
    assert f"compared with torch on 80 rows of {tmp_path / 'train.parquet'}" in caplog.text
    (tmp_path / "train.parquet").unlink()
    export.export(config, tmp_path / "without", checkpoint=checkpoint)
    assert "compared with torch on random rows" in caplog.text
    assert not (tmp_path / "cache").exists()  # a look at the data builds no copy of it


# --- what it takes ---------------------------------------------------------------------------


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path):
    checkpoint = of_another_trainer(random_head(plain(), 5), tmp_path)
    config = configured(tmp_path, hidden_dim=21, output_dim=6)
    with pytest.raises(DataError, match=r"output_layer.weight: \[6, 20\] in the checkpoint"):
        export.export(config, tmp_path / "out", checkpoint=checkpoint)
    assert not (tmp_path / "out").exists()


def test_a_head_for_other_embeddings_is_refused_by_width(tmp_path):
    checkpoint = of_another_trainer(random_head(plain(), 5), tmp_path, epoch=3)
    config = configured(tmp_path, hidden_dim=20, output_dim=6)
    head, epoch = inputs.load_head(config, checkpoint, 5)
    assert (head.training, epoch) == (False, 3)
    with pytest.raises(DataError, match="takes vectors of 5 numbers, not 6"):
        inputs.load_head(config, checkpoint, 6)


@pytest.mark.parametrize("crafted", ["configuration", "weights"])
def test_no_memory_is_taken_for_a_head_that_a_file_only_tells_of(tmp_path, crafted):
    told = {"hidden_dim": 2**24, "num_hidden_layers": 1000, "output_dim": 6}
    weights = random_head(plain(), 5).state_dict()
    if crafted == "weights":  # of a number each
        with torch.device("meta"):
            shapes = Head(TrainingModel(**told), 5).state_dict()
        weights = {k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}
    path = tmp_path / "checkpoint.pt"
    torch.save({"model_state_dict": weights}, path)
    with pytest.raises(DataError, match="does not fit the configured head"):
        inputs.load_head(configured(tmp_path, **told), path, 5)


def test_a_head_that_went_wrong_is_refused(tmp_path):
    head = random_head(plain(), 5)
    with torch.no_grad():
        head.output_layer.bias[0] = float("nan")
    config = configured(tmp_path, hidden_dim=20, output_dim=6)
    with pytest.raises(DataError, match="weights that are NaN or infinite"):
        export.export(config, tmp_path / "out", checkpoint=of_another_trainer(head, tmp_path))


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, missing):
    checkpoint = of_another_trainer(random_head(plain(), 5), tmp_path)
    config = configured(tmp_path, hidden_dim=20, output_dim=6)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match="--format onnx needs onnx and onnxruntime") as caught:
        export.export(config, tmp_path / "out", checkpoint=checkpoint)
    assert caught.value.hint == "pip install 'tripletkit[export]'"
    written = export.export(
        config, tmp_path / "out", checkpoint=checkpoint, formats=["safetensors"]
    )
    assert [p.name for p in written] == ["model.safetensors", "README.md", "config.json"]


# --- the folder ------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> tuple[Config, Path]:
    """A configuration, and a checkpoint that fits it."""
    checkpoint = of_another_trainer(random_head(plain(), 5), tmp_path / "run")
    return configured(tmp_path, hidden_dim=20, output_dim=6), checkpoint


def test_an_existing_folder_is_only_replaced_when_asked(small, tmp_path):
    config, checkpoint = small
    out = tmp_path / "deep/er/out"
    export.export(config, out, checkpoint=checkpoint)
    first = everything_in(out)
    other = of_another_trainer(random_head(plain(), 5, seed=1), tmp_path / "other")
    with pytest.raises(ConfigError, match="out exists") as caught:
        export.export(config, out, checkpoint=other)
    assert "--force" in caught.value.hint
    assert everything_in(out) == first
    export.export(config, out, checkpoint=other, force=True)
    second = everything_in(out)
    assert second.keys() == first.keys()
    assert all(second[name] != first[name] for name in first)
    assert list(out.parent.iterdir()) == [out]


def test_what_is_not_of_an_export_survives_force(small, tmp_path):
    config, checkpoint = small
    out = tmp_path / "clone"
    (out / ".git").mkdir(parents=True)
    (out / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (out / "notes.txt").write_text("mine")
    export.export(config, out, checkpoint=checkpoint, force=True)
    assert len(everything_in(out)) == 6
    export.export(config, out, checkpoint=checkpoint, formats=["safetensors"], force=True)
    assert (out / ".git/HEAD").read_text() == "ref: refs/heads/main\n"
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "model.onnx").exists()  # it would be that of the head before


# Exports over what is there, and dies when one file is in place.
DIES = """
import os, signal, sys
from pathlib import Path
from tripletkit import config
from tripletkit.apply import export

out, left = Path("out").resolve(), [1]

def dying(move):
    def moved(self, target):
        if self.parent != out:  # the mark is written within the folder
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return move(self, target)
    return moved

Path.replace = dying(Path.replace)
export.export(
    config.load(Path("config.toml"), environ={}), out, checkpoint=Path(sys.argv[1]), force=True
)
"""


def test_after_a_kill_force_makes_it_whole(small, tmp_path):
    config, checkpoint = small
    out = tmp_path / "out"
    export.export(config, out, checkpoint=checkpoint)
    fsio.write_text(tmp_path / "config.toml", configuration.dump(config))
    died = subprocess.run([sys.executable, "-c", DIES, str(checkpoint)], cwd=tmp_path)
    assert died.returncode == -signal.SIGKILL
    assert json.loads((out / "config.json").read_text())["incomplete"]
    with pytest.raises(KeyError):  # nobody builds a head of it
        load("numpy", out)
    export.export(config, out, checkpoint=checkpoint, force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "out", "config.toml"}
    names = {"README.md", "config.json", "model.onnx", "model.safetensors"}
    assert everything_in(out).keys() == names
    assert "incomplete" not in json.loads((out / "config.json").read_text())


def test_only_what_exports_into_this_folder_left_is_cleared(small, tmp_path):
    config, checkpoint = small
    others = [".out.7.8.tmp", ".outer.7.tmp", ".out.json.7.tmp", ".out.tmp", "out.7.tmp"]
    for name in [*others, ".out.7.tmp"]:
        (tmp_path / name).mkdir()
    export.export(config, tmp_path / "out", checkpoint=checkpoint)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "out", *others}


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.onnx"])
def test_a_file_of_somebody_else_is_not_replaced(small, tmp_path, name):
    config, checkpoint = small
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / name).write_text('{"hello": "world"}')
    before = everything_in(tmp_path)
    with pytest.raises(ConfigError, match=f"holds a {name}.*--force would destroy it"):
        export.export(config, tmp_path / "project", checkpoint=checkpoint, force=True)
    assert everything_in(tmp_path) == before


def test_a_file_in_the_place_of_the_folder(small, tmp_path):
    config, checkpoint = small
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out is a file"):
        export.export(config, tmp_path / "out", checkpoint=checkpoint, force=True)


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_what_was_there(small, tmp_path, before):
    config, checkpoint = small
    if before:
        export.export(config, tmp_path / "out", checkpoint=checkpoint)
    there = everything_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError, match="out cannot be written: File too large"):
            export.export(config, tmp_path / "out", checkpoint=checkpoint, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything_in(tmp_path) == there
    assert {p.name for p in tmp_path.iterdir()} == {"run", *(["out"] if before else [])}


# --- the card --------------------------------------------------------------------------------


def training_config(folder: Path, **training) -> Config:
    toy.write_parquet(folder / "train.parquet", buildings=30, dim=8)
    toy.write_parquet(folder / "val.parquet", buildings=12, first=100, dim=8)
    values = {
        "num_epochs": 3, "batch_size": 16, "monitor": "map@r", "retrieval_metric_top_k": [1, 5],
        "device": "cpu", **training,
    }  # fmt: skip
    return configuration.with_values(
        Config(),
        global_={"scratch_dir": folder, "log_dir": folder / "logs"},
        paths={
            "train_parquet_path": folder / "train.parquet",
            "val_parquet_path": folder / "val.parquet",
        },
        training=values,
        training_model={"hidden_dim": 16, "output_dim": 6},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Config:
    """A finished run on small data; copy it before changing it."""
    config = training_config(tmp_path_factory.mktemp("finished"))
    stages.train(config, lambda: False)
    return config


def read_card(folder: Path) -> tuple[dict, str]:
    """The metadata and the text of the card."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def cells(text: str) -> dict[str, list[str]]:
    """The rows of all tables as a markdown reader shows them, by their first cell."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found: dict[str, list[str]] = {}
    row: list[str] = []
    for token in tokens:
        if token.type == "tr_open":
            row = []
        elif token.type == "tr_close":
            found[row[0]] = row[1:]
        elif token.type == "inline":
            row.append("".join(child.content for child in token.children))
    return found


def shown_in(text: str) -> list[str]:
    """The paragraphs and cells as a markdown reader shows them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [
        "".join(child.content for child in token.children)
        for token in tokens
        if token.type == "inline"
    ]


def test_the_card_tells_the_story_of_the_run(finished, tmp_path):
    paths = run_paths(finished.checkpoint_dir)
    export.export(finished, tmp_path / "my_head")
    meta, text = read_card(tmp_path / "my_head")
    table = cells(text)

    records = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    best = max(records, key=lambda record: record["map@r"])
    for name in ("recall@1", "recall@5", "map@r", "mrr", "r_precision"):
        assert table[name] == [f"{records[0]['raw'][name]:.4f}", f"{best[name]:.4f}"]
    assert (
        f"The run is finished: 3 epochs. These are the weights after epoch {best['epoch']}," in text
    )

    for what, split, rows, buildings in (
        ("training", "train", "120", "30"), ("validation", "val", "48", "12")
    ):  # fmt: skip
        store = open_store(getattr(finished.paths, f"{split}_parquet_path"), finished.cache_dir)
        assert table[what] == [f"{split}.parquet", rows, buildings, store.fingerprint]
    assert table["learning_rate"] == ["0.0001"]
    assert table["activation"] == ['"gelu"']
    assert table["input_dim"] == ["8"]
    assert table["run"] == ["checkpoints"]
    torch_version = metadata.version("torch")  # of files for a GPU, torch.__version__ says more
    assert f"torch {torch_version}" in table["exported with"][0]
    assert f"torch {torch_version}" in table["trained with"][0]
    (start,) = provenance.read(paths.root)["starts"]
    assert table["device"] == [visible(start["machine"]["cpu"])]
    assert table["started"] == [start["started"]]
    code = start["code"]["tripletkit"] or {}  # none outside a repository
    assert table.get("commit of tripletkit", [""])[0].startswith(code.get("commit", ""))
    assert card.WITH_TORCH in text
    assert card.WITH_ONNX in text
    assert str(tmp_path.parent) not in text  # names, not paths: cards are published

    assert meta["library_name"] == "tripletkit"
    assert {"safetensors", "onnx", "triplet-loss"} <= set(meta["tags"])
    assert "license" not in meta
    (model,) = meta["model-index"]
    (result,) = model["results"]
    assert model["name"] == "my_head"
    assert result["dataset"] == {"name": "val.parquet", "type": "parquet", "split": "validation"}
    assert result["task"]["type"]
    values = {each["type"]: each["value"] for each in result["metrics"]}
    assert values == {k: pytest.approx(best[k], abs=1e-6) for k in values}
    assert set(values) == {"recall@1", "recall@5", "map@r", "mrr", "r_precision"}


def test_results_on_the_test_split_are_told_if_they_are_of_these_weights(
    finished, tmp_path, caplog
):
    run = run_paths(tmp_path / "run")
    shutil.copytree(finished.checkpoint_dir, run.root)
    toy.write_parquet(tmp_path / "te|st.parquet", buildings=40, first=300, dim=8, noise=0.6)
    config = configuration.with_values(
        finished, paths={"test_parquet_path": tmp_path / "te|st.parquet"}
    )
    paths = [str(run.final), str(run.best)]
    stages.evaluate(config, split="test", checkpoint=paths, resamples=100)
    report = json.loads(run.evaluation("test").report.read_text())
    raw, _, best = report["columns"]

    export.export(finished, tmp_path / "out", checkpoint=run.best, formats=["safetensors"])
    meta, text = read_card(tmp_path / "out")
    tested, validated = text.split("among the validation data")
    table = cells(tested)
    for name, (low, high) in best["intervals"].items():
        assert table[name] == [
            f"{raw['metrics'][name]:.4f}", f"{best['metrics'][name]:.4f}",
            f"{low:.4f} to {high:.4f}",
        ]  # fmt: skip
    assert table["metric"] == ["raw embeddings", "this head", "95% interval"]
    assert "160 queries of 40 buildings in a gallery of 160 images" in tested
    assert "te\\|st.parquet" in tested
    assert report["data"]["fingerprint"] in tested
    assert str(tmp_path) not in text
    assert "evaluate --split test" not in text
    assert "map@r" in cells(validated)
    test, validation = meta["model-index"][0]["results"]
    assert test["dataset"] == {"name": "te|st.parquet", "type": "parquet", "split": "test"}
    assert validation["dataset"]["split"] == "validation"
    values = {each["type"]: each["value"] for each in test["metrics"]}
    assert values == {k: pytest.approx(best["metrics"][k], abs=1e-6) for k in best["intervals"]}

    def told(**changes) -> bool:
        fsio.write_json(run.evaluation("test").report, {**report, **changes})
        export.export(
            finished, tmp_path / "out", checkpoint=run.best, formats=["safetensors"], force=True
        )
        return "test data" in (tmp_path / "out/README.md").read_text()

    assert told()
    assert not told(columns=[raw, {**best, "sha256": "0" * 64}])
    assert "is not used" not in caplog.text
    assert not told(columns=[])
    assert "evaluation.json is not used" in caplog.text


def test_a_checkpoint_that_is_replaced_meanwhile(small, tmp_path, monkeypatch):
    config, checkpoint = small
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    load_it = export.checkpoints.load_with_sha256

    def load_and_replace(path):
        found = load_it(path)
        path.write_bytes(b"another")
        return found

    monkeypatch.setattr(export.checkpoints, "load_with_sha256", load_and_replace)
    export.export(config, tmp_path / "out", checkpoint=checkpoint, formats=["safetensors"])
    told = json.loads((tmp_path / "out/config.json").read_text())["provenance"]
    assert told["checkpoint_sha256"] == before


def test_a_final_training_names_the_trial_of_its_parameters(finished, tmp_path):
    run = tmp_path / "best_fonts_00004"
    shutil.copytree(finished.checkpoint_dir, run)
    best = {"source": "study fonts, trial 4", "metric": "map@r", "value": 0.52527}
    fsio.write_json(run_paths(run).origin, best)
    export.export(finished, tmp_path / "out", checkpoint=run / "checkpoint_best.pt")
    table = cells(read_card(tmp_path / "out")[1])
    assert table["run"] == ["best_fonts_00004"]
    assert table["parameters from"] == ["study fonts, trial 4"]
    assert table["value there"] == ["map@r 0.5253"]
    notes = json.loads((tmp_path / "out/config.json").read_text())["provenance"]
    assert notes["parameters from"] == "study fonts, trial 4"


def test_a_run_that_was_interrupted_started_when_it_first_did(finished, tmp_path):
    run = run_paths(tmp_path / "run")
    shutil.copytree(finished.checkpoint_dir, run.root)
    record = json.loads(run.provenance.read_text())
    first = {**record["starts"][0], "started": "2026-01-02T03:04:05Z"}
    fsio.write_json(run.provenance, {**record, "starts": [first, *record["starts"]]})
    export.export(finished, tmp_path / "out", checkpoint=run.best, formats=["safetensors"])
    assert cells(read_card(tmp_path / "out")[1])["started"] == ["2026-01-02T03:04:05Z"]


def test_a_trial_names_its_study(finished, tmp_path):
    study = StudyPaths(tmp_path / "streetview")
    shutil.copytree(finished.checkpoint_dir, study.trial(12).root)
    fsio.write_json(study.identity, {"id": "x"})
    export.export(finished, tmp_path / "out", checkpoint=study.trial(12).best)
    table = cells(read_card(tmp_path / "out")[1])
    assert table["study"] == ["streetview"]
    assert table["trial"] == ["12"]


def test_a_checkpoint_alone_still_knows_its_numbers(finished, tmp_path):
    alone = tmp_path / "alone.pt"
    shutil.copy(run_paths(finished.checkpoint_dir).best, alone)
    export.export(Config(), tmp_path / "out", checkpoint=alone, formats=["safetensors"])
    export.export(finished, tmp_path / "full", formats=["safetensors"])
    there, full = (cells(read_card(tmp_path / name)[1]) for name in ("out", "full"))
    assert there["map@r"] == full["map@r"]
    assert there["training"] == ["", "", "", full["training"][3]]  # the fingerprint is in the file
    assert "run" not in there  # the folder that it happens to be in is none
    assert "How far the run got is not known here." in read_card(tmp_path / "out")[1]


def test_a_line_of_metrics_that_a_kill_tore_does_no_harm(finished, tmp_path):
    run = run_paths(tmp_path / "run")
    shutil.copytree(finished.checkpoint_dir, run.root)
    with run.metrics.open("a") as file:
        file.write('{"epoch": 4, "st')
    export.export(finished, tmp_path / "out", checkpoint=run.best, formats=["safetensors"])
    export.export(finished, tmp_path / "full", formats=["safetensors"])
    there, full = (cells(read_card(tmp_path / name)[1]) for name in ("out", "full"))
    assert there["map@r"] == full["map@r"]


def test_metrics_of_another_trainer_are_shown_as_they_are(tmp_path):
    metrics = {"val_metrics": {"recall@100": 0.75, "note": "best"}}
    head = random_head(plain(), 5)
    checkpoint = of_another_trainer(head, tmp_path, epoch=4, metrics=metrics)
    config = configured(tmp_path, hidden_dim=20, output_dim=6)
    export.export(config, tmp_path / "out", checkpoint=checkpoint)
    meta, text = read_card(tmp_path / "out")
    assert cells(text)["recall@100"] == ["0.7500"]
    assert "among the validation data after epoch 4." in text
    assert "By another program" in text
    assert meta["model-index"][0]["results"][0]["metrics"] == [
        {"type": "recall@100", "value": 0.75}
    ]


def test_a_run_that_was_stopped_within_an_epoch(tmp_path):
    config = training_config(tmp_path, validate_every_n_epochs=1)
    asked = iter([False] * 10 + [True] * 99)  # 8 steps an epoch
    with pytest.raises(Interrupted):
        stages.train(config, lambda: next(asked))
    paths = run_paths(config.checkpoint_dir)
    export.export(config, tmp_path / "best")
    _, text = read_card(tmp_path / "best")
    assert "The run was not finished when this was exported: it is to have 3 epochs." in text
    assert "map@r" in cells(text)
    export.export(config, tmp_path / "last", checkpoint=paths.last)
    meta, text = read_card(tmp_path / "last")
    assert "weights after epoch 1 and a part of the next." in text
    assert "Not recorded for these weights" in text  # those of epoch 1 are of other weights
    assert "model-index" not in meta
    head, epoch = inputs.load_head(config, paths.last)
    rows = np.ones((3, 8), np.float32)
    assert epoch == 1
    np.testing.assert_allclose(
        load("torch", tmp_path / "last")(rows), project(head, rows), atol=1e-5
    )


def test_a_killed_run_is_exported_with_a_word_about_its_epoch(tmp_path):
    config = training_config(tmp_path, num_epochs=100_000)
    file = tmp_path / "config.toml"
    fsio.write_text(file, configuration.dump(config))
    paths = run_paths(config.checkpoint_dir)
    train = subprocess.Popen(
        [fleet.COMMAND, "train", "--config", file],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    said = []
    for line in train.stderr:
        said.append(line)
        if b"epoch 2/" in line:
            break
    train.kill()
    train.communicate()
    assert train.returncode == -signal.SIGKILL, said
    done = subprocess.run(
        [fleet.COMMAND, "export", "out", "--config", file], cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote out: model.safetensors, model.onnx, README.md, config.json\n"
    said = [line.split(" ", 2)[2] for line in done.stderr.splitlines()]
    head, epoch = inputs.load_head(config, paths.best)
    may_be_better = "its run is not over, and a later epoch may be better"
    assert said == [
        f"WARNING {paths.best} is of epoch {epoch} of 100000: {may_be_better}",
        f"INFO ONNX is compared with torch on 48 rows of {tmp_path / 'val.parquet'}",
    ]
    rows = np.ones((3, 8), np.float32)
    for snippet in SNIPPETS:
        again = load(snippet, tmp_path / "out")(rows)
        np.testing.assert_allclose(again, project(head, rows), atol=1e-5)


def test_a_mistake_of_the_user_is_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        return cli.run(lambda: cli.app(["export", *arguments], standalone_mode=False))

    assert run("out", "--format", "onxx") == 2
    assert "--format is 'onxx'" in capsys.readouterr().err
    assert run("out") == 3
    assert "train first, or name one with --checkpoint" in capsys.readouterr().err
    assert run("out", "--checkpoint", "nothing.pt") == 3
    assert "there is no checkpoint nothing.pt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- names that look like markup -------------------------------------------------------------


def visible(text: str) -> str:
    """What is left of a text on one line: blanks are single, and what cannot be shown is marked."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


NASTY = "a|b <img src=x> *c* _d_ [e](f) `g` ~~h~~ &amp; \\ # http://i $j$"
texts = st.text(max_size=40) | st.text("|<>*_[]()`~&;\\#$: a-1.!\n", max_size=20)


@settings(deadline=None)
@given(texts)
@example(NASTY)
@example("name #")
@example("a\ud800b")
def test_no_name_is_markup(text):
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    name = card.escape(text)
    shown = reader.parse(f"# {name}\n\n| a | b |\n| --- | --- |\n| {name} | x |\n")
    inline = [token for token in shown if token.type == "inline"]
    assert len(inline) == 5
    for token in (inline[0], inline[3]):
        assert {child.type for child in token.children} <= {"text", "text_special"}
        assert "".join(child.content for child in token.children) == visible(text)


@given(texts)
@example(NASTY)
@example("a\ud800b: 'c' \"d\" \U0001f600 \x7f é")
def test_every_name_is_a_yaml_string(text):
    assert yaml.safe_load(f"- name: {card.quote(text)}") == [{"name": visible(text)}]


def test_nasty_names_come_through_the_whole_card(finished, tmp_path):
    run = RunPaths(tmp_path / "run", tmp_path / "run")
    shutil.copytree(finished.checkpoint_dir, run.root)
    state = export.checkpoints.load(run.best)
    section = inputs.head_section(finished, state)
    known = facts.gather(finished, run.best, state, "0" * 64, section)
    source = known.sources[1]._replace(name=NASTY, key=NASTY)
    training = {**known.training, "sample_fraction": NASTY, "monitor": NASTY}
    known = replace(
        known, origin={"run": NASTY}, sources=(known.sources[0], source), training=training
    )
    text = card.render(NASTY, known, ["model.onnx"])
    meta = yaml.safe_load(text.split("---\n", 2)[1])
    assert meta["model-index"][0]["name"] == NASTY
    assert meta["model-index"][0]["results"][0]["dataset"]["name"] == NASTY
    table = cells(text.split("---\n", 2)[2])
    assert table["run"] == [NASTY]
    assert table["validation"][::3] == [NASTY, NASTY]
    assert f"sample_fraction = {NASTY}." in " ".join(shown_in(text.split("---\n", 2)[2]))
