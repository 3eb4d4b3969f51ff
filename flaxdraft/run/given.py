"""What a run trains on in place of the training prompts' answers, read before the target is asked anything: a file that
cannot be used costs no answers."""

from __future__ import annotations

from flaxdraft.config import RunConfig
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.documents import Documents
from flaxdraft.data.online import open_conversations
from flaxdraft.data.store import FeatureStore
from flaxdraft.data.templates import tokenizer_digest
from flaxdraft.files.fetch import content_of
from flaxdraft.run.dates import answers_of, check_answered_with, check_date
from flaxdraft.targets import OpenedTarget
from flaxdraft.targets.decoder import DecoderConfig


def open_given(
    config: RunConfig, opened: OpenedTarget, target: DecoderConfig, template: ChatTemplate
) -> Documents | None:  # fmt: skip
    """What a run trains on in place of the answers; None where it trains on them.

    Raises:
        InputError: the store or the answers are of another target, tokenizer or template; conversations cannot be read
            or rendered.
    """
    data, tokenizer = config.data, opened.needed_tokenizer(with_template=True)
    if data.conversations is not None:
        check_answered_with(data.conversations, data.template, "data.template")
        answers = answers_of(data.conversations)
        check_date(data.date, answers.get("date"), "data.date", data.conversations)
        return open_conversations(data, opened, template, bool(answers))
    if data.store is None:
        return None
    expected = {
        "target": content_of(str(opened.path), config.target.sha256), "tokenizer": tokenizer_digest(tokenizer),
        "tap_layers": [*target.tap_layers], "template": data.template,
    }  # fmt: skip
    store = FeatureStore(data.store, expected)
    check_date(data.date, store.date, "data.date", data.store)
    return store
