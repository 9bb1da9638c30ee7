"""The training loop. It knows neither Slurm nor Optuna: they come in as two callables."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tripletkit import config as configuration
from tripletkit import fsio, log, provenance
from tripletkit.config import Config
from tripletkit.data.store import Store
from tripletkit.errors import DivergedError, RunError
from tripletkit.log import logger
from tripletkit.paths import RunPaths
from tripletkit.train import collapse, state
from tripletkit.train.assembly import Data, Pieces, assemble
from tripletkit.train.evaluation import better, metric_names
from tripletkit.train.group import ALONE, Group
from tripletkit.train.state import Progress
from tripletkit.train.step import LOSS, PULLS, REWARD, VIOLATIONS
from tripletkit.train.trackers import MetricsFile, Tracker, open_trackers

LOSSES = ("train_loss", "val_loss")
# Who only looks whether somebody trains in a folder holds its lock for a moment.
LOOKS, LOOK_SECONDS = 5, 0.1
SHOW_SECONDS = 0.2  # between two moves of the bar
AGREE_EVERY = 16  # steps; so often several processes ask each other whether to stop

Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `raw` and `best_*` are empty without validation data."""

    status: Literal["finished", "stopped"]
    epochs: int
    steps: int  #: of this process
    metrics: Mapping[str, float]
    raw: Mapping[str, float]
    best_metrics: Mapping[str, float]
    best_epoch: int | None


def train(
    config: Config,
    data: Data,
    paths: RunPaths,
    *,
    report: Report | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    group: Group = ALONE,
) -> TrainResult:
    """Train a projection head, or go on where an earlier process stopped.

    `report(epoch, metrics)` is called after every validation, also of the untrained head (epoch
    0), and may raise to end the run. `should_stop()` is asked before every step; when it says yes
    the state goes to checkpoint_last.pt and the result's status is "stopped". Each process of a
    `group` trains on its part of every batch; rank 0 alone writes, and calls `report`.

    The same configuration and data give the same bytes, however often the run is interrupted.
    Raises ConfigError, DataError or RunError.
    """
    with contextlib.ExitStack() as stack:
        if group.leads:
            stack.enter_context(_sole_use(paths))
        found = group.first(state.find(config, paths) if group.leads else None)
        pieces = assemble(config, data, fresh=found is None, group=group)
        progress = state.restore(pieces, *found) if found else Progress()
        if found and found[0].parent.absolute() != paths.checkpoints.absolute():
            state.move_in(progress)
        if not group.leads:
            return _Run(pieces, progress, paths, data.train).go(should_stop)
        if not (progress.finished and paths.config.exists()):  # else nothing comes of this start
            fsio.write_text(paths.config, configuration.dump(config))
            about_data = state.about_data(pieces, data.train, data.val, data.bands)
            trainer = state.about_trainer(pieces, progress, paths, found[0] if found else None)
            stack.enter_context(provenance.recorded(paths, config, about_data, trainer))
        file = stack.enter_context(MetricsFile(paths.metrics, progress.metrics_bytes))
        settings = configuration.describe(config)
        trackers = stack.enter_context(open_trackers(config.logging, paths, settings))
        run = _Run(pieces, progress, paths, data.train, file, trackers, report)
        return run.go(should_stop)


@contextlib.contextmanager
def _sole_use(paths: RunPaths) -> Iterator[None]:
    """Hold the run's folder, and clear away what a killed process left half-written."""
    with contextlib.ExitStack() as stack:
        for _ in range(LOOKS):
            lock = stack.enter_context(fsio.exclusive_lock(paths.lock, wait=False))
            if lock.ours:
                break
            time.sleep(LOOK_SECONDS)
        else:
            raise RunError(
                f"another process is training in {paths.root}",
                hint="wait for it, or give this run its own paths.checkpoint_dir",
            )
        if lock.sure:
            fsio.remove_leftovers(paths.checkpoints, ".checkpoint_*.pt.*.tmp")
            for file in (paths.config, paths.provenance, paths.origin, paths.root / "code_*.diff"):
                fsio.remove_leftovers(paths.root, f".{file.name}.*.tmp")
        yield


