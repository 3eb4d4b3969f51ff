"""The linter: one planted fault at a time in a directory that is right."""

import contextlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from commands import tool
from draft_changes import both, drop, field, nan, nothing, rename, tensor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_contracts import DEEPSEEK_FIELDS, TARGET_HF, V, W
from test_engine_contracts import SWITCHES, write

from flaxdraft.algorithms.eagle3.foreign.configs import understand
from flaxdraft.algorithms.eagle3.serving.fields import malformed
from flaxdraft.algorithms.loading import contract_of
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.serving import lint
from flaxdraft.serving.view import view_of_arrays

check = tool("convert/check")
Q_PROJ, NORM = "midlayer.self_attn.q_proj.weight", "midlayer.hidden_norm.weight"
IDS = "eagle_aux_hidden_state_layer_ids"
TARGET = TARGET_HF | {"rope_theta": 1e4}
DEEPSEEK = TARGET_HF | DEEPSEEK_FIELDS | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(tensors, config) of right directories."""
    root = tmp_path_factory.mktemp("good")
    made = {
        "llama": write(root / "llama", "sglang", "llama", {}),
        "mla": write(root / "mla", "sglang", "mla", {}),
        "full": write(root / "full", "sglang", "llama", {}, V),
        "switches": write(root / "switches", "sglang", "llama", SWITCHES),
    }
    return {
        name: (load_safetensors(path / "model.safetensors"), json.loads((path / "config.json").read_text()))
        for name, path in made.items()
    }


def one_place(place):
    return drop(IDS) if place == "eagle_config" else drop("eagle_config")


DIRECTORY = lint.DIRECTORY
GAPPED = np.arange(W) + 8 * (np.arange(W) >= 12)  # ids of a draft vocabulary
# name: draft, change, and {engine: (level, words)} that must be found.
FAULTS = {
    "d2t and t2d disagree": (
        "llama", tensor("t2d", np.isin(np.arange(V), np.arange(W) * 2 + 1)), {DIRECTORY: ("wrong", "different vocab")},
    ),
    "d2t holds ids": (
        "llama", both(tensor("d2t", GAPPED), tensor("t2d", np.isin(np.arange(V), GAPPED))),
        {DIRECTORY: ("wrong", "d2t holds target ids where offsets belong")},
    ),
    "d2t leaves the vocabulary": ("llama", tensor("d2t", np.arange(W) * 3), {DIRECTORY: ("wrong", "leave the target")}),
    "d2t twice": ("llama", tensor("d2t", -np.arange(W)), {DIRECTORY: ("wrong", "name a target token twice")}),
    "identity d2t": (
        "llama", both(tensor("d2t", np.zeros(W, np.int64)), tensor("t2d", np.arange(V) < W)),
        {DIRECTORY: ("wrong", f"the target's first {W}")},
    ),
    "no d2t": ("llama", drop("d2t", "t2d"), {
        "sglang": ("wrong", "token i is taken for target token i"), "vllm": ("wrong", "no d2t with 24 of 64"),
        "tpu-inference": ("refused", "no d2t"),
    }),
    "d2t not ascending": (
        "llama", tensor("d2t", lambda t: np.arange(W)[::-1] * 2 - np.arange(W)), {DIRECTORY: ("note", "do not ascend")},
    ),
    "d2t without a mask": ("llama", drop("t2d"), {DIRECTORY: ("note", "no t2d tells")}),
    "d2t for the whole vocabulary": (
        "full", both(tensor("d2t", np.zeros(V, np.int64)), tensor("t2d", np.ones(V, bool))),
        {"vllm": ("refused", "stops at d2t")},
    ),
    "one dialect, new": ("llama", both(drop("rope_theta"), field("rope_parameters", {"rope_theta": 5e5})), {
        "sglang-jax": ("wrong", "no rope_theta, so it turns with default RoPE of base 10000 instead of default, 5"),
    }),
    "another base than the target": (
        "llama", both(field("rope_theta", 5e5), field("rope_parameters", {"rope_type": "default", "rope_theta": 5e5})),
        {DIRECTORY: ("wrong", "rope_theta is 500000, the target's 10000")},
    ),
    "layer ids in eagle_config alone": ("llama", both(
        one_place("eagle_config"), field("eagle_config", {IDS: [2, 4, 6]})), {
            DIRECTORY: ("note", "in the eagle_config and not in the top level"),
            "vllm": ("wrong", r"hence the outputs of [1, 3, 4]; the draft was trained on [2, 4, 6]"),
        }),
    "layer ids at the top alone": ("llama", both(one_place("top"), field(IDS, [3, 5, 7])), {
        DIRECTORY: ("note", "in the top level and not in the eagle_config"),
        "sglang": ("wrong", "trained on [2, 4, 6]"),
    }),
    "layer ids that disagree": ("llama", field(IDS, [1, 3, 4]), {DIRECTORY: ("wrong", "different states")}),
    "layer ids out of order": ("llama", field(IDS, [5, 2, 4]), {DIRECTORY: ("wrong", "are not 3 ascending")}),
    "norm_output of an unknown trainer": ("switches", drop("draft_trainer"), {
        DIRECTORY: ("wrong", "SpecForge trains on the state before the norm"),
    }),
    "switches": ("switches", nothing, {
        "sglang-jax": ("wrong", "it ignores fc_norm"), "tpu-inference": ("wrong", "it ignores norm_output"),
    }),
    "SGLang's name of fc_norm": ("switches", both(drop("fc_norm"), field("use_aux_norm", True)), {
        "vllm": ("wrong", "does not read use_aux_norm"),
    }),
    "norm_before_residual": ("llama", field("norm_before_residual", True), {
        "sglang": ("wrong", "it ignores norm_before_residual"),
    }),
    "a short context": ("llama", field("max_position_embeddings", 32), {
        DIRECTORY: ("wrong", "max_position_embeddings is 32, the target's 64"),
    }),
    "no context": ("llama", drop("max_position_embeddings"), {DIRECTORY: ("wrong", "readers take 2048")}),
    "nulls": ("llama", field("rope_scaling", None), {DIRECTORY: ("note", "null in config.json: rope_scaling")}),
    "target_hidden_size null": ("llama", field("target_hidden_size", None), {
        "sglang": ("refused", "target_hidden_size is null"), "vllm": ("refused", "target_hidden_size is null"),
    }),
    "draft_vocab_size absent": ("full", drop("draft_vocab_size"), {"sglang": ("refused", "has no draft_vocab_size")}),
    "NaN": ("llama", tensor("fc.weight", nan), {DIRECTORY: ("wrong", "NaN or infinity in fc.weight")}),
    "float64": ("llama", tensor("fc.weight", lambda t: t["fc.weight"].astype(np.float64)), {
        DIRECTORY: ("wrong", "fc.weight stored as float64"),
    }),
    "a dtype that the config does not say": ("llama", field("torch_dtype", "bfloat16"), {
        DIRECTORY: ("note", "config.json says bfloat16, the weights are float32"),
    }),
    "sizes that are not so": ("llama", field("intermediate_size", 52), {
        DIRECTORY: ("refused", "midlayer.mlp.gate_proj.weight (48, 32), config.json says (52, 32)"),
    }),
    "a vocabulary that is not so": ("llama", field("draft_vocab_size", 25), {
        DIRECTORY: ("refused", "lm_head.weight (24, 32), config.json says (25, 32)"),
    }),
    "another target": ("llama", both(field("vocab_size", 128), tensor("t2d", lambda t: np.pad(t["t2d"], (0, 64)))), {
        DIRECTORY: ("refused", "vocab_size is 128, the target's 64"),
    }),
    "model. prefix": ("llama", rename("", "model."), {
        "vllm": ("refused", "it stops at model."), "tpu-inference": ("refused", "it stops at model."),
        "sglang-jax": ("refused", "and stops without"),
    }),
    "model. prefix of an MLA draft": ("mla", rename("", "model."), {
        "sglang": ("wrong", "it passes over model."), "vllm": ("refused", "it stops at model."),
    }),
    "layers.0 prefix": ("llama", rename("midlayer.", "layers.0."), {
        "sglang-jax": ("wrong", "it never looks at layers.0."), "tpu-inference": ("refused", "it stops at layers.0."),
    }),
    "an unknown key": ("llama", tensor("midlayer.self_attn.q_norm.weight", np.ones(8, np.float32)), {
        "sglang": ("wrong", "it passes over midlayer.self_attn.q_norm"),
        "vllm": ("refused", "it stops at midlayer.self_attn.q_norm"),
        "sglang-jax": ("wrong", "it never looks at midlayer.self_attn.q_norm"),
    }),
    "biases": ("llama", tensor("midlayer.self_attn.o_proj.bias", np.ones(32, np.float32)), {
        "sglang": ("wrong", "it passes over midlayer.self_attn.o_proj.bias"),
        "vllm": ("wrong", "it passes over midlayer.self_attn.o_proj.bias"),
    }),
    "an embedding that is the target's": ("llama", tensor("embed_tokens.weight", np.ones((V, 32), np.float32)), {
        "vllm": ("note", "it keeps embed_tokens.weight where that differs"),
    }),
    "a missing key": ("llama", drop(NORM), {
        "sglang": ("wrong", f"serves with random values for {NORM}"),
        "sglang-jax": ("refused", f"stops without {NORM}"),
    }),
    "no head of its own": ("llama", drop("lm_head.weight"), {"vllm": ("wrong", "random values for lm_head.weight")}),
    "tied": ("llama", field("tie_word_embeddings", True), {"sglang": ("wrong", "its head is then the embedding")}),
    "tied by default": ("llama", drop("tie_word_embeddings"), {"sglang-jax": ("wrong", "embeddings is absent")}),
    "attention_bias": ("llama", field("attention_bias", True), {"sglang": ("wrong", "it ignores attention_bias")}),
    "another class name": ("mla", field("architectures", ["DeepseekV3ForCausalLMEagle3"]), {
        "sglang": ("refused", "architectures names 'DeepseekV3ForCausalLMEagle3'"),
        "vllm": ("refused", "it knows Eagle3DeepseekV2"),
    }),
    "a plain query": ("mla", drop("q_lora_rank"), {"sglang": ("refused", "without q_lora_rank cannot be served")}),
    "half of yarn": ("mla", field("rope_parameters", {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0}), {
            "sglang": ("refused", "yarn without original_max"),
            "vllm": ("wrong", "one of mscale and mscale_all_dim absent"),
        }),
    "yarn that does not round": ("llama", field("rope_parameters", {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "truncate": False}), {"sglang": ("note", "truncate is false: vLLM reads it and SGLang does not")}),
    "two layers": ("llama", field("num_hidden_layers", 2), {
        "sglang-jax": ("refused", "it builds 1"), "sglang": ("wrong", "SGLang norms the residual stream"),
    }),
    "a width that hides fc": (
        "llama", both(field("hidden_size", 96), field("target_hidden_size", 32)),
        {"sglang": ("refused", "fc would be left out")},
    ),
    "the speculators form": ("llama", field("speculators_model_type", "eagle3"), {DIRECTORY: ("refused", "specul")}),
    "a config without sizes": ("llama", drop("hidden_size"), {DIRECTORY: ("refused", "hidden_size is None")}),
}  # fmt: skip


def verdicts_of(good, draft, change, target):
    tensors, config = ({**part} for part in good[draft])
    change(tensors, config)
    return {
        verdict.name: verdict for verdict in lint.check(view_of_arrays(config, tensors, target), contract_of(config))
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(good, fault):
    draft, change, expected = FAULTS[fault]
    verdicts = verdicts_of(good, draft, change, TARGET)
    for name, (level, words) in expected.items():
        found = [finding for finding in verdicts[name].findings if words in finding.what]
        assert [finding.level for finding in found] == [level], verdicts[name].findings
        assert found[0].mend
        if level != "note":
            assert not lint.passes([*verdicts.values()], [name])
        if level == "refused":
            assert not verdicts[name].loads


@pytest.mark.parametrize("draft", ["llama", "mla", "full", "switches"])
@pytest.mark.parametrize("target", [None, TARGET, DEEPSEEK], ids=["alone", "llama target", "deepseek target"])
def test_a_right_directory_has_nothing_amiss(good, draft, target):
    verdicts = verdicts_of(good, draft, nothing, target)
    assert lint.passes([*verdicts.values()])
    for name in ("sglang", "vllm", DIRECTORY):
        notes = verdicts[name].findings
        # Without a target nobody can tell whether a short context is its own.
        assert all("for the length of their rows" in note.what for note in notes), notes
        assert not notes or (name == DIRECTORY and target is None)


# What a broken writer may put anywhere.
ODD = st.none() | st.booleans() | st.integers(-2, 100) | st.floats() | st.text(max_size=3) | st.lists(
    st.integers(-2, 9) | st.text(max_size=2), max_size=4)  # fmt: skip
NAMES = [
    "architectures", "model_type", "hidden_size", "num_hidden_layers", "draft_vocab_size", "target_hidden_size",
    "fc_norm", "tie_word_embeddings", "max_position_embeddings", "rope_theta", "rope_parameters", "rope_scaling",
    "eagle_config", "q_lora_rank", "kv_lora_rank", "rms_norm_eps", "latent_norm_eps", "torch_dtype", "attention_bias",
    "vocab_size", IDS,
]  # fmt: skip
INSIDE = ["rope_type", "rope_theta", "factor", "mscale", "type", IDS, "layer_ids"]
FIELDS = st.dictionaries(st.sampled_from(NAMES), ODD | st.dictionaries(st.sampled_from(INSIDE), ODD), max_size=3)


def test_no_config_makes_the_linter_stumble(good):
    """Whatever stands in config.json, there is a verdict and no traceback; the importer raises InputError at most."""

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(draft=st.sampled_from(["llama", "mla"]), fields=FIELDS)
    @example(draft="llama", fields={"architectures": True})
    @example(draft="llama", fields={"architectures": [["LlamaForCausalLMEagle3"]]})
    def one(draft, fields):
        tensors, config = good[draft]
        verdicts = lint.check(view_of_arrays(config | fields, tensors, TARGET), contract_of(config | fields))
        assert verdicts[0].name == DIRECTORY
        lint.as_table(verdicts)
        json.dumps(lint.as_json(verdicts))
        if not malformed(config | fields):
            with contextlib.suppress(InputError):
                understand(config | fields, None, None, "there")

    one()


def test_sglang_counts_inputs_next_to_deepseek(good):
    ids = both(field("eagle_config", {IDS: [2, 4, 6]}), field(IDS, [3, 5, 7]))
    llama, deepseek = (verdicts_of(good, "llama", ids, target) for target in (TARGET, DEEPSEEK))
    assert llama[DIRECTORY].faithful
    assert llama["sglang"].faithful
    words = "hence the outputs of [1, 3, 5]; the draft was trained on [2, 4, 6]"
    assert any(words in finding.what for finding in deepseek["sglang"].findings)
    assert not deepseek[DIRECTORY].faithful
    assert deepseek["vllm"].faithful


@pytest.fixture
def on_disk(tmp_path, good):
    def put(draft="llama", change=nothing, target=TARGET):
        tensors, config = ({**part} for part in good[draft])
        change(tensors, config)
        directory = tmp_path / "draft"
        directory.mkdir(exist_ok=True)
        save_safetensors(directory / "model.safetensors", tensors)
        (directory / "config.json").write_text(json.dumps(config))
        (tmp_path / "target").mkdir(exist_ok=True)
        (tmp_path / "target" / "config.json").write_text(json.dumps(target))
        return [str(directory), "--target", str(tmp_path / "target")]

    return put


def test_the_old_dialect_of_rope_is_read_by_all(good):
    """vLLM, and tpu-inference with it, patches a top-level rope_theta into rope_parameters."""
    change = both(drop("rope_parameters"), field("rope_theta", 5e5))
    verdicts = verdicts_of(good, "llama", change, TARGET | {"rope_theta": 5e5})
    for name, verdict in verdicts.items():
        assert not [finding for finding in verdict.findings if "rope" in finding.what.lower()], name
    assert lint.passes([*verdicts.values()], ["vllm", "sglang"])


def test_an_embedding_that_is_not_the_targets_is_wrong(on_disk, tmp_path, capsys):
    arguments = on_disk()
    theirs = np.random.default_rng(0).normal(size=(V, TARGET_HF["hidden_size"])).astype(np.float32)
    save_safetensors(Path(arguments[2]) / "model.safetensors", {"model.embed_tokens.weight": theirs})
    for mine, code in ((theirs, 0), (theirs.astype(ml_dtypes.bfloat16), 0), (theirs[::-1].copy(), 1)):
        changed = on_disk(change=tensor("embed_tokens.weight", mine))
        capsys.readouterr()
        assert check.main([*changed, "--json"]) == code
        assert ("differs from the target's embedding in" in capsys.readouterr().out) == bool(code)
    assert check.main([*on_disk(change=tensor("embed_tokens.weight", np.array(1, np.float32))), "--json"]) == 1
    assert "embed_tokens.weight (), config.json says" in capsys.readouterr().out
    (Path(arguments[2]) / "model.safetensors").unlink()
    mine = tensor("embed_tokens.weight", theirs)
    unknown = TARGET | {"architectures": ["OddForCausalLM"], "model_type": "odd"}
    assert check.main([*on_disk(change=mine), "--json"]) == 0  # there are none
    assert "with which it could not be compared" in capsys.readouterr().out
    save_safetensors(Path(arguments[2]) / "model.safetensors", {"model.qweight": theirs})
    for target in (unknown, TARGET | {"quantization_config": {"quant_method": "awq", "bits": 4}}):
        assert check.main([*on_disk(change=mine, target=target), "--json"]) == 0
        assert "with which it could not be compared" in capsys.readouterr().out
        assert check.main([*on_disk(target=target), "--json"]) == 0
        assert "could not be" not in capsys.readouterr().out


def test_exit_codes_are_for_scripts(on_disk, capsys):
    assert check.main(on_disk()) == 0
    assert check.main([*on_disk(), "--engine", "tpu-inference"]) == 1  # it takes another name
    assert check.main(on_disk(change=tensor("fc.weight", nan))) == 1
    assert check.main(on_disk("mla")) == 0
    assert check.main([*on_disk("mla"), "--engine", "sglang-jax"]) == 1
    assert check.main([*on_disk(), "--engine", "tensorrt"]) == 2
    assert "known are" in capsys.readouterr().err
    assert check.main([*on_disk(), "--engine", "hf"]) == 2
    assert "hf serves nothing" in capsys.readouterr().err


def test_a_target_may_be_a_gguf_file(on_disk, tiny_gguf, capsys):
    directory = on_disk()[0]
    assert check.main([directory, "--target", str(tiny_gguf), "--json"]) == 1
    assert "vocab_size is 64, the target's 266" in capsys.readouterr().out


def test_the_table_and_json_say_the_same(on_disk, capsys):
    arguments = on_disk(change=field("max_position_embeddings", 32))
    assert check.main([*arguments, "--json"]) == 1
    found = {entry["engine"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["sglang"]["loads"]
    assert not found[DIRECTORY]["faithful"]
    assert found[DIRECTORY]["findings"][0]["mend"] == "write 64"
    check.main(arguments)
    table = capsys.readouterr().out
    for words in ("SGLang 0.5.23", "vLLM 0.33.0", "refused", "write 64", "nothing amiss"):
        assert words in table


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_files_are_read_in_every_type_and_number(on_disk, good, capsys, dtype):
    arguments = on_disk()
    tensors = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in good["llama"][0].items()}
    directory = Path(arguments[0])
    keys = list(tensors)
    for name, part in (("model", keys[:4]), ("more", keys[4:])):
        save_safetensors(directory / f"{name}.safetensors", {key: tensors[key] for key in part})
    assert check.main(arguments) == 0
    save_safetensors(directory / "again.safetensors", {keys[0]: tensors[keys[0]]})
    capsys.readouterr()
    assert check.main([*arguments, "--json"]) == 1
    assert f"two files hold {keys[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "expected an object, found list"),
        (lambda d: (d / "config.json").unlink(), "config.json: cannot be read"),
        (lambda d: (d / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"cut"), "not a readable safetensors file"),
    ],
)
def test_a_directory_that_cannot_be_read_is_told_apart(on_disk, capsys, damage, message):
    arguments = on_disk()
    damage(Path(arguments[0]))
    assert check.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        check.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for words in ("refused", "wrong", "note", "Exit code", "--json", "python tools/convert/check.py"):
        assert words in text
