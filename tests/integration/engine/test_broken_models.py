"""A model whose output is not a number fails its requests; nobody is answered with garbage."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from opta_lmx.inference.worker.decoder import Launch
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch
from tests.integration.engine.driver import Engine, TinyModel
from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

Tiny = Callable[[Family], TinyModel]


@pytest.mark.parametrize("launch", [HostLaunch, DeviceLaunch])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_not_a_number_fails_the_request(tiny: Tiny, launch: Launch, sampling: dict[str, Any]) -> None:
    """One NaN weight of the last norm is enough; the scheduler is empty afterwards and serves a mended model."""
    model = tiny("llama")
    norm: Any = model.model.model.norm
    sound = norm.weight
    engine = Engine(model, launch=launch)
    norm.weight = sound * mx.array(float("nan"))
    try:
        engine.ask(0, [5, 6, 7], max_tokens=4, **sampling)
        engine.run().assert_empty()
    finally:
        norm.weight = sound
    assert engine.failed[0] == "the model's output is not a number"
    engine.ask(1, [5, 6, 7], max_tokens=4, ignore_eos=True, **sampling)
    engine.run().assert_empty()
    assert len(engine.said(1)[0]) == 4
