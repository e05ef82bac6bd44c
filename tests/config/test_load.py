"""Configuration: what is mistyped is named, what is right comes back the same."""

from pathlib import Path

import pytest
import yaml

from oel_ray.config.load import load_config, parse_config
from oel_ray.distill.step import scheduled_rate
from oel_ray.errors import UserError

GOOD = "engines:\n  max_model_len: 20000\n"


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "game.yaml"
    path.write_text(GOOD)
    return str(path)


def test_overrides_change_dotted_keys(source: str) -> None:
    config = load_config(source, ["rounds=3", "env.params={size: 4}", "collect.sampling.temperature=0"])
    assert config.rounds == 3
    assert config.env.params == {"size": 4}
    assert config.collect.sampling.temperature == 0
    assert config.engines.max_model_len == 20000


def test_the_printed_configuration_loads_to_the_same_configuration(source: str, tmp_path: Path) -> None:
    config = load_config(source, ["evaluate.maps=5"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(str(copy)) == config
    assert yaml.safe_load(config.to_yaml()) == config.model_dump(mode="json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("colect.players=3", "unknown configuration key 'colect': did you mean 'collect'?"),
        ("learning_rate=1", "did you mean 'consolidate.learning_rate'?"),
        ("collect.seets=3", "did you mean 'collect.seats'?"),
        ("rounds=three", "rounds: Input should be a valid integer"),
        ("rounds=0", "rounds: Input should be greater than or equal to 1"),
        ("rounds", "'rounds' is not an override: write key=value"),
        ("rounds=[", "the value in 'rounds=[' is not valid YAML"),
        ("rounds.more=1", "rounds"),
        ("engines.max_model_len=100", "leaves no room for a prompt"),
    ],
)
def test_an_override_that_is_wrong_is_refused_in_one_line_that_names_it(
    source: str, override: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        load_config(source, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list\n", "rounds: [\n", "just words\n"])
def test_a_configuration_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(str(path))


def test_an_unknown_source_lists_the_presets() -> None:
    with pytest.raises(UserError, match="neither a YAML file nor a preset"):
        load_config("no-such-preset")


def test_keep_steps_refuses_the_last_step() -> None:
    assert parse_config({"consolidate": {"steps": 4, "keep_steps": [1, 3]}}).consolidate.keep_steps == (1, 3)
    with pytest.raises(UserError, match=r"keep_steps names step 4, .* the last of steps=4"):
        parse_config({"consolidate": {"steps": 4, "keep_steps": [1, 4]}})


@pytest.fixture
def layers(tmp_path: Path) -> str:
    below = "rounds: 3\nenv: {id: Here, max_turns: 7, params: {size: 4, holes: 1}}\nswitches: {quick: {rounds: 1}}\n"
    (tmp_path / "below.yaml").write_text(below)
    (tmp_path / "above.yaml").write_text(
        "base: below.yaml\nenv: {params: {size: 5}}\n"
        "switches: {greedy: {collect: {sampling: {temperature: 0}}, rounds: 2}}\n"
    )
    return str(tmp_path / "above.yaml")


def test_a_file_is_laid_over_its_base_section_by_section(layers: str) -> None:
    config = load_config(layers)
    assert (config.rounds, config.env.id, config.env.max_turns, config.env.params) == (3, "Here", 7, {"size": 5})


def test_switches_come_before_overrides_whatever_their_order(layers: str) -> None:
    assert load_config(layers, ["quick=true"]).rounds == 1
    assert load_config(layers, ["quick=false"]).rounds == 3
    config = load_config(layers, ["rounds=5", "collect.sampling.top_k=4", "greedy=true"])
    assert (config.rounds, config.collect.sampling.temperature, config.collect.sampling.top_k) == (5, 0, 4)
    assert load_config(layers).collect.sampling.temperature > 0, "a switch stays off for those who do not ask"


def test_a_section_that_is_absent_can_be_filled_by_dotted_keys(source: str) -> None:
    config = load_config(source, ["collect.extraction_sampling.top_k=7"])
    assert config.collect.sampling_for("extraction").top_k == 7
    assert config.collect.sampling_for("consolidation").top_k == 0


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("base: absent.yaml", [], "'absent.yaml' is neither a YAML file nor a preset"),
        ("base: self.yaml", [], "is based on itself"),
        ("switches: [a, b]", [], "'switches' must hold names"),
        ("switches: {quick: {rounds: 1}}", ["quick=maybe"], "write quick=true or quick=false"),
        ("switches: {quick: {rounds: 1}}", ["quik=true"], "did you mean 'quick'?"),
        ("switches: {quick: {round: 1}}", ["quick=true"], "unknown configuration key 'round'"),
        ("env: {id: a}", ["env.id.more=1"], "id is a value, not a section"),
    ],
)
def test_a_mistake_in_a_base_file_or_switch_is_refused_in_one_line(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    path = tmp_path / "self.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(path), overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_goes_down_by_the_end_of_a_round(schedule: str, rates: list[float]) -> None:
    settings = {"steps": 6, "warmup_steps": 2, "learning_rate": 2.0, "schedule": schedule}
    config = parse_config({"consolidate": settings}).consolidate
    assert [scheduled_rate(config, update) for update in range(6)] == pytest.approx(
        [2 * rate for rate in rates], rel=1e-5
    )
