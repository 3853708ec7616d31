"""One small corpus for the whole room."""

from pathlib import Path

import pytest

from storm_vlm.data import Mixture, MixtureConfig, SetConfig
from tests.data.corpus import write_corpus
from tests.model.tiny import make_model


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def processor():
    return make_model(temporal_pool=2, num_frames=4)[1]


@pytest.fixture
def mixture(corpus) -> Mixture:
    return Mixture(MixtureConfig((SetConfig("tiny", corpus),)), seed=3)
