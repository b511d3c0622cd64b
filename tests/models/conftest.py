"""Models to ask, made anew for each test: attention is switched on their configs."""

from __future__ import annotations

import pytest
from tiny_models import ARCHITECTURES, build, wrap

from sparse_attention_hub.models import LanguageModel


@pytest.fixture(params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    return wrap(build(request.param))


@pytest.fixture
def llama() -> LanguageModel:
    return wrap(build("llama"))
