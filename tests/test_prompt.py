"""Prompts to tokens: to the letter, cut only where allowed, and the answers' tokens for all sorts of tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from varlora import prompt
from varlora.errors import TaskError, VarloraError
from varlora.prompt import _chat_template, answer_tokens, encode, prompt_ids
from varlora.tasks import TASKS, Example, load_rows

CORPUS = ["Answer: A Answer: B Answer: C Answer: D Answer: E True False Question: Choices: one two three"] * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def wrap(tokenizer: Tokenizer, template: str = "", **options) -> PreTrainedTokenizerFast:
    """A `transformers` tokenizer; `template` such as "<s> $A" says which special tokens it adds."""
    if template:
        special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", **options
    )


def byte_level(template: str = "", **options) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's and Llama-3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, template, **options)


def sentence_piece(template: str = "<s> $A", vocab_size: int = 120, **options) -> PreTrainedTokenizerFast:
    """BPE with "▁" for a space and one before each text, as Llama-2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    corpus = [word for text in CORPUS for word in text.split()]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([*corpus, "[INST]", "[/INST]"], trainer)
    return wrap(tokenizer, template, **options)


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    """One token for each known word."""
    known = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "Answer:", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer)


def shown(tokenizer, tokens) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(tokens))


def said(tokenizer, ids, **options) -> str:
    return tokenizer.decode(list(ids), **options)


def example(**changes) -> Example:
    fields: dict[str, Any] = {
        "id": "1",
        "head": "Question: ",
        "context": "one two three",
        "tail": " Answer:",
        "label": 1,
    }
    return Example(**(fields | {"answers": ("A", "B")} | changes))


