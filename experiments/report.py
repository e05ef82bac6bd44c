"""`python -m experiments.report`: docs/results.md and its figures, from the committed results. Reads files alone.

The same results give the same bytes.
"""

import io
import itertools
import math
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import beyond, knowledge_vs_raw, model_size, on_vs_off_policy, own_vs_other, rounds
from experiments.records import ArmResult, Arms, Condition, Experiment, Key, Point, Start
from experiments.statistics import Estimate, estimate, verdict
from oel_ray.errors import UserError
from oel_ray.views.report.figures import CONTEXT, ORACLE, POLICY, RANDOM, canvas_and_axes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
DOCS = ROOT / "docs"
PAGE, FIGURES = "results.md", "results"
EXPERIMENTS: tuple[Experiment, ...] = tuple(
    module.EXPERIMENT for module in (rounds, on_vs_off_policy, model_size, knowledge_vs_raw, own_vs_other, beyond)
)
COLORS = (POLICY, CONTEXT, ORACLE, "#2b2b2b", RANDOM, "#8e5ea2", "#c0504d", "#4f9d9d", "#b8860b", "#7f7fbf")
BARE = 0
ABSENT = "-"
OUTSIDE: Condition = "out_of_distribution"
ASIDE = 0.02
"""Rounds between the marks of neighbouring arms in a figure, so that those that coincide are all seen."""

INTRODUCTION = """\
# The paper's experiments

<!-- Written by `python -m experiments.report` from experiments/results. -->

What arXiv 2603.16856 says, tried with this code. How the runs are made: [experiments](../experiments/README.md).

**How to read it.** A number is the mean over repetitions with its 95 % t interval. A repetition has a seed of its own,
and with it maps, games and sampling of its own; all arms have the same seeds, so differences are taken seed by seed. A
claim **holds here** if the whole 95 % interval of its paired difference is on its side of zero, **does not hold here**
if the whole interval is on the other side, and else **cannot be told apart**. Where a claim says that nothing changes,
the interval has to lie within the margin that it names, or outside of it. There is no correction for the number of
claims, and with three repetitions intervals are wide. Where runs are missing that is said, and a number over fewer
repetitions than there should be has their number behind it. Minutes are those of the stages of one run, without its
starts and without what was measured of its policies afterwards. In figures bars are intervals, hollow marks are the
policy of the round before with knowledge in its prompt, and arms are drawn a little aside of each other. The micro
model is a proving ground and no language model, and much that it does is built into it: see
[its card](../oel_ray/models/micro/README.md).
"""
NOTHING = """
**No results are committed yet.** Nothing on this page has been tried. The commands are below; what they write into
`experiments/results` is what this page is made of.
"""

Group = dict[str, dict[int, ArmResult]]
"""The results of one experiment with one preset: by arm, by seed."""

Curve = dict[float, Estimate]
"""Estimates by their places in the run, in order."""


