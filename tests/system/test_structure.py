"""The dependency rule: cli -> preprocess, adapters, reporting -> store; numerics do no I/O; imports are light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prep
import prep.store

ROOT = Path(__file__).parents[2]
PARTS = ("preprocess", "adapters", "reporting", "store")

# who may import whom inside the package; None: the modules of the root
ALLOWED = {
    "store": {"store", None},
    "preprocess": {"preprocess", "store", None},
    "adapters": {"adapters", "store", None},
    "reporting": {"reporting", "store", None},
}

NUMERICS = sorted((ROOT / "preprocess" / "numerics").glob("*.py"))
NUMERICS += [ROOT / "adapters" / name for name in ("cores.py", "coefficient.py", "layer.py")]
OUTSIDE = {"zarr", "pathlib", "os", "io", "shutil", "tempfile", "glob", "subprocess", "sys", "tqdm", "click"}
OUTSIDE |= {"transformers", "datasets", "safetensors", "huggingface_hub", "peft"}
DATA = {
    ("prep.store.moments", "SiteData"),
    ("prep.store.format.schema", "panels"),
    ("prep.store.sample", "TokenSample"),
}


def imports(path: Path) -> list[tuple[str, str]]:
    return imports_of(path.read_text(), ["prep", *path.relative_to(ROOT).parent.parts])


def imports_of(source: str, package: list[str]) -> list[tuple[str, str]]:
    """(module, name) of every import, relative ones resolved; the name is empty for `import module`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [(module, alias.name) for alias in node.names]
    return names


def part(module: str, name: str) -> str | None:
    """The subpackage that an import of this package names; None for the root's own names."""
    inner = [*module.split("."), name][1:]
    return next((piece for piece in inner[:1] if piece in PARTS or piece == "cli"), None)


FILES = [path for folder in PARTS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_layers_import_downwards_only(path):
    for module, name in imports(path):
        if module.split(".")[0] == "prep":
            assert part(module, name) in ALLOWED[path.relative_to(ROOT).parts[0]], (
                f"{path.name} imports {module} {name}"
            )


def test_the_rule_sees_relative_and_absolute_imports():
    for line, wanted in [
        ("from ..adapters.cores import Core", "adapters"),
        ("from .. import adapters", "adapters"),
        ("import prep.adapters.cores", "adapters"),
        ("from prep import adapters", "adapters"),
        ("from .. import __version__", None),
        ("from . import models", "preprocess"),
        ("from ..cli import main", "cli"),
    ]:
        [(module, name)] = imports_of(f"def f():\n    {line}\n", ["prep", "preprocess"])
        assert (module.split(".")[0], part(module, name)) == ("prep", wanted), line


@pytest.mark.parametrize("path", NUMERICS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_numerics_do_no_input_and_output(path):
    name = path.relative_to(ROOT).as_posix()
    for module, imported in imports(path):
        assert module.split(".")[0] not in OUTSIDE, f"{name} imports {module}"
        if module.startswith("prep.store") and (module, imported) not in DATA:
            assert module in ("prep.errors", "prep.linear", "prep.precision"), f"{name} imports {module} {imported}"


def test_inside_the_package_imports_are_relative():
    for path in [*FILES, *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "prep" for name in names), path


def test_private_parts_of_zarr_are_named_in_one_file():
    users = {path.name for path in FILES for module, _ in imports(path) if module.startswith("zarr.core")}
    assert users == {"zarr_core.py"}


def test_type_checkers_see_every_name_that_is_loaded_on_first_use():
    for path, names in ((ROOT / "__init__.py", prep.__all__), (ROOT / "store" / "__init__.py", prep.store.__all__)):
        [block] = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        typed = {alias.name for node in block.body for alias in node.names}
        assert typed == set(names) - {"__version__"}, path
        assert all(getattr(prep if path.parent == ROOT else prep.store, name) is not None for name in names)


def loaded_by(code: str) -> set[str]:
    """Top-level packages in memory after a fresh process ran `code`."""
    show = "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_prep_is_light():
    loaded = loaded_by("import prep\nassert prep.PrepError and prep.StoreError and len(dir(prep)) > 5")
    assert "prep" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "zarr", "numpy", "click"}


def test_reading_a_store_and_attaching_need_neither_transformers_nor_datasets(tmp_path):
    path = str(tmp_path / "s")
    attrs = {"id": "0" * 32, "model": {"id": "m"}, "corpus": None, "options": None, "status": "complete"}
    make = f"from prep.store import create_store\ncreate_store({path!r}, {attrs})\n"
    use = f"import prep\nassert prep.open_store({path!r}).status == 'complete'\nprep.attach, prep.load"
    loaded = loaded_by(make + use)
    assert {"prep", "torch", "zarr"} <= loaded
    assert not loaded & {"transformers", "datasets", "peft", "scipy", "click"}


def test_the_command_line_starts_light():
    """--help and a mistyped option answer at once."""
    assert not loaded_by("import prep.cli") & {"torch", "transformers", "datasets", "zarr"}


def test_tests_mirror_the_package():
    folders = {path.relative_to(ROOT / "tests").parent.as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders == {*PARTS, "system"}
