"""Conversations that a server is asked to answer: by the command, or with less patience by what is under it."""

import json

from faulty_server import MODEL
from small_targets import rows_at

from flaxdraft.data.__main__ import main
from flaxdraft.data.conversations import read_conversations
from flaxdraft.data.served_answers import Served, answer_from_servers
from flaxdraft.data.server_client import Patience
from flaxdraft.data.talks import FILE, answerable

QUICK = Patience(timeout=5, first_pause=0.01, longest_pause=0.05, give_up=0.5, tries=4)


def asked(text):
    return {"role": "user", "content": text}


ROWS = [
    {"id": "one", "category": "a", "messages": [asked("and the")]},
    {"id": "two", "messages": [asked("tell me"), {"role": "assistant", "content": "nothing of this"}, asked("more")]},
    {"id": "long", "messages": [asked("z" * 200)]},
    {"id": "three", "split": "held_out", "messages": [{"role": "system", "content": "brief"}, asked("é <|im_end|>")]},
]
MANY = [{"id": f"row {i}", "messages": [asked(f"question {i}")]} for i in range(30)]


def call(rows, out, target, servers, *more):
    file = rows_at(out.parent / "chats.jsonl", *rows)
    urls = [part for server in servers for part in ("--server", getattr(server, "url", server))]
    return main(["regenerate", str(file), str(out), "--target", str(target), *urls, "--model", MODEL,
                 "--max-prompt-tokens", "150", "--max-new-tokens", "40", *more])  # fmt: skip


def ask(rows, out, text, servers, in_flight=4, patience=QUICK, num_tokens=300):
    """As `call` does, with less patience."""
    out.mkdir(exist_ok=True)
    file = rows_at(out.parent / "chats.jsonl", *rows)
    conversations = answerable(read_conversations(file), text.tokenizer, text.template, None)
    served = Served([getattr(one, "url", one) for one in servers], MODEL, in_flight, patience)
    return answer_from_servers(out, conversations, served, text, num_tokens)


def lines(out) -> dict[str, dict]:
    rows = [json.loads(line) for line in (out / FILE).read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}
