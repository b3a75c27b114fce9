"""What the rules give: points over plain training, data sets being the unit."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report, statistics
from benchmarks.pictures import BLUE, FAINT, INCHES, RED, panels, say
from benchmarks.statistics import Effect

LAST, AVERAGED = "last", "averaged"


class Rule(NamedTuple):
    """How a row calls it, the weights it keeps, and whether it floods."""

    title: str
    weights: str = LAST
    floods: bool = True


FLOOR = "`noise_floor`"
RULES = {
    "early_accuracy": Rule("early stopping, validation accuracy", "best", False),
    "early_loss": Rule("early stopping, validation loss", "best", False),
    "label_wave": Rule("early stopping by Label Wave", "best", False),
    "average": Rule("averaged weights alone", AVERAGED, False),
    "decay": Rule("weight decay, by validation", LAST, False),
    "smoothing": Rule("label smoothing, by validation", LAST, False),
    "grid": Rule("the grid, by validation"),
    "grid_average": Rule("the grid, by validation", AVERAGED),
    "grid_best": Rule("the grid with early stopping, by validation", "best"),
    "halving": Rule("successive halving on a shared trunk"),
    "floor": Rule(f"{FLOOR}, share known"),
    "floor_average": Rule(f"{FLOOR}, share known", AVERAGED),
    "floor_half": Rule(f"{FLOOR}, share halved"),
    "floor_half_average": Rule(f"{FLOOR}, share halved", AVERAGED),
    "floor_more": Rule(f"{FLOOR}, share x 1.5"),
    "floor_more_average": Rule(f"{FLOOR}, share x 1.5", AVERAGED),
    "floor_estimated": Rule(f"{FLOOR}, share estimated by folds"),
    "floor_estimated_average": Rule(f"{FLOOR}, share estimated by folds", AVERAGED),
    "best_accuracy_forked": Rule("stop and flood, validation accuracy"),
    "best_accuracy_average": Rule("stop and flood, validation accuracy", AVERAGED),
    "best_loss_forked": Rule("stop and flood, validation loss"),
    "best_loss_average": Rule("stop and flood, validation loss", AVERAGED),
    "best_loss_better": Rule("stop, or stop and flood, as validates better", "either"),
    "wave_forked": Rule("stop and flood at Label Wave's loss"),
    "wave_average": Rule("stop and flood at Label Wave's loss", AVERAGED),
    "accordance_again": Rule("level from accordance (Flooding-X)"),
    "plateau": Rule("level on plateau, from 0"),
    "plateau_floor": Rule(f"level on plateau, from {FLOOR}"),
    "adaflood": Rule("AdaFlood"),
}
POOLS = {  # examples that the draws of a data set share; new points are drawn anew
    "digits": 1797,
    "breast_cancer": 569,
    "wine": 178,
    "mnist-5k": 5000,
    "fashion-mnist": 5000,
}

Setting = Mapping[str, Any]
Settings = Sequence[Setting]


def is_full_batch(setting: Setting) -> bool:
    """Whether every step is on all training examples."""
    return setting["batch"] is None


def is_noisy(setting: Setting) -> bool:
    return setting["flips"] > 0


GROUPS: dict[str, tuple[str, Callable[[Setting], bool]]] = {
    "all": ("wrong labels", is_noisy),
    "full": ("full batch", lambda s: is_noisy(s) and is_full_batch(s)),
    "mini": ("mini-batch", lambda s: is_noisy(s) and not is_full_batch(s)),
    "fixed": ("constants fixed on", lambda s: is_noisy(s) and s["development"]),
    "new": ("new", lambda s: is_noisy(s) and not s["development"]),
    "clean": ("right labels", lambda s: not is_noisy(s)),
}
HELP: dict[str, tuple[str, Callable[[Setting], bool]]] = {
    "clean": ("none", GROUPS["clean"][1]),
    "some": (
        "1 to 10 %, full batch",
        lambda s: is_full_batch(s) and 0 < s["flips"] <= 0.1,
    ),
    "many": ("20 to 40 %, full batch", lambda s: is_full_batch(s) and s["flips"] > 0.1),
    "parts": ("10 to 40 %, mini-batches", GROUPS["mini"][1]),
}


def gains(setting: Setting, rule: str, over: str = "plain") -> np.ndarray:
    """Points of test accuracy that a rule gains over another, by seed."""
    of = setting["rules"]
    return np.array(of[rule]["accuracies"]) - np.array(of[over]["accuracies"])


def overlap(payload: Mapping[str, Any], data: str) -> float:
    """Examples tested over those that are not, of the pool of a data set."""
    if data not in POOLS:
        return 0.0
    train, validation, test = payload["protocol"]["sizes"][data]
    tested = min(test, POOLS[data] - train - validation)
    return tested / (POOLS[data] - tested)


def in_setting(
    payload: Mapping[str, Any], setting: Setting, rule: str, over: str = "plain"
) -> Effect:
    """Of one setting, widened for what its draws share."""
    ratio = overlap(payload, setting["data"])
    return statistics.corrected(gains(setting, rule, over), ratio)


Named = str | Callable[[Setting], str]  # a rule, or which one it is of a setting


def named(setting: Setting, rule: Named) -> str:
    return rule if isinstance(rule, str) else rule(setting)


def over_data(settings: Settings, rule: Named, over: Named = "plain") -> Effect:
    """The mean over the settings, data sets being the unit."""
    return statistics.over_data(
        (s["data"], gains(s, named(s, rule), named(s, over))) for s in settings
    )


def chosen(payload: Mapping[str, Any], group: str) -> Settings:
    return [s for s in payload["settings"] if GROUPS[group][1](s)]


def share(settings: Settings, rule: str) -> float:
    """The mean gain as a share of the grid's; NaN where that is 0."""
    own, grid = (
        np.mean([gains(s, r).mean() for s in settings]) for r in (rule, "grid")
    )
    return float(own / grid) if grid else math.nan


