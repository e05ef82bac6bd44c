"""Playing with a scripted policy on the real games, and replaying what was recorded."""

import asyncio
from pathlib import Path

import pytest

from oel_ray.config.budget import play_response
from oel_ray.config.schema import EnginesConfig, EnvironmentConfig, RunConfig
from oel_ray.consolidate.prefixes import prefixes
from oel_ray.envs import make
from oel_ray.envs.replay import replay
from oel_ray.envs.splits import held_out_episodes
from oel_ray.errors import RunFailed
from oel_ray.play.player import Player, player_actor
from oel_ray.records import Episode, Trajectory
from oel_ray.seeds import derive_seed
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat
from tests.support.scripted import SAMPLING, PromptedGenerate, ScriptedGenerate
from tests.support.tokenizers_for_tests import small_tokenizer

LAKE = EnvironmentConfig(id="FrozenLake-v0", params={"size": 3, "num_holes": 2})


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(policy: Path) -> ChatFormat:
    return ChatFormat.from_pretrained(policy, thinking=False)


@pytest.fixture(scope="module")
def episode() -> Episode:
    return held_out_episodes(LAKE, 4, 1)[0]


def run_config(config: EnvironmentConfig | None = None, max_prompt_tokens: int = 10_000) -> RunConfig:
    run = RunConfig(seed=4, env=config or EnvironmentConfig(max_turns=10))
    room = EnginesConfig(max_model_len=max_prompt_tokens + play_response(run)[1])
    return run.model_copy(update={"engines": room})


def played(
    episode: Episode, chat: ChatFormat, generate, config=None, max_prompt_tokens: int = 10_000, **changes
) -> tuple[Trajectory, bool]:
    player = Player(Path(chat.tokenizer.name_or_path), generate, run_config(config, max_prompt_tokens))
    return asyncio.run(player.play(episode, SAMPLING, **changes))


def winning_answers(episode: Episode) -> list[str]:
    solution = make(episode.env, episode.seed, episode.params).solution()
    return [f"I go {move}" for move in solution or []]


def test_a_won_game_is_recorded_as_it_was_played(episode: Episode, chat: ChatFormat) -> None:
    answers = winning_answers(episode)
    generate = ScriptedGenerate(answers)
    trajectory, success = played(episode, chat, generate)
    assert success is True
    assert trajectory.ended_by == "environment" and "goal" in trajectory.outcome
    assert "success" not in trajectory.model_dump() and "reward" not in trajectory.model_dump()
    assert [turn.response for turn in trajectory.turns] == answers
    assert [turn.response_ids for turn in trajectory.turns] == [[*answer.encode(), 0] for answer in answers]
    assert [turn.prompt_ids for turn in trajectory.turns] == [request.prompt_ids for request in generate.requests]
    for before, after in zip(trajectory.turns, trajectory.turns[1:], strict=False):
        assert after.observation == before.feedback
    assert trajectory.template == prompts.GAME_TEMPLATE
    assert {name: getattr(trajectory, name) for name in Episode.model_fields} == episode.model_dump()
    last = trajectory.turns[-1]
    situation = prompts.game_situation(trajectory.instructions, trajectory.turns[:-1], last.observation)
    assert last.prompt_ids == chat.game_ids(situation)


def test_the_seed_of_a_request_depends_on_game_sampling_seed_and_turn_and_not_on_the_answer(
    episode: Episode, chat: ChatFormat
) -> None:
    generate = ScriptedGenerate(["no move", "[left]", "no move", "[left]"])
    trajectory, _ = played(episode, chat, generate, config=EnvironmentConfig(max_turns=2), sampling_seed=2)
    assert [request.seed for request in generate.requests] == [
        derive_seed(4, "play", episode.id, 2, n) for n in range(2)
    ]
    assert {request.key for request in generate.requests} == {episode.id}
    other = ScriptedGenerate(["no move"])
    played(episode, chat, other, config=EnvironmentConfig(max_turns=2), key="k-03")
    assert other.requests[0].key == "k-03"
    assert other.requests[0].seed == derive_seed(4, "play", episode.id, 0, 0) != generate.requests[0].seed
    assert len(trajectory.turns) == 2


def test_knowledge_stands_in_the_prompt_and_not_in_the_trajectory(episode: Episode, chat: ChatFormat) -> None:
    generate = ScriptedGenerate(["[left]"])
    trajectory, _ = played(episode, chat, generate, config=EnvironmentConfig(max_turns=1), knowledge="H is deep water")
    assert "H is deep water" in chat.tokenizer.decode(trajectory.turns[0].prompt_ids)
    assert "deep water" not in trajectory.instructions + trajectory.turns[0].observation


def test_every_prompt_holds_the_actions_so_far(chat: ChatFormat, episode: Episode) -> None:
    moves = winning_answers(episode)
    generate = PromptedGenerate(chat, lambda text: moves[text.count("Your action at turn")])
    _, success = played(episode, chat, generate)
    assert success is True


def test_a_game_that_reaches_the_turn_limit_ends_without_success(episode: Episode, chat: ChatFormat) -> None:
    trajectory, success = played(
        episode, chat, ScriptedGenerate(winning_answers(episode)), config=EnvironmentConfig(max_turns=3)
    )
    assert (trajectory.ended_by, success, len(trajectory.turns)) == ("turn_limit", False, 3)
    assert "3 turns" in trajectory.outcome


