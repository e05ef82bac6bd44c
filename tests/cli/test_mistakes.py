"""Every mistake that a person can make is one line with the remedy, exit code 2, and nothing written.

A new mistake is a new row of `MISTAKES`: the command line, a part of the message that names the culprit, and one that
names the remedy. All rows share one desk (`desk`): as nothing is ever written, none disturbs another.
"""

import hashlib
import json
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import ray
import yaml

from oel_ray.cli.main import main
from oel_ray.cluster import session
from oel_ray.config.load import parse_config
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.stage import Stage
from tests.support import example_run
from tests.support.tokenizers_for_tests import CHAT_TEMPLATE, small_tokenizer

GAME = {
    "model": "models/good",
    "env": {"params": {"size": 3, "num_holes": 2}},
    "collect": {"extraction_games": 2, "sampling": {"max_tokens": 64}},
    "extract": {"seeds": 2, "max_tokens": 256, "sampling": {"max_tokens": 64}},
    "consolidate": {"steps": 2, "games_per_step": 2, "workers": 1, "sampling": {"max_tokens": 64}},
    "evaluate": {"maps": 3, "sampling": {"max_tokens": 64}},
    "engines": {"device": "cpu", "max_model_len": 4096},
    "switches": {"quick": {"rounds": 1}},
}
PLAIN_TEMPLATE = CHAT_TEMPLATE.partition("{% if enable_thinking")[0] + "{% endif %}"
THINKER_TEMPLATE = PLAIN_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")

