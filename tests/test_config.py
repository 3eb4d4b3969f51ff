"""Run configurations: strict, and every message says what is wrong and where."""

from pathlib import Path

import pytest
import yaml

from flaxdraft.config import RunConfig, load_config
from flaxdraft.errors import InputError

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
SMALLEST = "output_dir: out\ntarget: {path: t.gguf}\ndata: {prompts: p.jsonl}\ntrain: {num_steps: 3}\n"


@pytest.fixture
def load(tmp_path):
    """load(text, *overrides) through a file run.yaml."""

    def load(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(str(path), list(overrides))

    return load


def refusal(load, *args) -> str:
    """The message, less the path of the file, which is the same in every one."""
    with pytest.raises(InputError) as caught:
        load(*args)
    return str(caught.value)


def test_the_quickstart_loads_as_written():
    written = yaml.safe_load(QUICKSTART.read_text())
    config = load_config(str(QUICKSTART), [])
    assert config.target.path == written["target"]["path"]
    assert config.train.learning_rate == float(written["train"]["learning_rate"])
    assert config.train.num_steps == written["train"]["num_steps"]
    assert (QUICKSTART.parents[1] / config.data.prompts).is_file()


def test_sections_left_out_take_their_defaults(load):
    config = load(SMALLEST)
    assert (config.draft.architecture, config.algorithm.ttt_length, config.mesh.data) == ("llama", 7, 1)
    assert config.export.engine == "sglang"
    assert config.draft_dir == Path("out/llama")
    assert load(SMALLEST, "name=first", "draft.architecture=mla").draft_dir == Path("out/first")
    assert load(SMALLEST, "draft.architecture=mla").draft_dir == Path("out/mla")


def test_another_algorithm_leaves_the_sections_of_the_files_own_aside(load):
    """Whatever comes first on the command line; a file's own algorithm keeps them."""
    text = SMALLEST + "draft: {architecture: llama, draft_vocab_size: 9}\nalgorithm: {ttt_length: 2}\n"
    for overrides in (
        ("algorithm.block_size=4", "algorithm.name=dflash"),
        ("algorithm.name=dflash", "algorithm.block_size=4"),
    ):
        config = load(text, *overrides)
        assert (config.algorithm.block_size, config.draft.architecture) == (4, "qwen3")
        assert "draft_vocab_size" not in config.draft.model_fields_set
    config = load(text, "algorithm.name=eagle3")
    assert (config.algorithm.ttt_length, config.draft.draft_vocab_size) == (2, 9)
    assert load(text.replace("{ttt", "{name: dflash, ttt"), "algorithm.name=eagle3").algorithm.ttt_length == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("3E-4", 3e-4), ("1.5e-3", 1.5e-3), ("2.e-2", 2e-2), ("+1e-2", 1e-2), ("1", 1.0), ("0.25", 0.25)],
)
def test_numbers_may_be_written_any_usual_way(load, text, value):
    got = load(SMALLEST, f"train.learning_rate={text}").train.learning_rate
    assert got == value
    assert isinstance(got, float)