def read_results(folder: Path) -> list[ArmResult]:
    """All results in a folder, in the order of their names.

    Raises:
        UserError: a file has another name than its content says.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        it = ArmResult.from_json(path.read_bytes())
        if path.name != it.file_name:
            raise UserError(f"{path} holds {it.file_name}: rename it")
        found.append(it)
    return found


def pages(results: Sequence[ArmResult]) -> dict[str, bytes]:
    """The page and its figures, by their paths below docs/.

    Raises:
        UserError: arms, or repetitions of one, were made with different settings or versions.
    """
    groups: dict[tuple[str, str], Group] = defaultdict(lambda: defaultdict(dict))
    for it in results:
        groups[it.preset, it.experiment][it.arm][it.seed] = it
    figures: dict[str, bytes] = {}
    parts = [INTRODUCTION] + ([] if results else [NOTHING])
    for experiment in EXPERIMENTS:
        parts.append(f"\n## {experiment.title}\n\n{experiment.question}\n")
        presets = sorted(preset for preset, name in groups if name == experiment.name)
        if not presets:
            parts += [f"\nNot tried yet: `python -m experiments.{experiment.name}`.\n", *_untried(experiment)]
        for preset in presets:
            group = _in_order(experiment, groups[preset, experiment.name])
            parts += [*_section(experiment, preset, group)]
            for metric in _METRICS:
                if metric.wanted(experiment):
                    name = f"{FIGURES}/{Start(preset).name}.{experiment.name}.{metric.name}.svg"
                    figures[name] = _drawn(group, metric)
                    parts.append(f"\n![{metric.title}, {experiment.name}]({name})\n")
        if experiment.notes:
            parts.append(f"\n{experiment.notes}\n")
    return {PAGE: "".join(parts).encode(), **figures}


def _in_order(experiment: Experiment, group: Group) -> Group:
    """With the arm first that others are compared with."""
    for arm, by_seed in group.items():
        if len({(it.settings_hash, it.model_hash) for it in by_seed.values()}) > 1:
            raise UserError(f"{experiment.name}, {arm}: repetitions have different settings or models: make them again")
    if len({(it.settings, it.packages.get("oel-ray")) for by_seed in group.values() for it in by_seed.values()}) > 1:
        raise UserError(f"{experiment.name}: results were made with different --set or versions: make them again")
    return {arm: group[arm] for arm in sorted(group, key=lambda arm: (arm != experiment.reference, arm))}


def _section(experiment: Experiment, preset: str, group: Group) -> Iterator[str]:
    everything = [it for by_seed in group.values() for it in by_seed.values()]
    seeds = _seeds(group)
    settings = ["--set", *everything[0].settings] if everything[0].settings else []
    yield f"\n### {Start(preset).name}\n\n```bash\npython -m experiments.{experiment.name} "
    yield shlex.join(["--preset", preset, "--seeds", *map(str, seeds), *settings]) + "\n```\n\n"
    yield "| arm | run as | repetitions | tokens of a text, by round | minutes each |\n|---|---|---|---|---|\n"
    for arm, by_seed in group.items():
        its = list(by_seed.values())
        minutes = sum(it.wall_s for it in its) / len(its) / 60
        yield f"| {arm} | `{its[0].command}` | {len(its)} | {_text_lengths(its)} | {minutes:.1f} |\n"
    yield from _missing(everything)
    yield from _same_texts(experiment.reference, group)
    yield "\nMade on " + "; ".join(sorted({it.machine for it in everything}))
    yield "; " + "; ".join(sorted({f"oel-ray {it.packages.get('oel-ray', '?')}" for it in everything})) + ".\n"
    yield from _baselines(everything, len(seeds))
    yield from _measurements(experiment, group)
    yield from _decided(experiment, group) if experiment.claims else _compared(experiment, group)


def _seeds(group: Group) -> list[int]:
    """All that a repetition was asked for with."""
    its = [it for by_seed in group.values() for it in by_seed.values()]
    return sorted({seed for it in its for seed in (it.seed, *it.seeds)})


def _missing(its: Sequence[ArmResult]) -> Iterator[str]:
    """What was asked for beside these and has no result."""
    there = {(it.arm, it.seed) for it in its}
    asked = {(arm, seed) for it in its for arm in it.arms for seed in it.seeds}
    without: dict[str, list[str]] = defaultdict(list)
    for arm, seed in sorted(asked - there):
        without[arm].append(str(seed))
    if without:
        named = "; ".join(f"{arm} with {', '.join(seeds)}" for arm, seeds in without.items())
        yield f"\n**Missing** are, by their seeds, not begun or not ended: {named}.\n"


def _baselines(its: Sequence[ArmResult], repetitions: int) -> Iterator[str]:
    """The maps of a seed are the same for all arms, and so are these players' rates."""
    named = {
        "a random player": {it.seed: it.random for it in its if it.random is not None},
        "a perfect one": {it.seed: it.oracle for it in its if it.oracle is not None},
    }
    wins = [f"{who} wins {_written([*at.values()], 100, repetitions)} %" for who, at in named.items() if at]
    yield f"On the same maps {', '.join(wins)}.\n\n" if wins else "\n"


def _text_lengths(its: Sequence[ArmResult]) -> str:
    shared = sorted(set.intersection(*(set(it.knowledge_tokens) for it in its)))
    return ", ".join(f"{sum(it.knowledge_tokens[number] for it in its) / len(its):.0f}" for number in shared) or ABSENT


