"""SGLang, which serves no such drafts."""

from flaxdraft.algorithms.eagle3.serving.engines import sglang
from flaxdraft.algorithms.peagle.serving.terms import refusing

ENGINE = refusing(
    sglang.ENGINE, "it drafts one token after another and has nothing that proposes in one pass (its issue 23171)"
)
