"""Strict for every test: eight CPU devices, rank promotion raises, warnings are errors (pyproject.toml)."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

# The same programs are compiled by many tests, by the workers that share them out, and by the processes that some of
# them start: once a session is enough. FLAXDRAFT_TEST_CACHE names a folder that keeps them for the next session.
if "FLAXDRAFT_TEST_CACHE" not in os.environ:
    os.environ["FLAXDRAFT_TEST_CACHE"] = tempfile.mkdtemp(prefix="flaxdraft-compiled-")  # workers inherit it
    atexit.register(shutil.rmtree, os.environ["FLAXDRAFT_TEST_CACHE"], ignore_errors=True)
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": os.environ["FLAXDRAFT_TEST_CACHE"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

with warnings.catch_warnings():
    # Raised inside orbax and its dependencies while they are imported; none of it is this project's code.
    warnings.simplefilter("ignore", DeprecationWarning)
    import orbax.checkpoint  # noqa: F401

from compiling import FAST  # noqa: E402 (devices are set first)
from tiny import write_tiny_gguf  # noqa: E402

# Compiled programs are millions of objects that stay; the collector would look through them again and again.
gc.freeze()
gc.set_threshold(50_000, 20, 50)


def pytest_configure(config):
    if config.getoption("markexpr") != "gpu":
        jax.config.update("jax_platforms", "cpu")
    # The default tests compile far more than they compute; the slow ones see programs as users run them, but for small
    # runs in processes of their own (multiprocess/launch.py).
    if "not slow" in config.getoption("markexpr"):
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ |= FAST  # also of the processes that tests start


@pytest.fixture
def damaged_reads():
    """For tests that read damaged checkpoints, or write to a full disk: Orbax leaves its other reads or writes behind,
    whose warnings come when they are collected. That is here, where they are told apart from anybody else's."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        gc.collect()
        sys.unraisablehook = hook


def pytest_terminal_summary(terminalreporter):
    """What tests have to say of themselves (`record_property("note", ...)`), whichever worker ran them."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "note" and report.when == "call":
                    terminalreporter.write_line(f"{report.nodeid}: {value}")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    """An eight-layer Llama with a byte-level tokenizer, as a GGUF file."""
    return write_tiny_gguf(tmp_path_factory.mktemp("target") / "tiny.gguf", num_layers=8)