def test_numbers_inside_lists_too(load):
    assert load(SMALLEST, "train.betas=[9e-1, 0.99]").train.betas == [0.9, 0.99]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "unknown key 'train.learning_rat'; did you mean 'learning_rate'?"),
        ("trian.num_steps=1", "unknown key 'trian'; did you mean 'train'?"),
        ("target.tap_layer=[0, 1, 2]", "unknown key 'target.tap_layer'; did you mean 'tap_layers'?"),
        ("mesh.zzz=1", "unknown key 'mesh.zzz'; known keys: data"),
        ("target.mesh.fsdpp=1", "unknown key 'target.mesh.fsdpp'; did you mean 'fsdp'?"),
        ("target.mesh.sequence=2", "unknown key 'target.mesh.sequence'; known keys: data, fsdp, tensor, expert"),
        ("target.dtype=float16", "target.dtype: found 'float16'; input should be 'bfloat16' or 'float32'"),
        ("train.num_steps=many", "train.num_steps: found 'many'; input should be a valid integer"),
        ("train.num_steps=2.0", "train.num_steps: found 2.0; "),
        ("train.num_steps=0", "train.num_steps: found 0; input should be greater than or equal to 1"),
        ("train.learning_rate=fast", "train.learning_rate: found 'fast'; input should be a valid number"),
        ("train.learning_rate=true", "train.learning_rate: found True; input should be a valid number"),
        ("train.learning_rate=0", "train.learning_rate: found 0; input should be greater than 0"),
        ("train.learning_rate=.nan", "train.learning_rate: found nan; input should be greater than 0"),
        ("train.betas=[0.9]", "train.betas: found [0.9]; list should have at least 2 items"),
        ("train.betas=[0.9, x]", "train.betas.1: found 'x'; input should be a valid number"),
        (
            "train.compute_dtype=float64",
            "train.compute_dtype: found 'float64'; input should be 'float32' or 'bfloat16'",
        ),
        ("target.tap_layers=[]", "target.tap_layers: found []; list should have at least 1 item"),
        ("target.path=", "target.path: found None; input should be a valid string"),
        ("target.path=''", "target.path: found ''; string should have at least 1 character"),
        ("draft.warm_start=1", "draft.warm_start: found 1; input should be a valid boolean"),
        ("algorithm.ttt_length=0", "algorithm.ttt_length: found 0; input should be greater than or equal to 1"),
        ("algorithm.step_decay=1.5", "algorithm.step_decay: found 1.5; input should be less than or equal to 1"),
        (
            "draft=llama",
            "draft: found 'llama'; expected a section with some of the keys architecture",
        ),
        ("train=[1]", "train: found [1]; expected a section with some of the keys num_steps, batch_size"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(load, override, message):
    text = refusal(load, SMALLEST, override)
    assert f"run.yaml: {message}" in text
    assert "\n" not in text


@pytest.mark.parametrize("missing", ["output_dir", "target", "data", "train"])
def test_a_missing_section_is_named(load, missing):
    raw = yaml.safe_load(SMALLEST)
    del raw[missing]
    assert refusal(load, yaml.safe_dump(raw)).endswith(f"run.yaml: {missing} is missing")


def test_every_problem_is_listed(load):
    text = refusal(load, "output_dir: 3\ntarget: {pth: t}\ndata: {prompts: p}\ntrain: {num_steps: x}\nsede: 1\n")
    lines = [line.partition("run.yaml: ")[2] for line in text.splitlines()]
    assert sorted(lines) == [
        "output_dir: found 3; input should be a valid string",
        "target.path is missing",
        "train.num_steps: found 'x'; input should be a valid integer",
        "unknown key 'sede'; did you mean 'seed'?",
        "unknown key 'target.pth'; did you mean 'path'?",
    ]


def test_overrides_reach_into_sections_and_make_new_ones(load):
    config = load(
        SMALLEST, "train.num_steps=5", "evaluate.chain_length=2", "draft.fields.hidden_size=96", "seed=7",
        "data.prompts=a=b.jsonl", "train.num_steps=6",
    )  # fmt: skip
    assert (config.train.num_steps, config.evaluate.chain_length, config.seed) == (6, 2, 7)
    assert config.draft.fields == {"hidden_size": 96}
    assert config.data.prompts == "a=b.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_steps", "override 'train.num_steps': expected section.field=value"),
        ("=3", "override '=3': expected section.field=value"),
        ("target.path.file=x", "override 'target.path.file=x': path is not a section"),
        ("train.betas=[1", "override 'train.betas=[1': '[1' is not a YAML value"),
        ("name=2024-13-45", "is not a YAML value"),
    ],
)
def test_a_bad_override_is_quoted(load, override, message):
    with pytest.raises(InputError) as caught:
        load(SMALLEST, override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML: "),
        ("a: b: c\n", "not valid YAML: mapping values are not allowed here"),
        ("x: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine a constructor"),
        ("- a\n", "expected a mapping of sections (target, data, train, ...), found list"),
        ("", "expected a mapping of sections (target, data, train, ...), found nothing"),
        (SMALLEST + "name: 2024-13-45\n", "not valid YAML: "),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused(load, text, message):
    with pytest.raises(InputError) as caught:
        load(text)
    assert f"run.yaml: {message}" in str(caught.value)


def test_unreadable_files_say_why(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xe9\n")
    for path, why in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), (latin, "not UTF-8 text")):
        with pytest.raises(InputError) as caught:
            load_config(str(path), [])
        assert f"{path}: cannot be read ({why}" in str(caught.value).replace("(Is a directory", "(directory")
