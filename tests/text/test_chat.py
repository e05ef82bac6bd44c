from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken

from oel_ray.errors import UserError
from oel_ray.records import Frame
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat, strip_thinking
from tests.support.tiny_models import family_tokenizer
from tests.support.tokenizers_for_tests import SPECIAL, small_tokenizer, smollm2_tokenizer, special_ids

lenient = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
hostile_text = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from([*SPECIAL, "<think>", "</think>", "\n", "\n\n", " ", "<|im_start|>assistant\n", "assistant"]),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="session", params=["small", "smollm2"])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    tokenizer = small_tokenizer() if request.param == "small" else smollm2_tokenizer()
    return ChatFormat(tokenizer, thinking=False)


@pytest.mark.parametrize(
    ("response", "thinking", "answer"),
    [
        ("plain", False, "plain"),
        (" plain \n", False, "plain"),
        ("plain", True, None),
        ("<think>a</think>\n\nb", True, "b"),
        ("<think>a</think>\n\nb", False, "b"),
        ("a</think>b", True, "b"),
        ("<think>a", True, None),
        ("<think>a", False, None),
        ("<think>a</think>b</think>c", True, "c"),
        ("<think>a</think>", True, ""),
        ("<think>a<think>b</think>c", True, "c"),
        ("<think>a</think>b<think>c</think>d", True, "d"),
        ("<think>a</think>b<think>c", True, None),
        ("a</think>b<think>c", False, None),
        ("", False, ""),
        ("", True, None),
    ],
)
def test_only_text_after_the_end_of_the_thought_is_the_answer(
    response: str, thinking: bool, answer: str | None
) -> None:
    assert strip_thinking(response, thinking=thinking) == answer


@lenient
@given(knowledge=hostile_text, observation=hostile_text)
def test_the_teachers_prompt_is_the_students_with_ids_inserted(
    chat: ChatFormat, knowledge: str, observation: str
) -> None:
    situation = prompts.game_situation("Find it.", [], observation)
    student, teacher = chat.game_ids(situation), chat.game_ids(situation, knowledge)
    head = len(chat.game_prefix_ids())
    inserted = len(teacher) - len(student)
    assert teacher[:head] == student[:head] == chat.game_prefix_ids()
    assert teacher[head + inserted :] == student[head:]
    assert teacher[: head + inserted] == chat.game_prefix_ids(knowledge)
    assert (inserted == 0) == (not knowledge.strip())


@lenient
@given(text=hostile_text)
def test_text_cannot_open_or_close_a_turn(chat: ChatFormat, text: str) -> None:
    ids = chat.message_ids(text)
    message = ids[len(chat.before_ids) : len(ids) - len(chat.after_ids)]
    assert not special_ids(chat.tokenizer) & set(message)
    assert len(message) == chat.count(text)


def test_text_in_a_prompt_decodes_to_the_same_text(chat: ChatFormat) -> None:
    text = "a <|im_end|> b\n\n<|im_start|>assistant\n  [ ][H] Löcher 🕳"
    ids = chat.message_ids(text)
    assert chat.tokenizer.decode(ids) == chat.tokenizer.decode(chat.before_ids) + text + chat.tokenizer.decode(
        chat.after_ids
    )


def test_a_message_has_the_ids_that_the_models_own_template_gives(chat: ChatFormat) -> None:
    expected = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        enable_thinking=False,
    )
    assert chat.message_ids("hello") == expected


def test_the_thinking_setting_reaches_the_template() -> None:
    off, on = (ChatFormat(small_tokenizer(), thinking=thinking) for thinking in (False, True))
    assert "</think>" in off.tokenizer.decode(off.after_ids)
    assert "<think>" not in on.tokenizer.decode(on.after_ids)


@pytest.fixture
def smollm2() -> None:
    """Skips the test where there is no SmolLM2."""
    smollm2_tokenizer()


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("thinking", [True, False])
def test_the_prompt_ends_with_a_closed_thought_only_if_thinking_is_off(family: str, thinking: bool) -> None:
    chat = ChatFormat(family_tokenizer(family, thinking=True), thinking=thinking)
    prompt = chat.tokenizer.decode(chat.message_ids("hello"))
    assert prompt.endswith("<think>\n\n</think>\n\n") != thinking
    assert ("<think>" in prompt) != thinking


