"""The description of a config, against counts by hand."""

import json

import pytest

from configs import base
from ivideo.planning import describe


@pytest.fixture(scope="module", autouse=True)
def described_once():
    """An equal config is traced once for all tests."""
    facts, found = describe.facts, {}

    def once(config):
        key = config.to_json_best_effort(sort_keys=True)
        if key not in found:
            found[key] = facts(config)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describe, "facts", once)
        yield


@pytest.fixture
def small():
    """The small base with two levels whose layers differ."""
    config = base.get_config("small")
    config.model.channels, config.model.blocks, config.model.strides = (8, 16), (1, 1), (2, 2)
    config.model.spatial_attention = config.model.cross_attention = (False, True)
    config.model.temporal = ("attention", "attention")
    return config


def test_parameters_of_a_base_by_hand(small):
    """Levels of 8 and 16 channels, embeddings of 32, text of 128; one head of 8 channels or two, 33 distances."""
    e, d, c0, c1, head, distances = 32, 128, 8, 16, 8, 33
    folded = 3 * 2**2  # of 2 × 2 pixels

    def residual(c_in, c):
        shortcut = c_in * c + c if c_in != c else 0
        return (2 * c_in + 9 * c_in * c + c) + (e * 2 * c + 2 * c) + (2 * c + 9 * c * c + c) + shortcut

    def attention(c):
        return 2 * c + 4 * c * c

    def temporal(c):
        return attention(c) + distances * (c // head) * (1 + head)

    cross = d + 2 * c1 + 2 * c1 * c1 + 2 * d * c1
    layers = attention(c1) + cross + temporal(c1)
    parts = {
        "down_0": residual(c0, c0) + temporal(c0),
        "down_1": residual(c1, c1) + layers,
        "down_1_resize": 9 * c0 * c1 + c1,
        "middle": residual(c1, c1) + layers,
        "noise_embedding": c0 * e + e + e * e + e,
        "frame_embedding": (16 * e + e) + 2 * e + 2 * (e * e + e),  # 16 waves, a norm, two dense layers
        "out": 9 * c0 * folded + folded,
        "out_norm": 2 * c0,
        "stem": 9 * folded * c0 + c0,
        "text_norm": 2 * d,
        "text_pooling": d + d + d * e + e + e * e + e,
        "up_0": residual(2 * c0, c0) + temporal(c0),
        "up_1": residual(2 * c1, c1) + layers,
        "up_1_resize": 9 * c1 * c0 + c0,
    }
    found = describe.facts(small)
    assert found["parts"] == parts
    assert found["parameters"] == sum(parts.values())


def test_small_text_parameters_by_hand(small):
    """T5 1.1: four attention matrices, three of the gated feed-forward layer, two norms; 32 buckets of distance."""
    text = small.text
    inner = text.heads * text.head_dim
    layer = 4 * text.dim * inner + 3 * text.dim * text.ff + 2 * text.dim
    wanted = text.vocab * text.dim + text.layers * layer + text.heads * 32 + text.dim
    assert describe.facts(small)["text"]["parameters"] == wanted


def test_small_paper_sizes_without_allocating():
    found = describe.facts(base.get_config("paper"))
    assert found["output"] == {"frames": 16, "height": 24, "width": 40}
    assert (found["stage"], found["variant"], found["fps"]) == ("base", "paper", 3)
    assert abs(found["parameters"] / 5.6e9 - 1) < 0.02
    assert abs(found["text"]["parameters"] / 4.7e9 - 1) < 0.02  # the encoder half of T5-XXL's 11B
    assert [(l["height"], l["width"]) for l in found["levels"]] == [(24, 40), (12, 20), (6, 10)]
    # a network on F frames of N pixels does at least its convolutions: two FLOPs a weight and pixel
    assert found["forward_flops"] > 2 * 16 * 60 * sum(found["parts"][k] for k in ("down_2", "middle", "up_2"))


def test_small_conditioning_is_seen(small):
    base_facts = describe.facts(small)
    small.cond.update(frames=4, height=8, width=8, fps=3, fill="blank")
    found = describe.facts(small)
    assert found["input"] == {"kind": "video", "frames": 4, "height": 8, "width": 8, "fps": 3, "channels": 4}
    assert found["output"] == {"frames": 4, "height": 8, "width": 8}
    assert base_facts["input"]["kind"] == "noise"
    # four more channels of 2 × 2 pixels into the stem, and an embedding of the noise put on them
    more = 9 * 4 * 2**2 * 8 + base_facts["parts"]["noise_embedding"]
    assert found["parameters"] - base_facts["parameters"] == more
    # the stem on 4 frames of 4 × 4, and the embedding's two products
    more = 4 * 4 * 4 * 9 * 4 * 2**2 * 8 + 8 * 32 + 32 * 32
    assert found["forward_flops"] - base_facts["forward_flops"] == 2 * more


def test_small_levels(small):
    shared = {"blocks": 1}
    off = {"spatial_attention": False, "cross_attention": False, "temporal": "attention"}
    on = {"spatial_attention": True, "cross_attention": True, "temporal": "attention"}
    assert describe.facts(small)["levels"] == [
        {"height": 4, "width": 4, "channels": 8, **shared, **off},
        {"height": 2, "width": 2, "channels": 16, **shared, **on},
    ]


def test_small_json_and_table(small, capsys):
    describe.describe(small, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found == describe.facts(small)
    assert {"stage", "variant", "parameters", "input", "output", "fps", "forward_flops", "levels", "text"} <= set(found)
    describe.describe(small)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "base:small"
    assert f"{found['parameters']:,}" in lines[1]
    assert "noise, 4 × 8 × 8" in lines[2]
    assert "4 × 8 × 8 at 3 fps" in lines[3]
    assert lines[-1].split() == ["1", "2", "×", "2", "16", "1", "attention", "attention", "attention"]


@pytest.mark.parametrize(
    ("number", "wanted"),
    [(0, "0"), (999, "999"), (1000, "1K"), (999_600, "1M"), (57_882, "57.9K"), (5.607e9, "5.61B"), (1.5e16, "15,000T")],
)
def test_small_human_numbers(number, wanted):
    assert describe.human(number) == wanted


def test_small_human_flops():
    assert describe.human_flops(2.69e9) == "2.69 GFLOPs"
    assert describe.human_flops(12) == "12 FLOPs"
    assert describe.human_flops(1.5e16) == "15 PFLOPs"
