"""The drafts that run.py trains beside each other, and what of each differs from flagship.yaml.

Each proposes up to seven tokens a target pass. Blocks read every tapped layer and fill their slots at once; a batch row
of 1,024 tokens trains 256 of them, a step's 16 rows 4,096.
"""

from __future__ import annotations

MOST_TOKENS = 7  # that any of them is trained to propose
# Each algorithm's own layers, written out so that drafts that read the same ones share a folder of answers.
_THREE = "target.tap_layers=[1,14,26]"
_FIVE = "target.tap_layers=[1,8,14,20,27]"


def _block(name: str, layers: int, size: int, *more: str) -> list[str]:
    return [
        f"algorithm.name={name}", f"algorithm.block_size={size}", f"draft.fields.num_hidden_layers={layers}",
        "algorithm.num_anchors=256", "algorithm.loss_chunk=2048", _FIVE, *more,
    ]  # fmt: skip


_THREE_TAPS = ("llama", "mla", "peagle")
CONTESTANTS: dict[str, list[str]] = {
    "llama": ["draft.architecture=llama", _THREE],
    "mla": ["draft.architecture=mla", _THREE],
    "peagle": [
        "algorithm.name=peagle",
        f"algorithm.num_depths={MOST_TOKENS}",
        "algorithm.loss_chunk=2048",
        _THREE,
    ],
    # A DSpark block proposes as many tokens as it has slots, the others one less.
    "dflash": _block("dflash", 2, MOST_TOKENS + 1),
    "dflash-5": _block("dflash", 5, MOST_TOKENS + 1),
    "dflash-5x16": _block("dflash", 5, 16, "algorithm.decay_gamma=7"),
    "dflash2": _block("dflash2", 2, MOST_TOKENS + 1),
    "domino": _block("domino", 2, MOST_TOKENS + 1),
    "dspark": _block("dspark", 2, MOST_TOKENS),
}
LABELS = {
    "llama": "EAGLE-3 (Llama)", "mla": "EAGLE-3 (MLA)", "peagle": "P-EAGLE", "dflash": "DFlash, 2 layers",
    "dflash-5": "DFlash, 5 layers", "dflash-5x16": "DFlash, 5 layers, block 16", "dflash2": "DFlash2",
    "domino": "Domino", "dspark": "DSpark",
}  # fmt: skip


def folder_of(name: str) -> str:
    """The folder of a trained draft; those that read the same layers share held-out answers, beside it."""
    return f"{'chains' if name.partition('-seed-')[0] in _THREE_TAPS else 'blocks'}/{name}"
