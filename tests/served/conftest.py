"""A target of which the text side alone is there, and a server that runs it."""

import pytest
from faulty_server import Said, serving
from small_targets import target_at

from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.talks import Answering, Asking
from flaxdraft.targets.text_side import open_text_side


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    """Its weights are not there."""
    path = target_at(tmp_path_factory.mktemp("target") / "t")
    (path / "model.safetensors").unlink()
    return path


@pytest.fixture(scope="session")
def text(target):
    opened = open_text_side(str(target))
    return Asking(opened.tokenizer, ChatTemplate(), opened.stop_tokens, Answering(150, 40))


@pytest.fixture(scope="session")
def answer(text):
    """What the servers' model says: something that depends on all of its prompt."""

    def said(prompt):
        words = f"After {len(prompt)}: {sum(prompt) % 97} <é>"
        return Said([*text.tokenizer(words, add_special_tokens=False)["input_ids"], text.stop_tokens[0]], words)

    return said


@pytest.fixture
def server(answer):
    with serving(answer) as server:
        yield server
