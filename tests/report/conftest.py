from pathlib import Path

import pytest

from jaxvaccine.report import plots


@pytest.fixture
def figures(monkeypatch):
    """{name: figure} of what a test's reports save; drawing it would take a second each."""
    saved = {}

    def save(figure, path):
        saved[Path(path).name] = figure
        Path(path).write_bytes(b"a figure")

    monkeypatch.setattr(plots, "save", save)
    return saved
