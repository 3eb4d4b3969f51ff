"""An algorithm of another package goes through all that a run is, and nothing of this package was written for it.

It is as unlike EAGLE-3 as it can be: five taps, two layers, the whole vocabulary, rows drawn on the host, no teacher, a
schedule that is carried from step to step, and proposals that all come out of one pass.
"""

import json
import shutil
from pathlib import Path

import contracts
import jax
import numpy as np
import pytest
from flax import nnx
from test_contracts import TARGET_HF, target_config
from test_rejection import PROMPT, TOKENS, V, exact, excess, fill
from tiny_runs import call, make_workspace, metrics

from flaxdraft import algorithms
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.config import load_config
from flaxdraft.data.documents import Document
from flaxdraft.data.pipeline import collate
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.evaluate.walk import evaluate_teacher_forced, make_accepted
from flaxdraft.evaluate.walk_answers import featured
from flaxdraft.interfaces import Draw, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.run.draft_source import open_draft
from flaxdraft.targets import decoder
from flaxdraft.targets import llama as llama_target
from flaxdraft.train.state import split_draft

INSTALLED = Path(__file__).parent / "installed"  # as site-packages has it: the package, and its metadata
SECTION = "algorithm={name: blocky, block_size: 4, num_anchors: 6, gamma_steps: 5}"
RUN = (
    SECTION, "draft={}", "data.feature_dtype=float32", "train.num_steps=6", "train.schedule=constant",
    "train.learning_rate=2.0e-2", "train.length_buckets=1", "train.eval_every=6", "train.log_every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def installed():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(INSTALLED)
        yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("blocky"), tiny_gguf)


@pytest.fixture(scope="module")
def finished(installed, workspace):
    assert call(workspace, *RUN) == 0
    return workspace / "out" / "plain"


def said(capfd) -> str:
    return " ".join(capfd.readouterr().err.split())


def test_it_is_not_there_unless_installed(workspace):
    with pytest.raises(InputError, match=r"algorithm.name: no 'blocky' in flaxdraft.algorithms; found .*eagle3"):
        load_config(str(workspace / "run.yaml"), [SECTION])


@pytest.mark.usefixtures("installed")
def test_it_keeps_the_contract(tmp_path):
    contracts.assert_settings("blocky")
    pair = contracts.pairs()["blocky-plain"]
    contracts.assert_asks_well(pair.algorithm)
    contracts.assert_chooses_alike(algorithms.make(algorithms.settings_of("blocky")(num_anchors=2), packed=True))
    contracts.assert_trains(pair, target_config())
    contracts.assert_drafts(pair, target_config())
    contracts.assert_shares_or_says_so(pair.algorithm, pair.config(target_config()))
    contracts.assert_named(pair, target_config())
    contracts.assert_refuses_another_map(pair, target_config())
    contracts.assert_exports(pair, target_config(), TARGET_HF, tmp_path)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.blocksize=4", "run.yaml: unknown key 'algorithm.blocksize'; did you mean 'block_size'?"),
        ("algorithm.ttt_length=4", "run.yaml: unknown key 'algorithm.ttt_length'; known keys: name, block_size"),
        ("algorithm.block_size=1", "run.yaml: algorithm.block_size: found 1; input should be greater than or equal to"),
        ("algorithm.gamma=nan", "run.yaml: algorithm.gamma: found 'nan'; input should be a valid number"),
        ("draft.architecture=llama", "draft.architecture: no 'llama' in blocky.drafts; found plain"),
        ("draft.draft_vocab_size=64", "draft.draft_vocab_size: drafts of blocky know the target's whole vocabulary"),
        ("export.engine=sglang", "export.engine: no 'sglang'; known are hf"),
        ("evaluate.chain_length=4", "evaluate.chain_length: found 4, but such drafts of blocky propose at most 3"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused_as_ever(workspace, tmp_path, capfd, override, message):
    assert call(workspace, *RUN, f"output_dir={tmp_path}", override) == 2
    assert message in said(capfd)


def test_a_run_leaves_its_results(finished):
    result = json.loads((finished / "evaluation.json").read_text())["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
    assert result["teacher_forced"]["answers_with_the_decoded_passes"] == 4
    assert result["decoded"]["accept_length"] == result["teacher_forced"]["accept_length"] > 1.0
    lines = metrics(finished, "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["mean_weight"] > lines[0]["mean_weight"]  # gamma grows
    report = (finished / "report" / "report.md").read_text()
    for text in ("| mean weight | ", "| reached, chain of 3 | ", "| top-1 accuracy, chain of 3 | "):
        assert text in report
    assert "- draft: blocky, plain" in report
    config = json.loads((finished / "export" / "config.json").read_text())
    assert (config["block_size"], config["target_layer_ids"]) == (4, [1, 2, 4, 5, 6])
    card = (finished / "export" / "README.md").read_text()
    assert "Blocky draft for tiny.gguf" in card
    assert "2 layers of width 32, blocks of 4" in card


def test_an_export_is_read_again_as_what_it_was(finished):
    """Weights to the bit, taps, vocabulary, and the settings that the draft holds."""
    exported, trained = from_pretrained(finished / "export"), open_draft(finished, step="best")
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.draft.params)
    assert [*open_draft(finished / "export").target.tap_layers] == [*trained.target.tap_layers]
    assert exported.config == trained.draft.config
    assert exported.algorithm.settings.block_size == trained.draft.algorithm.settings.block_size == 4
    assert exported.vocab.draft_vocab_size == exported.vocab.vocab_size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["draft={fields: {block_size: 4}}"], "draft.fields.block_size: algorithm.block_size says it; leave it out"),
        (["draft={init_from: EXPORT}", "algorithm.block_size=5"],
         "algorithm.block_size: found 5, the draft at EXPORT has 4"),
    ],
)  # fmt: skip
def test_a_blocks_size_is_said_once(finished, workspace, tmp_path, capfd, overrides, message):
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    where = lambda text: text.replace("EXPORT", str(finished / "export"))  # noqa: E731
    assert call(workspace, *RUN, f"output_dir={tmp_path}", *map(where, overrides)) == 2
    assert where(message) in said(capfd)


