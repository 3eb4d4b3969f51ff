"""What is written for each engine, key by key and field by field, and what is refused for it.

The expectations are spelled out here, not taken from the tables that the export reads.
"""

import dataclasses
import importlib
import json
import re
import sys

import pytest
from small_drafts import config_of, random_params, vocab_of, write_export
from test_contracts import DEEPSEEK_FIELDS, DRAFTS, TARGET_HF, V, W, target_config
from test_export import E, common, llama_attention, mla_attention, qwen3_attention

from flaxdraft.algorithms import algorithm_of
from flaxdraft.algorithms.eagle3 import draft, drafts
from flaxdraft.algorithms.eagle3.serving import contract, layer_ids, terms
from flaxdraft.algorithms.eagle3.serving.kinds import engines, kind_of
from flaxdraft.algorithms.eagle3.serving.tensors import extras, weights
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.serving import lint
from flaxdraft.serving.contract import find_engine
from flaxdraft.serving.export import check_servable
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.serving.view import read_config, view_of_directory

DEFAULT_TAPS = (1, 3, 4)  # of the eight layers of TARGET_HF
DEEPSEEK_HF = TARGET_HF | DEEPSEEK_FIELDS | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
ATTENTION = {"llama": llama_attention, "mla": mla_attention, "qwen3": qwen3_attention}
PORTABLE_KINDS = ("llama", "mla")  # that SGLang and vLLM both serve
FC_NORM = {f"fc_norm.{i}.weight": (E,) for i in range(3)}
TABLES = {"d2t": (W,), "t2d": (V,)}
FULL_TABLES = {"d2t": (V,), "t2d": (V,)}
FULL_HEAD = {"lm_head.weight": (V, 32)}
SWITCHES = {"fc_norm": True, "norm_output": True}

# (draft, its vocabulary) -> what each engine gets besides the attention: tensors, or the reason of a refusal.
PORTABLE = {
    ("plain", W): common() | TABLES,
    ("plain", V): common() | FULL_HEAD,
    ("switches", W): common() | FC_NORM | TABLES,
    ("own width", W): common(40) | {"embed_tokens.weight": (V, 40)} | TABLES,
}
FIELDS = {
    "plain": {}, "switches": SWITCHES, "own width": {"hidden_size": 40}, "before fc": {"norm_before_fc": True},
    "before residual": {"norm_before_residual": True},
}  # fmt: skip
# Of speculators' switches, which engines read for Llama drafts alone, and not all of them.
BEFORE_FC = {("before fc", W): common() | {"input_norm.weight": (3 * E,)} | TABLES}
BEFORE_RESIDUAL = {("before residual", W): common() | TABLES}
NOT_BEFORE_FC, NOT_BEFORE_RESIDUAL = (
    {key: f"it ignores norm_before_{key[0].removeprefix('before ')}" for key in case}
    for case in (BEFORE_FC, BEFORE_RESIDUAL)
)
EXPECTED = {
    ("sglang", "llama"): PORTABLE | BEFORE_FC | NOT_BEFORE_RESIDUAL,
    ("sglang", "mla"): PORTABLE | NOT_BEFORE_FC | NOT_BEFORE_RESIDUAL,
    ("vllm", "llama"): PORTABLE | BEFORE_FC | BEFORE_RESIDUAL,
    ("vllm", "mla"): PORTABLE | NOT_BEFORE_FC | NOT_BEFORE_RESIDUAL,
    ("sglang-jax", "llama"): PORTABLE
    | NOT_BEFORE_FC
    | NOT_BEFORE_RESIDUAL
    | {("switches", W): "it ignores fc_norm", ("own width", W): "it takes the target's embedding .width 32. always"},
    ("sglang-jax", "mla"): dict.fromkeys(PORTABLE, "it serves no mla drafts"),
    ("tpu-inference", "llama"): PORTABLE
    | NOT_BEFORE_FC
    | BEFORE_RESIDUAL
    | {("plain", V): common() | FULL_HEAD | FULL_TABLES, ("switches", W): "it ignores fc_norm"},
    ("tpu-inference", "mla"): dict.fromkeys(PORTABLE, "it serves no mla drafts"),
    ("hf", "llama"): PORTABLE | BEFORE_FC | BEFORE_RESIDUAL | {("plain", V): common() | FULL_HEAD | FULL_TABLES},
    ("hf", "mla"): PORTABLE | {("plain", V): common() | FULL_HEAD | FULL_TABLES},
    ("vllm", "qwen3"): PORTABLE | BEFORE_FC | BEFORE_RESIDUAL,
    ("hf", "qwen3"): PORTABLE | BEFORE_FC | BEFORE_RESIDUAL | {("plain", V): common() | FULL_HEAD | FULL_TABLES},
    **{
        (engine, "qwen3"): dict.fromkeys(PORTABLE, "it serves no qwen3 drafts")
        for engine in ("sglang", "sglang-jax", "tpu-inference")
    },
}
ARCHITECTURE = {
    ("tpu-inference", "llama"): "Eagle3LlamaForCausalLM",
    **{(name, "llama"): "LlamaForCausalLMEagle3" for name in ("sglang", "vllm", "sglang-jax", "hf")},
    **{(name, "mla"): "Eagle3DeepseekV2ForCausalLM" for name in ("sglang", "vllm", "hf")},
    **{(name, "qwen3"): "Eagle3Qwen3ForCausalLM" for name in ("vllm", "hf")},
}
CASES = [(engine, kind, *case) for (engine, kind), cases in EXPECTED.items() for case in cases]


