"""Fixtures shared by all tests."""

import pytest
from hypothesis import settings
from torch import fx
from transformers import PreTrainedModel

from tests.tiny_graphs import flat_graph, outlined_graph, shared_model
from tests.tiny_models import ARCHITECTURES

# The same examples in every run: a failure is then the change's, not the draw's.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=20, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(architecture: str) -> PreTrainedModel:
    """A tiny model of the architecture, shared by all tests: not to be changed."""
    return shared_model(architecture)


@pytest.fixture(scope="session")
def flat(architecture: str) -> fx.GraphModule:
    """Its trace, as `drop_guards` leaves it."""
    return flat_graph(architecture)


@pytest.fixture(scope="session")
def outlined(architecture: str) -> fx.GraphModule:
    """Its graph in outlined form."""
    return outlined_graph(architecture)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """A tiny LLaMA, shared by all tests: not to be changed."""
    return shared_model("llama")
