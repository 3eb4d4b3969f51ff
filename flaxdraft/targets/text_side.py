"""What of a target reads and writes text: its tokenizer, and what ends its answers.

It takes no weights, and no knowledge of the target's family: a command that asks servers opens nothing else.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxdraft.errors import InputError
from flaxdraft.files.fetch import fetch_text_side
from flaxdraft.files.gguf_file import GGUFCheckpoint
from flaxdraft.files.hugging_face import HFDescription
from flaxdraft.files.slow_tokenizers import how_to_convert

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextSide(abc.ABC):
    """Of a target whose files are at `path`, and can be read from `source`."""

    path: Path
    source: Any  # HFDescription or GGUFCheckpoint

    @property
    @abc.abstractmethod
    def num_tokens(self) -> int:
        """Rows of the target's embedding.

        Raises:
            InputError: the configuration does not say.
        """

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """
        Raises:
            InputError: its files cannot be read.
        """
        return self.source.tokenizer()

    def needed_tokenizer(self, with_template: bool = False) -> PreTrainedTokenizerFast:
        """
        Raises:
            InputError: there is none, or none with a chat template.
        """
        tokenizer = self.tokenizer
        if tokenizer is None or (with_template and not tokenizer.chat_template):
            mend, how = "give a file whose metadata hold it, or the model's Hugging Face directory", ""
            if self.path.is_dir():
                mend = "put the model's tokenizer.json and tokenizer_config.json there"
                how = how_to_convert(self.path) if tokenizer is None else ""
            raise InputError(
                f"target.path: {self.path} has no {'tokenizer' if tokenizer is None else 'chat template'}, which it "
                f"takes to ask the target; {mend}{'. ' * bool(how)}{how}"
            )
        return tokenizer

    @functools.cached_property
    def stop_tokens(self) -> list[int]:
        """What ends an answer: all that the configurations and the tokenizer name, as far as the target can write it.

        Raises:
            InputError: a configuration names no ids.
        """
        named = None if self.tokenizer is None else self.tokenizer.eos_token_id
        ends = [*self.source.end_tokens(), *(named if isinstance(named, list) else [named])]
        return sorted({end for end in ends if isinstance(end, int) and end < self.num_tokens})

    def needed_stop_tokens(self) -> list[int]:
        """
        Raises:
            InputError: there are none, so that no answer would end.
        """
        if not self.stop_tokens:
            raise InputError(
                f"target.path: {self.path} names no token that ends an answer; expected eos_token_id in its "
                "config.json or generation_config.json, an eos_token of its tokenizer, or the ids of a GGUF file's "
                "metadata"
            )
        return self.stop_tokens


@dataclasses.dataclass(frozen=True)
class TextSideAlone(TextSide):
    """Of a target that is not loaded here."""

    path: Path
    source: HFDescription | GGUFCheckpoint

    @property
    def num_tokens(self) -> int:
        config = self.source.config
        inner = config.get("text_config")
        found = (inner if isinstance(inner, dict) else config).get("vocab_size", config.get("vocab_size"))
        if type(found) is not int or found < 1:
            raise InputError(f"{self.path}: config.json: vocab_size: found {found!r}, expected the number of tokens")
        return found


def open_text_side(address: str) -> TextSideAlone:
    """
    Args:
        address: see `targets.from_pretrained`. Of a model on the hub no weights are fetched.

    Raises:
        InputError: the address leads nowhere, or the configuration cannot be read.
    """
    path = fetch_text_side(address)
    return TextSideAlone(path, HFDescription(path) if path.is_dir() else GGUFCheckpoint(path))
