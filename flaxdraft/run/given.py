"""What a run trains on in place of the training prompts' answers, read before the target is asked anything: a file that
cannot be used costs no answers."""

from __future__ import annotations

from flaxdraft.config import RunConfig
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.documents import Documents
from flaxdraft.data.online import open_conversations
from flaxdraft.data.store import FeatureStore
from flaxdraft.data.templates import tokenizer_digest
from flaxdraft.errors import InputError
from flaxdraft.files.fetch import content_of
from flaxdraft.run.dates import answers_of
from flaxdraft.targets import OpenedTarget
from flaxdraft.targets.decoder import DecoderConfig


def open_given(
    config: RunConfig, opened: OpenedTarget, target: DecoderConfig, template: ChatTemplate
) -> Documents | None:  # fmt: skip
    """None where it trains on the answers.

    Raises:
        InputError: the store or the answers are of another target, tokenizer or template; conversations cannot be read
            or rendered.
    """
    data, tokenizer = config.data, opened.needed_tokenizer(with_template=True)
    if data.conversations is not None:
        answered = answers_of(data.conversations).get("template", data.template)
        if answered != data.template:
            raise InputError(
                f"data.template: found {data.template}, the target answered {data.conversations} with {answered}; give "
                "the same, or let it answer again"
            )
        return open_conversations(data, opened, template)
    if data.store is None:
        return None
    expected = {
        "target": content_of(str(opened.path), config.target.sha256), "tokenizer": tokenizer_digest(tokenizer),
        "tap_layers": [*target.tap_layers], "template": data.template,
    }  # fmt: skip
    return FeatureStore(data.store, expected)
