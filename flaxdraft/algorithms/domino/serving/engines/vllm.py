"""vLLM, which has no Domino."""

from flaxdraft.algorithms.dflash.serving.engines import vllm
from flaxdraft.algorithms.domino.serving.terms import Engine
from flaxdraft.serving.contract import like

ENGINE = like(
    vllm.ENGINE, Engine, portable=False,
    refuses="it has no Domino: it would read the draft as DFlash's, without the head",
)  # fmt: skip
