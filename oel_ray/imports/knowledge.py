"""Import knowledge texts. Runs in the driver."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError
from oel_ray.ids import knowledge_id
from oel_ray.imports.games import content_of
from oel_ray.records import KnowledgeItem, KnowledgeText, first_problem, join_items
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import IMPORT_KNOWLEDGE
from oel_ray.runs.stage import Stage
from oel_ray.text.chat import ChatFormat

ELSEWHERE = "elsewhere"
"""The trajectory id of imported knowledge items whose game is unknown."""


def put_knowledge(folder: RunFolder, number: int, texts: Sequence[KnowledgeText]) -> None:
    """Put knowledge texts into a round, in place of extracted ones."""
    stage = Stage(folder, number, IMPORT_KNOWLEDGE)
    stage.begin()
    stage.commit_knowledge(texts)


def read_knowledge(paths: Sequence[Path], number: int, config: RunConfig, chat: ChatFormat) -> list[KnowledgeText]:
    """Read knowledge texts for a round, from `.json` files of a run folder's `knowledge/` or from plain text.

    Raises:
        UserError: a file cannot be read or is too long; names it.
    """
    return [_knowledge(path, number, seed, config, chat) for seed, path in enumerate(paths)]


def _knowledge(path: Path, number: int, seed: int, config: RunConfig, chat: ChatFormat) -> KnowledgeText:
    content = content_of(path)
    if path.suffix == ".json":
        try:
            given = KnowledgeText.from_json(content)
        except ValidationError as error:
            raise UserError(f"{path} is no knowledge file of a run: {first_problem(error)}") from None
        items, style = given.items, given.format
    else:
        text = content.decode(errors="replace").strip()
        if not text:
            raise UserError(f"{path} holds no knowledge")
        items, style = [KnowledgeItem(text=text, trajectory_id=ELSEWHERE)], "unstructured"
    text = join_items([item.text for item in items])
    if (tokens := chat.count(text)) > config.extract.max_tokens:
        raise UserError(f"{path} has {tokens} tokens of knowledge: shorten it or raise extract.max_tokens")
    return KnowledgeText(
        id=knowledge_id(number, seed), round=number, seed=seed, format=style, text=text, tokens=tokens,
        items=items, steps=[],
    )  # fmt: skip