class _Run:
    """One process's share of a run: `go` is the loop, the rest are its parts."""

    def __init__(
        self,
        pieces: Pieces,
        progress: Progress,
        paths: RunPaths,
        store: Store,
        file: MetricsFile | None = None,
        trackers: Sequence[Tracker] = (),
        report: Report | None = None,
    ) -> None:
        self.pieces = pieces
        self.section = pieces.config.training
        self.log_every = pieces.config.logging.log_every_n_batches
        self.progress = progress
        self.paths = paths
        self.store = store
        self.file = file
        self.trackers = trackers
        self.report = report
        self.group = pieces.learner.group
        self.collapsed = False  # and that was said
        self.saved_at = time.monotonic()
        self.began_at = progress.global_step

    def go(self, should_stop: Callable[[], bool]) -> TrainResult:
        """Train until the last epoch, early stopping, or a request to stop."""
        progress = self.progress
        if progress.finished:
            logger.info("nothing left to train: the run ended after %d epochs", progress.epoch)
        if not progress.evaluated_start:
            self._evaluate_start()
        while not progress.early_stopped and progress.epoch < self.section.num_epochs:
            if not self._train_epoch(should_stop):
                return self._result("stopped")
            self._end_epoch()
        if not progress.finished:
            progress.finished = True
            self._save(self.paths.final)
            if self.group.leads:
                self.paths.last.unlink(missing_ok=True)
        self._conclude()
        return self._result("finished")

    def _evaluate_start(self) -> None:
        """Epoch 0: the raw embeddings and the untrained head, which may turn out the best."""
        progress = self.progress
        progress.evaluated_start = True
        record: dict[str, Any] = {"epoch": progress.epoch, "step": progress.global_step}
        if self.pieces.evaluation is not None:
            progress.raw = self.pieces.evaluation.raw()
            record["raw"] = progress.raw
            logger.info("raw embeddings: %s", _shown(progress.raw))
            record |= self._validate()
        self._write(record)
        if self.pieces.evaluation is not None:
            self._save(self.paths.best)
            raw = {f"raw/{name}": value for name, value in progress.raw.items()}
            self._tell({**progress.metrics, **raw}, validated=True)

    def _train_epoch(self, should_stop: Callable[[], bool]) -> bool:
        """Run the rest of the current epoch; False if asked to stop, with the state saved."""
        progress, section, step = self.progress, self.section, self.pieces.step
        anchors, epoch = self.pieces.anchors, progress.epoch + 1
        label = f"epoch {epoch}/{section.num_epochs}"
        step.begin(self.pieces.config.global_.seed, epoch, progress.place)
        clock = shown_at = time.monotonic()
        since, text = progress.place, label
        with log.progress(anchors, label) as update:
            while step.place < anchors:
                if self._agreed(should_stop, first=step.place == since):
                    self._save(self.paths.last)
                    logger.info("asked to stop: saved %s, anchor %d", label, step.place)
                    return False
                step()
                progress.place = step.place
                progress.global_step += 1
                if progress.global_step % self.log_every == 0:
                    rate = (step.place - since) / (time.monotonic() - clock)
                    text = f"{label} loss {self._train_loss():.4f} {rate:,.0f} triplets/s"
                    update(step.place, text)
                    left = (anchors - step.place) / rate
                    if not log.err.is_terminal:
                        logger.info("%s %d/%d, %.0f s left", text, step.place, anchors, left)
                elif (now := time.monotonic()) - shown_at > SHOW_SECONDS:
                    shown_at = now
                    update(step.place, text)  # the loss would wait for the device
                if time.monotonic() - self.saved_at > 60 * section.checkpoint_every_minutes:
                    self._save(self.paths.last)
        return True

    def _agreed(self, should_stop: Callable[[], bool], *, first: bool) -> bool:
        """Whether any process of the group was asked to stop; they all hear of it at once.

        They ask at the `first` step of an epoch, since a validation may be behind them, and then
        every few steps.
        """
        if self.group.size == 1:
            return should_stop()
        asks = first or self.progress.global_step % AGREE_EVERY == 0
        return asks and self.group.any(should_stop())

    def _end_epoch(self) -> None:
        """Validate, decide what is best and whether to go on, and write it all down."""
        section, progress, tally = self.section, self.progress, self.pieces.learner.tally
        progress.train_loss = self._train_loss()
        self._check_numbers()
        progress.epoch += 1
        progress.place = 0
        record: dict[str, Any] = {
            "epoch": progress.epoch,
            "step": progress.global_step,
            "train_loss": progress.train_loss,
        }
        validate = self.pieces.evaluation is not None and (
            progress.epoch % section.validate_every_n_epochs == 0
            or progress.epoch == section.num_epochs
        )
        if validate:
            record |= self._validate()
        if not self.collapsed:
            self._look_for_collapse(tally.sum(0).tolist())
        record["bands"] = bands = _band_statistics(tally.tolist())
        tally.zero_()
        self._write(record)

        names = [self.paths.best] if progress.best_epoch == progress.epoch else []
        if progress.epoch % section.save_every_n_epochs == 0:
            names.append(self.paths.epoch(progress.epoch))
        if names:
            self._save(*names)
        metrics = {f"band_{n}/{i}": x for n, xs in bands.items() for i, x in enumerate(xs) if x}
        metrics["train_loss"] = progress.train_loss
        self._tell({**metrics, **(progress.metrics if validate else {})}, validated=validate)

    def _look_for_collapse(self, tally: list[float]) -> None:
        """By the newest validation, or without any by the losses of the epoch; said once."""
        spread = self.progress.metrics.get(collapse.SPREAD)
        if self.pieces.evaluation is None:
            pulls, _, loss, violations = tally
            self.collapsed = collapse.by_losses(pulls, loss, violations, self.section.margin)
            sign = "every triplet has the margin as its loss"
        else:
            self.collapsed = self._is_lost()
            sign = f"the cosine of two of them is {1 - (spread or 0.0):.5f} on average"
        if self.collapsed:
            collapse.warn(sign)

    def _is_lost(self) -> bool:
        """Whether the head had collapsed at the newest validation."""
        return collapse.by_spread(self.progress.metrics, self.progress.raw)

    def _validate(self) -> dict[str, float]:
        """Evaluate the head and update what is best; returns the metrics."""
        assert self.pieces.evaluation is not None
        progress, monitor = self.progress, self.section.monitor
        metrics = progress.metrics = self.pieces.evaluation.of(self.pieces.learner.head)
        # The loss of a collapsed head may be small: it is the margin.
        lost = self._is_lost()
        if not lost and better("val_loss", metrics["val_loss"], progress.best_val_loss):
            progress.best_val_loss = metrics["val_loss"]
            progress.best_val_epoch = progress.epoch
        if not lost and better(monitor, metrics[monitor], progress.best_value):
            progress.best_value = metrics[monitor]
            progress.best_epoch = progress.epoch
            progress.best_metrics = metrics
            progress.waited = 0
        else:
            progress.waited += 1
        progress.early_stopped = 0 < self.section.early_stopping_patience <= progress.waited
        return metrics

    def _tell(self, metrics: Mapping[str, float], *, validated: bool) -> None:
        """Log how the epoch went, and hand its metrics to the trackers and the caller."""
        progress = self.progress
        shown = [f"{name} {metrics[name]:.4f}" for name in LOSSES if name in metrics]
        if validated:
            shown.append(_shown(progress.metrics))
        logger.info("epoch %d/%d %s", progress.epoch, self.section.num_epochs, " ".join(shown))
        for track in self.trackers:
            track(progress.epoch, metrics)
        if validated and self.report is not None and not self._is_lost():
            self.report(progress.epoch, progress.metrics)

    def _train_loss(self) -> float:
        """Mean loss of the epoch so far. Waits for the device. Raises DivergedError."""
        tally = self.pieces.learner.tally.sum(0)
        loss = float(tally[LOSS] / tally[PULLS])
        if not math.isfinite(loss):
            where, hint = self.pieces.step.watch.told(self.store, self.began_at)
            raise self._diverged(f"the training loss became {loss}", where, hint)
        return loss

    def _check_numbers(self) -> None:
        """A loss is computed before its step: the last one of an epoch shows in no loss of it."""
        if not self.pieces.learner.is_sound():
            raise self._diverged("a weight, or a moment of one, is no number any more")

    def _diverged(self, what: str, where: str = "", hint: str | None = None) -> DivergedError:
        saved = sorted(self.paths.saved(), key=lambda path: path.stat().st_mtime)
        last = (
            f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        )
        hint = hint or 'lower training.learning_rate or set training.precision = "fp32"'
        return DivergedError(
            f"{what} in epoch {self.progress.epoch + 1}, "
            f"{where or f'at or before step {self.progress.global_step}'}",
            hint=f"{hint}; {last}",
        )

    def _write(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        if self.file is not None:
            self.progress.metrics_bytes = self.file.append(record)

    def _save(self, *names: Path) -> None:
        if self.progress.place:
            self._train_loss()  # never save a head that has gone wrong
        self._check_numbers()
        if self.group.leads:
            state.save(self.pieces, self.progress, *names)
        self.saved_at = time.monotonic()

    def _conclude(self) -> None:
        """Say what the best is, also when that is the start."""
        progress, monitor = self.progress, self.section.monitor
        if progress.early_stopped:
            logger.info("stopped early after %d epochs", progress.epoch)
        if progress.best_epoch is not None:
            logger.info("best %s %.4f, epoch %d", monitor, progress.best_value, progress.best_epoch)
        raw = progress.raw.get(monitor)
        if raw is not None and better(monitor, raw, progress.best_value):
            logger.warning(
                "the raw embeddings are better in %s (%.4f): raise training_model.output_dim, or "
                "use them as they are",
                monitor,
                raw,
            )
        if progress.best_epoch == 0 and progress.epoch > 0:
            logger.warning(
                "no epoch beat the untrained head in %s: checkpoint_best.pt is the start", monitor
            )

    def _result(self, status: Literal["finished", "stopped"]) -> TrainResult:
        progress = self.progress
        return TrainResult(
            status=status,
            epochs=progress.epoch,
            steps=progress.global_step - self.began_at,
            metrics=progress.metrics,
            raw=progress.raw,
            best_metrics=progress.best_metrics,
            best_epoch=progress.best_epoch,
        )


def _band_statistics(tally: list[list[float]]) -> dict[str, list[float | None]]:
    """Per arm, the random one last: its share of the epoch, and means over its pulls."""
    total = sum(row[PULLS] for row in tally)

    def mean(column: int) -> list[float | None]:
        return [row[column] / row[PULLS] if row[PULLS] else None for row in tally]

    return {
        "share": [row[PULLS] / total for row in tally],
        "reward": mean(REWARD),
        "loss": mean(LOSS),
        "violation_rate": mean(VIOLATIONS),
    }


def _shown(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name} {metrics[name]:.4f}" for name in metric_names(metrics))