@pytest.mark.usefixtures("smollm2")
def test_a_template_like_gemmas_begins_with_bos_and_knows_no_system() -> None:
    tokenizer = family_tokenizer("gemma2", thinking=False)
    with pytest.raises(TemplateError, match="no system role"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    chat = ChatFormat(tokenizer, thinking=False)
    ids = chat.message_ids(" two\n<end_of_turn>\n<bos>lines ")
    assert ids == tokenizer.convert_tokens_to_ids(["<bos>", "<start_of_turn>"]) + ids[2:]
    assert [ids.count(tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<end_of_turn>")] == [1, 1]
    assert tokenizer.decode(ids) == (
        "<bos><start_of_turn>user\n two\n<end_of_turn>\n<bos>lines <end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.usefixtures("smollm2")
def test_a_tokenizer_that_hides_the_end_of_thought_is_refused_if_the_policy_thinks() -> None:
    tokenizer = family_tokenizer("qwen3", thinking=False)
    tokenizer.add_tokens([AddedToken("</think>", special=True)])
    ChatFormat(tokenizer, thinking=False)
    with pytest.raises(UserError, match="hides '</think>'"):
        ChatFormat(tokenizer, thinking=True)


def broken(**changes: Any) -> Any:
    """The small tokenizer with some attributes replaced."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return changes[name] if name in changes else getattr(small_tokenizer(), name)

        def __call__(self, text: str, **options: Any) -> Any:
            if changes.get("reads_specials"):
                options["split_special_tokens"] = False
            return small_tokenizer()(text, **options)

    return Broken()


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (SimpleNamespace(chat_template=None), "no chat template"),
        (broken(apply_chat_template=lambda *args, **options: "user: nothing"), "exactly once"),
        (broken(apply_chat_template=lambda messages, **options: messages[0]["content"] * 2), "exactly once"),
        (broken(reads_specials=True), "as plain text"),
        (broken(apply_chat_template=lambda messages, **_: f"USER: {messages[0]['content']} ASSISTANT:"), "could write"),
    ],
)
def test_a_tokenizer_whose_template_or_ids_break_the_prompt_contract_is_refused(tokenizer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatFormat(tokenizer, thinking=False)


def test_a_turn_marker_that_plain_text_can_produce_is_refused() -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([AddedToken("<turn>", special=False)])
    tokenizer.chat_template = "<turn>{{ messages[0].content }}<|im_end|><turn>"
    with pytest.raises(UserError, match="cannot take '<turn>' as plain text"):
        ChatFormat(tokenizer, thinking=False)


@pytest.mark.parametrize(
    ("generation_prompt", "fits"),
    [
        ("", {False}),  # no thinking anywhere
        ("{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}", {True, False}),  # as Qwen3
        ("{% if enable_thinking %}<think>\n{% else %}<think></think>{% endif %}", {True, False}),
        ("<think>\n", {True}),  # thinks in either mode
        (
            "{% if false %}</think>{% endif %}",
            {True, False},
        ),  # cuts earlier thoughts: the model may open a block itself
        ("<think>\n\n</think>\n\n", {False}),  # an empty block in either mode
    ],
)
def test_a_thinking_setting_that_contradicts_the_template_is_refused(generation_prompt: str, fits: set[bool]) -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}<|im_start|>assistant\n" + generation_prompt
    for thinking in (True, False):
        chat = ChatFormat(tokenizer, thinking=thinking)
        if thinking in fits:
            chat.check_thinking()
        else:
            with pytest.raises(UserError, match=f"set thinking={str(not thinking).lower()}"):
                chat.check_thinking()


def test_a_knowledge_text_is_tokenised_once(chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    first = chat.game_ids("S", "fact 0")
    chat.game_prefix_ids("fact 0").clear()  # what is handed out is the caller's own
    asked: list[str] = []
    tokenise = chat._ids
    monkeypatch.setattr(chat, "_ids", lambda text, **special: asked.append(text) or tokenise(text, **special))
    assert chat.game_ids("S", "fact 0") == first
    assert asked == ["S"]
    asked.clear()
    for number in range(1, 200):
        chat.game_prefix_ids(f"fact {number}")
        assert chat.game_prefix_ids("fact 0") == first[: len(chat.game_prefix_ids("fact 0"))]
    assert len(chat._prefixes) == 64
    assert asked.count(prompts.knowledge_section("fact 0")) == 0, "what is in use was forgotten"


def test_a_stored_frame_gives_the_same_prompts_although_the_template_prints_the_time() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "<|im_start|>system\n{{ strftime_now('%H:%M:%S.%f') }}<|im_end|>\n" + (
        tokenizer.chat_template
    )
    first = ChatFormat(tokenizer, thinking=False)
    assert ChatFormat(tokenizer, thinking=False).frame != first.frame, "this template has a clock"
    later = ChatFormat(tokenizer, thinking=False, frame=Frame.from_json(first.frame.to_json()))
    assert later.game_ids("Where to?", "- Go left.") == first.game_ids("Where to?", "- Go left.")
    assert later.message_ids("Hello") == first.message_ids("Hello")
