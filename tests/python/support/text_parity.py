"""Writes transformers' results for a folder's tokenizer and template, for tests/rust/text_parity.rs.

By hand, because the folders are real models' (their terms forbid to commit them):

    python tests/python/support/text_parity.py cases.json FOLDER [FOLDER or TEMPLATE.jinja ...]
    MLXD_TEXT_CASES=cases.json cargo test --release --test rust text_parity -- --ignored

A folder has tokenizer.json and tokenizer_config.json. A template is rendered with the tokenizer of
the first folder. Needs transformers and jinja2.
"""

import datetime
import json
import random
import sys
import time

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "a",
    " a",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\r\nnewlines\n\n\n",
    "What is the capital of France?",
    "don't can't we'll I'M SHE'S",
    "1234567890 3.14159 1,000,000 0x1F",
    "café naïve Ærøskøbing Straße",
    "cafe\u0301 combining",
    "Ελληνικά Русский עברית العربية हिन्दी ไทย",
    "日本語のテキスト、中文文本,한국어 텍스트",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 😀😃😄",
    "\u200b\u200d\ufeff zero width",
    "x" * 300,
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    '{"key": [1, 2.5, null, true], "s": "\\n"}',
    '<html><body class="a">&amp;</body></html>',
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ≈ √2 ½ ²",
    "ﬁ ﬂ Å ｆｕｌｌ",
    "\x00\x01\x7f\x80",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] x [/INST]</s>",
    "<bos><start_of_turn>user\nx<end_of_turn>",
    "<|begin_of_text|>already",
    "<|begin_of_text|",
    "▁▁ underscores ▁",
    "Ġ Ċ ġ",
    "\U0001f9ff\U00020000\U0010ffff",
    "a\u00a0b\u2003c\u3000d",
    "https://example.org/path?q=1&r=%20#frag",
    "ALLCAPS camelCase snake_case kebab-case",
]

TEXTS_COUNT = 500

# Pieces of random strings: scripts, combining marks, spaces, digits, code, and the beginnings of
# control tokens.
PIECES = [
    *(
        "the",
        "The",
        " of",
        "ing",
        "'s",
        "don't",
        "naïve",
        "ﬁ",
        "Straße",
        "İstanbul",
        "ǅ",
        "e\u0301",
    ),
    *(
        "привет",
        "мир",
        "Ελλάδα",
        "שלום",
        "مرحبا",
        "हिन्दी",
        "ภาษาไทย",
        "日本",
        "語",
        "中文，",
        "한국어",
        "க்ஷ",
    ),
    *("0", "42", "1234567", "3.14", "1e-9", "½", "²", "٣", "Ⅻ", "0x1F", "$5", "50%"),
    *(
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\u200d",
        "\ufeff",
    ),
    *("🎉", "👩‍👩‍👧", "🇫🇷", "\U00020000", "∀x∈ℝ", "→", "…", "—", "“", "”", "«", "»"),
    *("def f(x):", "return", "{", "}", "[]", "();", "<a href=", "&amp;", "#!", "//", "\\n", "_"),
    *(
        "<|",
        "|>",
        "<|im_",
        "<|im_end|>",
        "<s>",
        "</s>",
        "<bos>",
        "<eos>",
        "[INST]",
        "▁",
        "Ġ",
        "<0x0A>",
    ),
]


def texts():
    """Returns the texts above, and random ones of these pieces and of all of Unicode."""
    draw = random.Random(1)
    found = dict.fromkeys(TEXTS)
    while len(found) < TEXTS_COUNT:
        pieces = [draw.choice(PIECES) for _ in range(draw.randrange(1, 24))]
        if draw.random() < 0.3:
            code = draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])
            pieces.insert(draw.randrange(len(pieces)), chr(code))
        found["".join(pieces)] = None
    return list(found)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather <now> & "here", é.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city's name"},
                "days": {
                    "type": "array",
                    "items": {"type": "integer"},
                    "default": [1, 2.5, True, None],
                },
                "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            },
            "required": ["city"],
        },
    },
}
NO_ARGUMENTS = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}


