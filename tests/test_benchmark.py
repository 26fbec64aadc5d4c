"""The benchmark's report on a small stage. No test depends on the times."""

import json

import jax
import light_network
import pytest

from configs import base
from ivideo.devices import flops
from ivideo.errors import UserError
from ivideo.planning import benchmark, describe
from ivideo.training import step


@pytest.fixture(scope="module")
def small():
    config = base.get_config("small")
    config.update_from_flattened_dict({**light_network.OPTIONS, "sample.weight": 1.0})
    return config


@pytest.fixture(scope="module")
def found(small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark.PEAK_ROWS, "cpu", 128)
        return benchmark.measure(small, repeats=2)


def test_every_number_is_there(found):
    assert (found["stage"], found["variant"], found["dtype"]) == ("base", "small", "float32")
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"]["platform"] == "cpu"
    assert found["peak_flops_per_second"] > 0
    assert list(found["cases"]) == ["forward", "sampling_step", "training_step"]
    for case in found["cases"].values():
        assert case["repeats"] == 2
        assert 0 < case["min_seconds"] <= case["median_seconds"] <= case["max_seconds"]
        assert case["compile_seconds"] > 0
        assert case["memory_source"] == "compiler"
        assert case["flops_per_second"] == pytest.approx(case["flops"] / case["median_seconds"])
        assert case["share_of_peak"] == pytest.approx(case["flops_per_second"] / found["peak_flops_per_second"])
    assert [c["batch"] for c in found["cases"].values()] == [1, 1, 8]


def test_flops_are_counted(small, found):
    forward = found["cases"]["forward"]["flops"]
    assert forward == describe.facts(small)["forward_flops"]
    # with and without the text, around which there is no product
    assert found["cases"]["sampling_step"]["flops"] == 2 * forward

    shapes = step.state_shapes(small), step.batch_shapes(small)
    assert found["cases"]["training_step"]["flops"] == flops.count(step.make_train_step(small), *shapes)


def test_rematerialised_flops_are_not_the_models(small, found):
    config = small.copy_and_resolve_references()
    config.model.remat = "full"
    state = step.state_shapes(config)
    *_, count = benchmark._training_step(config, state)
    assert count == found["cases"]["training_step"]["flops"]


def test_memory_holds_the_arguments(small, found):
    parameters = describe.facts(small)["parameters"]
    assert found["cases"]["forward"]["memory_bytes"] > 4 * parameters
    # parameters, their average and Adam's two moments
    assert found["cases"]["training_step"]["memory_bytes"] > 4 * 4 * parameters


def test_json_and_table(small, found, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda config, repeats: found)
    assert benchmark.benchmark(small, as_json=True) == found
    assert json.loads(capsys.readouterr().out) == found
    benchmark.benchmark(small)
    out = capsys.readouterr().out
    assert out.startswith("base:small in float32 on ")
    assert describe.human_flops(found["cases"]["forward"]["flops"]) in out
    for name in ("forward ", "sampling step ", "training step "):
        assert f"\n{name}" in out


def test_small_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"base:paper needs \d+\.\dGB .* benchmark a smaller variant"):
        benchmark.measure(base.get_config("paper"))


def test_small_repeats_follow_the_time():
    assert not benchmark._enough([10.0], None)
    assert benchmark._enough([10.0] * 3, None)
    assert not benchmark._enough([0.01] * 199, None)
    assert benchmark._enough([0.01] * 200, None)
    assert benchmark._enough([0.01] * 2, 2)
