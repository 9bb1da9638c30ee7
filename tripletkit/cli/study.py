"""To be written by its owner; replace this file."""

import typer

app = typer.Typer()


@app.command("show")
def show() -> None:
    """Nothing yet."""
