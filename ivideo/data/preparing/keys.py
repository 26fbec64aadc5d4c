"""The values that the keys of `config.prepare` may have."""

from ivideo.values import Value, choice, number, whole

_NOT_NEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
_SWITCH = Value("True or False", lambda value: isinstance(value, bool))

KEYS = {
    "media": choice("video", "image"),
    "label_template": Value("a text", lambda value: isinstance(value, str)),
    "split": Value("a name", lambda value: isinstance(value, str) and value.strip() != ""),
    "caption_feature": Value("a text", lambda value: isinstance(value, str)),
    "long_captions": choice("keep", "drop"),
    "min_seconds": _NOT_NEGATIVE,
    "min_fps": _NOT_NEGATIVE,
    "min_scale": _NOT_NEGATIVE,
    "max_cropped": number("a share from 0 to 1", lambda value: 0 <= value <= 1),
    "min_motion": _NOT_NEGATIVE,
    "max_jump": number("a number above 0", lambda value: value > 0),
    "split_shots": _SWITCH,
    "gop": whole(0),
    "crop_bars": _SWITCH,
    "duplicate_bits": whole(-1, 32),
    "shard_megabytes": whole(1),
    "workers": whole(0),
    "timeout": _NOT_NEGATIVE,
}
