"""sglang-jax, which serves no such drafts."""

from flaxdraft.algorithms.eagle3.serving.engines import sglang_jax
from flaxdraft.algorithms.peagle.serving.terms import refusing

ENGINE = refusing(sglang_jax.ENGINE, "it drafts one token after another and never looks at mask_hidden")