def write(directory, engine, kind, fields, vocab_size=W, *, tap_layers=DEFAULT_TAPS, target=TARGET_HF, dtype="float32"):
    config = config_of(kind, vocab_size, **fields)
    write_export(
        directory, DRAFTS[kind], config, random_params(kind, config), vocab_of(vocab_size), tap_layers=tap_layers,
        target=target, dtype=dtype, engine=engine,
    )  # fmt: skip
    return directory


def test_every_engine_and_draft_is_expected():
    assert EXPECTED.keys() == {(engine, kind) for engine in engines() for kind in DRAFTS}


def test_the_switches_are_the_draft_s():
    assert terms.SWITCHES == draft.SWITCHES


@pytest.mark.parametrize(("engine", "kind", "variant", "vocab_size"), CASES)
def test_every_key_and_shape(tmp_path, engine, kind, variant, vocab_size):
    expected = EXPECTED[engine, kind][variant, vocab_size]
    out = tmp_path / "out"
    if isinstance(expected, str):
        with pytest.raises(
            InputError, match=f"export for {re.escape(find_engine(contract, engine).title)}: {expected}"
        ):
            write(out, engine, kind, FIELDS[variant], vocab_size)
        assert not out.exists()
        return
    write(out, engine, kind, FIELDS[variant], vocab_size)
    tensors, config = load_safetensors(out / "model.safetensors"), read_config(out / "config.json")
    hidden = 40 if variant == "own width" else 32
    assert {key: array.shape for key, array in tensors.items()} == expected | ATTENTION[kind](hidden)
    assert config["architectures"] == [ARCHITECTURE[engine, kind]]
    assert config["tie_word_embeddings"] is False
    assert config["draft_vocab_size"] == vocab_size
    assert config["num_aux_hidden_states"] == 3
    assert config.get("target_hidden_size") == (E if variant == "own width" else None)
    assert None not in config.values()
    # The layout that the linter derives from config.json is the one written down here.
    tables = {key: extras(config)[key] for key in ("d2t", "t2d") if key in expected}
    assert weights(config, kind_of(config)) | tables == expected | ATTENTION[kind](hidden)


@pytest.mark.parametrize(("kind", "variant", "vocab_size"), [(k, *case) for k in PORTABLE_KINDS for case in PORTABLE])
def test_one_directory_satisfies_all_that_can_be_satisfied(tmp_path, kind, variant, vocab_size):
    """The default export: SGLang and vLLM always, sglang-jax for Llama drafts without the switches."""
    out = write(tmp_path / "out", "sglang", kind, FIELDS[variant], vocab_size)
    faithful = {v.name for v in lint.check(view_of_directory(out, TARGET_HF), contract) if v.loads and v.faithful}
    wanted = {lint.DIRECTORY, "sglang", "vllm"}
    assert faithful == wanted | ({"sglang-jax"} if kind == "llama" and variant == "plain" else set())


