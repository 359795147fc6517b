"""A byte tokenizer with turn markers, chat templates of the usual makes, tiny targets and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec_training.data.chat import ChatFormat, Encoded

START, END, EOS, BOS = "<|im_start|>", "<|im_end|>", "<eos>", "<bos>"
CONTEXT = 160

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED_TEXT_ONLY = TAGGED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
TAGGED_WHOLE = (
    "{% generation %}{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% endgeneration %}"
)
# Like Qwen3: the last answer opens with a thinking block, earlier ones lose it.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
HEADER_IGNORED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[I] {{ m['content'] }} [/I]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<eos>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)

# Like those of today: tools, calls, thoughts and names are all in the text. Thoughts of earlier
# turns are left out, unless `keep` is set.
_BODY = (
    "{% if m.reasoning_content and (keep or loop.last) %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}"
)
WHOLE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name else '' }}{{ '\n' }}"
    f"{_BODY}<|im_end|>{{{{ '\n' }}}}{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WHOLE_TAGGED = WHOLE.replace(
    f"{_BODY}<|im_end|>",
    f"{{% if m.role == 'assistant' %}}{{% generation %}}{_BODY}<|im_end|>{{% endgeneration %}}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each marker."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, EOS, BOS, START, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=BOS,
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def chat_format(template: str | None, **options: Any) -> ChatFormat:
    """The byte tokenizer with a template; turns end with the markers' own end token."""
    tokenizer = byte_tokenizer(template)
    ends = frozenset({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)})
    return ChatFormat(tokenizer, template, options, ends)


def learnt(encoded: Encoded, tokenizer: Any) -> str:
    """The text of the tokens to be learnt; "|" where the mask has a gap."""
    parts, ids = [], []
    for token, wanted in zip(encoded.token_ids, encoded.loss_mask, strict=True):
        if wanted:
            ids.append(token)
        elif ids:
            parts.append(tokenizer.decode(ids))
            ids = []
    if ids:
        parts.append(tokenizer.decode(ids))
    return "|".join(parts)


def write_target(folder: Path, chat_template: str | None = CHATML) -> Path:
    """A random Llama over bytes, with its tokenizer."""
    tokenizer = byte_tokenizer(chat_template)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 4,  # padded, as many are
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.4,
        )
    )
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(END),
    ]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """JSON lines; a row that is bytes or a string is written as it is."""
    lines = []
    for row in rows:
        if isinstance(row, bytes):
            lines.append(row)
        else:
            lines.append((row if isinstance(row, str) else json.dumps(row)).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def chat_row(question: str, answer: str) -> dict[str, Any]:
    """One turn each, in the OpenAI format."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
