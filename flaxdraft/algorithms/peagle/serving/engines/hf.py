"""No engine: the directory as transformers' configuration classes and other trainers read it."""

from flaxdraft.algorithms.eagle3.serving.engines import hf
from flaxdraft.algorithms.eagle3.serving.terms import SWITCHES, Served
from flaxdraft.algorithms.peagle.drafts.llama import ARCHITECTURES
from flaxdraft.algorithms.peagle.serving.terms import serving

ENGINE = serving(hf.ENGINE, Served(ARCHITECTURES, SWITCHES, model_prefix=True), None)
