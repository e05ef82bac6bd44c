"""What follows from a configuration, against sums done by hand."""

from collections import Counter

from oel_ray.cluster.demand import GPU_MEMORY, Nodes, demands, place, placement, total
from oel_ray.config.budget import budgets
from oel_ray.config.load import load_config
from oel_ray.config.precision import Auto
from oel_ray.distill.memory import ModelSize
from oel_ray.preflight import outlook
from oel_ray.views.explain import explain, headline

AUTO = Auto(precision="float32", because="of this")


def test_the_plan_of_a_preset_counts_stages_games_samples_resources_and_tokens() -> None:
    config = load_config("smollm2")
    assert explain(config, AUTO) == [
        "stages       12 in rounds 0 to 2",
        "games        T = 4 and T' = 6 a round, 20 in all",
        "extraction   K x T = 3 x 4, 12 responses a round",
        "training     2 games x 5 turns, at most 10 samples a step and 30 a round",
        "evaluation   16 games of the policy and 16 in context a round, 80 games in all",
        "on CPUs      6 CPU for engines 2 x (1 CPU), players 2 x (1 CPU), trainer 2 x (1 CPU), extractors 1 x (1 CPU); "
        "trainer and extractors take turns",
        "precision    auto stands for float32, because of this",
        "tokens       at most, beside the prompt; engines.max_model_len=4096",
        "  play       24 of response; 4072 are left to the prompt",
        "  in context 192 of knowledge + 24 of response = 216; 3880 are left to the prompt",
        "  extraction 192 of knowledge + 64 of response = 256; 3840 are left to the prompt",
        "  student    24 of response; 4072 are left to the prompt",
        "  teacher    192 of knowledge + 24 of response = 216; the model's own context holds the prompt, too",
    ]
    assert headline(config).endswith("12 extractions, at most 30 training samples, 32 evaluation games")


def test_the_plan_leaves_out_evaluation_and_extraction_that_do_not_happen() -> None:
    config = load_config("smollm2", ["evaluate.enabled=false", "extract.format=raw"])
    assert [budget.name for budget in budgets(config)] == ["play", "student", "teacher"]
    assert explain(config, AUTO)[0] == "stages       7 in rounds 0 to 2"
    assert headline(config).endswith("0 extractions, at most 30 training samples, 0 evaluation games")


def test_every_step_of_the_accumulation_is_a_set_of_games_in_context() -> None:
    config = load_config("smollm2", ["evaluate.accumulation_steps=[1, 2, 4]"])  # T = 4: the last is the complete text
    assert explain(config, AUTO)[4].endswith("16 games of the policy and 48 in context a round, 144 games in all")
    assert headline(config).endswith(" 64 evaluation games")


def test_each_reader_has_a_budget_of_the_knowledge_and_response_that_it_reads() -> None:
    config = load_config("smollm2", ["extract.show_previous=false", "collect.sampling.max_tokens=99"])
    assert [(budget.knowledge, budget.response) for budget in budgets(config)] == [
        (0, 99),
        (192, 99),  # one bound for all games of a player
        (0, 64),
        (0, 24),
        (192, 24),
    ]
    assert [budget.keys[-1].split(".")[0] for budget in budgets(config)] == [
        "collect",
        "collect",
        "extract",
        "consolidate",
        "consolidate",
    ]


def test_engines_and_trainers_demand_gpus_where_there_are_and_else_all_their_threads() -> None:
    changes = ["engines.cpu_threads=3", "engines.tensor_parallel=2", "consolidate.workers=4", "engines.device=auto"]
    config = load_config("smollm2", [*changes, "extract.resources={CPU: 6, reader: 1}"])
    cpu, gpu = demands(config, on_gpu=False), demands(config, on_gpu=True)
    assert total(cpu) == {"CPU": 2 * 3 * 2 + 2 + 6, "reader": 1}  # all threads of an engine's ranks count
    assert total(gpu) == {"CPU": 10, "GPU": 8, "reader": 1}
    (row,) = (line for line in explain(config, AUTO) if line.startswith("on GPUs"))
    assert "10 CPU + 8 GPU + 1 reader for engines 2 x (1 CPU + 2 GPU), players 2 x (1 CPU), trainer 4 x (1 CPU" in row


GPU_NODE = {"CPU": 16.0, "GPU": 8.0}


