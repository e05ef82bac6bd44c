"""Fakes that several tests share: a policy that follows a script, and a tiny real tokenizer with a chat template."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oel_ray.chat import ChatFormat
from oel_ray.records import Generation, Sampling

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=64)

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ScriptedGenerate:
    """Answers with `responses` in turn (the last one again and again), and remembers what it was asked."""

    def __init__(self, responses: Sequence[str]) -> None:
        self.responses = responses
        self.calls: list[dict[str, Any]] = []

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        text = self.responses[min(len(self.calls), len(self.responses) - 1)]
        self.calls.append({"prompt_ids": list(prompt_ids), "sampling": sampling, "seed": seed, "key": key})
        ids = [*text.encode(), 0]
        return Generation(token_ids=ids, text=text, finish_reason="stop", weight_version="1.0.0")


class PromptedGenerate:
    """Answers with a function of the prompt's text, as a policy does."""

    def __init__(self, chat: ChatFormat, answer: Callable[[str], str]) -> None:
        self.chat = chat
        self.answer = answer

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        text = self.answer(self.chat.tokenizer.decode(prompt_ids))
        return Generation(token_ids=[*text.encode(), 0], text=text, finish_reason="stop", weight_version="1.0.0")


def save_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes in the form that transformers loads; returns its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(str(folder))
    return folder
