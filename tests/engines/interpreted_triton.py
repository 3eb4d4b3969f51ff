"""Triton's interpreter in place of a GPU, for vLLM's newer runner, which alone has DSpark and DFlash2. It is imported
before vLLM.

vLLM's CPU build takes that runner where Triton has a backend called `cpu`, which no released Triton has. The
interpreter runs the same kernels in numpy, and asks only that masks be booleans.
"""

import os
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import backends
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def boolean(mask: TensorHandle) -> TensorHandle:
    return TensorHandle(mask.data.astype(bool), mask.dtype)


InterpreterBuilder.create_masked_load = lambda self, pointers, mask, *how: load(self, pointers, boolean(mask), *how)
InterpreterBuilder.create_masked_store = lambda self, pointers, values, mask, *how: store(
    self, pointers, values, boolean(mask), *how
)
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
