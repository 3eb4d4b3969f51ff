"""DFlash checkpoints of other trainers, written in the layouts that they document, imported: the same draft comes out,
and goes out again to the engines that serve it."""

import json

import numpy as np
import pytest
from commands import tool
from contracts import Pair
from flax import nnx
from test_contracts import TARGET_HF, V, target_config

from flaxdraft.algorithms import algorithm_of
from flaxdraft.algorithms.dflash.drafts import mla, qwen3
from flaxdraft.algorithms.importing import converter
from flaxdraft.algorithms.loading import abstract_params, from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.interfaces import VocabMap
from flaxdraft.serving import lint
from flaxdraft.serving.export import export
from flaxdraft.serving.foreign.report import Options
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.serving.view import view_of_directory

from_pytorch = tool("convert/from_pytorch")
TAPS, SIZE = [1, 2, 4, 5, 6], 24
OF_TRAINERS = {"auto_map", "transformer_layer_config", "speculators_config", "embed_requires_grad", "use_cache",
               "transformers_version", "dtype"}  # fmt: skip
IDS = np.sort(np.random.default_rng(5).permutation(V)[:SIZE])  # neither even nor contiguous


class Source:
    """A draft of this project, to be written as another trainer would."""

    def __init__(self, module=qwen3, **fields):
        self.module, self.config = module, Pair(algorithm_of(module), module).config(target_config(), **fields)
        rng, flat = np.random.default_rng(0), nnx.to_flat_state(abstract_params(module, self.config))
        self.params = nnx.from_flat_state(
            [(path, v.replace(rng.normal(size=v.shape).astype(np.float32))) for path, v in flat]
        )
        self.vocab = VocabMap(IDS if self.config.draft_vocab_size < V else np.arange(V), V)
        self.tensors = state_to_torch(self.params, module.name_table(self.config), np.float32)
        self.hf = self.config.to_hf()
        if (own := self.hf.get("dflash_config")) is not None:
            nested = {name: value for name, value in own.items() if name != "num_taps"}
            self.hf |= {"num_target_layers": 8, "dflash_config": nested | {"target_layer_ids": TAPS}}


def specforge(source):
    """Nulls, code of its own, one name of attention, layer types that say nothing, transformers' rotary object."""
    config = source.hf | {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "rope_scaling": None}
    config = {"sliding_window": None, "use_sliding_window": False} | config | {
        "max_window_layers": 2, "use_cache": True, "transformers_version": "5.2.0", "dtype": "bfloat16",
    }  # fmt: skip
    config["dflash_config"] = config["dflash_config"] | {"attention_mode": "gqa", "projector_type": None}
    return source.tensors, config


def specforge_mla(source):
    config = source.hf | {
        "rope_interleave": True,
        "dflash_config": source.hf["dflash_config"] | {"attention_mode": "mla"},
    }
    return source.tensors, config


def z_lab(source):
    """`model.` in front, the target's embedding and head inside, the old rotary fields alone; the size of a block and
    of the taps nested, as its later checkpoints have them."""
    tensors = {f"model.{name}": array for name, array in source.tensors.items()}
    tensors |= {"embed_tokens.weight": np.ones((V, 32), np.float32), "lm_head.weight": np.ones((V, 32), np.float32)}
    config = {name: value for name, value in source.hf.items() if name not in ("rope_parameters", "block_size")}
    config["dflash_config"] = config["dflash_config"] | {"block_size": source.config.block_size}
    return tensors, config


def swa(source):
    """Windows everywhere, in the words that vLLM alone reads."""
    config = {
        name: value for name, value in source.hf.items() if name not in ("layer_types", "sliding_window", "is_causal")
    }
    more = {"use_swa": True, "swa_window_size": source.config.sliding_window}
    return source.tensors, config | {"dflash_config": source.hf["dflash_config"] | more}


def speculators(source):
    """The layer's configuration nested, and only what differs from transformers' Qwen3; taps counted by input. Of a
    reduced vocabulary there are the rows of the target's head and the tables, of a whole one neither."""
    c = source.config
    layer = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "model_type": "qwen3",
    }  # fmt: skip
    if c.sliding_window is not None:
        layer |= {"sliding_window": c.sliding_window, "use_sliding_window": True, "layer_types": [*c.layer_types]}
    config = {
        "architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash", "speculators_version": "0.9.0",
        "draft_vocab_size": c.draft_vocab_size, "block_size": c.block_size, "target_hidden_size": None,
        "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in TAPS], "mask_token_id": c.mask_token_id,
        "sliding_window_non_causal": c.is_causal is False, "sample_from_anchor": c.sample_from_anchor,
        "transformer_layer_config": layer, "speculators_config": {"algorithm": "dflash"},
    }  # fmt: skip
    return source.tensors | tables_of(source), config


def tables_of(source):
    return source.vocab.tables() if source.config.draft_vocab_size < V else {}


