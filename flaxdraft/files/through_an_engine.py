"""The sentence that ends a message which refuses a target's family, quantisation or layout of files: what an engine
that runs the target can do instead.

Answers from an engine need nothing of the target but its tokenizer. Training also reads the target's embedding, head
and final norm from its files, so the family must be known for it.
"""

THROUGH_AN_ENGINE = (
    "An engine that runs the model can answer in its place (`python -m flaxdraft.data regenerate --server`, with the "
    "tokenizer from the model's Hugging Face directory). Hidden states that an engine kept become features "
    "(tools/convert/features_from_speculators.py) if embedding, head and final norm are in files of a supported family "
    "and format"
)
