"""What the tests of budgets and of profiles share."""

import pytest
import torch


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The commands that errors name leave out the device that a model is opened on anyway."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
