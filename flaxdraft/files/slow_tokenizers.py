"""Tokenizers without tokenizer.json: how that file is made, where what lies there says so.

Nothing is converted here. What such files leave to a repository's code (tiktoken's split of a text, the ids of special
tokens) would have to be guessed, and a guess that is wrong is a tokenizer that nearly is the target's.
"""

from __future__ import annotations

import re
from pathlib import Path

_TIKTOKEN = (
    "{file} lies there, of which tokenizer.json is made so (pip install tiktoken; no code of the repository runs):\n"
    "    from transformers.convert_slow_tokenizer import TikTokenConverter\n"
    "    made = TikTokenConverter({path!r}, pattern=PATTERN, extra_special_tokens=SPECIAL)\n"
    "    made.converted().save({target!r})\n"
    "  PATTERN is the pat_str that the repository's tokenization_*.py writes down. SPECIAL is a list of the special "
    "tokens in the order of their ids, the first one behind the last rank of the file: those of added_tokens_decoder "
    "in tokenizer_config.json, and for an id that has none <|reserved_token_ID|>"
)
_OTHERS = (
    "{file} lies there, of which tokenizer.json is made so (pip install {packages}; no code of the repository runs):\n"
    "    from transformers import AutoTokenizer\n"
    "    AutoTokenizer.from_pretrained({folder!r}).save_pretrained({folder!r})"
)
_TEKKEN = (
    "{file} lies there, of which tokenizer.json is made so (pip install mistral-common; no code of the repository "
    "runs):\n"
    "    from transformers.integrations.mistral import convert_tekken_tokenizer\n"
    "    convert_tekken_tokenizer({path!r}).save_pretrained({folder!r})"
)
_PACKAGES = {
    **dict.fromkeys(("*.model", "*.model.v*", "*.spm"), "sentencepiece protobuf"),
    "vocab.json": "transformers", "vocab.txt": "transformers",
}  # fmt: skip


def how_to_convert(directory: Path) -> str:
    """What to do for a tokenizer.json; nothing where there is nothing to make it of."""
    for pattern in ("*.tiktoken", "*.model"):
        for file in filter(_is_tiktoken, sorted(directory.glob(pattern))):
            return _TIKTOKEN.format(file=file.name, path=str(file), target=str(directory / "tokenizer.json"))
    if (file := directory / "tekken.json").is_file():
        return _TEKKEN.format(file=file.name, path=str(file), folder=str(directory))
    for pattern, packages in _PACKAGES.items():
        for file in sorted(directory.glob(pattern)):
            return _OTHERS.format(file=file.name, packages=packages, folder=str(directory))
    return ""


def _is_tiktoken(file: Path) -> bool:
    """Whether a file has lines of a token in base64 and its rank, whatever it is called (Llama 3's is a
    tokenizer.model)."""
    with file.open("rb") as lines:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", lines.readline(4096)) is not None
