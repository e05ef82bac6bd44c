"""Turn text into token ids and back; prompts are tokenised here only. Any process with transformers.

A chat prompt is one user message. Its ids are those of up to five pieces, each tokenised by itself:

    template before the message | head | knowledge section | situation | template behind the message

The cuts lie at special tokens or line breaks. Student, teacher and in-context evaluation all use these pieces. So a
teacher's prompt is the student's with ids inserted. Responses are appended as ids. Head and knowledge are separate
pieces, because some tokenizers read the blank line between them differently if a word follows. Text from games and
models is tokenised without special tokens, so it cannot open or close a turn.
"""

from pathlib import Path
from typing import Any

from cachetools import LRUCache

from oel_ray.errors import UserError
from oel_ray.records import Frame
from oel_ray.text import prompts

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_SENTINEL = "OELSENTINELMESSAGE"
_REMEMBERED = 64
"""Knowledge texts whose ids are kept: a game with one asks for the same ids every turn, at milliseconds each time."""


def strip_thinking(response: str, *, thinking: bool) -> str | None:
    """Return the text of a response after its thinking block; None if the block was never closed.

    With `thinking` the template or the model has opened a block, so a response without its end is all thought.
    """
    _, closed, answer = response.rpartition(THINK_CLOSE)
    if (thinking and not closed) or THINK_OPEN in answer:
        return None
    return answer.strip()


class ChatFormat:
    """A tokenizer with its chat template, reduced to what this project needs."""

    def __init__(self, tokenizer: Any, *, thinking: bool, frame: Frame | None = None) -> None:
        """`tokenizer`: a transformers tokenizer with a chat template. `frame` replaces the text that the template gives
        today.

        Raises:
            UserError: the tokenizer has no chat template, or one that changes the user's message or that text could
                imitate; or the end of a thought would be invisible.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the model's tokenizer has no chat template: use an instruction-tuned model")
        self.tokenizer = tokenizer
        self.thinking = thinking
        self._prefixes: LRUCache[str, list[int]] = LRUCache(_REMEMBERED)
        self.frame = frame or self._rendered_frame()
        self.before_ids: list[int] = self._ids(self.frame.before, special=True)
        self.after_ids: list[int] = self._ids(self.frame.after, special=True)
        framing = {*self.before_ids, *self.after_ids}
        added = {token.content for index, token in tokenizer.added_tokens_decoder.items() if index in framing}
        self.control_tokens: list[str] = sorted(
            {*tokenizer.all_special_tokens, *added} - {tokenizer.unk_token, THINK_OPEN, THINK_CLOSE}
        )
        control = {token: tokenizer.convert_tokens_to_ids(token) for token in self.control_tokens}
        for token, index in control.items():
            if index in self._ids(token):
                raise UserError(
                    f"the model's tokenizer cannot take '{token}' as plain text: a game could end the prompt"
                )
        if not {*control.values()} & {*self.after_ids}:
            raise UserError(
                "the model's chat template ends a message with plain text, which a game could write as well: use a "
                "model whose template has a special token there"
            )

        # Engines leave special tokens out of a response's text.
        if thinking and THINK_CLOSE not in tokenizer.decode(
            self._ids(THINK_CLOSE, special=True), skip_special_tokens=True
        ):
            raise UserError(f"the model's tokenizer hides '{THINK_CLOSE}' as a special token: set thinking=false")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, thinking: bool, frame: Frame | None = None) -> "ChatFormat":
        """Load from a policy folder. Reads no network."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return cls(tokenizer, thinking=thinking, frame=frame)

    def check_thinking(self) -> None:
        """Check that the template starts responses as `thinking` says. A model's own habit cannot be checked.

        Raises:
            UserError: the template opens a thinking block that is not wanted, or none where one is.
        """
        text, other = self._rendered(thinking=self.thinking), self._rendered(thinking=not self.thinking)
        after = text.rpartition(_SENTINEL)[2]
        opened, closed = after.rfind(THINK_OPEN), after.rfind(THINK_CLOSE)
        if not self.thinking and opened > closed:
            raise UserError(
                f"thinking is false, and the model's chat template opens a {THINK_OPEN} block all the same: "
                "set thinking=true"
            )
        # Templates of models that always think contain the block's end at least, because they cut out earlier thoughts.
        knows = text != other or any(mark in str(self.tokenizer.chat_template) for mark in (THINK_OPEN, THINK_CLOSE))
        if self.thinking and (not knows or closed > opened):
            raise UserError(
                f"thinking is true, and the model's chat template opens no {THINK_OPEN} block: set thinking=false"
            )

    def _rendered_frame(self) -> Frame:
        before, found, after = self._rendered(thinking=self.thinking).partition(_SENTINEL)
        if not found or _SENTINEL in after:
            raise UserError("the model's chat template does not show the user's message exactly once")
        return Frame(before=before, after=after)

    def _rendered(self, *, thinking: bool) -> str:
        message = {"role": "user", "content": _SENTINEL}
        rendered: str = self.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        return rendered

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)
        return list(encoded["input_ids"])

    def message_ids(self, text: str) -> list[int]:
        """Prompt ids of one user message."""
        return [*self.before_ids, *self._ids(text), *self.after_ids]

    def game_ids(self, situation: str, knowledge: str = "") -> list[int]:
        """Prompt ids of a game prompt, with a knowledge text in it or without.

        `situation` comes from `prompts.game_situation`.
        """
        return [*self.game_prefix_ids(knowledge), *self._ids(situation), *self.after_ids]

    def game_prefix_ids(self, knowledge: str = "") -> list[int]:
        """The part of `game_ids` that depends on the knowledge alone."""
        if knowledge not in self._prefixes:
            section = self._ids(prompts.knowledge_section(knowledge))
            self._prefixes[knowledge] = [*self.before_ids, *self._ids(prompts.GAME_HEAD), *section]
        return [*self._prefixes[knowledge]]

    def count(self, text: str) -> int:
        """Tokens of plain text."""
        return len(self._ids(text))
