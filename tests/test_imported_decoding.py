"""A draft that another trainer wrote, imported and decoded with: it gains what its own formula predicts.

The pair of tests/agreeing.py is so made that the draft says the head's best row for the embedding of the token DISTANCE
back. That is computed here from the foreign file's own tensors, in numpy, and walked over the target's answers.
"""

import numpy as np
import pytest
from agreeing import DISTANCE, VOCAB, make_draft, make_target, prompts
from trainers_layouts import Source, nemo, specforge

from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.algorithms.eagle3.foreign.convert import convert
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.data.answers import answer_greedily
from flaxdraft.decode.decoding import Decoding, Settings
from flaxdraft.evaluate.loading import pair
from flaxdraft.evaluate.walk import walk
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import LoadedTarget

LAG = DISTANCE + 1  # of the token that decides, behind the one that is said
PROMPTS = [prompt for prompt in prompts(32) if len(prompt) > LAG]
LIMIT, STOP, CHAIN = 24, 7, 4


@pytest.fixture(scope="module")
def target():
    return make_target()


def predicted(tensors, config, embedding_VD, row):
    """Tokens that each target pass yields for one answer, by the trainer's layout alone: offsets to its own order of
    the draft's tokens, which is that of its head's rows."""
    ids = tensors["d2t"] + np.arange(config["draft_vocab_size"])
    said_V = ids[np.argmax(embedding_VD @ tensors["lm_head.weight"].T, axis=-1)]
    # Row p drafts the tokens p + 2, p + 3, ...
    hits = np.zeros(len(row.tokens), bool)
    hits[LAG:] = said_V[row.tokens[:-LAG]] == row.tokens[LAG:]
    accepted = [int(np.cumprod(hits[p + 2 : p + 2 + CHAIN]).sum()) for p in range(len(row.tokens))]
    return walk(accepted, row.num_prompt, row.num_answer)


@pytest.mark.parametrize("layout", [nemo, pytest.param(specforge, marks=pytest.mark.slow)])
def test_an_imported_draft_gains_what_its_formula_says(tmp_path, target, layout):
    draft = make_draft("llama", target)
    source = Source.of(draft, llama, VOCAB)
    tensors, config = layout(source)
    convert(tensors, config, tmp_path / "out", "there")
    out = tmp_path / "out"
    loaded = pair(out, from_pretrained(out), LoadedTarget(target, None, {}, tmp_path), Precision())
    rows = answer_greedily(target, PROMPTS, LIMIT, [STOP], len(PROMPTS), lambda num: None)
    decoded = Decoding(target, loaded.ready, PROMPTS, Settings(LIMIT, CHAIN, (STOP,))).finish()
    embedding = np.asarray(target.embedding())
    want = [predicted(tensors, config, embedding, row) for row in rows]
    assert [one.yields for one in decoded] == want
    lengths = np.concatenate(want)
    assert {1, 2, 3} <= set(lengths.tolist())  # runs of many lengths, not one answer to everything
    assert lengths.mean() > 1.5
