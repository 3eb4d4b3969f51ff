"""The terms in which engines say what serving a block draft needs."""

from __future__ import annotations

import dataclasses

from flaxdraft.algorithms.dflash.sizes import SERVING_ARCHITECTURE
from flaxdraft.serving import contract


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(contract.Engine):
    """What one engine reads from config.json and the weights."""

    architecture: str = SERVING_ARCHITECTURE  # by which it knows such drafts
    refuses: str | None = None  # why it serves no draft of the algorithm; None: it serves them
    model_prefix: bool = False  # `model.` before a key is taken off
    samples_from_anchor: bool = False  # serves drafts whose slot 0 predicts
    nested_causal: bool = False  # reads dflash_config.causal besides the top-level is_causal
    mixed_layers: str | None = None  # what has to be set for drafts of sliding and full layers; None: nothing
    scales_logits: bool = False  # by output_multiplier and final_logit_softcapping
    plain_logits: bool = False  # passes both over, and a head corrects its logits, so that it proposes other tokens
    reduced_vocabulary: bool = False  # reads draft_vocab_size, and the tables and the head that go with it
    last_layer: bool = False  # can hand over the output of the target's last layer

    rope_dialects: tuple[str, ...]  # of "rope_parameters" and "rope_theta", those it reads
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")


CONFIG = "dflash_config"  # the object of config.json that holds what is the algorithm's own
TAPS = "target_layer_ids"  # there: tapped layers, counted by output from 0
# Other trainers' places for the same, which count by input: the input of layer i is the output of layer i - 1.
INPUT_TAPS = ("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
