"""What every test relies on: no network, few threads, fixed seeds."""

import os
import random
from pathlib import Path

# Before any library of the Hugging Face family is imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_DISABLED", "true")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

from tests.minimal_recipe import load, opened, recipe_file, tree  # noqa: F401 - fixtures
from tests.organism import organism, small  # noqa: F401 - fixtures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))  # more threads than cores crawl


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and models that lie beside the checkout; tests that need them are skipped elsewhere."""
    folder = Path(os.environ.get("ROUTEALIGN_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs {folder} (ROUTEALIGN_SHARED names another folder)")
    return folder
