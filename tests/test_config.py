"""Configuration: what is mistyped is named, what is right comes back the same."""

from pathlib import Path

import pytest
import yaml

from oel_ray.config import load_config
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


def test_the_printed_configuration_loads_to_the_same(source: str, tmp_path: Path) -> None:
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
def test_a_bad_override_is_named(source: str, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(source, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list\n", "rounds: [\n", "just words\n"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(str(path))


def test_an_unknown_source_lists_the_presets() -> None:
    with pytest.raises(UserError, match="neither a YAML file nor a preset"):
        load_config("no-such-preset")