MISTAKES: list[tuple[str, str, str]] = [
    # what was typed
    ("", "Missing command", "see --help"),
    ("fly", "No such command 'fly'", "see --help"),
    ("run game.yaml --fast", "No such option: --fast", "see --help"),
    ("config", "Missing argument 'CONFIG'", "see --help"),
    ("show", "Missing argument 'RUN_DIR'", "see --help"),
    ("run", "give a CONFIG", "quickstart"),
    ("run rounds=3 game.yaml", "CONFIG comes before 'rounds=3'", "a YAML file or a preset"),
    ("run game.yaml rounds", "'rounds' is not an override", "write key=value"),
    ("run game.yaml rounds=[", "'rounds=['", "write it as in a YAML file"),
    ("config game.yaml quick=yess", "'quick' is a switch", "write quick=true or quick=false"),
    # configuration
    ("run quikstart", "'quikstart' is neither a YAML file nor a preset", "quickstart"),
    ("config absent.yaml", "'absent.yaml'", "presets are exact"),
    ("run broken.yaml", "broken.yaml is not valid YAML", "line 2"),
    ("run list.yaml", "list.yaml holds no", "key: value"),
    ("run game.yaml colect.players=3", "unknown configuration key 'colect'", "did you mean 'collect'?"),
    ("config game.yaml engines.seats=3", "unknown configuration key 'engines.seats'", "did you mean 'collect.seats'?"),
    ("run game.yaml rounds=three", "rounds: Input should be a valid integer", "got 'three'"),
    ("run game.yaml rounds=0", "rounds:", "greater than or equal to 1"),
    ("run game.yaml extract.seeds=0", "extract.seeds:", "greater than or equal to 1"),
    ("run game.yaml consolidate.learning_rate=-1e-6", "consolidate.learning_rate:", "greater than or equal to 0"),
    ("run game.yaml consolidate.zero_stage=4", "consolidate.zero_stage:", "less than or equal to 3"),
    ("run game.yaml extract.max_tokens=9000", "engines.max_model_len=4096 leaves no room", "lower extract.max_tokens"),
    ("run game.yaml evaluate.accumulation_steps=[1,3]", "names step 3, and an accumulation has", "or raise collect."),
    ("run game.yaml evaluate.accumulation_steps=[0]", "evaluate.accumulation_steps.0:", "greater than or equal to 1"),
    # environment and maps
    ("run game.yaml env.id=FrozenLak-v0", "'FrozenLak-v0'", "did you mean 'FrozenLake-v0'?"),
    ("run game.yaml env.params={size:3}", "'size:3' has no value", "write e.g. 'env.params={size: 4}'"),
    ("run game.yaml 'env.params={sise: 3}'", "no parameter 'sise'", "did you mean 'size'?"),
    ("run game.yaml 'env.params={size: big}'", "parameter 'size' must be of type int", "got 'big'"),
    ("run game.yaml evaluate.maps=100", "only 19 distinct maps were found, and 100 are", "lower evaluate.maps"),
    ("run game.yaml evaluate.maps=19", "no map is left to learn on", "lower evaluate.maps"),
    # model
    ("run game.yaml model=./absent", "the model folder absent does not exist", "a Hugging Face folder or a hub name"),
    ("run game.yaml model=nobody/knows-it", "'nobody/knows-it'", "that is on this machine"),
    ("run game.yaml model=a/b/c", "'a/b/c'", "give a Hugging Face folder or a hub name"),
    ("run game.yaml model=game.yaml", "the model game.yaml is a file", "the Hugging Face folder"),
    ("run game.yaml model=notes", "the model folder notes has no config.json", "give a Hugging Face model folder"),
    ("run game.yaml model=models/no-weights", "no weights (*.safetensors", "the folder of a whole model"),
    ("run game.yaml model=models/no-shard", "no model-2.safetensors", "fetch them"),
    ("run game.yaml model=models/torn-index", "no sound model.safetensors.index.json", "fetch it again"),
    ("run game.yaml model=models/bad-index", "no sound model.safetensors.index.json", "fetch it again"),
    ("run game.yaml model=models/no-tokenizer", "no tokenizer (no tokenizer.json", "copy the tokenizer's files"),
    ("run game.yaml model=models/bad-tokenizer", "the tokenizer in", "copy its files there"),
    ("run game.yaml model=models/no-template", "has no chat template", "use an instruction-tuned model"),
    ("run game.yaml model=models/bad-template", "TemplateSyntaxError", "copy its files there"),
    ("run game.yaml model=models/unknown", "config.json cannot be used", "a model that transformers knows"),
    ("run game.yaml model=models/t5", "(T5ForConditionalGeneration) is no decoder-only", "...ForCausalLM model"),
    ("run game.yaml model=models/classifier", "(LlamaForSequenceClassification)", "...ForCausalLM model"),
    ("run game.yaml model=models/plain thinking=true", "opens no <think> block", "set thinking=false"),
    ("run game.yaml model=models/thinker", "opens a <think> block", "set thinking=true"),
    # contexts
    ("run game.yaml engines.max_model_len=8193", "more than the 8192 tokens", "set engines.max_model_len=8192 or less"),
    ("run game.yaml extract.max_tokens=3900", "in context: a prompt of", "raise it, or lower extract.max_tokens"),
    ("run game.yaml evaluate.in_context=false extract.max_tokens=3900", "extraction: a prompt", "extract.max_tokens"),
    ("run game.yaml collect.sampling.max_tokens=3800", "play: a prompt of", "or lower collect.sampling.max_tokens"),
    (
        "run game.yaml evaluate.in_context=false extract.show_previous=false extract.max_tokens=8100",
        "teacher: a prompt of",
        "take a model with a longer one, or lower extract.max_tokens",
    ),
    (
        "run game.yaml consolidate.responses=teacher evaluate.in_context=false extract.show_previous=false "
        "extract.max_tokens=3900",
        "off-policy: a prompt of",
        "raise it, or lower extract.max_tokens",
    ),
    # adapters
    ("run game.yaml consolidate.lora.rank=0", "consolidate.lora.rank:", "greater than or equal to 1"),
    ("run game.yaml consolidate.lora.target_modules=q_proj", "consolidate.lora.target_modules:", "a list of layers"),
    ("run game.yaml consolidate.lora.target_modules=[]", "consolidate.lora.target_modules:", "write all-linear"),
    ("run game.yaml consolidate.lora.target_modules=[q_prj]", "no linear layer 'q_prj'", "choose from down_proj, gate"),
    ("run game.yaml consolidate.lora={} consolidate.zero_stage=3", "zero_stage=3", "set consolidate.zero_stage=2"),
    ("run game.yaml consolidate.offload_optimizer=true", "means nothing on CPUs", "leave it out"),
    (
        "run game.yaml consolidate.offload_optimizer=true consolidate.zero_stage=0",
        "offload_optimizer=true needs ZeRO",
        "set consolidate.zero_stage=1",
    ),
    # another teacher
    ("run game.yaml consolidate.teacher=./absent", "the model folder absent does not exist", "a Hugging Face folder"),
    ("run game.yaml consolidate.teacher=models/wide", "has another tokenizer", "read and write the same tokens"),
    ("run game.yaml consolidate.teacher=models/others", "has another tokenizer", "read and write the same tokens"),
    (
        "run game.yaml consolidate.teacher=models/short",
        "more than the teacher's context=512",
        "take a model with a longer one",
    ),
    (
        "run game.yaml consolidate.live_teacher=true consolidate.lora={}",
        "neither another teacher nor",
        "set teacher=null",
    ),
    (
        "run game.yaml consolidate.live_teacher=true consolidate.teacher=models/wide",
        "neither another teacher nor adapters",
        "set teacher=null",
    ),
    # machine and cluster
    ("run game.yaml engines.count=999", "engines 999 x (1 CPU) needs 999 cores", "lower engines.count"),
    ("run game.yaml consolidate.workers=999", "trainer 999 x (1 CPU) needs 999 cores", "or consolidate.workers"),
    ("run game.yaml engines.device=cuda", "needs 2 GPUs and this machine has 0: add 2", "set engines.device=cpu"),
    ("run game.yaml cluster.address=127.0.0.1:{closed}", "no Ray answers at '127.0.0.1:", "correct cluster.address"),
    ("run game.yaml cluster.address=127.0.0.1:{deaf}", "no Ray answers at '127.0.0.1:", "correct cluster.address"),
    ("run game.yaml cluster.address=head-node", "'head-node' is no address", "write HOST:PORT or auto"),
    ("run game.yaml cluster.address=ray://head:10001", "Ray Client", "start oel on a machine of the cluster"),
    ("run game.yaml cluster.address={cluster}", "needs 4 CPUs and the cluster at", "add 3, or lower engines.count"),
    # a job
    ("submit game.yaml", "Missing option '--name'", "see --help"),
    ("submit game.yaml colect.players=3 --name a", "unknown configuration key 'colect'", "did you mean 'collect'?"),
    ("submit game.yaml --name 'a b'", "'a b' is no name for a run", "use 1 to 64 letters"),
    ("submit game.yaml --name a --runs runs", "--runs runs is relative", "storage that all nodes share"),
    ("submit quickstart --name a --address 127.0.0.1:{closed}", "is no address of a job server", "write that of the"),
    ("submit quickstart --name a --address ray://127.0.0.1:{closed}", "is no address of a job server", "http://HOST:"),
    ("submit quickstart --name a --address http://127.0.0.1:{closed}", "takes no job from here", "open a tunnel"),
    ("run game.yaml 'collect.resources={GPU: 1}'", "GPUs follow from engines.device", "set those"),
    # run folder
    ("run game.yaml --run-dir game.yaml", "game.yaml is a file", "choose another folder"),
    ("run game.yaml --run-dir game.yaml/run", "game.yaml is a file", "choose another folder"),
    ("run game.yaml --run-dir /proc/run", "cannot write to /proc/run", "choose another folder"),
    ("run game.yaml --run-dir " + 300 * "x", "name too long", "choose another folder"),
    ("run game.yaml --run-dir notes", "notes is not empty and holds no run", "choose another folder"),
    ("run game.yaml --run-dir finished", "finished already holds a run", "add --resume"),
    ("run game.yaml --resume", "--resume needs the folder of the run", "--run-dir RUN_DIR"),
    ("run --resume --run-dir absent", "absent does not exist", "give the folder of a run"),
    ("run --resume --run-dir notes", "notes holds no run", "give the folder of a run"),
    ("run --resume --run-dir held", "held is in use by process", "wait for it to end"),
    ("knowledge finished --diff r001-k00 r001-k09", "no knowledge text r001-k09", "'oel knowledge RUN_DIR' lists them"),
    ("knowledge finished --drop nobody", "was learned from 'nobody'", "'oel show' names the game of each item"),
    ("run game.yaml --resume --run-dir begun", "rounds: 1 -> 2", "leave CONFIG out"),
    ("run --resume --run-dir begun", "the model folder /lost/model does not exist", "give a Hugging Face folder"),
    ("run game.yaml --allow-config-change", "--allow-config-change is for a run that goes on", "add --resume"),
    ("run game.yaml rounds=1 seed=7 --resume --run-dir begun --allow-config-change", "seed: 0 -> 7", "start a new run"),
    ("rollback finished --to-round 2 --yes", "finished has no round behind round 2", "choose an earlier one"),
    # one stage
    ("collect absent", "absent holds no run", "start one there with --config CONFIG"),
    ("collect notes --config game.yaml", "notes is not empty and holds no run", "choose another folder"),
    ("extract finished extract.seeds=3", "'extract.seeds=3' changes a configuration", "name one with --config"),
    ("extract finished --config game.yaml", "the configuration differs", "leave CONFIG out"),
    ("extract finished", "no round is left to extract", "a new run needs --config"),
    ("evaluate finished --round 1", "round 1: nothing to evaluate: it is done", "choose another --round"),
    ("evaluate new --config game.yaml --round 7", "the run has 2 rounds", "choose another --round"),
    ("evaluate new --config game.yaml evaluate.enabled=false", "switches it off", "another --round or configuration"),
    ("evaluate new --config game.yaml --knowledge long.txt", "with --in-context only", "add it, or leave --knowledge"),
    ("extract new --config game.yaml", "no games to extract from", "give a file with --trajectories"),
    ("consolidate new --config game.yaml --trajectories good.jsonl", "no knowledge", "give a file with --knowledge"),
    ("extract new --config game.yaml --round 2 --trajectories good.jsonl", "round 1 has no policy", "finish it first"),
    ("extract new --config game.yaml --trajectories bad.jsonl", "2 bad lines: line 1: Invalid JSON", "mend or remove"),
    ("extract new --config game.yaml --trajectories bad.jsonl", "line 3: turns.0.response: Field", "mend or remove"),
    ("extract new --config game.yaml --trajectories notes", "notes cannot be read", "give the path of a file"),
    (
        "consolidate new --config game.yaml --trajectories good.jsonl --knowledge long.txt",
        "long.txt has",
        "shorten it or raise extract.max_tokens",
    ),
    # environments
    ("envs FrozenLak-v0", "'FrozenLak-v0'", "did you mean 'FrozenLake-v0'?"),
    ("envs FrozenLake-v0 sise=3", "no parameter 'sise'", "did you mean 'size'?"),
    ("envs size=3 FrozenLake-v0", "ID comes before 'size=3'", "oel envs lists"),
    ("check-env", "Missing argument 'ID'", "see --help"),
    ("check-env Wordle-v0", "Wordle-v0 needs word lists", "nltk.downloader"),
    # reading runs
    ("show absent", "absent does not exist", "give the folder of a run"),
    ("show notes", "notes holds no run", "give the folder of a run"),
    ("show damaged", "damaged/run.json is damaged", "give the folder of another run"),
    ("show finished r009-k00", "r009-k00", "r001-"),
    ("report absent", "absent does not exist", "give the folder of a run"),
    ("report notes", "notes holds no run", "give the folder of a run"),
    ("report finished --out game.yaml", "cannot write to game.yaml", "choose another folder with --out"),
    ("report finished --out game.yaml/page", "cannot write to game.yaml/page", "choose another folder with --out"),
    ("verify absent --replay", "absent does not exist", "give the folder of a run"),
    ("verify notes", "notes holds no run", "give the folder of a run"),
]


