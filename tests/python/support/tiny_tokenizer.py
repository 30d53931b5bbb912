"""A byte-level BPE tokenizer of 384 tokens with a chat template, made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 384
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
EOS = SPECIAL.index("<|im_end|>")

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Enough prose for the merges of 384 tokens.
PROSE = """
The harbour master counted the boats every evening, and every evening there was one more than in
the morning. Nobody had seen a stranger come in. The fishermen said the tide brought it, the tide
said nothing, and the lighthouse keeper wrote the number down in a book with a blue cover. When the
winter came and the water froze, there were forty boats in the harbour and thirty-nine names in the
book. The keeper looked for the missing name through the whole of the winter. In the spring, when
the ice went out and took the boats with it, one stayed where it was. It was his own. He had been
counting it from the window, from where the mast could be seen and the hull could not, and had never
thought to ask whose it might be. He painted it green and called it The Answer.
"""


@cache
def tokenizer() -> Tokenizer:
    """Trains the tokenizer on the prose above; the result is the same on every machine."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([PROSE], trainer)
    assert made.get_vocab_size() == VOCABULARY
    return made


def decode(ids: list[int]) -> str:
    """Returns the text of a whole output."""
    return tokenizer().decode(ids)


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[3],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
