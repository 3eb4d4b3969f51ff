"""Checkpoints of other trainers, built in the layouts that they document (trainers_layouts.py), imported: the same
weights come out."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
from closeness import assert_close
from commands import tool
from flax import nnx
from test_contracts import V, W
from trainers_layouts import IDS, TRAINERS, Source, eagle, specforge, speculators

from flaxdraft.algorithms.eagle3.draft import SWITCHES
from flaxdraft.algorithms.eagle3.foreign.convert import convert
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.interfaces import VocabMap
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.serving.foreign.report import Options

from_pytorch = tool("convert/from_pytorch")


@pytest.fixture(scope="module")
def llama():
    return Source()


@pytest.fixture(scope="module")
def mla():
    return Source("mla")


@pytest.fixture(scope="module")
def qwen3():
    return Source("qwen3")


def assert_same(directory, source, vocab=None):
    loaded = from_pretrained(directory)
    assert loaded.module is source.module
    for field in ("hidden_size", "draft_vocab_size", "rope", "num_attention_heads", *SWITCHES):
        assert getattr(loaded.config, field) == getattr(source.config, field)
    np.testing.assert_array_equal(loaded.vocab.target_ids_W, (vocab or source.vocab).target_ids_W)
    for (path, want), (_, got) in zip(
        nnx.to_flat_state(source.params), nnx.to_flat_state(loaded.params), strict=True
    ):  # fmt: skip
        np.testing.assert_array_equal(got[...], want[...], err_msg="/".join(map(str, path)))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainers_layout_gives_the_same_draft(tmp_path, request, trainer):
    kind, build = TRAINERS[trainer]
    source = request.getfixturevalue(kind)
    tensors, config = build(source)
    report = convert(tensors, config, tmp_path / "out", "there")
    assert_same(tmp_path / "out", source)
    assert {row.key for row in report.rows} == set(tensors)  # every key accounted for
    assert all(row.became or row.reason for row in report.rows)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert None not in written.values()
    named = {"nemo": "nemo", "eagle": "eagle", "speculators": "speculators", "speculators qwen3": "speculators",
             "specforge mla": "specforge",
             "nemo mla": "nemo"}  # fmt: skip
    assert report.trainer == named.get(trainer)
    if "nemo" in trainer:
        assert "lm_head's rows were sorted along" in " ".join(report.remarks)


def test_layer_ids_and_nested_fields_of_speculators(tmp_path, llama):
    convert(*speculators(llama), tmp_path / "out", "there")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert written["architectures"] == ["LlamaForCausalLMEagle3"]
    assert not {"transformer_layer_config", "speculators_config", "target_hidden_size"} & written.keys()


# Values of d2t, t2d, and what they must be understood as: ids, or an error's words.
GAPPED = np.arange(W) + 8 * (np.arange(W) >= 12)


def mask(ids):
    return np.isin(np.arange(V), ids)


@pytest.mark.parametrize(
    ("d2t", "t2d", "meaning", "expected"),
    [
        (GAPPED - np.arange(W), mask(GAPPED), None, GAPPED),
        (GAPPED, mask(GAPPED), None, GAPPED),  # absolute, t2d tells
        (GAPPED - np.arange(W), None, None, GAPPED),  # as ids 0 would stand there twelve times
        (IDS + 0, None, "ids", IDS),
        (np.arange(W) + 1, None, None, "can be read as offsets and as target ids"),
        (np.arange(W) * 2 + 1, None, "ids", np.arange(W) * 2 + 1),
        (np.arange(W), None, "offsets", np.arange(W) * 2),
        (GAPPED, mask(GAPPED), "offsets", "d2t does not fit t2d as offsets"),
        (np.arange(W) * 0 + V, None, None, "fits a vocabulary of 64 neither as offsets nor as target ids"),
        (GAPPED - np.arange(W), mask(GAPPED + 1), None, "fits t2d neither as offsets nor as target ids"),
        (GAPPED[::-1] - np.arange(W), mask(GAPPED), None, GAPPED),  # the head's rows turn with them
        (GAPPED[1:], None, None, r"d2t and t2d have shapes \(23,\) and None, expected \(24,\)"),
        (None, None, None, "no d2t for 24 of 64 tokens"),
    ],
)
def test_d2t_is_understood_or_asked_about(tmp_path, llama, d2t, t2d, meaning, expected):
    tensors, config = specforge(llama)
    tables = {name: table for name, table in (("d2t", d2t), ("t2d", t2d)) if table is not None}
    tensors = {name: array for name, array in tensors.items() if name not in ("d2t", "t2d")} | tables
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            convert(tensors, config, tmp_path / "out", "there", Options(table=meaning))
        assert not list(tmp_path.iterdir())
        return
    convert(tensors, config, tmp_path / "out", "there", Options(table=meaning))
    written = load_safetensors(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written["d2t"] + np.arange(W), expected)
    head = tensors["lm_head.weight"]
    turned = np.array_equal(d2t, GAPPED[::-1] - np.arange(W))
    np.testing.assert_array_equal(written["lm_head.weight"], head[::-1] if turned else head)


def test_a_whole_vocabulary_loses_its_tables(tmp_path):
    source = Source(size=V)
    tables = {"d2t": np.zeros(V, np.int64), "t2d": np.ones(V, bool)}
    convert(source.tensors | tables, source.hf, tmp_path / "out", "there")
    assert_same(tmp_path / "out", source, VocabMap(np.arange(V), V))
    assert not {"d2t", "t2d"} & load_safetensors(tmp_path / "out" / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("trainer", "recurrence", "expected"),
    [
        ("nemo", None, True), ("speculators", None, None), ("specforge", None, False), (None, None, "cannot be told"),
        ("torchspec", None, "give --trainer, or --recurrence"), ("torchspec", "post-norm", True),
        (None, "pre-norm", False),
    ],
)  # fmt: skip
def test_norm_output_means_what_its_trainer_did(tmp_path, llama, trainer, recurrence, expected):
    if trainer == "speculators":
        tensors, config = speculators(llama)
        config, expected = config | {"norm_output": True}, True
    else:
        tensors, config = specforge(llama)
        config = config | {"norm_output": True}
    options = Options(trainer=trainer, recurrence=recurrence)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            convert(tensors, config, tmp_path / "out", "there", options)
        return
    convert(tensors, config, tmp_path / "out", "there", options)
    assert from_pretrained(tmp_path / "out").config.norm_output == expected


def test_the_norms_of_the_tapped_states_have_two_names(tmp_path):
    source = Source(fc_norm=True)
    old = dict(zip(("low", "mid", "high"), range(3), strict=True))
    tensors = {**source.tensors, **source.tables()}
    for level, i in old.items():
        tensors[f"aux_norm_{level}.weight"] = tensors.pop(f"fc_norm.{i}.weight")
    config = {name: value for name, value in source.hf.items() if name != "fc_norm"} | {"use_aux_norm": True}
    convert(tensors, config, tmp_path / "out", "there")
    assert_same(tmp_path / "out", source)


def test_a_draft_of_its_own_width_keeps_its_embedding(tmp_path):
    source = Source(hidden_size=40)
    report = convert(source.tensors | source.tables(), source.hf, tmp_path / "out", "there")
    assert_same(tmp_path / "out", source)
    assert ("embed_tokens.weight", "embed_tokens.weight", "") in report.rows
    tensors = {name: array for name, array in source.tensors.items() if name != "embed_tokens.weight"}
    with pytest.raises(InputError, match=r"there: the weights do not fit.*missing: embed_tokens.weight"):
        convert(tensors | source.tables(), source.hf, tmp_path / "other", "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_rotary_bases_that_trainers_ignore_are_pointed_out(tmp_path, llama):
    tensors, config = eagle(llama)
    report = convert(tensors, config | {"rope_theta": 5e5}, tmp_path / "a", "there")
    assert "that trainer builds its rotary embedding with 10000" in " ".join(report.remarks)
    assert from_pretrained(tmp_path / "a").config.rope.rope_theta == 5e5  # nothing is changed in silence
    convert(tensors, config | {"rope_theta": 5e5}, tmp_path / "b", "there", Options(rope_theta=1e4))
    assert from_pretrained(tmp_path / "b").config.rope.rope_theta == 1e4
    source = Source("mla", rope=RopeConfig("yarn", 5e4, 64, 4.0, 16))
    for trainer, pointed_out in (("torchspec", True), ("nemo", False)):
        report = convert(
            source.tensors | source.tables(), source.hf, tmp_path / trainer, "there", Options(trainer=trainer)
        )
        assert any("with 10000" in remark for remark in report.remarks) == pointed_out


def test_nemos_softmax_scale_is_made_up_for(tmp_path):
    """Scores there: (q.k) / sqrt(width) without YaRN's factors. Here: the factor on cos and sin is 1, mscale squared is
    on the scale, and in the queries divided out."""
    source = Source("mla", rope=RopeConfig("yarn", 1e4, 64, 4.0, 16, mscale=1.0, mscale_all_dim=0.0))
    convert(source.tensors | source.tables(), source.hf, tmp_path / "out", "there", Options(trainer="nemo"))
    loaded = from_pretrained(tmp_path / "out")
    rope = loaded.config.rope
    assert (rope.mscale, rope.mscale_all_dim) == (1.0, 1.0)
    squared = (0.1 * np.log(4.0) + 1) ** 2
    assert_close(rope.softmax_mscale(), squared, ulp=4)
    name = "midlayer.self_attn.q_b_proj.weight"
    written = load_safetensors(tmp_path / "out" / "model.safetensors")
    assert_close(written[name] * squared, source.tensors[name], ulp=4, of="each")


def add(name, value):
    return lambda tensors, config: tensors.update({name: value})


def say(**fields):
    return lambda tensors, config: config.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add("midlayer.self_attn.q_norm.weight", np.ones(8, np.float32)), "q_norm.weight: a Qwen3 layer with norms"),
        (add("layers.1.mlp.up_proj.weight", np.ones((48, 32), np.float32)), "a second layer; drafts here have one"),
        (add("mask_hidden", np.ones((1, 1, 96), np.float32)), "a parallel-drafting"),
        # However many keys of one sort there are, the others are named.
        (
            lambda tensors, config: tensors.update(
                dict.fromkeys([*(f"layers.1.{i}" for i in range(9)), "mask_hidden"])
            ),
            "layers.1.0, .* and 5 more: a second layer; drafts here have one; mask_hidden: a parallel-drafting",
        ),
        (add("fc.bias", np.ones(32, np.float32)), "fc.bias: a bias that is not zero"),
        (add("surprise.weight", np.ones(3, np.float32)), "surprise.weight: an unknown name; it would have been lost"),
        (
            add("model.norm.weight", np.ones(32, np.float32)),
            "model.norm.weight is the second tensor that means norm.weight",
        ),
        (add("midlayer.self_attn.qkv_proj.weight", np.ones((3, 64), np.float32)), "qkv_proj.weight: an unknown name"),
        (lambda tensors, config: tensors.pop("lm_head.weight"), "no lm_head.weight"),
        (lambda tensors, config: tensors.pop("fc.weight"), "there: the weights do not fit.* missing: fc.weight"),
        (say(draft_vocab_size=20), "lm_head.weight has 24 rows, config.json says draft_vocab_size 20 of 64"),
        (say(intermediate_size=52), "there: the weights do not fit .* wrong shape: midlayer.mlp.gate_proj.weight"),
        (say(norm_before_fc=True), "missing: input_norm.weight"),
        (add("input_norm.weight", np.ones(96, np.float32)), "that of norm_before_fc, which config.json does not name"),
        (say(embed_requires_grad=True), "embed_requires_grad is true"),
        (say(num_hidden_layers=2), "num_hidden_layers is 2, expected 1"),
        (say(hidden_size=None), "config.json: hidden_size is None, expected"),
        (say(speculators_model_type="eagle"), "speculators_model_type 'eagle', expected 'eagle3'"),
        (say(speculators_model_type="eagle3"), "no transformer_layer_config"),
    ],
)
def test_what_cannot_be_imported_is_an_error_and_leaves_nothing(tmp_path, llama, change, message):
    tensors, config = specforge(llama)
    change(tensors, config)
    with pytest.raises(InputError, match=message):
        convert(tensors, config, tmp_path / "out", "there")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nested", [False, True])
def test_speculators_norms_come_along(tmp_path, nested):
    """Trainers write the switches at the top or in eagle_config."""
    switches = {"norm_before_fc": True, "norm_before_residual": True}
    source = Source(**switches)
    if nested:
        config = {name: value for name, value in source.hf.items() if name not in switches}
        tensors, config = source.tensors | source.tables(), config | {"eagle_config": switches}
    else:
        tensors, config = speculators(source)
        config |= switches
    convert(tensors, config, tmp_path / "out", "there")
    assert_same(tmp_path / "out", source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert switches.items() <= written.items()


def test_speculators_must_say_where_the_residual_starts(tmp_path, llama):
    tensors, config = speculators(llama)
    del config["norm_before_residual"]
    with pytest.raises(
        InputError, match="no norm_before_residual, which engines read as true and the trainer as false"
    ):
        convert(tensors, config, tmp_path / "out", "there")


def test_specforge_without_a_norm_before_the_head_is_refused(tmp_path, llama):
    tensors, config = specforge(llama)
    with pytest.raises(InputError, match="norm_output is false, which SpecForge reads as no norm before the head"):
        convert(tensors, config | {"norm_output": False}, tmp_path / "out", "there", Options(trainer="specforge"))


def test_the_command_reads_files_and_lists_every_key(tmp_path, llama, capsys):
    """Several safetensors, the tables in numpy's files, bfloat16."""
    tensors, config = speculators(llama)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("d2t", "t2d"):
        np.save(source / f"{name}.npy", tensors.pop(name))
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    keys = list(narrow)
    for name, part in (("model-1", keys[:5]), ("model-2", keys[5:])):
        save_safetensors(source / f"{name}.safetensors", {key: narrow[key] for key in part})
    (source / "config.json").write_text(json.dumps(config))
    assert from_pytorch.main([str(source), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "layers.0.mlp.up_proj.weight  -> midlayer.mlp.up_proj.weight" in printed
    assert "verifier_norm.weight  left out (the target's final norm" in printed
    assert "a draft of speculators" in printed
    written = load_safetensors(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written["fc.weight"], narrow["fc.weight"])
    assert from_pretrained(tmp_path / "out").vocab.target_ids_W.tolist() == IDS.tolist()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "config.json: cannot be read"),
        (lambda d: (d / "config.json").write_text("{}"), "neither *.safetensors nor training_state.pt"),
        (lambda d: d.rmdir(), "cannot be read"),
    ],
)
def test_a_folder_that_holds_nothing_is_told_apart(tmp_path, capsys, prepare, message):
    source = tmp_path / "source"
    source.mkdir()
    prepare(source)
    assert from_pytorch.main([str(source), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_without_pytorch_its_files_are_refused_with_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert from_pytorch.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert 'pip install -e ".[convert]"' in capsys.readouterr().err


def test_an_existing_folder_that_is_no_draft_is_not_touched(tmp_path, llama):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="exists and is no draft's directory"):
        convert(*specforge(llama), tmp_path, "there")
    assert (tmp_path / "mine.txt").read_text() == "kept"
