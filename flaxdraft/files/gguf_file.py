"""GGUF files of the Llama family, whole or in parts: configuration, weights under Hugging Face names, tokenizer.

llama.cpp permutes the rows of q and k so that rotary pairs become neighbours; reading undoes it. Quantised blocks
are dequantised by the `gguf` package to float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from flaxdraft.errors import InputError
from flaxdraft.files.gguf_parts import parts_of
from flaxdraft.files.through_an_engine import THROUGH_AN_ENGINE
from flaxdraft.nn.rope import RopeConfig, inverse_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _by_words(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    """GPT-4's split with that many digits a piece, as Llama 3 and Qwen2 have it."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# What tokenizer.ggml.pre stands for.
_SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": _by_words("{1,3}"),
    "qwen2": _by_words(""),
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_TOKENS, _MODEL = "tokenizer.ggml.tokens", "tokenizer.ggml.model"
_TEMPLATES = "tokenizer.chat_templates"  # names of those that stand beside the plain one
_NEEDED = object()  # in place of a field's default
_ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message that calls a tool


class GGUFCheckpoint:
    """An open model, of one file or of all parts; tensors are dequantised when asked for."""

    def __init__(self, path: Path):
        """
        Raises:
            InputError: not a GGUF file, truncated, or of another architecture; a part is missing.
        """
        self.path, self.origin = path, str(path)
        with self._readable():
            readers = [gguf.GGUFReader(part) for part in parts_of(path)]
        self._reader = readers[0]  # the parts behind it hold tensors alone
        if (count := self._field("split.count", 1)) not in (0, len(readers)):
            raise InputError(
                f"{path}: is one of {count} parts, found {len(readers)}; keep the names that they were made with "
                f"(NAME-00001-of-{count:05d}.gguf), in one folder"
            )
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise InputError(
                f"{path}: GGUF architecture {architecture!r} is not supported; supported: llama. {THROUGH_AN_ENGINE}"
            )
        with self._readable():
            self.config = self._read_config()
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        if (total := self._field("split.tensors.count", len(tensors))) != len(tensors):
            raise InputError(
                f"{path}: {len(tensors)} tensors in {len(readers)} parts, expected {total}; fetch it again"
            )
        if (factors := tensors.pop("rope_freqs.weight", None)) is not None:
            self.config["rope_scaling"] = self._llama3_scaling(np.asarray(factors.data, np.float64).ravel())
        self._tensors = {self._hf_name(name): tensor for name, tensor in tensors.items()}
        if self.config["num_hidden_layers"] > len(self._tensors):
            raise InputError(
                f"{path}: not a readable GGUF file ({self.config['num_hidden_layers']} layers in "
                f"{len(self._tensors)} tensors); it is truncated or altered"
            )
        self.config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors

    @contextmanager
    def _readable(self) -> Iterator[None]:
        # An altered file can break the reader, the arithmetic on its numbers, or the tokenizer built from it.
        try:
            yield
        except InputError:
            raise
        except (ValueError, LookupError, ArithmeticError, TypeError, OSError) as error:
            raise InputError(f"{self.path}: not a readable GGUF file ({error}); it is truncated or altered") from error

    def _field(self, key: str, default: Any = _NEEDED) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if default is _NEEDED:
                raise InputError(f"{self.path}: the GGUF metadata have no {key!r}")
            return default
        with self._readable():
            return field.contents()

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        if match is None or match[2] not in _NAMES:
            raise InputError(f"{self.path}: unknown GGUF tensor {name!r}")
        layer = "" if match[1] is None else f"model.layers.{match[1]}."
        return f"{layer}{_NAMES[match[2]]}.weight"

    def _read_config(self) -> dict[str, Any]:
        heads = self._field("llama.attention.head_count")
        hidden = self._field("llama.embedding_length")
        kv_heads = self._field("llama.attention.head_count_kv", heads)
        if hidden % heads or heads % kv_heads:
            raise InputError(
                f"{self.path}: {heads} heads and {kv_heads} key/value heads do not divide a width of {hidden}; "
                "the file is altered"
            )
        if self._field("llama.rope.scaling.type", "none") != "none":
            raise InputError(f"{self.path}: GGUF rope scaling is not supported yet. {THROUGH_AN_ENGINE}")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._field("llama.vocab_size", None) or len(self._field(_TOKENS)),
            "hidden_size": hidden,
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self._field("llama.rope.dimension_count", hidden // heads),
            # stored as float32; the written value is the nearest short decimal
            "rms_norm_eps": float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(self._field("llama.rope.freq_base", 10000.0)),
            "max_position_embeddings": self._field("llama.context_length"),
        }

    def _llama3_scaling(self, factors: np.ndarray) -> dict[str, Any]:
        """Llama 3.1's rotary scaling from what llama.cpp made of it: a divisor for each frequency.

        Raises:
            InputError: the divisors are not those of Llama 3.1's rule with its published constants.
        """
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
        plain = RopeConfig.from_hf(self.config)
        scaled = RopeConfig.from_hf(self.config | {"rope_scaling": scaling})
        nowhere, width = np.zeros((1, 1), np.int32), 2 * len(factors)
        found = inverse_frequencies(plain, width, nowhere) / inverse_frequencies(scaled, width, nowhere)
        if width != self.config["head_dim"] or not np.allclose(found, factors, rtol=1e-4):
            raise InputError(
                f"{self.path}: rope_freqs.weight is not Llama 3.1's rotary scaling; it is not supported. "
                f"{THROUGH_AN_ENGINE}"
            )
        return scaling

    def end_tokens(self) -> list[int]:
        """Ids that end an answer, by the metadata."""
        found = [self._field(f"tokenizer.ggml.{name}_token_id", None) for name in _ENDS]
        return [int(token) for token in found if token is not None]

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """float32 [out, in], in Hugging Face's row order; blocks are dequantised in those rows alone.

        Raises:
            InputError: the tensor is stored as a type that cannot be dequantised.
        """
        tensor = self._tensors[name]
        data = tensor.data
        if len(self.shape(name)) > 1:  # a vector is one row of blocks
            rows, *columns = index or (slice(None),)
            data = data[rows if (order := self._row_order(name)) is None else order[rows]]
            index = (slice(None), *columns)
        try:
            weight = gguf.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:  # gguf's, which knows more types than it can read
            kind = tensor.tensor_type.name
            raise InputError(
                f"{self.path}: {tensor.name} is stored as {kind}, which the gguf package cannot turn into "
                f"numbers; take a file in another quantisation, such as Q8_0 or F16. {THROUGH_AN_ENGINE}"
            ) from error
        return weight[index]

    def _row_order(self, name: str) -> np.ndarray | None:
        """Which rows of the file are those of the tensor, where llama.cpp has put them into another order."""
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if name.endswith(f"{projection}.weight"):
                rows = np.arange(self.shape(name)[0])[:, None]
                return unpermute(rows, self.config[heads])[:, 0]
        return None

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Byte-level BPE from the file's metadata, with its chat template; None where they hold none.

        Raises:
            InputError: another tokenizer model or pre-tokenizer than the ones known here.
        """
        if (model := self._field(_MODEL, "no_vocab")) == "no_vocab":  # llama.cpp's name for none
            return None
        pre = self._field("tokenizer.ggml.pre", "default")
        if model != "gpt2" or pre not in _SPLITS:
            known = ", ".join(f"gpt2/{name}" for name in _SPLITS)
            raise InputError(f"{self.path}: tokenizer {model}/{pre} is not supported; supported: {known}")
        with self._readable():
            return self._build_tokenizer()

    def _build_tokenizer(self) -> PreTrainedTokenizerFast:
        from transformers import PreTrainedTokenizerFast  # the import takes seconds

        tokens = self._field(_TOKENS)
        merges = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        try:
            bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(f"{self.path}: its tokenizer cannot be built ({error}); the file is altered") from error
        inner = Tokenizer(bpe)
        inner.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[self._field("tokenizer.ggml.pre")])
        inner.decoder = decoders.ByteLevel()
        kinds = self._field("tokenizer.ggml.token_type", ())
        inner.add_special_tokens(
            [AddedToken(tokens[i], special=True, normalized=False) for i, k in enumerate(kinds) if k == _CONTROL]
        )
        inner.add_tokens([AddedToken(tokens[i], normalized=False) for i, k in enumerate(kinds) if k == _USER_DEFINED])
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            chat_template=self._chat_template(),
            **{
                f"{role}_token": tokens[id]
                for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
                # llama.cpp takes an id that there is not, as -1, for none.
                if (id := self._field(f"tokenizer.ggml.{name}_token_id", len(tokens))) < len(tokens)
            },
            model_max_length=self.config["max_position_embeddings"],
        )

    def _chat_template(self) -> str | dict[str, str] | None:
        plain = self._field("tokenizer.chat_template", None)
        named = {name: self._field(f"tokenizer.chat_template.{name}") for name in self._field(_TEMPLATES, ())}
        return named | ({} if plain is None else {"default": plain}) if named else plain


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's q/k row order: pairs (2i, 2i+1) go back to (i, i + H/2)."""
    out, num_in = weight.shape
    return weight.reshape(num_heads, out // num_heads // 2, 2, num_in).swapaxes(1, 2).reshape(out, num_in)
