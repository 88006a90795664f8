"""The house: imports point down the floors, names have functions, the light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["experiments", "workers", "service"]
FORBIDDEN = {
    "experiments": {"torch", "ray", "mlflow", "numpy", "workers", "service"},
    "workers": {"ray", "mlflow", "service"},
    "service": set(),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor):
    files = list((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        assert not imports(path) & FORBIDDEN[floor], path


def test_service_never_touches_a_tensor():
    for path in (ROOT / "service").rglob("*.py"):
        assert "torch" not in imports(path), path


def test_every_package_is_shipped():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for floor in FLOORS for p in (ROOT / floor).rglob("__init__.py")}
    assert listed == found


def test_no_file_is_a_god():
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 420, path


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sorted(m.split('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import experiments.spec.experiment", {"torch", "ray", "mlflow", "numpy", "scipy", "pandas"}),
        ("import service.cli", {"torch", "ray", "mlflow", "numpy", "scipy", "yaml"}),
        ("from experiments import catalogue; catalogue.load('quickstart').expand()", {"torch", "ray", "mlflow", "numpy"}),
        ("import service.run.sweep, service.report.terminal", {"torch", "ray", "mlflow", "scipy", "pandas", "pyarrow"}),
        ("import workers.rank", {"ray", "mlflow", "pandas"}),
    ],
)
def test_heavy_imports_wait(code, heavy):
    assert not modules_after(code) & heavy