@pytest.mark.usefixtures("installed")
def test_every_step_and_seed_draws_rows_of_its_own():
    algorithm, batch = (
        algorithms.make(algorithms.settings_of("blocky")(num_anchors=3), packed=True),
        contracts.batch_of(),
    )
    drawn = {
        algorithm.choose(batch, contracts.T, Draw(seed, step, 0)).rows_BA.tobytes()
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len(drawn) == 4


@pytest.mark.usefixtures("installed")
def test_it_is_given_what_it_needs_and_no_more():
    algorithm = algorithms.make(algorithms.settings_of("blocky")(), packed=True)
    taps, one = np.ones((9, 5, 4), np.float32), np.arange(9)
    document = Document(one, one > 2, Features(taps, taps[:, 0], one, taps[:, 0, 0]))
    features = collate([[document]], document.features, 2, 16, 8, algorithm, Draw(0, 0, 0)).features
    np.testing.assert_array_equal(features.taps_BTKE[0, :9], taps)
    assert (features.last_BTE, features.argmax_BT, features.logsumexp_BT) == (None, None, None)


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch):
    """From its third step: the rows that are drawn, the schedule and the weights."""
    shutil.copytree(finished.parent, tmp_path / "out", symlinks=True)

    def enough(*args):
        raise InputError("that was enough")

    monkeypatch.setattr("flaxdraft.run.run.evaluate_draft", enough)
    assert call(workspace, *RUN, f"output_dir={tmp_path / 'out'}", "train.resume=step 3") == 2
    again = tmp_path / "out" / "plain"
    assert (again / "checkpoints" / "6.superseded").is_dir()
    one, other = (open_draft(root, step="6").draft.params for root in (again, finished))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    steps = [[(m["step"], m["loss"], m["grad_norm"]) for m in metrics(root, "train")] for root in (again, finished)]
    assert steps[0] == steps[1]
    assert [step for step, _, _ in steps[0]] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def models(installed):
    """A target and a draft that say one of six tokens, and so often the same by chance."""
    sizes = {
        "vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 6, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    algorithm = algorithms.make(algorithms.settings_of("blocky")(block_size=4), packed=True)
    module = algorithms.architecture(algorithm.settings, "plain")
    config = llama_target.Config.from_hf(TARGET_HF | sizes, algorithm.tap_layers(6, (0, 1, 2, 3, 5)))
    groups = llama_target.groups(config, Precision(), Sharding.none())
    _, state = decoder.abstract_state(config, groups, Precision())
    target = decoder.build(config, groups, fill(state, 0, 1.5), Precision())
    draft = module.make(
        module.Config(**module.Config.for_target(config, V), block_size=4), VocabMap(np.arange(V), V), target,
        precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(0),
    )  # fmt: skip
    nnx.update(draft, fill(nnx.state(draft, nnx.Param), 1, 1.5))
    return algorithm, target, draft


def test_the_walk_is_greedy_decoding(models):
    """Pass by pass, over runs of every length."""
    algorithm, target, draft = models
    rng, chain = np.random.default_rng(0), 3
    prompts = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(48)]
    ready = ReadyDraft(*nnx.split(draft), algorithm.drafter())
    decoded = Decoding(target, ready, prompts, Settings(20, chain, (-1,))).finish()
    assert {gained for one in decoded for gained in one.yields} == set(range(1, chain + 2))
    texts = [([*prompt, *one.tokens], len(prompt)) for prompt, one in zip(prompts, decoded, strict=True)]
    rows = featured(target, texts, len(texts), 32)
    for row in rows:
        np.testing.assert_array_equal(row.features.argmax_BT[row.num_prompt - 1 : -1], row.tokens[row.num_prompt :])
    graphdef, params, frozen = split_draft(draft)
    evaluation = algorithm.drafting(chain)
    accepted = make_accepted(graphdef, evaluation, frozen, ())(params)
    forced = evaluate_teacher_forced(accepted, rows, evaluation, len(rows))
    assert forced.yields == [one.yields for one in decoded]


def test_sampled_answers_are_distributed_as_the_targets(models):
    algorithm, target, draft = models
    ready, num = ReadyDraft(*nnx.split(draft), algorithm.drafter()), 12_000
    decoded = Decoding(target, ready, [PROMPT] * num, Settings(TOKENS, 2, (-1,), temperature=1.0)).finish()
    yields = np.bincount([gained for one in decoded for gained in one.yields])
    assert (yields[1:] > num // 50).all()  # refused at once, after one token, and accepted whole
    assert excess([one.tokens for one in decoded], exact(target, 1.0)) < 4
