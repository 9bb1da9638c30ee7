"""The profile of the Alliance's clusters, as far as it runs elsewhere.

Stand-ins for what only the site has: `module` says what it would load, `virtualenv` is Python's own
venv, the wheelhouse is what is installed here, and a profile makes the folder $SLURM_TMPDIR that a
job is given there. Building, packing, copying, checking and the jobs are real.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.cluster import ACCOUNT
from tests.test_slurm_scripts import REPOSITORY, Site, config, site  # noqa: F401 - fixtures

MODULES = "module load StdEnv/2023 gcc arrow python/3.11 cuda postgresql"
VIRTUALENV = """\
#!/bin/sh
[ "$1" = --no-download ] && "{python}" -m venv --without-pip "$2" &&
    echo "{wheelhouse}" >"$2/lib/python{version}/site-packages/wheelhouse.pth"
"""
NODE_PROFILE = """\
if [ -n "${SLURM_JOB_ID:-}" ]; then
    export SLURM_TMPDIR=$TRIPLETKIT_DATA.of-job-$SLURM_JOB_ID
    mkdir -p "$SLURM_TMPDIR"
fi
. "$(dirname "${BASH_SOURCE[0]}")/alliance.sh"
"""


def wheel(folder: Path, name: str, version: str) -> None:
    """A wheel with nothing in it."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


class Alliance:
    """A user's clone of the repository there, with the virtual environment built and packed."""

    def __init__(self, site: Site) -> None:  # noqa: F811
        self.site = site
        self.clone = site.folder / "a clone"
        for name in "slurm", "tripletkit":
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, self.clone / name, ignore=ignored)
        for name in "pyproject.toml", "README.md", "LICENSE":
            shutil.copy(REPOSITORY / name, self.clone)
        (self.clone / "slurm" / "profiles" / "node.sh").write_text(NODE_PROFILE)

        wheelhouse, wheels, tools = (site.folder / n for n in ("wheelhouse", "wheels", "tools"))
        for folder in wheelhouse, wheels, tools:
            folder.mkdir()
        for installed in Path(sysconfig.get_path("purelib")).iterdir():
            if "tripletkit" not in installed.name:
                (wheelhouse / installed.name).symlink_to(installed)
        wheel(wheels, "psycopg2", "2.9.9")
        virtualenv = tools / "virtualenv"
        version = sysconfig.get_python_version()
        text = VIRTUALENV.format(python=sys.executable, wheelhouse=wheelhouse, version=version)
        virtualenv.write_text(text)
        virtualenv.chmod(0o755)
        self.variables = {
            "BASH_FUNC_module%%": '() { echo "module $*"; }',
            "PATH": f"{tools}:{site.environment['PATH']}",
            "TRIPLETKIT_VENV": str(site.folder / "my venv"),
            "TRIPLETKIT_WHEELS": str(wheels),
            "TRIPLETKIT_PROFILE": "alliance",
        }
        self.built = site.run(self.clone / "slurm" / "alliance_venv.sh", **self.variables)

    def profile(self, then: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Load the profile, then run a line."""
        script = f'. "$0"; {then}'
        words = ("bash", "-euo", "pipefail", "-c", script, self.clone / "slurm" / "profile.sh")
        return self.site.call(*words, **{**self.variables, **variables})


@pytest.fixture(scope="module")
def alliance(site) -> Alliance:  # noqa: F811
    return Alliance(site)


@pytest.fixture
def data(site) -> Path:  # noqa: F811
    """A folder to be staged, with its checksums."""
    folder = site.folder / "my data"
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "numbers").write_bytes(bytes(range(256)))
    add_checksums(folder)
    return folder


def add_checksums(folder: Path) -> None:
    """As the how-to page says."""
    line = "find . -type f ! -name SHA256SUMS -exec sha256sum {} + >SHA256SUMS"
    subprocess.run(["bash", "-c", line], cwd=folder, check=True)


WHERE = 'python -c "import tripletkit; print(tripletkit.__file__)"'


def test_modules_are_loaded_before_the_environment_is_built(alliance):
    assert alliance.built.startswith(MODULES)
    assert "Successfully installed tripletkit" in alliance.built


def test_a_login_node_uses_the_environment_itself(alliance):
    done = alliance.profile(WHERE)
    assert done.stdout.splitlines()[0] == MODULES
    assert done.stdout.splitlines()[-1].startswith(alliance.variables["TRIPLETKIT_VENV"] + "/")


def test_a_job_uses_a_copy_on_the_disk_of_its_node(alliance, tmp_path):
    done = alliance.profile(WHERE, SLURM_TMPDIR=str(tmp_path), TRIPLETKIT_MODULES="arrow/23 cuda")
    assert done.stdout.splitlines()[0] == "module load arrow/23 cuda"
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path}/venv/")


def test_staged_data_is_complete_and_checked(alliance, data, tmp_path):
    variables = {"SLURM_TMPDIR": str(tmp_path), "TRIPLETKIT_DATA": str(data)}
    assert alliance.profile("true", **variables).returncode == 0
    copied = tmp_path / "data" / "cache" / "numbers"
    assert copied.read_bytes() == bytes(range(256))

    (data / "cache" / "numbers").write_bytes(bytes(255))
    done = alliance.profile("echo went on", **variables)
    assert done.returncode != 0
    assert "cache/numbers: FAILED" in done.stdout
    assert "went on" not in done.stdout


def test_a_study_runs_from_the_staged_cache(alliance, data, config):  # noqa: F811
    here = alliance.site
    cached = ("--set", f"paths.cache_dir={data}/cache", "--config", config)
    here.run(sys.executable, "-m", "tripletkit", "data", "check", *cached)
    add_checksums(data)
    staged = (here.folder / config).read_text().replace(
        "[paths]", '[paths]\ncache_dir = "$SLURM_TMPDIR/data/cache"'
    )  # fmt: skip
    (here.folder / "staged.toml").write_text(staged)
    said = here.run(
        alliance.clone / "slurm" / "submit_optuna_tuning.sh", "--config", "staged.toml",
        "--account", ACCOUNT, "--profile", "node",
        **{**alliance.variables, "TRIPLETKIT_DATA": str(data)},
    )  # fmt: skip
    element = re.search(r"array (\d+)", said)[1] + "_0"
    assert here.ended(element) == "COMPLETED 0"
    log = (here.folder / "logs" / f"tune_{element}.err").read_text()
    assert "complete" in log
    assert "kept as" not in log  # no cache was built
    dumped = (here.folder / "trials" / "tripletkit" / "config.toml").read_text()
    assert 'cache_dir = "$SLURM_TMPDIR/data/cache"' in dumped
