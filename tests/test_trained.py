"""Trained weights: where they are found, and which are refused before they are read."""

import json
import os
import shutil

import jax
import light_network
import numpy as np
import pytest

from configs import base
from configs import cascade as cascade_config
from ivideo import recipe, stages
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.evaluation import evaluate
from ivideo.sampling import cascade, generate
from ivideo.training import trained
from ivideo.training.loop import train
from ivideo.weights import config_metadata, load_metadata, load_params, save_params


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_programs):
    """A run of two steps."""
    workdir = str(tmp_path_factory.mktemp("run"))
    config = base.get_config("small")
    config.update_from_flattened_dict(
        {**light_network.OPTIONS, "train.steps": 2, "train.checkpoint_every": 2, "train.sample_every": 0}
    )
    train(config, workdir, devices=jax.devices()[:1])
    return config, workdir


def saved(config, path, dtype=np.float32, change=lambda p: p):
    """Random weights of a config in a file."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: (0.1 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))
    save_params(path, change(params), metadata=config_metadata(config), dtype=dtype)
    return path


def test_exported_weights_are_sampled_evaluated_and_continued_from(run, tmp_path, capsys):
    config, workdir = run
    file = str(tmp_path / "base.safetensors")
    trained.export(config, workdir, file)
    kept = json.loads(load_metadata(file)["config"])
    assert kept["train"]["steps"] == 2
    assert kept == recipe.read_run_config(workdir)
    from_run, from_file = str(tmp_path / "run.mp4"), str(tmp_path / "file.mp4")
    generate.generate(config, ["a star"], from_run, workdir=workdir)
    generate.generate(config, ["a star"], from_file, weights_path=str(tmp_path))  # a folder of STAGE.safetensors
    # rounded to bfloat16
    a, b = (video_io.read_video(path)[0].astype(int) for path in (from_run, from_file))
    assert np.abs(a - b).mean() < 3
    result = evaluate.evaluate(config, weights_path=file, clips=2, out=str(tmp_path / "new" / "table.json"))
    assert json.loads((tmp_path / "new" / "table.json").read_text())["table"] == result["table"]
    more = config.copy_and_resolve_references()
    more.train.start, more.train.steps, more.train.learning_rate = file, 1, 0.0
    state = train(more, str(tmp_path / "more"), devices=jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, state.params, trained.load(config, file))


def test_small_sources_of_a_cascade(tmp_path):
    config = cascade_config.get_config("small")
    some = cascade.select(config, "base", "tsr1")
    assert trained.find(some, workdir="runs") == {"base": "runs/base", "tsr1": "runs/tsr1"}
    assert trained.find(some[:1], workdir="runs") == {"base": "runs"}
    assert trained.find(some) == {"base": None, "tsr1": None}
    folder = str(tmp_path)
    assert trained.find(some, weights=folder) == {n: f"{folder}/{n}.safetensors" for n in ("base", "tsr1")}
    with pytest.raises(UserError, match="--weights=x.safetensors is one file, but 2 stages need weights"):
        trained.find(some, weights="x.safetensors")
    with pytest.raises(UserError, match="--weights=x.ckpt is neither a folder nor a .safetensors file"):
        trained.find(some[:1], weights="x.ckpt")
    with pytest.raises(UserError, match="--workdir=a and --weights=b are both given"):
        trained.find(some, workdir="a", weights="b")


def test_small_later_stages_are_looked_at_first(tmp_path, monkeypatch):
    """Missing weights, or those of another network, are found before the first stage is sampled."""
    config = cascade_config.get_config("small")
    saved(config.stages.base, str(tmp_path / "base.safetensors"))
    monkeypatch.setattr(cascade, "run", lambda *_, **__: pytest.fail("it was sampled"))

    def run():
        options = {"weights_path": str(tmp_path), "to_stage": "tsr1"}
        generate.generate(config, ["a star"], str(tmp_path / "new.mp4"), **options)

    with pytest.raises(UserError, match=r"no weights at .*/tsr1.safetensors: expected a .safetensors file"):
        run()
    saved(config.stages.ssr1, str(tmp_path / "tsr1.safetensors"))
    with pytest.raises(UserError, match=r"tsr1.safetensors is of another network: config.stage is 'ssr1' there"):
        run()
    os.remove(tmp_path / "tsr1.safetensors")
    other = config.stages.tsr1.copy_and_resolve_references()
    other.model.channels = (16,)
    saved(other, str(tmp_path / "tsr1.safetensors"))
    with pytest.raises(UserError, match=r"another network: config.model.channels is \[16\] there and \[8\] in this"):
        run()
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "tsr1.safetensors"]


def test_small_weights_that_no_network_can_use(tmp_path):
    config = base.get_config("small")
    whole = saved(config, str(tmp_path / "int8.safetensors"), dtype=np.int8)
    with pytest.raises(UserError, match=r"int8.safetensors: \S+ is of type I8, expected one of F32, BF16, F16, F64"):
        trained.check(config, whole)
    with pytest.raises(UserError, match="is of type I8"):
        trained.load(config, whole)
    broken = saved(
        config, str(tmp_path / "nan.safetensors"), change=lambda tree: jax.tree.map(lambda p: p.astype(float) / 0, tree)
    )
    with pytest.raises(UserError, match=r"nan.safetensors: \S+ has values that are not finite"):
        trained.load(config, broken)
    config.train.start = str(tmp_path)
    with pytest.raises(UserError, match=r"config.train.start = .*: expected a .safetensors file"):
        trained.check_start(config)


def test_small_weights_may_start_another_stage_with_the_same_network(tmp_path):
    """As tsr2's start tsr3; sampling takes a stage's own alone."""
    config = cascade_config.get_config("small")
    path = saved(config.stages.tsr2, str(tmp_path / "tsr2.safetensors"))
    config.stages.tsr3.train.start = path
    trained.check_start(config.stages.tsr3)
    with pytest.raises(UserError, match="config.stage is 'tsr2' there and 'tsr3' in this config"):
        trained.check(config.stages.tsr3, path)


@pytest.mark.parametrize("stage", ["base", "ssr1"])
def test_small_metadata_of_older_configs_is_compared(stage, tmp_path):
    """The config beside weights may have keys that configs no longer have; the keys of both still count."""
    config = cascade_config.STAGES[stage].get_config("small")
    path = saved(config, str(tmp_path / "new.safetensors"))
    older = json.loads(load_metadata(path)["config"])
    older["model"] |= {"cond_channels": 0 if stage == "base" else 3, "augmentation": stage != "base"}
    save_params(str(tmp_path / "old.safetensors"), load_params(path), metadata={"config": json.dumps(older)})
    trained.check(config, str(tmp_path / "old.safetensors"))
    config.model.max_distance = 3
    with pytest.raises(
        UserError, match="old.safetensors is of another network: config.model.max_distance is \\d+ there"
    ):
        trained.check(config, str(tmp_path / "old.safetensors"))


@pytest.mark.parametrize("stage", cascade_config.STAGES)
def test_small_weights_in_the_package_fit_the_demo_configs(stage):
    assert trained.check(cascade_config.STAGES[stage].get_config("demo"), None)


def test_small_weights_of_the_base_do_not_start_a_stage_with_conditioning(tmp_path):
    config = cascade_config.get_config("small")
    config.stages.ssr1.train.start = saved(config.stages.base, str(tmp_path / "base.safetensors"))
    with pytest.raises(UserError, match="base.safetensors is of another (network|model): "):
        trained.check_start(config.stages.ssr1)


def test_small_identity_follows_from_the_values(run, tmp_path):
    config, workdir = run
    a = trained.check(config, saved(config, str(tmp_path / "a.safetensors")))
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert trained.check(config, str(tmp_path / "b.safetensors")) == a
    other = saved(config, str(tmp_path / "c.safetensors"), change=lambda t: jax.tree.map(lambda p: p * 1.01, t))
    assert trained.check(config, other) != a
    assert trained.check(config, workdir).startswith("step 2, saved ")


def test_small_run_keeps_its_config(run, tmp_path, caplog):
    """What differs from the last start is logged, but for another network, which is refused by its key."""
    config, workdir = run
    shutil.copytree(workdir, tmp_path / "run")
    workdir = str(tmp_path / "run")
    assert recipe.differences(recipe.read_run_config(workdir), config) == []
    other = config.copy_and_resolve_references()
    other.train.learning_rate, other.model.dtype = 0.5, "bfloat16"
    recipe.save_run_config(other, workdir)
    assert "config.train.learning_rate is 0.5 now, and was 0.0008 at the previous start of this run" in caplog.text
    assert "config.model.dtype is 'bfloat16' now" in caplog.text
    assert recipe.read_run_config(workdir)["train"]["learning_rate"] == 0.5
    other.model.data_std = 0.5  # no shape tells
    message = "is of another network: config.model.data_std is 0.1 there and 0.5 in this config"
    with pytest.raises(UserError, match=message):
        recipe.save_run_config(other, workdir)
    with pytest.raises(UserError, match=message):
        trained.check(other, workdir)
    with pytest.raises(UserError, match=message):
        train(other, workdir, devices=jax.devices()[:1])
    assert recipe.read_run_config(workdir)["model"]["data_std"] == 0.1
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # nothing trained is left that could be of another network
    recipe.save_run_config(other, workdir)
    assert recipe.read_run_config(workdir)["model"]["data_std"] == 0.5
