"""tpu-inference, which serves no such drafts."""

from flaxdraft.algorithms.eagle3.serving.engines import tpu_inference
from flaxdraft.algorithms.peagle.serving.terms import refusing

ENGINE = refusing(tpu_inference.ENGINE, "it drafts one token after another with one layer, and stops at mask_hidden")
