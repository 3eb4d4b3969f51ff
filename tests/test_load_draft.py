"""Drafts from directories: round trips, other writers' names, and what is refused."""

import json

import numpy as np
import pytest
from flax import nnx
from test_contracts import DRAFTS, V, W
from test_export import make_draft, params_of, write

from flaxdraft.algorithms.eagle3.serving.layer_ids import outputs_of
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.config import DraftConfig
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.interfaces import VocabMap
from flaxdraft.run.init_from import load_start

both = pytest.mark.parametrize("name", DRAFTS)


@pytest.fixture(scope="module")
def drafts():
    """One draft of each architecture, with both switches of EAGLE-3.1."""
    return {name: make_draft(module, fc_norm=True, norm_output=True) for name, module in DRAFTS.items()}


@pytest.fixture
def directory(tmp_path, drafts):
    """Writes a draft and gives (directory, change): change(tensors, config) edits what was written, in place."""

    def make(name, change=lambda tensors, config: None, draft=None):
        tensors, config = write(tmp_path, name, draft or drafts[name])
        change(tensors, config)
        save_safetensors(tmp_path / "export" / "model.safetensors", tensors)
        (tmp_path / "export" / "config.json").write_text(json.dumps(config))
        return tmp_path / "export"

    return make


def assert_same_params(got, want):
    flat = dict(nnx.to_flat_state(got))
    assert flat.keys() == dict(nnx.to_flat_state(want)).keys()
    for path, variable in nnx.to_flat_state(want):
        assert flat[path][...].dtype == np.float32
        np.testing.assert_array_equal(flat[path][...], variable[...], err_msg="/".join(map(str, path)))


@both
def test_an_exported_draft_comes_back_whole(directory, drafts, name):
    loaded = from_pretrained(directory(name), vocab=VocabMap(np.arange(W) * 2, V))
    assert loaded.module is DRAFTS[name]
    assert loaded.config == drafts[name].config
    assert_same_params(loaded.params, params_of(drafts[name]))
    np.testing.assert_array_equal(loaded.vocab.target_ids_W, np.arange(W) * 2)


@pytest.mark.parametrize("fields", [{"hidden_size": 40}, {"vocab_size": V}], ids=["own embedding", "full vocabulary"])
def test_drafts_of_other_kinds_come_back_whole(directory, fields):
    draft = make_draft(DRAFTS["llama"], **fields)
    loaded = from_pretrained(directory("llama", draft=draft))
    assert loaded.config == draft.config
    assert_same_params(loaded.params, params_of(draft))
    assert loaded.vocab.draft_vocab_size == draft.config.draft_vocab_size


@both
def test_other_writers_names_mean_the_same(directory, drafts, name):
    """`model.` before every key, `layers.0.` for the layer, SGLang's old names of the norms, a stored buffer and an
    embedding that servers would put the target's in place of; no t2d."""

    def rename(tensors, config):
        del tensors["t2d"]
        for key in list(tensors):
            if key == "d2t":
                continue
            new = key.replace("midlayer.", "layers.0.")
            for i, level in enumerate(("low", "mid", "high")):
                new = new.replace(f"fc_norm.{i}.", f"aux_norm_{level}.")
            tensors[f"model.{new}"] = tensors.pop(key)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["model.embed_tokens.weight"] = np.ones((V, 32), np.float32)
        config["use_aux_norm"] = config.pop("fc_norm")

    loaded = from_pretrained(directory(name, rename))
    assert loaded.config == drafts[name].config
    assert_same_params(loaded.params, params_of(drafts[name]))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "llama"),
        ({"architectures": ["Eagle3LlamaForCausalLM"], "model_type": None}, "llama"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "llama"),
        ({"architectures": None, "model_type": "llama"}, "llama"),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"], "model_type": "kimi_k2"}, "mla"),
        ({"architectures": ["Eagle3DeepseekV3ForCausalLM"]}, "mla"),
        ({"architectures": ["DeepseekV3ForCausalLMEagle3"], "model_type": None}, "mla"),
        ({"architectures": ["Unknown"], "model_type": "deepseek_v3"}, "mla"),
    ],
)
def test_the_config_names_the_module(directory, said, name):
    assert from_pretrained(directory(name, lambda tensors, config: config.update(said))).module is DRAFTS[name]