def fused(source):
    """Projections joined, as an engine's own dump has them."""
    tensors = source.tensors | tables_of(source)
    for i in range(source.config.num_hidden_layers):
        for joined, parts in (("self_attn.qkv", ("self_attn.q", "self_attn.k", "self_attn.v")),
                              ("mlp.gate_up", ("mlp.gate", "mlp.up"))):  # fmt: skip
            for kind in ("weight", "bias"):
                names = [f"layers.{i}.{part}_proj.{kind}" for part in parts]
                if names[0] in tensors:
                    tensors[f"layers.{i}.{joined}_proj.{kind}"] = np.concatenate([*map(tensors.pop, names)])
    return tensors, source.hf


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
LAYOUTS = {
    "specforge": (specforge, qwen3, {}), "specforge, sliding": (specforge, qwen3, SLIDING),
    "specforge, mla": (specforge_mla, mla, {}), "z-lab": (z_lab, qwen3, {}), "fused": (fused, qwen3, {}),
    "fused, with biases": (fused, qwen3, {"attention_bias": True}),
    "windows everywhere": (swa, qwen3, SLIDING | {"layer_types": ["sliding_attention"] * 2, "is_causal": False}),
    "sinks and scales": (specforge, qwen3, {"attention_sink_bias": True, "attention_value_scale": 0.7,
                                            "output_multiplier": 0.5, "final_logit_softcapping": 20.0}),
    "speculators": (speculators, qwen3, {}),
    "speculators, reduced": (speculators, qwen3, {"draft_vocab_size": SIZE}),
    "speculators, sliding both ways": (speculators, qwen3, SLIDING | {"is_causal": False}),
    "speculators, from the anchor": (speculators, qwen3, {"sample_from_anchor": True}),
}  # fmt: skip


def imported(out, tensors, config, **options):
    return converter(config)(tensors, config, out, "there", Options(**options))


def imported_whole(out, tensors, config):
    """With every tensor accounted for, and nothing left that the trainer alone reads; the report and config.json."""
    report = imported(out, tensors, config)
    assert {row.key for row in report.rows} == set(tensors)
    assert all(row.became or row.reason for row in report.rows)
    written = json.loads((out / "config.json").read_text())
    assert not OF_TRAINERS & written.keys()
    assert None not in written.values()
    return report, written


def assert_same(directory, source):
    found = from_pretrained(directory)
    assert (found.module, found.config) == (source.module, source.config)
    np.testing.assert_array_equal(found.vocab.target_ids_W, source.vocab.target_ids_W)
    for (path, want), (_, got) in zip(
        nnx.to_flat_state(source.params), nnx.to_flat_state(found.params), strict=True
    ):  # fmt: skip
        np.testing.assert_array_equal(got[...], want[...], err_msg="/".join(map(str, path)))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_draft_which_engines_take_again(tmp_path, name):
    build, module, fields = LAYOUTS[name]
    source = Source(module, **fields)
    _, written = imported_whole(tmp_path / "in", *build(source))
    assert written["dflash_config"]["target_layer_ids"] == TAPS
    found = assert_same(tmp_path / "in", source)
    export(tmp_path / "out", found, AboutTarget(TARGET_HF, TAPS), dtype="float32", engine="hf")
    assert_same(tmp_path / "out", source)
    verdicts = lint.check(view_of_directory(tmp_path / "out", TARGET_HF), found.algorithm.serving())
    served = {verdict.name for verdict in verdicts if verdict.faithful}
    refuses = {"specforge, mla": {"sglang", "vllm"}, "speculators, from the anchor": {"sglang", "vllm"},
               "speculators, reduced": {"sglang"}}  # fmt: skip
    assert served == {lint.DIRECTORY, "sglang", "vllm"} - refuses.get(name, set())


