"""Ways of breaking a draft: each changes its tensors or its config.json."""

import numpy as np


def rename(old, new):
    def change(tensors, config):
        for key in [key for key in tensors if key.startswith(old)]:
            tensors[new + key.removeprefix(old)] = tensors.pop(key)

    return change


def tensor(name, value):
    return lambda tensors, config: tensors.update({name: value(tensors) if callable(value) else value})


def field(name, value):
    return lambda tensors, config: config.update({name: value})


def drop(*names):
    return lambda tensors, config: [source.pop(name, None) for name in names for source in (tensors, config)]


def both(*changes):
    return lambda tensors, config: [change(tensors, config) for change in changes]


def nothing(tensors, config):
    """No change."""


def nan(tensors):
    array = tensors["fc.weight"].copy()
    array[0, 0] = np.nan
    return array