def placed(nodes: Nodes, *changes: str) -> tuple[dict[str, Counter[str]], Counter[str]]:
    config = load_config("frozenlake-qwen3-1.7b", ["engines.device=cuda", *changes])
    return place(demands(config, on_gpu=True), nodes)


def test_what_needs_no_gpu_keeps_away_from_nodes_that_have_one() -> None:
    changes = ["engines.count=4", "consolidate.workers=4", "collect.players=3"]
    on, left = placed({"head": {"CPU": 0.0}, "gpus": GPU_NODE, "small": {"CPU": 2.0}}, *changes)
    assert not left
    assert on["head"] == {}
    assert on["small"]["players"] == 2 and on["gpus"]["players"] == 1  # there was no more room elsewhere
    assert on["gpus"]["engines"] == on["gpus"]["trainer"] == 4


def test_an_engine_needs_its_gpus_on_one_node() -> None:
    nodes = {"a": {"CPU": 8.0, "GPU": 3.0}, "b": {"CPU": 8.0, "GPU": 3.0}}
    changes = ["engines.tensor_parallel=4", "engines.count=1", "consolidate.workers=2", "collect.players=1"]
    on, left = placed(nodes, *changes)
    assert left == {"engines": 1}
    changes[0] = "engines.tensor_parallel=3"
    on, left = placed(nodes, *changes)
    assert not left and on["a"]["trainer"] * on["a"]["engines"] == 0


def test_a_custom_resource_keeps_a_pool_on_the_nodes_that_have_it() -> None:
    nodes = {"a": GPU_NODE, "b": {"CPU": 64.0}, "c": {"CPU": 64.0, "collector": 2.0}}
    on, left = placed(nodes, "engines.count=1", "collect.players=3", "collect.resources={collector: 1}")
    assert on["c"]["players"] == 2 and left == {"players": 1}


def test_nodes_that_are_alike_are_listed_together() -> None:
    config = load_config("smollm2", ["engines.count=2", "collect.players=1", "consolidate.workers=2"])
    nodes = {"head": {"CPU": 0.0, "memory": 1.0}, "x": {"CPU": 2.0}, "y": {"CPU": 2.0}, "z": {"CPU": 2.0}}
    said = placement(demands(config, on_gpu=False), nodes)
    assert said == (
        "1 x (0 CPU) for nothing; 1 x (2 CPU) for 2 engines; "
        "1 x (2 CPU) for 1 players, 1 trainer, 1 extractors; 1 x (2 CPU) for 1 trainer"
    )


SIZE = ModelSize(10**9, values_per_token=2**16, own=10**9, trained=10**9, teacher=10**9)


def test_the_outlook_warns_if_a_gpu_is_too_small_for_an_engine_or_a_rank() -> None:
    config = load_config("frozenlake-qwen3-1.7b", ["engines.device=cuda", "consolidate.workers=4"])
    nodes = {"head": {"CPU": 4.0}, "gpus": {"GPU": 8.0, GPU_MEMORY: 80.0 * 2**30}}
    _, engine, rank = outlook(config, SIZE, nodes, on_gpu=True)
    assert engine.startswith("an engine's GPU (80.00 GiB): weights 1.86 GiB, caches ") and "too little" not in engine
    # 2 bytes of weights and of teacher, a quarter of 12 bytes of masters and optimizer.
    assert "parameters 1.86 GiB" in rank and "masters and optimizer 2.79 GiB" in rank and "teacher 1.86 GiB" in rank
    assert "tight" not in rank
    nodes["gpus"][GPU_MEMORY] = 2.0 * 2**30
    _, engine, rank = outlook(config, SIZE, nodes, on_gpu=True)
    assert "too little, raise engines.tensor_parallel" in engine and "tight, lower" in rank
    _, unknown, _ = outlook(config, SIZE, {"gpus": {"GPU": 8.0}}, on_gpu=True)
    assert unknown == "an engine's GPU: weights 1.86 GiB, caches in what is left"


def test_the_outlook_on_cpus_counts_the_configured_cache() -> None:
    config = load_config("smollm2", ["engines.cpu_kv_cache_gib=2"])
    where, engine, _ = outlook(config, SIZE, {"here": {"CPU": 2.0, "memory": 24.0 * 2**30}}, on_gpu=False)
    assert where.startswith("nodes: 1 x (2 CPU) for 2 engines")
    assert engine == "an engine's process (24.00 GiB): weights 1.86 GiB, caches 2.00 GiB for 16,384 tokens"
