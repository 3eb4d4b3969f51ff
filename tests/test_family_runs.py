"""The whole command on a model directory of each target family that no other test takes through a run."""

import functools
import json

import pytest
from safetensors.numpy import save_file
from test_contracts import DEEPSEEK_FIELDS, TARGETS, target_hf
from tiny import random_weights
from tiny_runs import call, make_workspace

from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.gguf_file import GGUFCheckpoint
from flaxdraft.nn.precision import Precision

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("run"), tiny_gguf)


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory, tiny_gguf):
    """Of a family: a model directory with the tiny target's tokenizer."""

    @functools.cache
    def make(name: str):
        directory, family = tmp_path_factory.mktemp(name), TARGETS[name]
        tokenizer = GGUFCheckpoint(tiny_gguf).tokenizer()
        tokenizer.save_pretrained(directory)
        last = len(family.ARCHITECTURES) - 1
        hf = target_hf(name) | {
            "architectures": [family.ARCHITECTURES[last]], "model_type": family.MODEL_TYPES[last],
            "vocab_size": len(tokenizer), "max_position_embeddings": 128, "tie_word_embeddings": False,
            "eos_token_id": tokenizer.eos_token_id,
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(hf))
        config = family.Config.from_hf(hf)
        weights = random_weights(family, config, family.groups(config, Precision(), Sharding.none()))
        save_file(weights, directory / "model.safetensors")
        return directory

    return make


# Each with a draft.
FAMILIES = [
    ("deepseek", "mla"),
    ("deepseek", "llama"),
    ("qwen3_moe", "llama"),
    ("mistral", "llama"),
    ("gpt_oss", "llama"),
    ("gemma3", "llama"),
]


@pytest.mark.parametrize(("family", "architecture"), FAMILIES)
def test_a_model_directory_of_another_family(workspace, directory_of, tmp_path, family, architecture):
    few = ("train.num_steps=2", "train.eval_every=2", f"output_dir={tmp_path}", f"draft.architecture={architecture}")
    assert call(workspace, f"target.path={directory_of(family)}", *few) == 0
    evaluation = json.loads((tmp_path / architecture / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["identical_answers"] == evaluation["answers"] == 4
    config = json.loads((tmp_path / architecture / "export" / "config.json").read_text())
    if architecture == "mla":  # its ranks are the target's
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        assert {name: config[name] for name in names} == {name: DEEPSEEK_FIELDS[name] for name in names}
    elif family == "deepseek":
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (5, 5, 6)
    else:
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
