"""vLLM, which has no Domino."""

from flaxdraft.algorithms.dflash.serving.engines import vllm
from flaxdraft.algorithms.domino.serving.terms import like

ENGINE = like(
    vllm.ENGINE, portable=False, refuses="it has no Domino: it would read the draft as DFlash's, without the head"
)
