"""Meshes that take long to start are shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.processes import Served, served_mesh


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A whole mesh with real embedding and rerank models; read `served_mesh` for what is in it."""
    with pytest.MonkeyPatch.context() as patch, served_mesh(tmp_path_factory.mktemp("served")) as mesh:
        patch.setenv("NO_PROXY", "127.0.0.1")  # SDKs obey the environment's proxy, which knows nothing of loopback
        yield mesh
