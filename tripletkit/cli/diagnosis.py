"""`tripletkit why | doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from tripletkit.cli.options import (
    PATIENCE,
    STUDY_FLAGS,
    AsJson,
    ConfigFile,
    Overrides,
    flags,
    load_study,
)
from tripletkit.errors import ClusterError
from tripletkit.log import logger, out

if TYPE_CHECKING:
    from tripletkit.monitor.checks import Finding
    from tripletkit.monitor.site import Setting
    from tripletkit.monitor.why import Why


@flags("tuning", STUDY_FLAGS)
def why(
    target: Annotated[str, typer.Argument(help="A trial, a job, an array, or a run.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say why a trial or a job is as it is, who says so, and what to do about it."""
    from tripletkit.monitor import targets
    from tripletkit.monitor.why import why_jobs, why_trial

    found = targets.resolve(target, load_study(config, overrides), PATIENCE)
    if found.kind == "trial":
        answers = {str(found): why_trial(found.inventory, found.number)}
    else:
        answers = why_jobs(found.inventory, list(found.jobs()))
    if as_json:
        out.print_json(json.dumps({name: _as_dict(answer) for name, answer in answers.items()}))
    elif len(answers) == 1:
        _print_why(*answers.values())
    else:
        for answer in answers.values():
            out.print(f"{answer.diagnosis.kind}: {answer.diagnosis.summary}", soft_wrap=True)


@flags("tuning", STUDY_FLAGS)
def doctor(
    config: ConfigFile = None,
    overrides: Overrides = None,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired here.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check study, queue and folders against each other, and show what matters of the cluster.

    Ends with 1 if something is wrong and was not repaired.
    """
    from tripletkit.monitor.doctor import examine
    from tripletkit.monitor.inventory import Inventory

    inventory = Inventory(load_study(config, overrides), PATIENCE)
    findings = list(examine(inventory, change=fix))
    fixed = [fix and finding.apply is not None and finding.apply() for finding in findings]
    wrong = sum(not (done or each.harmless) for done, each in zip(fixed, findings, strict=True))
    silent = any(each.kind == "queue" for each in findings)
    cluster = ([], []) if silent else _cluster()
    if as_json:
        report = {
            "study": inventory.study_name,
            "healthy": not wrong,
            "findings": [
                {**each._asdict(), "apply": each.apply is not None, "fixed": done}
                for done, each in zip(fixed, findings, strict=True)
            ],
            "cluster": [each._asdict() for each in cluster[0]],
            "partitions": [each._asdict() for each in cluster[1]],
        }
        out.print_json(json.dumps(report))
    else:
        _print_findings(inventory.study_name, findings, fixed)
        _print_settings("cluster", cluster[0])
        _print_settings("partitions", cluster[1])
    raise typer.Exit(1 if wrong else 0)


def _cluster() -> tuple[list[Setting], list[Setting]]:
    """Settings and partitions, where there is a Slurm that answers."""
    from tripletkit.cluster import queue
    from tripletkit.monitor import site

    if not queue.available():
        return [], []
    try:
        return site.settings(), site.partitions()
    except ClusterError as error:
        logger.warning("cannot ask Slurm for its settings: %s", error.message)
        return [], []


def _as_dict(answer: Why) -> dict[str, object]:
    return {
        **answer.diagnosis._asdict(),
        "attempts": [each._asdict() for each in answer.history],
    }


def _print_why(answer: Why) -> None:
    out.print(f"{answer.diagnosis.summary} [{answer.diagnosis.kind}]", soft_wrap=True)
    for line in answer.diagnosis.evidence:
        out.print(f"  {line}", soft_wrap=True)
    out.print(f"what to do: {answer.diagnosis.remedy}", soft_wrap=True)
    for each in answer.history:
        begun = "" if each.from_epoch is None else f" from epoch {each.from_epoch}"
        out.print(
            f"attempt {each.attempt}: job {each.job} on {each.node}{begun}, {each.started} to "
            f"{each.ended or 'now'}: {each.how or 'goes on'}",
            soft_wrap=True,
        )


def _print_findings(study: str, findings: Iterable[Finding], fixed: Iterable[bool]) -> None:
    told = False
    for finding, done in zip(findings, fixed, strict=True):
        label = "note" if finding.harmless else "repaired" if done else "wrong"
        out.print(f"{label}: {finding.what}", soft_wrap=True)
        if not done:
            able = " (--fix does it)" if finding.apply is not None else ""
            out.print(f"  {finding.repair}{able}", soft_wrap=True)
        told = told or not finding.harmless or finding.kind == "no_study"
    if not told:
        out.print(f"study {study}, the queue and the folders fit together", soft_wrap=True)


def _print_settings(title: str, settings: Iterable[Setting]) -> None:
    for number, setting in enumerate(settings):
        if number == 0:
            out.print(f"{title}:")
        out.print(f"  {setting.name} = {setting.value}: {setting.meaning}", soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (why, doctor):
        app.command(command.__name__)(command)
