"""The micro model's tokenizer: one token for what always stands together. Runs in the trainer.

A unigram model whose pieces all cost the same takes the fewest pieces for a text: whole sentences of the prompts, one
piece a cell, a coordinate, a word of the demonstrations. Any other text falls apart into characters and bytes.
"""

import re
import string
from collections.abc import Iterable
from typing import Any

from examples.micro_model import demonstrations
from examples.micro_model.worlds import CELLS, LETTERS, LIMIT, PLAYER, STEPS, WALL_NOTICE, Board, World
from oel_ray.text import prompts
from oel_ray.text.prompts import ITEM_MARKER

END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
_MARK = "\0"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
)


def build_tokenizer() -> Any:
    """The tokenizer with its chat template, as transformers' fast tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in dict.fromkeys(_pieces()) if piece not in pieces]
    inner = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def _pieces() -> Iterable[str]:
    yield from string.printable
    yield from (f" {letter}" for letter in LETTERS)
    yield from (f"({row}, {column})" for row, column in CELLS)
    yield from ("  ", *(f"  {letter}" for letter in (*LETTERS, PLAYER, " ")))
    yield from (f" {PLAYER}/{letter} " for letter in LETTERS)
    yield from _board_frames()
    yield from _sentences()
    yield from _words(f" {demonstrations.PUZZLED}")
    for move in STEPS:
        yield from (
            f"\n{move} ",
            f"\nSo {move}:",
            f"\n</think>\n[{move}]",
            f" {move}",
            f" [{move}]",
            WALL_NOTICE.format(move=move),
        )
        yield from (f"You moved {move} to position ", f"[{move}]\n\n")
        yield f"Invalid Move: You tried to move {move} but hit a wall!"


def _board_frames() -> Iterable[str]:
    """What stands around the cells of an observation."""
    text = Board({}, (0, 0)).observation()
    before, *between, after = re.split(r"(?<=\|)[ P|]+(?=\|)", text)
    yield from (before, *between, after, f".\n\n{before}")


def _sentences() -> Iterable[str]:
    """The fixed texts of prompts and demonstrations."""
    situation = prompts.game_situation(demonstrations.INSTRUCTIONS, [_turn()] * 2, _MARK)
    first = prompts.game_situation(demonstrations.INSTRUCTIONS, [], _MARK)
    record = prompts.transcript(demonstrations.INSTRUCTIONS, [_turn()] * 2, _MARK)
    extraction = prompts.extraction_prompt(_MARK, "", structured=True, show_previous=False)
    for text in (prompts.GAME_HEAD, prompts.knowledge_section(_MARK), first, situation, record, extraction):
        for part in text.split(_MARK):
            yield from re.split(r"(\d+)", part)
    for phrase in (*demonstrations.HOLE_PHRASINGS, *demonstrations.GOAL_PHRASINGS):
        yield f" {phrase}"
    yield from (
        demonstrations.OPENING,
        demonstrations.IGNORANT,
        ITEM_MARKER,
        f"\n{ITEM_MARKER}",
        " I am at ",
        ", the goal at ",
        ", a mark at ",
        f" {demonstrations.NO_MARK}",
        f" {PLAYER}",
        " free",
        " hole",
        " goal",
        " mark",
        " other",
        " me",
        "wall",
        " wall",
    )
    yield from ("user\n", "assistant\n<think>\n", "\n</think>\n", "\n</think>\n\n", "</think>", "<think>\n")
    yield from ("You fell into a hole! Game over. You completed ", "% of the journey to the goal.")
    yield from ("Congratulations! You reached the goal!", "The game was stopped after ", " turns.")
    nothing = demonstrations.Played([], "", Board({}, (0, 0)), "", "")
    yield from re.split(r"(\n</think>\n)", demonstrations.extractor_answer(World("H", "G"), nothing))
    yield from ("The last move led onto", ". That was a hole.", ". That was the goal.")
    yield from (str(number) for number in range(LIMIT + 1))


def _turn() -> Any:
    return demonstrations.turn(_MARK, _MARK, _MARK, _MARK)


def _words(text: str) -> list[str]:
    return re.findall(r" [A-Za-z]+[.,]?", text)