def _same_texts(reference: str, group: Group) -> Iterator[str]:
    """Where no difference can come from what knowledge says."""
    ours = group.get(reference, {})
    same: dict[str, list[str]] = defaultdict(list)
    for arm in group.keys() - {reference}:
        for seed in sorted(group[arm].keys() & ours.keys()):
            for number, _ in group[arm][seed].knowledge_hash.items() & ours[seed].knowledge_hash.items():
                same[f"{arm} in round {number}"].append(str(seed))
    if same:
        named = "; ".join(f"{where} with {', '.join(seeds)}" for where, seeds in sorted(same.items()))
        yield f"\nWord for word the same texts as {reference}, by their seeds: {named}.\n"


def _measurements(experiment: Experiment, group: Group) -> Iterator[str]:
    reference, repetitions = group.get(experiment.reference, {}), len(_seeds(group))
    yield f"| arm | measured | rate % | tokens a turn | points above {experiment.reference} |\n|---|---|---|---|---|\n"
    for arm, by_seed in group.items():
        for key in _keys(by_seed):
            points = [point for it in by_seed.values() if (point := it.find(key))]
            rates = [point.rate for point in points]
            lengths = [point.tokens_per_turn for point in points if point.tokens_per_turn is not None]
            above = [] if arm == experiment.reference else _above(by_seed, reference, key)
            compared = _written(above, 100, repetitions, signed=True)
            measured = f"{_written(rates, 100, repetitions)} | {_written(lengths, 1, repetitions)}"
            yield f"| {arm} | {_description(key)} | {measured} | {compared} |\n"


def _decided(experiment: Experiment, group: Group) -> Iterator[str]:
    yield "\n| the paper's claim | here | by how much |\n|---|---|---|\n"
    seeds = _seeds(group)
    for claim in experiment.claims:
        numbers = []
        for seed in seeds:
            arms: Arms = {arm: by_seed[seed] for arm, by_seed in group.items() if seed in by_seed}
            try:
                numbers.append(claim.number(arms))
            except LookupError:
                continue
        decision = verdict(numbers, claim.within) if numbers else "not measured"
        yield _decision(claim.text, decision, numbers, len(seeds), in_tokens=claim.in_tokens)


def _compared(experiment: Experiment, group: Group) -> Iterator[str]:
    """Where nothing is claimed: whether another arm ends with a policy that differs from the reference's."""
    reference, repetitions = group.get(experiment.reference, {}), len(_seeds(group))
    ends = [point.round for it in reference.values() for point in it.points if point.condition == "policy"]
    others = [arm for arm in group if arm != experiment.reference]
    if not ends or not others:
        return
    last = Key("policy", max(ends), None)
    yield f"\n| arm | its policy of round {last.round} is | by how much |\n|---|---|---|\n"
    for arm in others:
        above = _above(group[arm], reference, last)
        decision = {"holds here": "better", "does not hold here": "worse"}.get(it := verdict(above), it)
        yield _decision(arm, decision, above, repetitions)


def _decision(of: str, decision: str, numbers: Sequence[float], repetitions: int, *, in_tokens: bool = False) -> str:
    """A row of those tables."""
    scale, unit = (1, "tokens") if in_tokens else (100, "points")
    size = f"{_written(numbers, scale, repetitions, signed=True)} {unit}" if numbers else ABSENT
    return f"| {of} | **{decision}** | {size} |\n"


def _above(by_seed: dict[int, ArmResult], reference: dict[int, ArmResult], key: Key) -> list[float]:
    """How much higher one measurement's rate is than the reference's, for each seed that has both."""
    pairs = [(it.find(key), reference[seed].find(key)) for seed, it in by_seed.items() if seed in reference]
    return [ours.rate - theirs.rate for ours, theirs in pairs if ours and theirs]


def _untried(experiment: Experiment) -> Iterator[str]:
    if experiment.claims:
        yield "\nIt will decide on:\n\n"
        yield from (f"- {claim.text}\n" for claim in experiment.claims)


def _keys(by_seed: dict[int, ArmResult]) -> list[Key]:
    """What was measured with any seed, round by round: with knowledge in the prompt as it grew, then without."""
    place = {point.key: point.place for it in by_seed.values() for point in it.points}
    return sorted(place, key=lambda key: (key.condition == OUTSIDE, key.round, key.condition == "policy", place[key]))


