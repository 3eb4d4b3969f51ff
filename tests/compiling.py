"""Programs that compile fast and run slowly: of the default tests, and of small runs in processes of their own."""

import os

import jax

FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
if jax.__version_info__ < (0, 11):  # its kernels of fused loops are two thirds of compiling; later ones have no flag
    FAST["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