ROPES = {
    "default": RopeConfig("default", 5e5, 64),
    "llama3": RopeConfig("llama3", 5e5, 64, 8.0, 32, 1.0, 4.0),
    "yarn": RopeConfig("yarn", 5e5, 64, 4.0),
}


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("engine", ["sglang", "hf"])
def test_both_dialects_say_everything(tmp_path, kind, rope, engine):
    if kind not in PORTABLE_KINDS and engine != "hf":
        engine = "vllm"
    config = read_config(write(tmp_path / "o", engine, kind, {"rope": ROPES[rope]}) / "config.json")
    extra = {
        "default": {},
        "llama3": {
            "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
        # What the formula takes for absent values, written out: readers differ in that.
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.0},
    }[rope]  # fmt: skip
    assert config["rope_parameters"] == {"rope_type": rope, "rope_theta": 5e5, **extra}
    assert config["rope_theta"] == 5e5
    assert config.get("rope_scaling") == ({"rope_type": rope, **extra} if extra else None)


@pytest.mark.parametrize(
    ("outputs", "model", "nested", "top"),
    [
        ((1, 3, 4), TARGET_HF, [1, 3, 4], [2, 4, 5]),
        ((2, 4, 6), TARGET_HF, [2, 4, 6], [3, 5, 7]),
        ((1, 3, 4), DEEPSEEK_HF, [1, 3, 4], [2, 4, 5]),  # begins with 1: SGLang counts outputs there too
        ((2, 4, 6), DEEPSEEK_HF, [3, 5, 7], [3, 5, 7]),  # else inputs
    ],
)
def test_layer_ids_follow_the_targets_family(tmp_path, outputs, model, nested, top):
    out = write(tmp_path / "o", "sglang", "mla", {}, tap_layers=outputs, target=model)
    config = json.loads((out / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == nested
    assert config["eagle_aux_hidden_state_layer_ids"] == top
    assert layer_ids.outputs_of(config, layer_ids.is_deepseek(model)) == list(outputs)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "max_position_embeddings": 64, "factor": 4.0}
ROPE_REFUSALS = {
    "dynamic": (RopeConfig("dynamic", 1e4, 64, 2.0), "rope_type 'dynamic' is not what was trained"),
    "yarn factor": (RopeConfig(**YARN, attention_factor=1.2), "it ignores yarn's attention_factor"),
    "yarn mscale": (RopeConfig(**YARN, mscale=0.7, mscale_all_dim=1.3), "it ignores mscale 0.7 and mscale_all_dim 1.3"),
}


@pytest.mark.parametrize(
    ("engine", "kind", "fields", "changes", "reason"),
    [
        ("sglang", "mla", {"q_lora_rank": None}, {}, "an MLA draft without q_lora_rank cannot be served"),
        ("vllm", "mla", {"q_lora_rank": None}, {}, "an MLA draft without q_lora_rank cannot be served"),
        ("vllm", "mla", {"latent_norm_eps": 1e-6}, {}, "latent_norm_eps 1e-06 differs from rms_norm_eps 1e-05"),
        ("sglang", "llama", {}, {"tap_layers": (1, 3, 7)}, "layer 7 is the target's last"),
        # Input ids would begin with 1, which SGLang takes for output ids next to DeepSeek.
        ("sglang", "llama", {}, {"tap_layers": (0, 3, 6), "target": DEEPSEEK_HF}, r"the outputs of \[1, 4, 7\]"),
        ("sglang-jax", "llama", {}, {"tap_layers": (2, 4, 6)}, r"no field of the draft's, .* outputs of \[1, 3, 4\]"),
        ("tpu-inference", "llama", {}, {"tap_layers": (2, 4, 6)}, r"the draft was trained on \[2, 4, 6\]"),
        ("tpu-inference", "llama", {}, {"target": TARGET_HF | {"model_type": "qwen3"}}, "it taps no qwen3 targets"),
        (
            "tpu-inference",
            "llama",
            {},
            {"target": {}},
            "it taps llama targets alone, .* type is not known; give --target",
        ),
        ("tpu-inference", "llama", {"norm_output": True}, {}, "it ignores norm_output"),
        *(("vllm", "llama", {"rope": rope}, {}, reason) for rope, reason in ROPE_REFUSALS.values()),
    ],
)
def test_what_an_engine_cannot_serve_is_refused_with_the_reason(tmp_path, engine, kind, fields, changes, reason):
    with pytest.raises(InputError, match=reason):
        write(tmp_path / "o", engine, kind, fields, **changes)
    assert not list(tmp_path.iterdir())
    about = AboutTarget(changes.get("target", TARGET_HF), changes.get("tap_layers", DEFAULT_TAPS))
    with pytest.raises(InputError, match=reason):  # already before training
        check_servable(algorithm_of(DRAFTS[kind]), config_of(kind, **fields), about, engine)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab_size": 63}, "vocab_size is 64, the target's 63"),
        ({"hidden_size": 48}, "hidden_size is 32, the target's 48"),
    ],
)
def test_a_target_of_other_sizes_is_refused(tmp_path, change, reason):
    with pytest.raises(InputError, match=reason):
        write(tmp_path / "o", "sglang", "llama", {}, target=TARGET_HF | change)


