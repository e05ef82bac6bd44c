"""Check everything that can be checked before a run writes its first byte. Runs in the driver.

Loads configurations and tokenizers and builds games; loads no weights and no engine. The parts work separately, because
a run on imported games has a model and a context, and no environment.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from oel_ray.cluster.demand import GPU_MEMORY, Nodes, demands, placement
from oel_ray.cluster.session import alive_nodes, check_resources
from oel_ray.config.budget import Budget, budgets
from oel_ray.config.precision import Auto, precisions
from oel_ray.config.schema import RunConfig
from oel_ray.distill.memory import ModelSize, _bytes, rank_memory
from oel_ray.envs.base import Environment
from oel_ray.envs.registry import make
from oel_ray.envs.splits import held_out_episodes, training_episodes
from oel_ray.errors import UserError
from oel_ray.extract.chain import extraction_prompt
from oel_ray.formats import gib
from oel_ray.models.policy import Model, check_model, check_teacher
from oel_ray.models.resolve import resolve_model
from oel_ray.runs import layout
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.schedule import PLAYED, check_imports, unfinished
from oel_ray.text import prompts


class Ready(NamedTuple):
    """The results of the checks: the model, and the precision that `auto` stands for where the run computes."""

    model: Model
    auto: Auto


def preflight(config: RunConfig, note: Callable[[str], None], *, plays: bool = True) -> Ready:
    """Check all that a run needs; an environment only if it `plays`. `note` is called with messages about slow steps.

    Raises:
        UserError: the run could not work here.
    """
    auto = check_resources(config)
    slow = [key for key, value in precisions(config).items() if value == "bfloat16" and key != "policy_dtype"]
    if slow and auto.precision == "float32":
        note(f"{' and '.join(slow)}=bfloat16 will be many times slower than float32: {auto.because}")
    environment = check_environment(config) if plays else None
    model = check_model(config, note)
    check_student(config, model)
    check_context(config, model, check_teacher(config, model, note), environment)
    return Ready(model, auto)


def preflight_resumed(folder: RunFolder, note: Callable[[str], None]) -> None:
    """Check all that the rest of a resumed run needs. Its model is the policy that the next stage loads.

    Raises:
        UserError: the run could not go on here.
    """
    check_imports(folder.config, folder.committed)
    if left := unfinished(folder.config, folder.committed):
        preflight(config_from_round(folder, left[0][0]), note, plays=any(name in PLAYED for _, name in left))


def report_outlook(config: RunConfig, policy: Path, note: Callable[[str], None], *, on_gpu: bool) -> None:
    """Report where the pools of the run can run in the joined Ray, and the memory that they take there."""
    from oel_ray.distill.memory import model_size

    teacher = resolve_model(config.consolidate.teacher, note) if config.consolidate.teacher else policy
    size = model_size(policy, teacher, config.consolidate.lora)
    for line in outlook(config, size, alive_nodes(), on_gpu=on_gpu):
        note(line)


def config_from_round(folder: RunFolder, number: int) -> RunConfig:
    """Copy the configuration, with the policy that a round starts from as its model."""
    if layout.PREPARE not in folder.committed.get(0, ()):
        return folder.config
    return folder.config.model_copy(update={"model": str(folder.policy(folder.deployed(number)))})


def check_environment(config: RunConfig) -> Environment:
    """Check that the environment has enough maps, and build one game as the run would play it.

    Raises:
        UserError: the environment cannot be built, or has too few maps for evaluation and training.
    """
    env, seed = config.env, config.seed
    environment = make(env.id, seed, env.params)
    held_out = {episode.map_hash for episode in held_out_episodes(env, seed, config.evaluate.held_out)}
    training_episodes(env, seed, 1, "extraction", 1, held_out)
    return environment


def check_student(config: RunConfig, model: Model) -> None:
    """Check that peft is installed, that the adapter layers exist, and that the model supports packing if required.

    Raises:
        UserError: one of these conditions does not hold.
    """
    lora, packing = config.consolidate.lora, config.consolidate.packing
    if lora and importlib.util.find_spec("peft") is None:
        raise UserError(
            "consolidate.lora needs the package peft, which is not installed: install oel-ray with the extra 'lora', "
            "or set consolidate.lora=null"
        )
    named = lora and lora.target_modules != "all-linear"
    if not named and packing != "always":
        return
    from oel_ray.distill.lora import layers_to_adapt
    from oel_ray.models.capabilities import reads_packed
    from oel_ray.models.load import model_without_weights

    student = model_without_weights(model.folder)
    reads_packed(student, packing)
    if lora:
        layers_to_adapt(student, lora)


def check_context(config: RunConfig, model: Model, teacher: Model, environment: Environment | None) -> None:
    """Check that real first-turn prompts fit, with the longest knowledge and response that the configuration allows.

    Without an environment there are no prompts, so only the model's own limit is checked.

    Raises:
        UserError: a prompt is too long for the engines or the trainer.
    """
    room = config.engines.max_model_len
    if model.context and room > model.context:
        raise UserError(
            f"engines.max_model_len={room} is more than the {model.context} tokens that the model {model.folder} was "
            f"made for (max_position_embeddings): set engines.max_model_len={model.context} or less"
        )
    if environment is None:
        return
    situation = prompts.game_situation(environment.instructions, [], environment.reset())
    question = extraction_prompt(prompts.transcript(environment.instructions, [], ""), "", config.extract)
    for budget in budgets(config):
        if budget.name == "extraction":
            prompt = len(model.chat.message_ids(question))
        else:
            prompt = len(model.chat.game_ids(situation, "." if budget.knowledge else ""))
        if budget.by_engine:
            _check_fits(budget, prompt, room, "engines.max_model_len", "raise it")
        elif teacher.context:
            _check_fits(budget, prompt, teacher.context, "the teacher's context", "take a model with a longer one")


def _check_fits(budget: Budget, prompt: int, room: int, limit: str, remedy: str) -> None:
    if prompt + budget.tokens > room:
        knowledge = f"{budget.knowledge} of knowledge and " if budget.knowledge else ""
        raise UserError(
            f"{budget.name}: a prompt of {prompt} tokens with {knowledge}{budget.response} of response makes "
            f"{prompt + budget.tokens}, more than {limit}={room}: {remedy}, or lower {' or '.join(budget.keys)}"
        )


def outlook(config: RunConfig, size: ModelSize, nodes: Nodes, *, on_gpu: bool) -> list[str]:
    """Describe the placement of the pools, and the permanent memory of engines and ranks there."""
    engines, consolidate = config.engines, config.consolidate
    of, kind = ("GPU", GPU_MEMORY) if on_gpu else ("CPU", "memory")
    there = min((node[kind] for node in nodes.values() if node.get(of) and node.get(kind)), default=0)
    one, room = ("GPU" if on_gpu else "process"), (f" ({gib(there)})" if there else "")
    weights, token = (
        n * _bytes(engines.dtype) / engines.tensor_parallel for n in (size.parameters, size.values_per_token)
    )
    cache = there * engines.gpu_memory_utilization - weights if on_gpu else engines.cpu_kv_cache_gib * 2**30
    rank = rank_memory(consolidate, size.own, size.trained, consolidate.workers) | {
        "teacher": size.teacher * _bytes(consolidate.precision),
        "its kept texts at most": consolidate.teacher_cache_gib * 2**30,
    }
    lying = sum(count for name, count in rank.items() if "host" not in name)
    cached = f"caches {gib(cache)} for {cache / token:,.0f} tokens" if there or not on_gpu else "caches in what is left"
    few = ": too little, raise engines.tensor_parallel" if cache <= 0 < there else ""
    tight = ""
    if lying > 0.85 * there > 0:
        tight = ": tight, lower consolidate.teacher_cache_gib, or raise zero_stage or workers"
    parts = ", ".join(f"{name} {gib(count)}" for name, count in rank.items())
    return [
        f"nodes: {placement(demands(config, on_gpu=on_gpu), nodes)}",
        f"an engine's {one}{room}: weights {gib(weights)}, {cached}{few}",
        f"a training rank's {one}{room}: {parts}, {gib(lying)} in all{tight}",
    ]
