"""The benchmarks of engines, players and chains, at sizes that say nothing, on real Ray and real engines."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rollout_sweep, serving
from oel_ray.engines.router import Replica
from oel_ray.models.resolve import MICRO, resolve_model
from oel_ray.seeds import derive_seed
from tests.benchmarks.commands import ROOT, check
from tests.support.example_run import trajectory


def small(name: str, *options: str) -> dict[str, Any]:
    """The last line of a benchmark that says nothing."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--small", "--runs", "1", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def test_requests_of_games_come_turn_by_turn() -> None:
    first, second = (trajectory(number, 1, "consolidation", "map") for number in (0, 1))
    second = second.model_copy(update={"turns": second.turns[:1]})
    requests = serving.requests_of([(first, 0), (second, 3)], run_seed=7)
    seeds = [(first.id, 0, 0), (second.id, 3, 0), (first.id, 0, 1)]
    assert [request.seed for request in requests] == [derive_seed(7, "play", *parts) for parts in seeds]
    assert {(tuple(request.prompt_ids), request.tokens) for request in requests} == {((1, 2, 3), 2)}


def test_move_replies_are_legal_moves_of_many_lengths() -> None:
    config = serving.quickstart()
    replies = serving.move_replies(config, resolve_model(MICRO, print), count=40)
    assert {reply.text.strip() for reply in replies} == {f"</think>[{way}]" for way in ("up", "down", "left", "right")}
    lengths = [len(reply.token_ids) for reply in replies]
    assert max(lengths) <= config.collect.sampling.max_tokens and len(set(lengths)) > 20


def test_each_routing_policy_picks_replicas_as_its_name_says() -> None:
    def picks(name: str) -> list[int]:
        router = rollout_sweep.ROUTERS[name]([Replica(index, handle=None) for index in range(2)])
        return [router.pick(key, 10).index for key in "aaaab"]

    assert picks("sticky") == [0, 0, 0, 0, 1]
    assert picks("least_loaded") == [0, 1, 0, 1, 0]
    assert picks("in_turn") == [0, 1, 0, 1, 0]
    assert picks("ours") == [0, 0, 1, 1, 0]


@pytest.mark.slow
def test_the_rollout_benchmark_plays_every_episode_and_reports_its_ratio() -> None:
    line = small("rollout")
    check(line, "rollout", ">= 0.95", "ours", "plain")
    assert line["episodes"] == 8 and 8 <= line["turns"] <= 80 and line["tokens"] > line["turns"]


@pytest.mark.slow
def test_the_lockstep_benchmark_plays_the_same_games_both_ways() -> None:
    line = small("lockstep")
    check(line, "lockstep", ">= 1.5", "lockstep", "ours")
    simulated = line["simulated"]
    assert line["games"] == 6 and simulated["turns"] >= 6
    assert simulated["ratio"] == pytest.approx(simulated["lockstep"] / simulated["ours"], rel=0.1)


@pytest.mark.slow
def test_the_collectors_benchmark_plays_every_game_with_every_player() -> None:
    line = small("collectors")
    check(line, "collectors", ">= 0.9", "all", "one_times_players")
    assert line["players"] == 2 and line["games"] == 8


@pytest.mark.slow
def test_the_sync_benchmark_times_each_sync_against_load_weights() -> None:
    line = small("sync")
    check(line, "sync", "<= 1.5", "sync", "load_weights")
    assert line["calls"] == 3 and line["tensors"] > 3


@pytest.mark.slow
def test_the_extraction_benchmark_finds_accumulations_side_by_side_faster_when_simulated() -> None:
    line = small("extraction")
    check(line, "extraction", ">= 5", "one_after_the_other", "ours")
    assert (line["accumulations"], line["trajectories"]) == (3, 2) and line["response_tokens"] > 0
    assert line["simulated"]["one_after_the_other"] > line["simulated"]["ours"] > 0


@pytest.mark.slow
def test_the_round_benchmark_measures_work_within_the_wall_time_of_every_stage() -> None:
    line = small("round")
    (stages,) = line["stages"]
    assert list(stages) == ["collect", "extract", "evaluate_in_context", "consolidate", "evaluate"]
    assert all(0 < stage["work"] < stage["wall"] for stage in stages.values())
    wall, work = (sum(stage[kind] for stage in stages.values()) for kind in ("wall", "work"))
    assert line["ratio"] == pytest.approx(wall / work, rel=0.01)


@pytest.mark.slow
def test_the_sweep_covers_engines_and_seats_and_sticky_routing_reuses_more(tmp_path: Path) -> None:
    line = small("rollout", "--sweep", "--out", str(tmp_path))
    assert "<svg" in (tmp_path / "rollout.svg").read_text()
    assert [(point["engines"], point["seats"]) for point in line["seats"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert line["seats_knee"].keys() == {"1", "2"} and line["actors_knee"] in {1, 2}
    reused = {row["policy"]: row["reused"] for row in line["routing"]}
    assert reused["sticky"] > reused["in_turn"]
    assert line["turn_us"]["alone"] > line["turn_us"]["engine_call_with_lease"] > line["turn_us"]["engine_call"] > 0