def test_a_game_whose_prompt_outgrows_the_context_ends_and_keeps_its_turns(episode: Episode, chat: ChatFormat) -> None:
    answers = winning_answers(episode)
    full, _ = played(episode, chat, ScriptedGenerate(answers))
    limit = len(full.turns[1].prompt_ids)
    trajectory, success = played(episode, chat, ScriptedGenerate(answers), max_prompt_tokens=limit)
    assert (trajectory.ended_by, success) == ("context_limit", False)
    assert trajectory.turns == full.turns[:2]
    assert "2 turns" in trajectory.outcome
    none, _ = played(episode, chat, ScriptedGenerate(answers), max_prompt_tokens=5)
    assert none.turns == [] and none.ended_by == "context_limit"


@pytest.mark.parametrize("answers", [None, ["nothing"], ["nothing", "[up]", "[left]", "nothing", "[right]"]])
@pytest.mark.parametrize("env", [LAKE, EnvironmentConfig(id="Sokoban-v0", params={"num_boxes": 1})])
def test_replay_agrees_with_a_played_game(chat: ChatFormat, env: EnvironmentConfig, answers: list[str] | None) -> None:
    for episode in held_out_episodes(env, 4, 3):
        generate = ScriptedGenerate(answers or winning_answers(episode))
        trajectory, success = played(episode, chat, generate, config=EnvironmentConfig(max_turns=6 if answers else 30))
        assert replay(Trajectory.from_json(trajectory.to_json())) == (success, "")
        assert success is True or answers is not None


def test_replay_finds_what_was_tampered_with(episode: Episode, chat: ChatFormat) -> None:
    trajectory, _ = played(episode, chat, ScriptedGenerate(winning_answers(episode)))
    turns = trajectory.turns

    def with_turn(index: int, **changes: str) -> Trajectory:
        changed = [*turns[:index], turns[index].model_copy(update=changes), *turns[index + 1 :]]
        return trajectory.model_copy(update={"turns": changed})

    tampered = {
        "turn 2, feedback": with_turn(1, feedback="You moved into the sea."),
        "turn 3, observation": with_turn(2, observation="?"),
        "turn 1, action": with_turn(0, action="[up]"),
        "turn 4": with_turn(3, response="[banana]"),
        "map_hash": trajectory.model_copy(update={"map_hash": "0" * 16}),
        "instructions": trajectory.model_copy(update={"instructions": "Holes kill."}),
        "outcome": trajectory.model_copy(update={"outcome": "You lost."}),
        "ended_by": trajectory.model_copy(update={"ended_by": "turn_limit"}),
        "turn 5": trajectory.model_copy(update={"turns": [*turns, turns[0]]}),
    }
    for where, changed in tampered.items():
        assert where in replay(changed)[1]
    cut = trajectory.model_copy(update={"turns": turns[:-1]})
    assert replay(cut)[0] is False and "ended_by" in replay(cut)[1]


def test_the_outcome_starts_with_the_result_if_state_result_is_on(chat: ChatFormat, episode: Episode) -> None:
    generate = ScriptedGenerate(winning_answers(episode))
    won, _ = played(episode, chat, generate, config=EnvironmentConfig(max_turns=10, state_result=True))
    assert won.outcome.startswith("The game was won. ") and "goal" in won.outcome
    assert replay(won) == (True, "")
    lie = won.model_copy(update={"outcome": won.outcome.replace("won", "lost")})
    assert "outcome" in replay(lie)[1]
    stopped, _ = played(
        episode, chat, ScriptedGenerate(["[up]"]), config=EnvironmentConfig(max_turns=1, state_result=True)
    )
    assert stopped.outcome == "The game was stopped after 1 turns."


def test_own_actions_can_be_left_out_of_prompts(chat: ChatFormat, episode: Episode) -> None:
    generate = ScriptedGenerate(winning_answers(episode))
    shown, _ = played(episode, chat, generate)
    hidden, _ = played(episode, chat, generate, config=EnvironmentConfig(max_turns=10, show_actions=False))
    texts = [chat.tokenizer.decode(game.turns[-1].prompt_ids) for game in (shown, hidden)]
    assert ["Your action at turn 1" in text for text in texts] == [True, False]
    prefixes([shown, hidden], chat)  # both are rendered again by the template that they name


def test_a_player_refuses_another_map(chat: ChatFormat, episode: Episode) -> None:
    other = episode.model_copy(update={"map_hash": "0" * 16})
    with pytest.raises(RunFailed, match=episode.id):
        played(other, chat, ScriptedGenerate(["[up]"]))


@pytest.mark.ray
def test_a_player_in_ray_plays_many_games_at_once(policy: Path) -> None:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False)
    try:
        episodes = held_out_episodes(LAKE, 4, 4)
        actor = player_actor(4, num_cpus=1).remote(policy, ScriptedGenerate(["[left]"]), run_config())
        results = ray.get([actor.play.remote(episode, SAMPLING) for episode in episodes], timeout=120)
    finally:
        ray.shutdown()
    assert [trajectory.id for trajectory, _ in results] == [episode.id for episode in episodes]
    assert all(trajectory.ended_by == "environment" and not success for trajectory, success in results)