def test_a_reduced_draft_goes_out_with_its_head_and_tables(tmp_path):
    source = Source(draft_vocab_size=SIZE)
    tensors, config = speculators(source)
    order = np.r_[SIZE - 2 : SIZE, 0 : SIZE - 2]
    turned = {"lm_head.weight": source.tensors["lm_head.weight"][order], "d2t": IDS[order]}
    report = imported(tmp_path / "in", tensors | turned, config)
    assert [remark for remark in report.remarks if "d2t" in remark or "lm_head" in remark] == [
        "d2t held target ids; offsets are written",
        "target ids did not ascend; lm_head's rows were sorted along with them",
    ]
    found = assert_same(tmp_path / "in", source)
    export(tmp_path / "out", found, AboutTarget(TARGET_HF, TAPS), dtype="float32", engine="vllm")
    written = load_safetensors(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written["d2t"] + np.arange(SIZE), IDS)
    np.testing.assert_array_equal(np.flatnonzero(written["t2d"]), IDS)
    np.testing.assert_array_equal(written["lm_head.weight"], source.tensors["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["draft_vocab_size"] == SIZE
    with pytest.raises(InputError, match=r"export for SGLang.*draft_vocab_size is 24 of 64: it knows no drafts"):
        export(tmp_path / "x", found, AboutTarget(TARGET_HF, TAPS), dtype="float32", engine="sglang")


@pytest.mark.parametrize(
    ("num_target", "num_layers", "taps"),
    [(36, 5, [1, 9, 17, 25, 33]), (64, 5, [1, 16, 31, 46, 61]), (36, 1, [18]), (8, 2, [1, 5])],
)
def test_taps_that_nobody_wrote_are_their_trainers(tmp_path, num_target, num_layers, taps):
    source = Source(num_hidden_layers=num_layers, num_taps=len(taps))
    config = source.hf | {"num_target_layers": num_target, "dflash_config": {"mask_token_id": 63}}
    report = imported(tmp_path / "in", source.tensors, config)
    assert json.loads((tmp_path / "in" / "config.json").read_text())["dflash_config"]["target_layer_ids"] == taps
    assert any(f"{taps}" in remark for remark in report.remarks)


def test_the_command_finds_the_algorithm(tmp_path, capsys):
    """Tables in numpy's files; a base that the user knows better."""
    source = Source(draft_vocab_size=SIZE)
    tensors, config = speculators(source)
    (tmp_path / "in").mkdir()
    for name in ("d2t", "t2d"):
        np.save(tmp_path / "in" / f"{name}.npy", tensors.pop(name))
    save_safetensors(tmp_path / "in" / "model.safetensors", tensors | {"verifier_norm.weight": np.ones(32, np.float32)})
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    assert from_pytorch.main([str(tmp_path / "in"), str(tmp_path / "out"), "--rope-theta", "5000"]) == 0
    said = capsys.readouterr().out
    for line in (
        "verifier_norm.weight  left out (the target's final norm", "a draft of speculators",
        "count inputs of layers: the outputs of [1, 2, 4, 5, 6]",
    ):  # fmt: skip
        assert line in said
    assert from_pretrained(tmp_path / "out").config.rope.rope_theta == 5000
    assert from_pytorch.main([str(tmp_path / "in"), str(tmp_path / "x"), "--recurrence", "pre-norm"]) == 2
    assert "--recurrence: a draft of blocks feeds no state back" in capsys.readouterr().err
    (tmp_path / "in" / "mask_embedding.pt").write_bytes(b"x")
    assert from_pytorch.main([str(tmp_path / "in"), str(tmp_path / "x")]) == 2
    assert "mask_embedding.pt: an embedding of its own for the mask token" in " ".join(capsys.readouterr().err.split())


def say(**fields):
    return lambda tensors, config: config.update(fields)


def add(name, *shape):
    return lambda tensors, config: tensors.update({name: np.ones(shape, np.float32)})


def drop(name):
    return lambda tensors, config: [source.pop(name, None) for source in (tensors, config)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("d2t"), "there: no d2t for 24 of 64 tokens"),
        (drop("lm_head.weight"), "there: no lm_head.weight, expected the 24 rows"),
        (add("lm_head.weight", 20, 32), "there: lm_head.weight has 20 rows, expected the 24 rows"),
        (drop("aux_hidden_state_layer_ids"), "no aux_hidden_state_layer_ids; write what the draft was trained with"),
        (drop("mask_token_id"), "no mask_token_id; write what the draft was trained with"),
        (say(aux_hidden_state_layer_ids=[0, 3]), r"\[0, 3\] taps the embedding"),
        (say(speculators_model_type="mtp", dflash_config={}), "speculators_model_type 'mtp', expected 'eagle3'"),
        (drop("transformer_layer_config"), "no transformer_layer_config"),
        (say(draft_vocab_size="many"), "there: config.json: draft_vocab_size is 'many', expected a positive integer"),
        (add("markov_head.markov_w1.weight", 64, 2), "markov_head.markov_w1.weight: another drafter of the family"),
        (add("layers.2.mlp.up_proj.weight", 48, 32), "of a layer more than num_hidden_layers says"),
        (add("layers.0.self_attn.q_proj.bias", 32), "q_proj.bias: a weight that such a layer does not have"),
        (add("surprise", 2), "surprise: an unknown name; it would have been lost"),
        (drop("fc.weight"), "there: the weights do not fit.* missing: fc.weight"),
    ],
)
def test_what_cannot_be_imported_is_an_error_and_leaves_nothing(tmp_path, change, message):
    tensors, config = map(dict, speculators(Source(draft_vocab_size=SIZE)))
    change(tensors, config)
    with pytest.raises(InputError, match=message):
        imported(tmp_path / "out", tensors, config)
    assert not list(tmp_path.iterdir())


def test_a_plain_config_must_say_its_mask_and_taps(tmp_path):
    source = Source()
    for nested, message in (
        ({"target_layer_ids": TAPS}, "no dflash_config.mask_token_id"),
        ({"mask_token_id": 63}, "neither dflash_config.target_layer_ids nor num_target_layers"),
    ):
        config = {name: value for name, value in source.hf.items() if name != "num_target_layers"}
        with pytest.raises(InputError, match=message):
            imported(tmp_path / "out", source.tensors, config | {"dflash_config": nested})
    config = source.hf | {"dflash_config": {"mask_token_id": 63}, "num_hidden_layers": None, "num_target_layers": 8}
    with pytest.raises(InputError, match="no num_hidden_layers; write how many"):
        imported(tmp_path / "out", source.tensors, config)
