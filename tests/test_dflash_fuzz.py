"""Whatever stands in a block draft's files, the linter gives a verdict, and the importer a draft or an `InputError`."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from fuzzing import LONG, fuzz
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_contracts import TARGET_HF, V
from test_dflash_import import SIZE, Source, speculators

from flaxdraft.algorithms.importing import converter
from flaxdraft.algorithms.loading import contract_of, from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import write_json
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.serving import lint
from flaxdraft.serving.view import view_of_arrays

KINDS = st.sampled_from(["sliding_attention", "full_attention"])
LIST = st.lists(st.integers(-2, 9) | st.text(max_size=2) | KINDS, max_size=4)
ODD = st.none() | st.booleans() | st.integers(-2, 100) | st.floats() | st.text(max_size=3) | LIST
BOTH = [
    "block_size", "sample_from_anchor", "attention_sink_bias", "attention_value_scale", "output_multiplier",
    "final_logit_softcapping", "use_swa", "swa_window_size", "is_causal", "mask_token_id", "num_taps",
    "aux_hidden_state_layer_ids",
]  # fmt: skip
NESTED = [*BOTH, "target_layer_ids", "causal", "projector_type", "attention_mode", "shift_label"]
LAYER = [
    "model_type", "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "layer_types",
    "sliding_window", "use_sliding_window", "attention_bias", "kv_lora_rank", "q_lora_rank", "max_position_embeddings",
]  # fmt: skip
TOP = [
    *BOTH, *LAYER, "architectures", "draft_vocab_size", "target_hidden_size", "num_target_layers", "dflash_config",
    "transformer_layer_config", "speculators_model_type", "sliding_window_non_causal", "torch_dtype", "dtype",
]  # fmt: skip
TABLE = arrays.arrays(
    st.sampled_from([np.int64, np.int32, np.bool_, np.float32]), st.sampled_from([(SIZE,), (V,), (0,), (2, 2)])
)


def fields(names):
    return st.dictionaries(st.sampled_from(names), ODD, max_size=2)


@pytest.fixture(scope="module")
def sources():
    whole, reduced = Source(), Source(draft_vocab_size=SIZE)
    return [(whole.tensors, whole.hf), (reduced.tensors | reduced.vocab.tables(), reduced.hf), speculators(reduced)]


EXAMPLES = st.fixed_dictionaries({
    "which": st.integers(0, 2), "top": fields(TOP), "nested": fields(NESTED), "layer": fields(LAYER),
    "tables": st.dictionaries(st.sampled_from(["d2t", "t2d"]), TABLE, max_size=1),
})  # fmt: skip


@pytest.mark.parametrize("seconds", [4, LONG])
def test_any_draft_is_judged_and_read_or_refused(seconds, sources, tmp_path):
    def check(example):
        tensors, config = sources[example["which"]]
        tensors, config = tensors | example["tables"], dict(config)
        for name in ("dflash_config", "transformer_layer_config"):
            if name in config:
                config[name] = config[name] | example["nested" if name == "dflash_config" else "layer"]
        config |= example["top"]
        verdicts = lint.check(view_of_arrays(config, tensors, TARGET_HF), contract_of(config))
        lint.as_table(verdicts)
        json.dumps(lint.as_json(verdicts))
        with contextlib.suppress(InputError):
            converter(config)(tensors, config, tmp_path / "out", "there")
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        (tmp_path / "in").mkdir()
        save_safetensors(tmp_path / "in" / "model.safetensors", tensors)
        write_json(tmp_path / "in" / "config.json", config)
        with contextlib.suppress(InputError):
            from_pretrained(tmp_path / "in")

    assert fuzz(check, EXAMPLES, seconds) > 5 * seconds
