"""Find the small files of a model that the front end needs: tokenizer, template, end-of-sequence tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BUILTIN_FOLDER", "ModelFiles", "ModelFilesError", "load_model_files"]

BUILTIN_FOLDER = Path(__file__).parent.parent / "worker" / "builtin"
_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "*.tiktoken"]
_CONVERT = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False).save_pretrained(sys.argv[2])
"""
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONVERT_TIMEOUT_S = 120.0


class ModelFilesError(Exception):
    """A model's files are missing or unreadable; the text is for the operator."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The contents that matter, read once."""

    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    """By the names that chat templates use: ``bos_token`` and so on."""
    eos_token_ids: tuple[int, ...]
    """From the generation configuration; empty if no file says so."""


def load_model_files(model: str, *, revision: str | None = None) -> ModelFiles:
    """Read the files of a local folder, of the built-in model, or of a hub repository.

    Blocks; may take seconds. Raises :class:`ModelFilesError`.
    """
    folder = _folder_of(model, revision)
    config = _read_json(folder / "tokenizer_config.json")
    tokenizer_file = folder / "tokenizer.json"
    try:
        tokenizer_json = tokenizer_file.read_text("utf-8") if tokenizer_file.is_file() else _converted(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{tokenizer_file}: {error}") from error
    return ModelFiles(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(folder, config),
        special_tokens=_special_tokens(config, _read_json(folder / "special_tokens_map.json")),
        eos_token_ids=_eos_token_ids(folder),
    )


def _folder_of(model: str, revision: str | None) -> Path:
    if model == "builtin":
        return BUILTIN_FOLDER
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        hint = "" if "/" in model or model.startswith((".", "~")) else "; a model of the hub is OWNER/NAME"
        raise ModelFilesError(f"{model}: no such folder{hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelFilesError(f"{model}: no such folder, and not found on the hub: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path}: not a JSON object")
    return value


def _converted(folder: Path) -> str:
    """Convert an older tokenizer (``tokenizer.model``) with transformers.

    In a process of its own, because that imports torch, which the front end has no use for.
    """
    with tempfile.TemporaryDirectory(prefix="kvserve-tokenizer-") as target:
        done = subprocess.run(  # noqa: S603 - this interpreter, a constant program
            [sys.executable, "-c", _CONVERT, str(folder), target],
            capture_output=True,
            text=True,
            timeout=_CONVERT_TIMEOUT_S,
            check=False,
        )
        result = Path(target) / "tokenizer.json"
        if done.returncode != 0 or not result.is_file():
            last_line = (done.stderr.strip().splitlines() or ["no tokenizer.json"])[-1]
            raise ModelFilesError(f"{folder}: the tokenizer cannot be loaded: {last_line}")
        return result.read_text("utf-8")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name) or special_map.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config")
    for source in (_read_json(folder / "generation_config.json"), config, text_config):
        if isinstance(source, dict) and source.get("eos_token_id") is not None:
            eos = source["eos_token_id"]
            return tuple(eos) if isinstance(eos, list) else (int(eos),)
    return ()
