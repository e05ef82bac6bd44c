"""What follows from a configuration, against sums done by hand."""

from oel_ray.configure import load_config
from oel_ray.plan import Demand, demand, explain, headline, readings


def test_the_sizes_of_a_preset() -> None:
    config = load_config("smollm2")
    assert explain(config) == [
        "stages       12 in rounds 0 to 2",
        "games        T = 4 and T' = 6 a round, 20 in all",
        "extraction   K x T = 3 x 4, 12 responses a round",
        "training     2 games x 5 turns, at most 10 samples a step and 30 a round",
        "evaluation   16 games of the policy and 16 in context a round, 80 games in all",
        "on CPUs      6 logical CPUs: 2 for engines, 2 for players, 2 for extraction workers or training ranks",
        "tokens       at most, beside the prompt; engines.max_model_len=4096",
        "  play       24 of response; 4072 are left to the prompt",
        "  in context 192 of knowledge + 24 of response = 216; 3880 are left to the prompt",
        "  extraction 192 of knowledge + 64 of response = 256; 3840 are left to the prompt",
        "  teacher    192 of knowledge + 24 of response = 216; the model's own context holds the prompt, too",
    ]
    assert headline(config).endswith("12 extractions, at most 30 training samples, 32 evaluation games")


def test_without_evaluation_and_extraction() -> None:
    config = load_config("smollm2", ["evaluate.enabled=false", "extract.format=raw"])
    assert [reading.name for reading in readings(config)] == ["play", "teacher"]
    assert explain(config)[0] == "stages       7 in rounds 0 to 2"
    assert headline(config).endswith("0 extractions, at most 30 training samples, 0 evaluation games")


def test_every_step_of_the_accumulation_is_a_set_of_games_in_context() -> None:
    config = load_config("smollm2", ["evaluate.accumulation_steps=[1, 2, 4]"])  # T = 4: the last is the complete text
    assert explain(config)[4].endswith("16 games of the policy and 48 in context a round, 144 games in all")
    assert headline(config).endswith(" 64 evaluation games")


def test_what_is_read_by_whom() -> None:
    config = load_config("smollm2", ["extract.show_previous=false", "collect.sampling.max_tokens=99"])
    assert [(reading.knowledge, reading.response) for reading in readings(config)] == [
        (0, 99),
        (192, 99),  # one bound for all games of a player
        (0, 64),
        (192, 24),
    ]
    assert [reading.keys[-1].split(".")[0] for reading in readings(config)] == [
        "collect",
        "collect",
        "extract",
        "consolidate",
    ]


def test_the_demand_on_cpus_and_on_gpus() -> None:
    changes = ["engines.cpu_threads=3", "engines.tensor_parallel=2", "consolidate.workers=4", "engines.device=auto"]
    config = load_config("smollm2", changes)
    cpu, gpu = demand(config, on_gpu=False), demand(config, on_gpu=True)
    assert (cpu, cpu.cpus, cpu.gpus) == (Demand(6, 2, 4), 12, 0)
    assert (gpu, gpu.cpus, gpu.gpus) == (Demand(2, 2, 4, 4, 4), 8, 8)
    (row,) = (line for line in explain(config) if line.startswith("on GPUs"))
    assert "8 GPUs: 4 for engines, 4 for training ranks; 8 logical CPUs: 2 for engines" in row
