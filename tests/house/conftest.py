"""Facts about the package, read once."""

import tomllib

import pytest


@pytest.fixture(scope="session")
def pyproject(repository):
    """pyproject.toml as a dictionary."""
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
