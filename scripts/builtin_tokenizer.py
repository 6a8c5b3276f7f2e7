"""Define the built-in model's tokenizer: special tokens, chat template, byte-level BPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from builtin_corpus import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["BOS", "END", "EOS", "PAD", "chat_text", "id_of", "train_tokenizer"]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END]
VOCAB_SIZE = 3072

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('unknown role: ' + message['role']) -}}
  {%- endif -%}
  {{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learnt from ``documents``.

    It is lossless on any text, and adds BOS through its post-processor as Llama's does.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [part for document in documents for part in (document.text, document.name) if part]
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    make_tokenizer: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return make_tokenizer(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT, END],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of ``token``, which must be in the vocabulary."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary[token]


def chat_text(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], *, add_generation_prompt: bool
) -> str:
    """Return the chat as text with its special tokens, BOS included."""
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return str(text)
