"""The fixtures of the recipe tests."""

import sys
import warnings
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from recipe_cases import SMALL, execute, fork


@pytest.fixture(autouse=True)
def clean_place(tmp_path, monkeypatch):
    """An empty working folder; and what a recipe does to the libraries' chatter is undone."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs that the results are compared with
    verbosity = transformers.utils.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_caching()
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a recipe in this process: gives exit code, stdout and stderr."""

    def run(name: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [])  # to be put back
        capfd.readouterr()
        return execute(name, arguments), *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Path:
    """A small ViT that keeps 12 clean images aside, with seed 5; too briefly trained to have learned anything."""
    place = tmp_path_factory.mktemp("victim")
    arguments = ["--output_dir", "vit", "--num_train_epochs", "1", "--seed", "5"]
    assert fork("backdoor_image", *SMALL, *arguments, cwd=place) == (0, "")
    return place / "vit"