KINDS = {
    "bytes": lambda: byte_level(),
    "bytes+bos": lambda: byte_level("<s> $A"),
    "bytes+bos+eos": lambda: byte_level("<s> $A </s>"),
    "pieces": lambda: sentence_piece("$A"),
    "pieces+bos": lambda: sentence_piece(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answer_tokens_continue_the_prompt(kind):
    tokenizer = KINDS[kind]()
    tokens = shown(tokenizer, answer_tokens(tokenizer, ("A", "B", "C", "D", "E")))
    space = "▁" if kind.startswith("pieces") else "Ġ"
    assert tokens == [space + letter for letter in "ABCDE"]
    row = encode(tokenizer, example())
    whole = tokenizer("Question: one two three Answer: B", add_special_tokens="bos" in kind)["input_ids"]
    assert [*row.input_ids, row.label_tokens[1]] == [i for i in whole if i != tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_as_the_tokenizer_adds_it_and_eos_never(kind):
    tokenizer = KINDS[kind]()
    ids = encode(tokenizer, example()).input_ids
    assert (ids[0] == tokenizer.bos_token_id) == ("bos" in kind)
    assert ids.count(tokenizer.bos_token_id) == int("bos" in kind)
    assert tokenizer.eos_token_id not in ids


def test_a_bos_that_is_the_eos_too_stays():
    """As GPT-2's: of an empty prompt, which is all there is, too."""
    tokenizer = byte_level("</s> $A")
    tokenizer.bos_token = "</s>"
    start, *rest = prompt_ids(tokenizer, ["A"])[0]
    assert (start, said(tokenizer, rest)) == (tokenizer.eos_token_id, "A")
    assert prompt_ids(tokenizer, [""]) == [[start]]
    assert encode(tokenizer, example(head="", context="", tail="")).input_ids == (start,)


@pytest.mark.parametrize(("template", "expected"), [("<s> $A </s>", ["<s>", "Answer:"]), ("$A </s>", ["Answer:"])])
@pytest.mark.parametrize(
    "names", [{"cls_token": "<s>", "sep_token": "</s>"}, {"bos_token": "</s>", "eos_token": "</s>"}]
)
def test_nothing_stands_after_a_prompt_by_whatever_name(template, expected, names):
    """As BERT's [SEP], of which the answer is not to be read, and an EOS that is the BOS too."""
    tokenizer = words("A", "B")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>", **names)
    assert shown(tokenizer, prompt_ids(tokenizer, ["Answer:"])[0]) == expected


def test_form_without_space_where_the_space_is_a_token_of_its_own():
    tokenizer = sentence_piece(vocab_size=1)  # characters alone
    assert tokenizer.tokenize("o A")[-2:] == ["▁", "A"]
    assert shown(tokenizer, answer_tokens(tokenizer, ("A", "B"))) == ["A", "B"]


def test_form_without_space_after_a_prompt_that_ends_in_white_space():
    tokenizer = byte_level()
    row = encode(tokenizer, example(tail=" Answer:\n"))
    assert shown(tokenizer, row.label_tokens) == ["A", "B"]
    assert encode(tokenizer, example()).label_tokens != row.label_tokens


def test_the_form_is_that_of_the_prompt_as_it_was_cut():
    """Here the white space at its end is cut off, or the words before it are."""
    tokenizer = byte_level()
    ends_in_space = example(context="one two three ", tail="", cut="right")
    longest = len(encode(tokenizer, ends_in_space).input_ids)
    assert shown(tokenizer, encode(tokenizer, ends_in_space).label_tokens) == ["A", "B"]
    assert shown(tokenizer, encode(tokenizer, ends_in_space, longest - 1).label_tokens) == ["ĠA", "ĠB"]
    ends_in_word = example(head="Question:\n", context="three", tail="")
    assert shown(tokenizer, encode(tokenizer, ends_in_word).label_tokens) == ["ĠA", "ĠB"]
    head = len(prompt_ids(tokenizer, ["Question:\n"])[0])
    assert shown(tokenizer, encode(tokenizer, ends_in_word, head).label_tokens) == ["A", "B"]


def test_answers_with_one_first_token():
    tokenizer = byte_level()
    with pytest.raises(TaskError) as caught:
        answer_tokens(tokenizer, ("True", "True love", "False"))
    message = str(caught.value)
    for part in ("' True' -> 'ĠTrue'", "' True love' -> 'ĠTrue'", "'True' -> ", "Give answers that begin differently"):
        assert part in message


def test_unknown_answer_is_told():
    tokenizer = words("A", "B")
    assert shown(tokenizer, answer_tokens(tokenizer, ("A", "B"))) == ["A", "B"]
    with pytest.raises(TaskError, match="' C' -> '<unk>'"):
        answer_tokens(tokenizer, ("A", "C"))


def test_answer_tokens_are_found_once(monkeypatch):
    tokenizer = byte_level()
    first = answer_tokens(tokenizer, ("A", "B"))
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *_, **__: pytest.fail("tokenised again"))
    assert answer_tokens(tokenizer, ["A", "B"]) == first


@pytest.mark.parametrize(
    ("cut", "kept"), [("left", ["", "e", "d e", "c d e"]), ("right", ["", "a", "a b", "a b c"])], ids=["left", "right"]
)
def test_whole_words_go_from_the_cut_end(cut, kept):
    tokenizer = words("Question:", "A", "B", *"abcde")
    row = example(context="a b c d e", cut=cut)
    for count, text in enumerate(kept):
        encoded = encode(tokenizer, row, max_length=2 + count)
        assert said(tokenizer, encoded.input_ids).split() == ["Question:", *text.split(), "Answer:"]
        assert encoded.cut
    assert encode(tokenizer, row, max_length=7) == encode(tokenizer, row)
    assert not encode(tokenizer, row, max_length=7).cut


def test_as_many_words_as_fit_are_kept():
    tokenizer = byte_level("<s> $A")
    context = " ".join(["one", "unfamiliar", "two", "x"] * 30)
    for length in range(30, 120, 7):
        row = encode(tokenizer, example(context=context), max_length=length)
        kept = said(tokenizer, row.input_ids, skip_special_tokens=True)
        assert len(row.input_ids) <= length
        words_kept = len(kept.split()) - 2
        longer = f"Question: {' '.join(context.split()[-words_kept - 1 :])} Answer:"
        assert len(tokenizer(longer)["input_ids"]) > length


def test_head_and_tail_alone_too_long():
    tokenizer = words("Question:", "A", "B", *"abcde")
    row = encode(tokenizer, example(head="Question: a b c d ", tail=" a b Answer:"), max_length=4)
    assert said(tokenizer, row.input_ids) == "d a b Answer:"
    assert row.cut


def test_bad_lengths_and_empty_prompts():
    with pytest.raises(VarloraError, match="`max_length` to be a number of tokens >= 1, but got 0"):
        encode(words("A", "B"), example(), max_length=0)
    with pytest.raises(TaskError, match="row `1` to hold a token"):
        encode(words("A", "B"), example(head="", context="", tail=""))
    assert prompt_ids(words(), []) == []


def test_chat_template_is_used_and_adds_the_special_tokens_alone():
    tokenizer = byte_level("<s> $A", chat_template=CHATML)
    row = encode(tokenizer, example(), chat=True)
    text = "<|im_start|>user\nQuestion: one two three Answer:<|im_end|>\n<|im_start|>assistant\n"
    assert said(tokenizer, row.input_ids) == text
    assert shown(tokenizer, row.label_tokens) == ["A", "B"]


def test_chat_template_that_puts_a_space_before_the_reply():
    tokenizer = sentence_piece(chat_template=LLAMA2)
    row = encode(tokenizer, example(), chat=True)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert shown(tokenizer, row.label_tokens) == ["▁A", "▁B"]


def test_chat_prompt_is_cut_within_the_message():
    tokenizer = byte_level(chat_template=CHATML)
    whole = encode(tokenizer, example(), chat=True)
    row = encode(tokenizer, example(), max_length=len(whole.input_ids) - 1, chat=True)
    text = "<|im_start|>user\nQuestion: two three Answer:<|im_end|>\n<|im_start|>assistant\n"
    assert said(tokenizer, row.input_ids) == text
    assert row.cut


def test_a_chat_template_that_asks_for_the_date_gets_the_same_one_every_day():
    dated = "{{ strftime_now('%d %b %Y') }}{% set y = strftime_now( \"%Y\" ) %} {{ y }} {{ messages[0].content }}"
    tokenizer = byte_level(chat_template=dated)
    (ids,) = prompt_ids(tokenizer, ["A"], chat=True)
    assert said(tokenizer, ids) == "26 Jul 2024 2024 A"
    assert _chat_template(byte_level(chat_template=CHATML)) == CHATML


def test_a_chat_template_that_refuses_a_question_alone():
    tokenizer = byte_level(chat_template="{{ raise_exception('System message required') }}")
    with pytest.raises(VarloraError, match="refuses a question without more: System message required"):
        encode(tokenizer, example(), chat=True)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ({"rag": "{{ messages[0].content }}"}, "ValueError"),
        ("{{ messages[0].content + none }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_chat_template_that_fails_by_itself(template, why):
    with pytest.raises(VarloraError, match=rf"chat template of .* fails \({why}: .*\)\. Leave `chat` out"):
        encode(byte_level(chat_template=template), example(), chat=True)


def test_no_chat_template():
    with pytest.raises(VarloraError, match=r"chat template.*Leave `chat` out"):
        encode(byte_level(), example(), chat=True)


SHARED_TOKENS = {
    "tinyllama-3m": {"ABCDE": ["▁A", "▁B", "▁C", "▁D", "▁E"], "boolq": ["▁F", "▁True"]},
    # " A" is "▁", "A" there, though " B" is "▁B": only the form without space tells them apart.
    "stories-260k": {"ABCDE": ["A", "B", "C", "D", "E"], "boolq": ["F", "T"]},
}


@pytest.mark.parametrize("model", SHARED_TOKENS)
def test_answer_tokens_of_real_models(shared, model):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    expected = SHARED_TOKENS[model]
    assert shown(tokenizer, answer_tokens(tokenizer, ("False", "True"))) == expected["boolq"]
    for count in (2, 3, 4, 5):  # an answer has the same token however many there are
        tokens = shown(tokenizer, answer_tokens(tokenizer, tuple("ABCDE"[:count])))
        assert tokens == expected["ABCDE"][:count]


def test_answer_token_of_llama_is_the_papers(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tinyllama-3m")
    for answer, token in zip("ABCD", answer_tokens(tokenizer, tuple("ABCD"))):
        assert tokenizer.encode(answer)[1] == token


def test_real_prompt_is_tokenised_to_the_letter(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tinyllama-3m")
    for row in load_rows(TASKS["arc_challenge"], "dev", shared / "data").examples[:20]:
        encoded = encode(tokenizer, row, max_length=256)
        assert encoded.cut or list(encoded.input_ids) == tokenizer(row.prompt)["input_ids"]
        assert encoded.input_ids[-1] == tokenizer.convert_tokens_to_ids(":")


def test_strangers_answers_do_not_fill_the_memory(bundled, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    monkeypatch.setattr(prompt, "REMEMBERED", 5)
    first = answer_tokens(tokenizer, ("red", "blue"))
    for i in range(20):
        answer_tokens(tokenizer, (f"red {i}", "blue"))
        assert len(prompt._CACHE[tokenizer]) <= 5
    assert answer_tokens(tokenizer, ("red", "blue")) == first
