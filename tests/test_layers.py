"""The architecture is a test: see [tool.importlinter] in pyproject.toml."""

import subprocess
import sys
from pathlib import Path


def test_modules_import_only_from_the_layers_below_them():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
