"""What the values in a model's config.json may be."""

import json

LARGEST = 10**8  # no size of a model is larger


def check(path, key: str, value, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{path}: {key} is {json.dumps(value)}, expected {expected}")


def is_size(value) -> bool:
    """A positive integer that a size can be; true is no 1."""
    return type(value) is int and 1 <= value <= LARGEST


def is_positive(value) -> bool:
    """A number above 0 that float32 has; infinity and an integer of 400 digits are none."""
    return type(value) in (int, float) and 0 < value < 1e38


def check_sizes(path, values: dict, *keys: str) -> None:
    for key in keys:
        size = values.get(key)
        check(path, key, size, is_size(size), f"a positive integer up to {LARGEST:,}")


def check_kinds(path, values: dict) -> None:
    """ValueError names a value of the wrong kind that is no size."""
    for key in ("rope_theta", "rms_norm_eps"):
        check(path, key, values[key], is_positive(values[key]), "a positive number")

    tied = values["tie_word_embeddings"]
    check(path, "tie_word_embeddings", tied, type(tied) is bool, "true or false")
    window = values["sliding_window"]
    check(path, "sliding_window", window, window is None or is_size(window), "a size, or null")

    for key in ("bos_token_id", "eos_token_id"):
        ids = values[key] if isinstance(values[key], list) else [values[key]]
        fits = all(one is None or (type(one) is int and one >= 0) for one in ids)
        check(path, key, values[key], fits, "a token id, or null")
