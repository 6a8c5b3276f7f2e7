"""A tokenizer that cannot be talked into control tokens.

``encode_special_tokens`` keeps a tokenizer from cutting "</s>" out of a text, but a vocabulary that has the
piece "</s>" (Unigram ones do) finds it all the same. Here these pieces carry names that nobody can guess.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from tokenizers import Tokenizer

__all__ = ["control_ids", "without_control_tokens"]


def control_ids(tokenizer: Tokenizer, *, unknown: str | None) -> frozenset[int]:
    """Return the ids of control tokens; the one for unknown words is none, texts are full of those."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(id_ for id_, token in added.items() if token.special and token.content != unknown)


def without_control_tokens(tokenizer: Tokenizer, *, unknown: str | None) -> Tokenizer:
    """Return a copy with the same ids and settings, for which control tokens in a text are text."""
    settings: dict[str, Any] = json.loads(tokenizer.to_str())
    renamed = {
        token["content"]: f"\U0010ffff{secrets.token_hex(16)}"
        for token in settings["added_tokens"]
        if token["special"] and token["content"] != unknown
    }
    for token in settings["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    vocabulary = settings["model"]["vocab"]
    if isinstance(vocabulary, dict):
        settings["model"]["vocab"] = {renamed.get(k, k): v for k, v in vocabulary.items()}
    else:
        settings["model"]["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocabulary]
    copy = Tokenizer.from_str(json.dumps(settings))
    copy.encode_special_tokens = True
    return copy
