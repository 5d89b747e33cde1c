"""What is shipped: the wheel holds every module of the packages and nothing else; the sdist can run the tests."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import prep

ROOT = Path(__file__).parents[2]
PACKAGES = ("preprocess", "adapters", "reporting", "store")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".cache", "build", "dist", "*.egg-info", "__pycache__", "*.zarr", "runs"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist built from a copy under another name, with a stray virtual environment in it."""
    copy = tmp_path_factory.mktemp("clone") / "another-name"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    (copy / ".venv" / "lib").mkdir(parents=True)
    (copy / ".venv" / "lib" / "stray.py").write_text("")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy.parent / "out"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy.parent / "out"


def test_the_wheel_holds_the_modules_and_nothing_else(built):
    wheel = next(built.glob("prep_bases-*.whl"))
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {f"prep/{path.name}" for path in ROOT.glob("*.py")}
    modules |= {
        f"prep/{path.relative_to(ROOT).as_posix()}" for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert files == modules | {"prep/py.typed", "prep/reporting/page.html"}
    assert {"prep/cli.py", "prep/__init__.py", "prep/store/format/schema.py"} <= files


def test_the_version_has_one_source(built):
    assert next(built.glob("*.whl")).name.startswith(f"prep_bases-{prep.__version__}-")


def test_every_folder_with_modules_is_a_package(built):
    holding = {path.parent.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.replace(".", "/") for name in listed} == {"prep", *(f"prep/{folder}" for folder in holding)}


def test_the_sdist_carries_tests_docs_and_examples(built):
    with tarfile.open(next(built.glob("prep_bases-*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for path in (
        "tests/system/test_packaging.py",
        "docs/store-format.md",
        "examples/demo.py",
        "constraints.txt",
        "LICENSE",
    ):
        assert path in names
    assert not any("stray" in name or "__pycache__" in name for name in names)
