"""Every test of this folder needs a shaped link, and says what is missing where none can be made."""

from __future__ import annotations

import pytest

from tests.hosts.link import missing_piece


@pytest.fixture(scope="session", autouse=True)
def _needs_a_link() -> None:
    if piece := missing_piece():
        pytest.skip(f"needs {piece}")