def cost(settings: Settings, rule: str) -> float:
    return float(np.mean([s["rules"][rule]["cost"] for s in settings]))


def by_batch(setting: Setting) -> str:
    """The rule of the weights: full batch, the last; mini-batches, the averaged."""
    return "floor" if is_full_batch(setting) else "floor_average"


def others(settings: Settings, setting: Setting) -> Settings:
    """Those on such batches of all other data sets."""
    full = is_full_batch(setting)
    return [
        s for s in settings if s["data"] != setting["data"] and is_full_batch(s) == full
    ]


def without(settings: Settings, setting: Setting) -> str:
    """The weights that do best in the mean of the `others`."""

    def mean(rule: str) -> float:
        return float(
            np.mean([gains(s, rule).mean() for s in others(settings, setting)])
        )

    return max(("floor", "floor_average"), key=mean)


def setting_title(setting: Setting) -> str:
    name = report.title(setting["data"])
    pair = ", pairs" if setting["pair"] else ""
    batch = "full" if setting["batch"] is None else setting["batch"]
    optimizer = {"adam": "Adam", "sgd": "SGD"}[setting["optimizer"]]
    return f"{name}, {setting['flips']:.0%}{pair}, {optimizer}, {batch}"


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Rules and weights over the data sets, settings one by one, and a short form."""
    return {
        "choosing": rule_table(payload),
        "choosing-weights": weight_table(payload),
        "choosing-settings": setting_table(payload),
        "choosing-help": help_table(payload),
    }


def rule_table(payload: Mapping[str, Any]) -> str:
    """Every rule, by the gain over the settings with wrong labels."""
    shown = [
        group for group in ("all", "full", "mini", "clean") if chosen(payload, group)
    ]
    effects = {
        group: {rule: over_data(chosen(payload, group), rule) for rule in RULES}
        for group in shown
    }
    cells = {group: statistics.marked(of) for group, of in effects.items()}
    settings = payload["settings"]
    noisy = [s for s in settings if is_noisy(s)]

    def cell(group: str, rule: str) -> str:
        known = rule.startswith("floor") and "estimated" not in rule
        if group == "clean" and known:
            return "off" if RULES[rule].weights == LAST else "off, averaged"
        return cells[group][rule]

    def of_seeds(rule: str, column: str) -> float:
        return float(np.mean([np.mean(s["rules"][rule][column]) for s in noisy]))

    first, *others = shown
    heads = {g: f"{GROUPS[g][0]} ({len(chosen(payload, g))})" for g in shown}
    body = report.markdown(
        [
            *("rule", "weights", "plain runs", heads[first], "of the grid's"),
            *(heads[group] for group in others),
            *("test loss", "calibration error"),
        ],
        [
            [
                RULES[rule].title,
                RULES[rule].weights,
                f"{cost(settings, rule):.2f}",
                cell(first, rule),
                f"{share(noisy, rule) if noisy else math.nan:.0%}",
                *(cell(group, rule) for group in others),
                f"{of_seeds(rule, 'losses'):.2f}",
                f"{100 * of_seeds(rule, 'ece'):.0f} %",
            ]
            for rule in sorted(RULES, key=lambda rule: -effects[first][rule].mean)
        ],
    )
    text = (
        "Points of test accuracy over plain training to the end, in the mean over the "
        "settings in brackets, with 95 % intervals for which data sets are the unit; "
        f"{len({s['data'] for s in settings})} data sets, "
        f"{payload['protocol']['seeds']} seeds. **Bold**: ahead or behind, by Holm's "
        "steps over the rows of the column; all else is not told apart from plain "
        "training. Test loss and calibration error: settings with wrong labels."
    )
    return "\n\n".join((body, text, report.provenance(payload)))


def weight_table(payload: Mapping[str, Any]) -> str:
    """Full batch: last weights; mini-batches: averaged. Tested with data held out."""
    noisy = chosen(payload, "all")
    found = {
        f"averaged less last weights, {GROUPS[group][0]} ({len(part)})": (
            over_data(part, "floor_average", "floor")
        )
        for group in ("full", "mini")
        if (part := chosen(payload, group))
    }

    def held_out(setting: Setting) -> str:
        return without(noisy, setting)

    tested = [s for s in noisy if others(noisy, s)]
    for over, title in (
        ("floor", "always the last weights"),
        ("floor_average", "always averaged weights"),
        ("plain", "plain training"),
        ("early_accuracy", "early stopping"),
    ):
        if tested:
            name = f"the rule, chosen on other data sets, less {title} ({len(tested)})"
            found[name] = over_data(tested, held_out, over)
    said = statistics.judged(found)
    return report.markdown(
        ["`noise_floor`, share known (settings)", "points", "the first is"],
        [[title, f"{one:+.1f}", said[title]] for title, one in found.items()],
    )


def setting_table(payload: Mapping[str, Any]) -> str:
    """What some rules gain in each setting, widened for what the draws share."""

    def gain(rule: str) -> report.Cell:
        return lambda s: f"{in_setting(payload, s, rule):+.1f}"

    def plain(setting: Setting) -> str:
        return f"{np.mean(setting['rules']['plain']['accuracies']):.1f}"

    body = report.table(
        payload["settings"],
        {
            "data, flips, optimizer, batch": setting_title,
            "constants": lambda s: "fixed on" if s["development"] else "new",
            "plain, %": plain,
            "grid": gain("grid"),
            "stop and flood": gain("best_accuracy_forked"),
            "`noise_floor`, last": gain("floor"),
            "averaged": gain("floor_average"),
            "estimated by folds, averaged": gain("floor_estimated_average"),
            "early stopping": gain("early_accuracy"),
            "weight decay": gain("decay"),
        },
    )
    text = (
        "Test accuracy of plain training at the end, and the points over it, paired by "
        "seed. The 95 % intervals are widened for what draws from one pool share "
        "(Nadeau and Bengio 2003); the synthetic sets are drawn anew."
    )
    return f"{body}\n\n{text}"


def help_table(payload: Mapping[str, Any]) -> str:
    """Where flooding helps, and its rivals: by the share of wrong labels."""

    def stop_and_flood(setting: Setting) -> str:
        return f"best_accuracy_{'forked' if is_full_batch(setting) else 'average'}"

    def cell(settings: Settings, rule: Named) -> str:
        found = [in_setting(payload, s, named(s, rule)) for s in settings]
        better, worse = statistics.verdicts(one.interval for one in found)
        return f"{np.mean([one.mean for one in found]):+.1f} ({better}, {worse})"

    columns: dict[str, Named] = {
        "flooding": by_batch,
        "stop and flood": stop_and_flood,
        "early stopping": "early_accuracy",
        "weight decay": "decay",
        "averaged weights alone": "average",
    }
    lines: list[list[str]] = []
    for title, holds in HELP.values():
        if found := [s for s in payload["settings"] if holds(s)]:
            cells = [cell(found, rule) for rule in columns.values()]
            if title == "none":  # the level is 0 there
                cells[0] = "off"
            lines.append([title, str(len(found)), *cells])
    return report.markdown(["wrong labels", "settings", *columns], lines)


SHORTER = {  # words of the titles, for the figure
    "`": "",
    ", by validation": "",
    "validation ": "",
    ", as validates better": "",
    " on a shared trunk": "",
    "level from accordance": "accordance",
    "level on plateau": "plateau",
    "share estimated by folds": "by folds",
    " at Label Wave's loss": ", Label Wave",
    " by Label Wave": ", Label Wave",
    " with early": ", early",
    "the grid": "grid",
}


def shorter(title: str) -> str:
    for words, fewer in SHORTER.items():
        title = title.replace(words, fewer)
    return title


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The rules sorted by their points over plain training, on wrong labels.

    Last and averaged weights of a rule are in one row.
    """
    noisy = chosen(payload, "all")
    if not noisy:
        return {}
    found = {rule: over_data(noisy, rule).interval for rule in RULES}
    rows: dict[str, list[str]] = {}
    for rule in sorted(RULES, key=lambda rule: -found[rule].mean):
        rows.setdefault(shorter(RULES[rule].title), []).append(rule)
    fig, (axis,) = panels(1, 1, size=(INCHES, 0.32 * len(rows) + 1.1))
    axis.axvline(0, color=FAINT, lw=0.8)
    least, most = -16.0, 22.0
    for row, rules in enumerate(reversed(rows.values())):
        for rule in rules:
            one, (_, weights, floods) = found[rule], RULES[rule]
            color = BLUE if floods else RED
            half = one.half if np.isfinite(one.half) else 0.0
            low, high = max(one.mean - half, least), min(one.mean + half, most)
            at = row + (0.18 if len(rules) > 1 and weights == AVERAGED else 0)
            at -= 0.18 if len(rules) > 1 and weights != AVERAGED else 0
            axis.plot((low, high), (at, at), color=color, lw=1)
            shape = "s" if weights == AVERAGED else "o"
            face = color if floods else "none"
            axis.plot(max(one.mean, least), at, shape, ms=5, color=color, mfc=face)
        say(axis, f"{cost(payload['settings'], rules[0]):.1f}", (most, row), (6, 0))
    say(axis, "runs", (most, len(rows)), (6, 0))
    axis.set(
        yticks=range(len(rows)),
        yticklabels=list(reversed(rows)),
        xlim=(least, most),
        ylim=(-0.7, len(rows) + 0.4),
        xlabel="points over plain training, 95 % interval;\n"
        "squares: averaged weights, hollow: no flooding",
    )
    axis.tick_params(axis="y", length=0)
    return {"choosing": fig}
