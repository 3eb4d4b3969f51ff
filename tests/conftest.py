"""Strict for every test: eight CPU devices, rank promotion raises, warnings are errors (pyproject.toml)."""

import warnings
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

with warnings.catch_warnings():
    # Raised inside orbax and its dependencies while they are imported; none of it is this project's code.
    warnings.simplefilter("ignore", DeprecationWarning)
    import orbax.checkpoint  # noqa: F401

from tiny import write_tiny_gguf  # noqa: E402 (devices are set first)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    """An eight-layer Llama with a byte-level tokenizer, as a GGUF file."""
    return write_tiny_gguf(tmp_path_factory.mktemp("target") / "tiny.gguf", num_layers=8)
