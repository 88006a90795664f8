"""A home with an MLflow of its own, on SQLite."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from service.store import mlflow_store
from service.store.home import TRACKING_ENV_VAR, Home
from service.store.mlflow_store import configure_mlflow
from tests.service.synthetic import home_in


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database: making one takes more than a second."""
    home = home_in(tmp_path_factory.mktemp("template"))
    configure_mlflow()
    mlflow_store._make_database(f"sqlite:///{home.folder / 'mlflow.db'}", home.artifacts)
    return home.folder / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.delenv(TRACKING_ENV_VAR, raising=False)
    made = home_in(tmp_path / "home of mine")  # a blank, as users have them
    shutil.copy(template, made.folder / "mlflow.db")
    return made
