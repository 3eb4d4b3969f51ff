"""Messages that refuse a target say how an engine helps, and what they say is so."""

import json
import re

import pytest
from test_contracts import target_hf
from tiny import write_tiny_gguf

from flaxdraft import targets
from flaxdraft.errors import InputError
from flaxdraft.files.gguf_file import GGUFCheckpoint
from flaxdraft.files.hugging_face import HFDirectory
from flaxdraft.files.through_an_engine import THROUGH_AN_ENGINE
from flaxdraft.targets import gemma3, llama
from flaxdraft.targets.text_side import open_text_side

UNKNOWN = {"architectures": ["NewForCausalLM"], "model_type": "new", "vocab_size": 64}
QUANTISED = {"quantization_config": {"quant_method": "awq"}}
PER_TENSOR = {"quantization_config": {"quant_method": "fp8"}}
WINDOW = {"use_sliding_window": True, "max_window_layers": 0}


def directory(path, config):
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return path


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (lambda d: targets.describe_target(str(directory(d, UNKNOWN))), "'NewForCausalLM'"),
        (lambda d: targets.open_target(str(directory(d, UNKNOWN))), "'NewForCausalLM'"),
        (lambda d: HFDirectory(directory(d, target_hf("llama") | QUANTISED)), "found 'awq'"),
        (lambda d: HFDirectory(directory(d, target_hf("llama") | PER_TENSOR)), "weight_block_size: found None"),
        (lambda d: HFDirectory(d), "other formats are not read"),
        (lambda d: GGUFCheckpoint(write_tiny_gguf(d / "a.gguf", num_layers=1, architecture="qwen2")), "'qwen2'"),
        (lambda d: llama.Config.from_hf(target_hf("llama") | WINDOW, ()), "use_sliding_window is true"),
        (lambda d: gemma3.Config.from_hf(target_hf("gemma3") | {"hidden_activation": "silu"}, ()), "hidden_activation"),
    ],
)
def test_a_refusal_names_the_way_through_an_engine(tmp_path, refused, said):
    (tmp_path / "config.json").write_text(json.dumps(target_hf("llama")))
    with pytest.raises(InputError, match=re.escape(said)) as error:
        refused(tmp_path)
    assert str(error.value).endswith(THROUGH_AN_ENGINE)


def test_what_asks_a_server_opens_a_target_that_is_refused(tmp_path):
    assert open_text_side(str(directory(tmp_path, UNKNOWN | QUANTISED))).num_tokens == 64
