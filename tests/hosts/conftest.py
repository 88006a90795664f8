"""Every test of this folder says what is missing where it cannot run."""

from __future__ import annotations

import pytest

from tests.hosts.bench import missing_bench_piece
from tests.hosts.link import missing_piece


@pytest.fixture(scope="session", autouse=True)
def _needs_a_link() -> None:
    if piece := missing_piece():
        pytest.skip(f"needs {piece}")


@pytest.fixture(scope="session")
def needs_a_bench() -> None:
    if piece := missing_bench_piece():
        pytest.skip(f"needs {piece}")
