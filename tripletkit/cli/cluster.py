"""To be written by its owner; replace this file."""

import typer


def add_to(app: typer.Typer) -> None:
    """Nothing yet."""
