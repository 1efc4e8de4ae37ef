"""The layout that everything relies on: links, one-way imports, and what the wheel holds."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import trisparse

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["kernels", "sparsity", "retrain", "bench"]


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield node.module


@pytest.mark.parametrize("folder", ORDER)
def test_namespace_links_to_the_top_level_folder(folder):
    link = ROOT / "src" / "trisparse" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("../..") / folder


def test_kernels_is_no_package_and_tests_are_none_either():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_one_way(folder):
    allowed = ORDER[: ORDER.index(folder) + 1]
    for file in sources(folder):
        for module in imported_modules(file):
            parts = module.split(".")
            assert parts[0] not in ORDER, f"{file.name} imports {module}: spell it trisparse.{module}"
            if parts[0] == "trisparse":
                assert len(parts) > 1, f"{file.name} imports the public namespace"
                assert parts[1] in (*allowed, "env"), f"{folder}/{file.name} imports {module}"
                assert parts[1] != "env" or folder == "bench"


def test_no_file_is_too_long():
    long = {}
    for folder in (*ORDER, "src/trisparse", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            length = len(file.read_text().splitlines())
            if length > 400:
                long[str(file.relative_to(ROOT))] = length
    assert not long


def test_importing_everything_touches_no_gpu_and_loads_no_model_class():
    code = (
        "import sys, torch, trisparse; [getattr(trisparse, name) for name in trisparse.__all__]; "
        "assert not torch.cuda.is_initialized(); "
        "assert 'transformers.models.llama.modeling_llama' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_transformers_imports_from_the_repository_root():
    subprocess.run([sys.executable, "-c", "import transformers.modeling_utils"], check=True, cwd=ROOT)


def test_wheel_holds_all_folders(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    command = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    subprocess.run(command, check=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"trisparse/{file.relative_to(ROOT)}" for folder in ORDER for file in sources(folder)}
    expected |= {f"trisparse/{name}" for name in ("__init__.py", "env.py", "py.typed")}
    expected |= {f"trisparse/{file.relative_to(ROOT)}" for file in (ROOT / "bench/papers/published").glob("*.json")}
    assert expected <= set(names)
    expected |= {f"trisparse/cli/{file.name}" for file in (ROOT / "src/trisparse/cli").glob("*.py")}
    unexpected = {n for n in names if not n.startswith(("trisparse/", "trisparse-"))}
    assert not unexpected


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in pins if "==" in line}
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in wanted:
        name = requirement.split(";")[0].split(">")[0].strip().lower()
        assert name in pinned, f"constraints.txt does not pin {name}"


def test_public_names_resolve_in_any_order():
    code = (
        "import trisparse; from trisparse.retrain.perp import retrain; "
        "assert trisparse.retrain.perp.retrain is retrain and callable(trisparse.retrain); "
        "assert all(callable(getattr(trisparse, n)) or n == 'Pattern' for n in trisparse.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "from trisparse import retrain; retrain.__call__"], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        trisparse.prune  # noqa: B018


def test_the_package_is_the_function():
    with pytest.raises(ValueError, match="transformers causal language model"):
        trisparse.retrain(torch.nn.Linear(2, 2), None, trisparse.PERPConfig(groups=("biases",)))