def test_hf_keeps_what_no_engine_serves(tmp_path):
    fields = {"q_lora_rank": None, "latent_norm_eps": 1e-6, "rope": RopeConfig("dynamic", 1e4, 64, 2.0)}
    out = write(tmp_path / "o", "hf", "mla", fields, tap_layers=(0, 3, 7))
    config = read_config(out / "config.json")
    assert (config["q_lora_rank"], config["latent_norm_eps"]) == (None, 1e-6)  # transformers takes 1536 for absent
    assert "midlayer.self_attn.q_proj.weight" in load_safetensors(out / "model.safetensors")


def test_the_context_is_the_targets(tmp_path):
    fields = {"rope": RopeConfig("default", 1e4, 32)}  # half of it
    config = read_config(write(tmp_path / "o", "sglang", "llama", fields) / "config.json")
    assert config["max_position_embeddings"] == TARGET_HF["max_position_embeddings"]


def test_an_engine_is_found_by_its_name():
    assert find_engine(contract, "sglang-jax").layer_prefixes == ("midlayer.",)
    with pytest.raises(
        InputError, match="engine: no 'tensorrt'; known are hf, sglang, sglang-jax, tpu-inference, vllm"
    ):
        find_engine(contract, "tensorrt")


# A draft architecture of its own file: Llama's attention, told by a field that no other has.
GATED = """
import dataclasses

from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.algorithms.eagle3.serving.terms import Kind, Served
from flaxdraft.serving.fields import SIZE

ARCHITECTURES, MODEL_TYPES = ("GatedForCausalLMEagle3",), ()
make, name_table = llama.make, llama.name_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    gate_width: int = 8

    @classmethod
    def from_hf(cls, config):
        return dataclasses.replace(super().from_hf(config), gate_width=config["gate_width"])

    def to_hf(self):
        own = {"architectures": [*ARCHITECTURES], "model_type": "gated", "gate_width": self.gate_width}
        return super().to_hf() | own


SERVING = Kind(
    name="gated", title="gated Llama", architecture=ARCHITECTURES[0], model_type="gated",
    claims=lambda config: "gate_width" in config, fields={"gate_width": SIZE}, attention=llama.SERVING.attention,
    engines={"hf": Served(ARCHITECTURES)},
)
"""


@pytest.fixture
def gated(tmp_path, monkeypatch):
    (tmp_path / "drafts").mkdir()
    (tmp_path / "drafts" / "gated.py").write_text(GATED)
    monkeypatch.setattr(drafts, "__path__", [*drafts.__path__, str(tmp_path / "drafts")])
    yield importlib.import_module(f"{drafts.__name__}.gated")
    del sys.modules[f"{drafts.__name__}.gated"]


def test_a_draft_architecture_brings_what_serving_asks_of_it(tmp_path, gated):
    config = gated.Config(**gated.Config.for_target(target_config(), W), gate_width=6)
    what = gated, config, random_params("llama", config), vocab_of(W)
    where = {"tap_layers": DEFAULT_TAPS, "target": TARGET_HF}
    with pytest.raises(InputError, match=r"export for SGLang 0\.5\.23: it serves no gated drafts"):
        write_export(tmp_path / "out", *what, engine="sglang", **where)
    write_export(tmp_path / "out", *what, engine="hf", **where)
    loaded = from_pretrained(tmp_path / "out")
    assert (loaded.module, loaded.config) == (gated, config)
    view = view_of_directory(tmp_path / "out", TARGET_HF)
    found = {verdict.name: verdict for verdict in lint.check(view, contract)}
    assert found[lint.DIRECTORY].faithful
    assert {name for name, verdict in found.items() if not verdict.loads} == found.keys() - {lint.DIRECTORY}
    broken = dataclasses.replace(view, config={**view.config, "gate_width": "x"})
    assert "gate_width is 'x', expected a positive integer" in lint.check(broken, contract)[0].findings[0].what