ROWS = [
    # A process of its own asks a cluster.
    pytest.param(*mistake, id=mistake[0], marks=pytest.mark.ray if re.search("cluster.address=.*{", mistake[0]) else ())
    for mistake in MISTAKES
]


@pytest.mark.parametrize(("command", "culprit", "remedy"), ROWS)
def test_a_mistake_is_one_line_and_writes_nothing(
    command: str,
    culprit: str,
    remedy: str,
    desk: Path,
    ports: dict[str, str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert session.CLUSTER_ANSWER_S < 30
    if "{deaf}" in command:
        monkeypatch.setattr(session, "CLUSTER_ANSWER_S", 5.0)
    if "{cluster}" in command:
        ports |= {"cluster": request.getfixturevalue("cluster")}
    arguments = shlex.split(re.sub(r"{(closed|deaf|cluster)}", lambda match: ports[match[1]], command))
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, "argv", ["oel", *arguments])
    before = contents(desk)
    capfd.readouterr()

    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main()
    seconds = time.monotonic() - began

    output, errors = capfd.readouterr()
    assert (end.value.code, output) == (2, ""), errors
    assert errors.startswith("oel: error: ") and errors.count("\n") == 1, errors
    assert culprit in errors and remedy in errors, errors
    assert contents(desk) == before
    assert seconds < 30


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as a user may have it: configurations, models good and bad, runs, and things that are none of these."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "game.yaml").write_text(yaml.safe_dump(GAME))
    (folder / "broken.yaml").write_text("rounds: 2\nenv: {id\n")
    (folder / "list.yaml").write_text("- rounds\n")
    (folder / "long.txt").write_text("word " * 1000)
    line = json.dumps({"instructions": "Go.", "turns": [{"observation": "A door.", "response": "[open]"}]})
    (folder / "good.jsonl").write_text(f"{line}\n")
    (folder / "bad.jsonl").write_text(f"oops\n{line}\n{line.replace('response', 'answer')}\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("mine")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "run.json").write_text("{}")
    make_models(folder / "models")
    example_run.build(folder / "finished")
    example_run.build(folder / "held")
    begun = GAME | {"model": "/lost/model", "rounds": 1}
    with RunFolder.create(folder / "begun", parse_config({k: v for k, v in begun.items() if k != "switches"})) as run:
        example_run.prepare(Stage(run, 0, "prepare"), Path("/lost/model"))
    with RunFolder.resume(folder / "held", None):
        yield folder


def make_models(folder: Path) -> None:
    """`good`, and what is like it but for one thing."""
    good = folder / "good"
    small_tokenizer().save_pretrained(good)
    sizes = {"max_position_embeddings": 8192, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    (good / "config.json").write_text(json.dumps(config))
    (good / "model.safetensors").touch()

    def variant(name: str, lacking: str = "", **texts: str) -> None:
        shutil.copytree(good, folder / name)
        for path in (folder / name).glob(lacking) if lacking else []:
            path.unlink()
        for file, text in texts.items():
            path = folder / name / file.replace("__", ".")
            assert path.exists() or lacking, f"{file} is not what transformers calls it"
            path.write_text(text)

    variant("no-weights", "*.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    variant("no-shard", "*.safetensors", model__safetensors__index__json=json.dumps(index))
    (folder / "no-shard" / "model-1.safetensors").touch()
    variant("bad-index", "*.safetensors", model__safetensors__index__json="[]")
    variant("torn-index", "*.safetensors", model__safetensors__index__json='{"weight_map": {"a"')
    variant("no-tokenizer", "tokenizer.json")
    variant("bad-tokenizer", tokenizer__json="{")
    variant("no-template", "chat_template.jinja")
    variant("bad-template", chat_template__jinja="{% for m in")
    variant("plain", chat_template__jinja=PLAIN_TEMPLATE)
    variant("thinker", chat_template__jinja=THINKER_TEMPLATE)
    variant("unknown", config__json=json.dumps(config | {"model_type": "nothing-like-it"}))
    variant("wide", config__json=json.dumps(config | {"vocab_size": 40000}))
    variant("short", config__json=json.dumps(config | {"max_position_embeddings": 512}))
    variant("others")
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(folder / "others")
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    variant("t5", config__json=json.dumps(t5))
    variant("classifier", config__json=json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs, a hub out of reach, and no cluster to join."""
    monkeypatch.setattr(session, "_gpus_here", lambda: 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, str]]:
    """`closed`: nobody listens; `deaf`: somebody does who is no Ray."""
    with socket.socket() as closed, socket.socket() as deaf:
        closed.bind(("127.0.0.1", 0))
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        yield {"closed": str(closed.getsockname()[1]), "deaf": str(deaf.getsockname()[1])}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a real cluster that is too small."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