def test_weights_may_lie_in_several_files(directory, drafts):
    path = directory("llama")
    tensors = load_safetensors(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for i, keys in enumerate((list(tensors)[:5], list(tensors)[5:])):
        save_safetensors(path / f"model-{i}.safetensors", {key: tensors[key] for key in keys})
    assert_same_params(from_pretrained(path).params, params_of(drafts["llama"]))
    save_safetensors(path / "again.safetensors", {"model.norm.weight": tensors["norm.weight"]})
    with pytest.raises(InputError, match=r"second tensor that means norm.weight"):
        from_pretrained(path)


def setter(name, value):
    return lambda tensors, config: (config if name in config else tensors).update({name: value})


def remover(name):
    return lambda tensors, config: (config if name in config else tensors).pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remover("d2t"), rf"no d2t, but draft_vocab_size is {W} of {V} target tokens"),
        (setter("d2t", np.zeros(W - 1, np.int64)), rf"d2t has shape \({W - 1},\), expected \({W},\)"),
        # Absolute ids where offsets belong: some leave the vocabulary.
        (setter("d2t", np.arange(W) * 4), r"d2t holds no offsets .* leave the target vocabulary 0..63"),
        (setter("d2t", -np.arange(W)), r"d2t holds no offsets .* must ascend strictly, found 0 then 0"),
        (setter("t2d", np.ones(V, bool)), r"t2d is not the membership mask of d2t"),
        (remover("fc.weight"), r"missing: fc.weight"),
        (setter("midlayer.self_attn.q_norm.weight", np.ones(8, np.float32)), r"unexpected: midlayer.self_attn.q_norm"),
        (setter("fc.weight", np.ones((32, 64), np.float32)), r"wrong shape: fc.weight: found \(32, 64\), expected"),
        (setter("intermediate_size", 52), r"wrong shape: midlayer.mlp.gate_proj.weight: found"),
        (setter("num_hidden_layers", 2), r"num_hidden_layers is 2, expected 1"),
        (setter("tie_word_embeddings", True), r"tie_word_embeddings is true, expected false"),
        (lambda tensors, config: config.update(norm_before_fc=True, fc_norm=False), r"missing: input_norm.weight"),
        (lambda tensors, config: config["eagle_config"].update(norm_before_fc=True), r"found it true with fc_norm"),
        (remover("hidden_size"), r"config.json: no field 'hidden_size', which every flaxdraft\S+eagle3.drafts.llama"),
        (setter("vocab_size", None), r"draft.fields.vocab_size: found None, expected a positive integer"),
        (setter("draft_vocab_size", V + 1), r"draft_vocab_size: 65 is larger than the target's vocabulary 64"),
        (lambda tensors, config: config.update(architectures=["Mamba"], model_type="mamba"), r"'Mamba' .* is not supp"),
        (lambda tensors, config: config.update(architectures={"Mamba": 1}), r"architectures: found {'Mamba': 1}, "),
    ],
)  # fmt: skip
def test_a_draft_that_does_not_add_up_is_refused(directory, change, message):
    with pytest.raises(InputError, match=message):
        from_pretrained(directory("llama", change))


def test_a_directory_without_a_draft_is_refused(tmp_path, directory):
    with pytest.raises(InputError, match=r"no config.json; expected"):
        from_pretrained(tmp_path)
    path = directory("llama")
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: not valid JSON"):
        from_pretrained(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*.safetensors"):
        from_pretrained(path)


@pytest.mark.parametrize("other", [VocabMap(np.arange(W) * 2 + 1, V), VocabMap(np.arange(W + 1), V)])
def test_another_vocabulary_map_is_refused(directory, other):
    with pytest.raises(InputError, match=rf"its vocabulary map \({W} of {V} tokens\) is not the one given"):
        from_pretrained(directory("llama"), vocab=other)


def test_a_run_must_agree_with_the_draft_it_begins_from(directory):
    path = str(directory("llama"))
    assert load_start(DraftConfig(init_from=path), DRAFTS["llama"]).config.draft_vocab_size == W
    assert load_start(DraftConfig(init_from=path, draft_vocab_size=W), DRAFTS["llama"]).vocab.vocab_size == V
    with pytest.raises(InputError, match=rf"draft.draft_vocab_size: 9 was asked for, .* has {W}"):
        load_start(DraftConfig(init_from=path, draft_vocab_size=9), DRAFTS["llama"])
    with pytest.raises(InputError, match=r"draft.fields.head_dim: 9 was asked for, .* has 8"):
        load_start(DraftConfig(init_from=path, fields={"head_dim": 9}), DRAFTS["llama"])
    with pytest.raises(InputError, match=r"holds a llama draft, draft.architecture says mla"):
        load_start(DraftConfig(init_from=path, architecture="mla"), DRAFTS["mla"])


def test_tapped_layers_are_read_in_both_conventions():
    both_ways = {
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    }
    assert outputs_of(both_ways) == [1, 3, 4]
    assert outputs_of({"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}) == [1, 3, 4]
    only_sglang = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}}
    assert outputs_of(only_sglang) == [2, 4, 5]
    assert outputs_of(only_sglang, deepseek=True) == [1, 3, 4]  # it counts inputs there
    assert outputs_of({}) is None