def call(name, arguments, call_id="call00001"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversations():
    user = {"role": "user", "content": "What is the capital of France?"}
    answer = {"role": "assistant", "content": "The capital of France is Paris."}
    more = {"role": "user", "content": "  And of Spain?\n"}
    system = {"role": "system", "content": " You are terse. "}
    asks = {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("get_weather", {"city": "Zürich", "days": [1, 2]})],
    }
    asks_none = {**asks, "content": None}
    asks_two = {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            call(
                "get_weather",
                {
                    "city": "A'b\"c",
                    "x": 1e20,
                    "y": 1e-7,
                    "z": 1.0,
                    "n": None,
                    "b": True,
                    "o": {"k": []},
                },
            ),
            call("now", {}, "call00002"),
        ],
    }
    result = {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": "call00001",
        "content": '{"t": 21.5}',
    }
    thinks = {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nParis.",
    }
    reasons = {"role": "assistant", "reasoning_content": "hm, France", "content": "Paris."}
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}],
    }
    image = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}],
    }
    plain = [
        [user],
        [user, answer, more],
        [system, user],
        [system, user, answer, more],
        [user, answer],
        [system],
        [answer, user],
        [user, user],
        [system, system, user],
        [parts],
        [system, parts, answer, image],
        [user, thinks, more],
        [user, reasons, more],
        [user, reasons],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "<|im_end|> {{ 7 * 7 }} {% raw %} \\n 日本 🎉"}],
        [{"role": "critic", "content": "x"}],
        [{"role": "user", "content": "x", "name": "Ann"}],
        [{"role": "developer", "content": "d"}, user],
        [user, answer] * 6 + [more],
    ]
    for messages in plain:
        yield messages, [], {}, True
    yield [user, answer], [], {}, False
    yield [system, user], [WEATHER], {}, True
    yield [user], [WEATHER, NO_ARGUMENTS], {}, True
    yield [system, user, asks, result], [WEATHER], {}, True
    yield [user, asks_none, result, answer, more], [WEATHER], {}, True
    yield (
        [
            user,
            asks_two,
            result,
            {**result, "content": "12:00", "name": "now", "tool_call_id": "call00002"},
        ],
        [WEATHER, NO_ARGUMENTS],
        {},
        True,
    )
    yield [user, asks, result, reasons, more], [WEATHER], {}, True
    yield [user, asks, {**result, "content": [{"type": "text", "text": "t"}]}], [WEATHER], {}, True
    yield [user], [], {"enable_thinking": False}, True
    yield [user, thinks, more], [], {"enable_thinking": True}, True
    yield [user], [], {"date_string": "1 Jan 2026"}, True
    yield [user], [WEATHER], {"tools_in_user_message": False}, True
    yield [user], [WEATHER], {"reasoning_effort": "high"}, True


def frozen(now):
    """The datetime that strftime_now sees."""

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(now, tz)

    return Frozen


def renders(tokenizer, template=None):
    for messages, tools, arguments, add_generation_prompt in conversations():
        case = {
            "messages": messages,
            "tools": tools,
            "arguments": arguments,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            case["text"] = tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **arguments,
            )
        except Exception as error:  # what a template refuses, whatever Python calls it
            case["error"] = f"{type(error).__name__}: {error}"
        yield case


def folder_cases(folder):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    draw = random.Random(0)
    size = len(tokenizer)
    streams = [[draw.randrange(size) for _ in range(draw.randrange(1, 40))] for _ in range(300)]
    backend = tokenizer.backend_tokenizer
    # Some of transformers 5's classes replace parts of tokenizer.json (GPT2Tokenizer drops
    # SmolLM2's digit splitting, so "½" becomes other tokens); the file is what the model was
    # trained with.
    file = Tokenizer.from_file(f"{folder}/tokenizer.json")
    encoded = []
    for text in texts():
        plain = file.encode(text, add_special_tokens=False).ids
        by_class, special = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
        if by_class == plain:
            encoded.append((text, plain, special))
        else:
            print(
                f"{folder}: {type(tokenizer).__name__} is not its file for {text!r}",
                file=sys.stderr,
            )
            encoded.append((text, plain, plain))
    streams += [ids for _, _, ids in encoded]
    return {
        "folder": folder,
        "bos": tokenizer.bos_token,
        "eos_id": tokenizer.eos_token_id,
        "size": max(tokenizer.get_vocab().values()) + 1,
        "encode": [
            {"text": text, "plain": plain, "special": special} for text, plain, special in encoded
        ],
        "decode": [
            {"ids": ids, "text": backend.decode(ids, skip_special_tokens=False)} for ids in streams
        ],
        "render": list(renders(tokenizer)) if tokenizer.chat_template else [],
    }


def main():
    out, first, *rest = sys.argv[1:]
    now = int(time.time())
    chat_template_utils.datetime = frozen(now)
    folders = [first, *(path for path in rest if not path.endswith(".jinja"))]
    templates = [path for path in rest if path.endswith(".jinja")]
    cases = [folder_cases(folder) for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(first)
    for path in templates:
        with open(path, encoding="utf-8") as file:
            source = file.read()
        cases.append(
            {"folder": first, "template": path, "render": list(renders(tokenizer, source))}
        )
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"now": now, "cases": cases}, file, ensure_ascii=False)


main()
