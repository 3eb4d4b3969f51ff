"""What still helps somebody whose target is refused here: an engine that runs it. Every message that refuses a family,
a quantisation or a layout of files ends with it.

A family that is unknown here helps nobody to train: hidden states need the target's embedding, head and final norm.
"""

THROUGH_AN_ENGINE = (
    "An engine that runs the model can answer in its place (`python -m flaxdraft.data regenerate --server`, with the "
    "tokenizer from the model's Hugging Face directory). Hidden states that an engine kept become features "
    "(tools/convert/features_from_speculators.py) if embedding, head and final norm are in files of a supported family "
    "and format"
)
