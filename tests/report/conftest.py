"""The committed results, once a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.committed_runs import committed_results


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return committed_results(tmp_path_factory.mktemp("committed"))
