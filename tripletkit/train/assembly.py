"""What a run is made of, and how that is built from its configuration and data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tripletkit.config import Config, TrainingModel
from tripletkit.data.bands import Bands
from tripletkit.data.store import Store
from tripletkit.device import choose_device, choose_precision, make_deterministic
from tripletkit.errors import ConfigError
from tripletkit.log import logger
from tripletkit.train import rng
from tripletkit.train.bandit import Bandit
from tripletkit.train.evaluation import Evaluation
from tripletkit.train.group import ALONE, Group
from tripletkit.train.head import Head
from tripletkit.train.init import linear_start
from tripletkit.train.placement import choose_placement
from tripletkit.train.resident import Resident, load, sample_key
from tripletkit.train.step import DeviceStep, HostStep, Learner


@dataclass(frozen=True)
class Data:
    """What a run trains on and validates with; `resident` is what of it is on the device already."""

    train: Store
    bands: Bands | None = None
    val: Store | None = None
    val_bands: Bands | None = None
    resident: Resident | None = None


@dataclass(frozen=True)
class Pieces:
    """The working parts of a run."""

    config: Config
    model_section: TrainingModel  # with the data's input_dim
    fingerprints: dict[str, str]
    bandit: Bandit
    learner: Learner
    step: DeviceStep | HostStep
    evaluation: Evaluation | None

    @property
    def anchors(self) -> int:
        """Anchors per epoch."""
        return len(self.step.index.anchors)


def assemble(config: Config, data: Data, *, fresh: bool, group: Group = ALONE) -> Pieces:
    """Build the working parts; a `fresh` head starts from the data if so configured."""
    section, seed = config.training, config.global_.seed
    device = choose_device(section.device)
    precision = group.first(choose_precision(section.precision, device))
    make_deterministic(device)
    _check_sampler(section.negative_sampler, data.bands)

    input_dim = data.train.embeddings.shape[1]
    model_section = config.training_model.model_copy(update={"input_dim": input_dim})
    torch.manual_seed(rng.key(seed, rng.INIT) % 2**63)
    head = Head(model_section, input_dim)
    if fresh and section.init != "random":
        head.start_linear(
            linear_start(
                data.train,
                section.init,
                model_section.output_dim,
                config.cache_dir,
                seed=seed,
                device=device,
            )
        )
    head.to(device)

    wanted, there = section.placement, data.resident
    if there is not None and not there.serves(wanted, data.train, device, precision):
        there = None
    on_device = there or not group.any(
        choose_placement(wanted, data.train, device, precision) == "host"
    )
    home = device if on_device else torch.device("cpu")
    resident = load(data.train, data.bands, home, precision, there)
    bandit = Bandit(section, resident.index.bands, home)
    learner = Learner(head, section, bandit, precision, group)
    kind = DeviceStep if on_device else HostStep
    step = kind(learner, resident.index, resident.table)
    evaluation = None
    if data.val is not None:
        evaluation = Evaluation(
            data.val,
            data.val_bands,
            section,
            seed=seed,
            device=device,
            precision=precision,
            group=group,
        )
    else:
        logger.info("no validation data: no best epoch, no early stopping")
    return Pieces(
        config=config,
        model_section=model_section,
        fingerprints={
            "training embeddings": resident.sample_key,
            "difficulty bands": data.bands.key if data.bands else "",
            "validation embeddings": sample_key(data.val) if data.val else "",
        },
        bandit=bandit,
        learner=learner,
        step=step,
        evaluation=evaluation,
    )


def _check_sampler(sampler: str, bands: Bands | None) -> None:
    count = bands.count if bands else 0
    if sampler.startswith("fixed:") and int(sampler.removeprefix("fixed:")) >= count:
        there_are = f"the bands are 0 to {count - 1}" if count else "there are no bands"
        raise ConfigError(f"negative_sampler is {sampler!r} but {there_are}")
    if bands is None and sampler in ("ucb", "uniform"):
        logger.warning(
            "no difficulty_metadata_path, so every negative is random; "
            "`tripletkit data bands` builds the bands"
        )