def _description(key: Key) -> str:
    if key.round == 0:
        where = "untouched model"
    elif key.condition == "in_context":
        read = "" if key.step is None else f" of {key.step} game{'s' * (key.step > 1)}"
        where = f"round {key.round}, knowledge{read} in the prompt"
    else:
        where = f"round {key.round}" + ("" if key.step is None else f", after {key.step} steps")
    return f"{where}, out of distribution" if key.condition == OUTSIDE else where


def _written(values: Sequence[float], scale: float, repetitions: int, *, signed: bool = False) -> str:
    """The mean with its interval, and how many of the repetitions it is over if that is not all."""
    if not values:
        return ABSENT
    it = estimate(values)
    mean = f"{scale * it.mean:{'+' if signed else ''}.1f}"
    interval = "" if math.isinf(it.half) else f" ± {scale * it.half:.1f}"
    return mean + interval + (f" ({it.repetitions} of {repetitions})" if it.repetitions < repetitions else "")


class _Metric(NamedTuple):
    """What a figure shows of every point."""

    name: str
    title: str
    wanted: Callable[[Experiment], bool]
    takes: Callable[[Point], bool]
    value: Callable[[Point], float]


_METRICS = (
    _Metric("rate", "Games won", lambda _: True, lambda it: it.condition != OUTSIDE, lambda it: it.rate),
    _Metric(
        "tokens",
        "Response tokens per turn",
        lambda experiment: experiment.lengths,
        lambda it: it.condition != OUTSIDE and it.tokens_per_turn is not None,
        lambda it: it.tokens_per_turn or 0.0,
    ),
    _Metric(
        "outside",
        "Out of distribution",
        lambda experiment: experiment.out_of_distribution,
        lambda it: it.condition == OUTSIDE,
        lambda it: it.rate,
    ),
)


def _drawn(group: Group, metric: _Metric) -> bytes:
    from matplotlib.ticker import MaxNLocator

    with canvas_and_axes(wide=True) as (canvas, axes):
        for index, (color, (arm, by_seed)) in enumerate(zip(itertools.cycle(COLORS), group.items(), strict=False)):
            aside = ASIDE * (index - (len(group) - 1) / 2)
            _draw_arm(axes, arm, _curves(by_seed, metric), color, aside)
        axes.set(xlabel="round", ylabel=metric.title.lower())
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=8)
        svg = io.StringIO()
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()).encode() + b"\n"


def _draw_arm(axes: Any, arm: str, curves: dict[int, Curve], color: str, aside: float) -> None:
    """Its policies in a line; from each the climb while knowledge grows in its prompt, hollow and dotted."""
    bare = curves.pop(BARE, {})
    _draw_curve(axes, bare, aside, color=color, fmt="o-", label=arm)
    for number, grown in curves.items():
        climb = {place: it for place, it in bare.items() if place == number - 1} | grown
        places, means = [place + aside for place in climb], [it.mean for it in climb.values()]
        axes.plot(places, means, ":", color=color, lw=1.2)
        _draw_curve(axes, grown, aside, color=color, fmt="D", mfc="white")


def _draw_curve(axes: Any, curve: Curve, aside: float, **style: str) -> None:
    halves = [0.0 if math.isinf(it.half) else it.half for it in curve.values()]
    means = [it.mean for it in curve.values()]
    axes.errorbar([place + aside for place in curve], means, halves, ms=4, capsize=2.5, **style)


def _curves(by_seed: dict[int, ArmResult], metric: _Metric) -> dict[int, Curve]:
    """Of the bare policies, and of each round's knowledge in the prompt under its number."""
    values: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in sorted((it for result in by_seed.values() for it in result.points), key=lambda it: it.place):
        if metric.takes(point):
            number = point.round if point.condition == "in_context" else BARE
            values[number][point.place].append(metric.value(point))
    return {number: {place: estimate(rates) for place, rates in at.items()} for number, at in values.items()}


def main() -> None:
    try:
        written = pages(read_results(RESULTS))
    except UserError as error:
        sys.exit(f"experiments: error: {error}")
    shutil.rmtree(DOCS / FIGURES, ignore_errors=True)
    for name, content in written.items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_bytes(content)


if __name__ == "__main__":
    main()
