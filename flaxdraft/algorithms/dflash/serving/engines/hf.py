"""No engine: the directory as transformers' configuration classes and other trainers read it.

What no engine serves can still be kept in this form and trained further.
"""

from flaxdraft.algorithms.dflash.serving.terms import Engine

ENGINE = Engine(
    title="Hugging Face layout",
    serve=None,
    samples_from_anchor=True,
    nested_causal=True,
    reduced_vocabulary=True,
    last_layer=True,
    scales_logits=True,
    rope_dialects=("rope_parameters", "rope_theta"),
    rope_types=("default", "linear", "dynamic", "llama3", "yarn"),
)
