"""From an example to token ids: the prompt, shortened only where it may be, and the tokens of its answers.

`encode` tokenises the whole prompt to the letter. A prompt longer than `max_length` loses words of its context, never
its end. `answer_tokens` finds, for each answer, the token whose logit stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from varlora.errors import TaskError, VarloraError
from varlora.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PROMPT_VERSION", "Encoded", "answer_tokens", "encode", "prompt_ids"]

PROMPT_VERSION = "2"
"""Raised whenever the tokens of a prompt or of its answers would change; stored with each run.

2: no appended `[SEP]` at a prompt's end, and answers that fit a prompt as it was cut.
"""
TODAY = datetime(2024, 7, 26)
"""What chat templates are told is today: a run's prompts must not change over night. Llama 3's, where it knows none."""
ASKS_FOR_TODAY = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class Encoded:
    """An example as the model takes it."""

    id: str
    """The example's id."""
    input_ids: tuple[int, ...]
    """The prompt's tokens, (T,); the answer is the token after the last."""
    label_tokens: tuple[int, ...]
    """The token that stands for each answer, (C,)."""
    label: int | None
    """Index into `label_tokens`; None: unknown."""
    cut: bool
    """Whether the prompt was longer than `max_length` and lost words."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    max_length: int | None = None,
    chat: bool = False,
    ids: Sequence[int] | None = None,
) -> Encoded:
    """Tokenise a prompt; if it is longer than `max_length`, remove whole words from the cut end of its context.

    If even the prompt without its context is too long, its last `max_length` tokens are kept.

    Args:
        tokenizer: any tokenizer of `transformers`; special tokens are added as it adds them.
        example: the prompt's parts and the answers.
        max_length: tokens; None: no limit.
        chat: put the prompt through the tokenizer's chat template, as the user's message.
        ids: the tokens of the whole prompt, if the caller has them already (`prompt_ids`).

    Raises:
        VarloraError: `max_length` below 1, a tokenizer without a chat template that works.
        TaskError: an empty prompt, answers that share a token.
    """
    if max_length is not None and max_length < 1:
        raise VarloraError(
            f"Expected `max_length` to be a number of tokens >= 1, but got {max_length}. Raise it, or leave it out."
        )
    ids = prompt_ids(tokenizer, [example.prompt], chat)[0] if ids is None else ids
    if not ids:
        raise TaskError(f"Expected the prompt of row `{example.id}` to hold a token, but it is empty.")
    text, cut = example.prompt, max_length is not None and len(ids) > max_length
    if max_length is not None and cut:
        text, ids = _shortened(tokenizer, example, max_length, chat)
    tokens = answer_tokens(tokenizer, example.answers, chat, after_space=text[-1:].isspace())
    return Encoded(example.id, tuple(ids), tokens, example.label, cut)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: bool = False) -> list[list[int]]:
    """Return the token ids of each prompt, whatever its length.

    Raises:
        VarloraError: `chat` with a tokenizer that has no chat template, or one that refuses a question alone, or fails.
    """
    texts = [_rendered(tokenizer, prompt) for prompt in prompts] if chat else list(prompts)
    # A chat template writes the special tokens itself.
    options = {"add_special_tokens": not chat, "return_special_tokens_mask": True, "verbose": False}
    encoded: Any = tokenizer(texts, **options) if texts else {}
    rows = encoded.get("input_ids", [])
    if not chat:
        # Some tokenizers end each text with EOS or [SEP], after which nothing would be said.
        masks = encoded.get("special_tokens_mask") or [()] * len(rows)
        rows = [_unclosed(row, added) for row, added in zip(rows, masks)]
    if not chat and tokenizer.eos_token_id != tokenizer.bos_token_id:
        rows = [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]
    return rows


def _unclosed(row: list[int], added: Sequence[int]) -> list[int]:
    """Return a text's tokens without the special ones that were put after it; of an empty text all stay."""
    after = next((count for count, is_added in enumerate(reversed(added)) if not is_added), 0)
    return row[: len(row) - after]


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str | None = None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise VarloraError(
            f"Expected a tokenizer with a chat template, but that of `{tokenizer.name_or_path}` has none: its model "
            "is probably not instruction-tuned. Leave `chat` out."
        )
    messages = [{"role": "user", "content": prompt}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    settings: dict[str, Any] = {"add_generation_prompt": answer is None, "tokenize": False}
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=_chat_template(tokenizer), **settings))
    except TemplateError as error:
        raise VarloraError(
            f"The chat template of `{tokenizer.name_or_path}` refuses a question without more: {error}. Leave `chat` "
            "out, or change the template."
        ) from error
    except Exception as error:  # a template is a program, and fails like one
        raise VarloraError(
            f"The chat template of `{tokenizer.name_or_path}` fails ({type(error).__name__}: {error}). Leave `chat` "
            "out, or change the template."
        ) from error


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a tokenizer's chat template, with the date that it asks for, as by `strftime_now("%d %b %Y")`, in it."""

    def written(found: re.Match[str]) -> str:
        return repr(TODAY.strftime(found["format"]))

    return ASKS_FOR_TODAY.sub(written, str(tokenizer.get_chat_template()))


