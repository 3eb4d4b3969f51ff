"""The tensors of a draft's directory: flat names and PyTorch shapes [out, in], from config.json.

Written down from what the engines load, not from this project's name tables: the two are compared with each other.
"""

from __future__ import annotations

from flaxdraft.algorithms.eagle3.serving import tensors
from flaxdraft.algorithms.eagle3.serving.tensors import BUFFERS as BUFFERS
from flaxdraft.algorithms.eagle3.serving.terms import Config, Kind, Shapes

MASK_STATE = "mask_hidden"
FIRST = "layers.0."
_READ_BOTH = ("q_proj.weight", "k_proj.weight", "v_proj.weight")  # token and state, in the first layer


def flat_name(key: str) -> str:
    """The name in this layout of what another writer calls `key`: without `model.`, the first layer by its number."""
    name = tensors.flat_name(key)
    return FIRST + name.removeprefix(tensors.LAYER) if name.startswith(tensors.LAYER) else name


def weights(config: Config, kind: Kind) -> Shapes:
    """What every draft of that kind holds.

    Raises:
        KeyError: config.json lacks a size.
    """
    hidden, target_hidden, vocab, _ = tensors.sizes(config)
    first = tensors.weights(config, kind)
    shapes = {flat_name(name): shape for name, shape in first.items()}
    narrow = {
        name.removeprefix(FIRST): (shape[0], hidden) if name.endswith(_READ_BOTH) else shape
        for name, shape in shapes.items()
        if name.startswith(FIRST) and not name.endswith("hidden_norm.weight")
    }
    for i in range(1, config["num_hidden_layers"]):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in narrow.items()}
    width = tensors.NUM_TAPS * target_hidden
    return shapes | {"embed_tokens.weight": (vocab, hidden), MASK_STATE: (1, 1, width)}


def tables(config: Config) -> Shapes:
    """The vocabulary tables, which stand beside the weights."""
    _, _, vocab, draft_vocab = tensors.sizes(config)
    return {"d2t": (draft_vocab,), "t2d": (vocab,)}
