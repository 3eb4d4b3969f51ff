"""Targets of which the files alone are there, and files of rows, for tests of commands that compute nothing."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from small_chats import ASKS, BODY, IM, Kind, tokenizer_of

WIDTH, VOCAB = 8, 300
DATED = "{{'<|im_start|>system\nToday: ' + strftime_now(form or '%d %b %Y %H:%M') + '<|im_end|>\n'}}"
MOOD = "{% if mood is defined %}{{ 'Be ' + mood + '. ' }}{% endif %}"


def target_at(directory: Path, template=BODY + ASKS, kind=Kind(), named=None, **config) -> Path:  # noqa: B008
    """A Llama of one layer, of which the embedding alone is there; nothing computes with it."""
    directory.mkdir(parents=True)
    tokenizer = tokenizer_of(template, IM, kind)
    tokenizer.save_pretrained(directory)
    if named is not None:
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        path = directory / "tokenizer_config.json"
        held = json.loads(path.read_text())
        held["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        path.write_text(json.dumps(held))
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 512,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(hf | config))
    embedding = np.arange(VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH)
    save_file({"model.embed_tokens.weight": embedding}, directory / "model.safetensors")
    return directory


def rows_at(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def packed(text: str) -> str:
    """Without the breaks of a narrow table."""
    return "".join(text.split())