def _shortened(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, chat: bool
) -> tuple[str, list[int]]:
    """Return the longest prompt that fits, and its tokens."""
    words = [match.span() for match in re.finditer(r"\S+", example.context)]

    def prompt_of(count: int) -> tuple[str, list[int]]:
        """The prompt with `count` words of its context, and its tokens."""
        context = ""
        if count and example.cut == "left":
            context = example.context[words[-count][0] :]
        elif count:
            context = example.context[: words[count - 1][1]]
        text = example.head + context + example.tail
        return text, prompt_ids(tokenizer, [text], chat)[0]

    best = prompt_of(0)
    if len(best[1]) > max_length:
        return best[0], best[1][-max_length:]
    low, high = 0, len(words)  # `low` words fit; that `high` words fit is not known to be true
    while high - low > 1:
        middle = (low + high) // 2
        found = prompt_of(middle)
        if len(found[1]) <= max_length:
            low, best = middle, found
        else:
            high = middle
    return best


REMEMBERED = 4096
"""Sets of answers whose tokens are remembered for a tokenizer."""
LONGEST_REMEMBERED = 2000
"""Characters of a set that is remembered."""

_Key = tuple[tuple[str, ...], bool, bool, str]
_CACHE: WeakKeyDictionary[PreTrainedTokenizerBase, dict[_Key, tuple[int, ...]]] = WeakKeyDictionary()


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], chat: bool = False, after_space: bool = False
) -> tuple[int, ...]:
    """Return, for each answer, the first token with which it continues a prompt.

    A prompt's end is tokenised without and with the answer; the answer's token is the first after the prompt's own.
    " A" is tried first and then "A", unless a space, a line break or a chat template comes before: there "A" is first,
    save for templates that put a space before the reply. A form serves if all its tokens differ and none is
    blank: small vocabularies split " A" into a space and "A".

    Args:
        tokenizer: any tokenizer of `transformers`, with or without BOS.
        answers: C texts.
        chat: whether the answers follow the tokenizer's chat template.
        after_space: whether the prompt ends with white space.

    Returns:
        C token ids.

    Raises:
        TaskError: two answers share a first token, or one has none, in both forms.
    """
    key = (tuple(answers), chat, after_space, str(tokenizer.chat_template) if chat else "")
    known = _CACHE.setdefault(tokenizer, {})
    if key in known:
        return known[key]
    found = _find_answer_tokens(tokenizer, key[0], chat, after_space)
    if sum(map(len, answers)) <= LONGEST_REMEMBERED:  # a service is asked for answers of strangers' making
        if len(known) >= REMEMBERED:
            known.clear()
        known[key] = found
    return found


def _find_answer_tokens(
    tokenizer: PreTrainedTokenizerBase, answers: tuple[str, ...], chat: bool, after_space: bool
) -> tuple[int, ...]:
    stub, spaced_first = "Answer:", not after_space
    if chat:
        stub = _rendered(tokenizer, "Answer:")
        reply = _rendered(tokenizer, "Answer:", answers[0])
        spaced_first = reply.startswith(f"{stub} {answers[0]}")
    tried = []
    for space in (" ", "") if spaced_first else ("", " "):
        texts = [stub, *(stub + space + answer for answer in answers)]
        start, *rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # A merge over the boundary leaves no token that the answer alone begins with.
        tokens = [row[len(start)] if row[: len(start)] == start and len(row) > len(start) else None for row in rows]
        if len(set(tokens)) == len(tokens) and all(_speaks(tokenizer, token) for token in tokens):
            return tuple(token for token in tokens if token is not None)
        shown = ", ".join(
            f"{space + answer!r} -> {'none' if token is None else repr(tokenizer.convert_ids_to_tokens(token))}"
            for answer, token in zip(answers, tokens)
        )
        tried.append(f"({shown})")
    raise TaskError(
        f"Expected answers that begin with different tokens, but {' and '.join(tried)} cannot be told apart by their "
        "first token. Give answers that begin differently (such as A, B, ... with the choices in the prompt), or take "
        "a model with a larger vocabulary."
    )


def _speaks(tokenizer: PreTrainedTokenizerBase, token: int | None) -> bool:
    """Whether a token says something: it exists, is not unknown, and is not blank."""
    return token is not None and token != tokenizer.unk_token_id and bool(str(tokenizer.decode([token])).strip())
