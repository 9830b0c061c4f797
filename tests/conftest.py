"""What every test starts from: a fixed torch seed, no network, few threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from infmoe.ops import dispatch

settings.register_profile("infmoe", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("infmoe")
# The tensors are tiny, and a second thread only adds hand-overs.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_choice_remembered():
    """What is chosen under what a test patches stays in that test."""
    dispatch._chosen.cache_clear()
    yield
    dispatch._chosen.cache_clear()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
