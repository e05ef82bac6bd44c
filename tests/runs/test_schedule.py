import pytest

from oel_ray.errors import UserError
from oel_ray.runs.schedule import check_imports, check_ready, first_open_round, is_done, unfinished
from tests.support.example_run import small_config

ROUND = {"collect", "extract", "evaluate_in_context", "consolidate", "evaluate"}
CONFIG = small_config()
FIRST = {0: {"prepare", "evaluate"}}


def test_a_run_goes_on_where_its_manifests_end() -> None:
    assert unfinished(CONFIG, FIRST)[0] == (1, "collect")
    assert unfinished(CONFIG, {**FIRST, 1: {"collect", "extract"}})[0] == (1, "evaluate_in_context")
    assert unfinished(CONFIG, {**FIRST, 1: ROUND, 2: ROUND}) == []


def test_imports_stand_for_the_stages_that_they_replace() -> None:
    assert is_done({"import_extraction", "import_consolidation"}, "collect")
    assert not is_done({"import_extraction"}, "collect")
    assert is_done({"import_knowledge", "import_consolidation"}, "collect"), "nobody would read games for extraction"
    assert not is_done({"import_knowledge"}, "collect")
    assert is_done({"import_knowledge"}, "extract")
    assert not is_done({"import_knowledge"}, "consolidate")


@pytest.mark.parametrize(
    ("there", "missing"), [("import_extraction", "consolidate"), ("import_consolidation", "extract")]
)
def test_playing_never_replaces_imported_games(there: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"none to {missing} with.*'oel {missing} RUN_DIR --round 1"):
        check_imports(CONFIG, {**FIRST, 1: {there}})
    check_imports(CONFIG, {**FIRST, 1: {"import_extraction", "import_consolidation"}})


def test_a_stage_without_a_round_is_done_in_the_first_round_that_lacks_it() -> None:
    assert first_open_round(CONFIG, FIRST, "extract") == 1
    assert first_open_round(CONFIG, {**FIRST, 1: {"import_knowledge"}}, "extract") == 2
    assert first_open_round(CONFIG, {0: {"prepare"}}, "evaluate") == 0
    with pytest.raises(UserError, match="no round is left to collect"):
        first_open_round(CONFIG, {**FIRST, 1: ROUND, 2: ROUND}, "collect")


@pytest.mark.parametrize(
    ("number", "stage", "there", "incoming", "message"),
    [
        (3, "extract", set(), set(), "the run has 2 rounds"),
        (0, "extract", set(), set(), "round 0 is the untouched model"),
        (1, "collect", {"collect"}, set(), "it is done"),
        (1, "extract", set(), set(), "no games to extract from: collect them, or give a file with --trajectories"),
        (1, "extract", {"import_consolidation"}, set(), "no games to extract from"),
        (1, "extract", {"collect"}, {"import_extraction"}, "has games to extract from already"),
        (1, "consolidate", {"collect"}, set(), "no knowledge: extract it, or give a file with --knowledge"),
        (1, "consolidate", {"import_knowledge"}, set(), "no games to consolidate on"),
        (1, "evaluate_in_context", {"collect"}, set(), "no knowledge"),
        (1, "evaluate", {"collect", "extract"}, set(), "no policy: consolidate first"),
        (2, "extract", set(), {"import_extraction"}, "round 1 has no policy to start from"),
    ],
)
def test_a_stage_that_lacks_its_inputs_is_refused_with_the_reason(
    number: int, stage: str, there: set[str], incoming: set[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        check_ready(CONFIG, {**FIRST, 1: there} if number < 2 else FIRST, number, stage, incoming)
    assert message in str(error.value)


def test_a_stage_that_is_switched_off_is_refused() -> None:
    config = small_config(evaluate={"enabled": False})
    with pytest.raises(UserError, match="nothing to evaluate: the configuration switches it off"):
        check_ready(config, {0: {"prepare"}}, 0, "evaluate")


@pytest.mark.parametrize(
    ("stage", "there", "incoming"),
    [
        ("collect", set(), set()),
        ("extract", set(), {"import_extraction"}),
        ("extract", {"import_extraction"}, set()),
        ("consolidate", {"import_extraction", "extract"}, {"import_consolidation"}),
        ("consolidate", set(), {"import_consolidation", "import_knowledge"}),
        ("evaluate", {"consolidate"}, set()),
    ],
)
def test_a_stage_that_has_what_it_reads_is_ready(stage: str, there: set[str], incoming: set[str]) -> None:
    check_ready(CONFIG, {**FIRST, 1: there}, 1, stage, incoming)
