"""Programs that compile fast and run slowly: of the default tests, and of small runs in processes of their own."""

import os

import jax
import pytest

FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
if jax.__version_info__ < (0, 11):  # its kernels of fused loops are two thirds of compiling; later ones have no flag
    FAST["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

# XLA turns float8 into float16 on the way to float32. For CPUs that have no instruction for that (F16C) it calls a
# function, __extendhfsf2, which jaxlib lacks.
needs_float8 = pytest.mark.skipif(
    "max_isa=SSE" in os.environ.get("XLA_FLAGS", ""), reason="XLA cannot convert float8 for a CPU without F16C"
)
