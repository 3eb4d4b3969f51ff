"""What a run trains on in place of the training prompts' answers, read before the target is asked anything: a file that
cannot be used costs no answers."""

from __future__ import annotations

import functools

from flaxdraft.data.documents import Documents
from flaxdraft.data.online import open_conversations
from flaxdraft.data.store import FeatureStore
from flaxdraft.data.templates import tokenizer_digest
from flaxdraft.errors import InputError
from flaxdraft.files.fetch import content_of
from flaxdraft.run.dates import answers_of
from flaxdraft.run.setup import Setup
from flaxdraft.run.target import RunTarget


@functools.cache
def given_documents(setup: Setup, target: RunTarget) -> Documents | None:
    """None where it trains on the answers.

    Raises:
        InputError: the store or the answers are of another target, tokenizer or template; conversations cannot be read
            or rendered.
    """
    data = setup.config.data
    if data.conversations is not None:
        template = answers_of(data.conversations).get("template", data.template)
        if template != data.template:
            raise InputError(
                f"data.template: found {data.template}, the target answered {data.conversations} with {template}; give "
                "the same, or let it answer again"
            )
        return open_conversations(data, target.tokenizer, target.config, target.template)
    if data.store is None:
        return None
    expected = {
        "target": content_of(str(target.opened.path), setup.config.target.sha256),
        "tokenizer": tokenizer_digest(target.tokenizer), "tap_layers": [*target.config.tap_layers],
        "template": data.template,
    }  # fmt: skip
    return FeatureStore(data.store, expected)
