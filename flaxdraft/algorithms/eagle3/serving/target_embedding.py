"""Whether the embedding in a draft's directory is the target's, where the target's weights can be read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flaxdraft.algorithms.eagle3.serving import tensors
from flaxdraft.algorithms.eagle3.serving.kinds import View
from flaxdraft.serving.finding import Finding

_ROWS = 4096  # compared at a time
_ROUNDING = 2.0**-7  # of bfloat16, relative


def embedding(view: View) -> Iterator[Finding]:
    """A draft of the target's width shares its embedding. Engines put the target's in the place of another one, or
    serve with what lies there, so that one of them serves another network whichever was trained."""
    hidden, target_hidden, vocab, _ = tensors.sizes(view.config)
    held = next((key for key in view.shapes if tensors.flat_name(key) == "embed_tokens.weight"), None)
    if held is None or view.target is None or hidden != target_hidden:
        return
    if view.shapes[held] != (vocab, hidden):  # sizes are another rule's
        return
    if view.target_rows is None:
        yield Finding(
            "note", "embed_tokens.weight lies here, and the target's embedding, with which it could not be compared, "
            "could not be read", "name a directory of the target with weights that are not quantised",
        )  # fmt: skip
        return
    ours, num_differing = view.read(held), 0
    for at in range(0, len(ours), _ROWS):
        mine = ours[at : at + _ROWS].astype(np.float32)
        theirs = view.target_rows(slice(at, at + _ROWS)).astype(np.float32)
        if mine.shape != theirs.shape:  # the target is of another size
            return
        num_differing += int((np.abs(mine - theirs) > _ROUNDING * np.abs(theirs) + 1e-6).any(axis=1).sum())
    if num_differing:
        yield Finding("wrong", f"embed_tokens.weight differs from the target's embedding in {num_differing} of "
                      f"{len(ours)} rows: vLLM would read tokens by it, SGLang by the target's",
                      "remove it, which all engines fill with the target's; a draft that was trained with an embedding "
                      "of its own cannot be served by all")  # fmt: skip
