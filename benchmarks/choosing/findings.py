"""What the rules give: gains over plain training as shares of the grid's, and costs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks import pixels, report, statistics
from benchmarks.choosing import rules
from benchmarks.pictures import panels

RULES = {  # and what a row calls it
    "plain": "plain training",
    "early_loss": "early stopping, validation loss",
    "early_accuracy": "early stopping, validation accuracy",
    "label_wave": "early stopping by Label Wave",
    "grid": "the grid, by validation",
    "grid_shared": "the grid on a shared trunk (`forked`)",
    "halving": "successive halving on the shared trunk",
    "oracle": "the grid, by the test set (no rule)",
    "floor": "`noise_floor`, rate known",
    "floor_half": "`noise_floor`, rate halved",
    "floor_more": "`noise_floor`, rate x 1.5",
    "floor_estimated": "`noise_floor`, rate estimated (`noise_matrix`)",
    "floor_average": "`noise_floor`, rate known, averaged weights",
    "best_loss_again": "`at_best` by validation loss, a second run",
    "best_loss_forked": "stop and flood, validation loss",
    "best_loss_average": "stop and flood, validation loss, averaged weights",
    "best_loss_better": "stop and flood or stop, the better by validation",
    "best_accuracy_again": "`at_best` by validation accuracy, a second run",
    "best_accuracy_forked": "stop and flood, validation accuracy",
    "wave_forked": "stop and flood at Label Wave's loss",
    "accordance_again": "level from accordance (Flooding-X)",
    "plateau": "level on plateau, from 0",
    "plateau_floor": "level on plateau, from `noise_floor`",
    "adaflood": "AdaFlood",
    "decay": "weight decay, by validation",
    "smoothing": "label smoothing, by validation",
    "average": "averaged weights",
}
NO_RULE = {"plain", "oracle", "grid", "grid_shared"}  # of what the criterion asks
RIVALS = {"early_loss", "early_accuracy", "label_wave", "decay", "smoothing", "average"}
TARGETS = ((0.90, 1.2), (0.95, 2.0))  # a share of the grid's gain, at most at a cost
GROUPS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "all": ("all", lambda _: True),
    "fixed": ("constants fixed on", lambda s: s["development"]),
    "new": ("new", lambda s: not s["development"]),
    "full": ("full batch", lambda s: s["batch"] is None),
    "mini": ("mini-batch", lambda s: s["batch"] is not None),
    "adam": ("Adam", lambda s: s["optimizer"] == "adam"),
    "sgd": ("SGD with momentum", lambda s: s["optimizer"] == "sgd"),
}
Settings = list[Mapping[str, Any]]


class Share(NamedTuple):
    """A share of the grid's gain, and its 95% interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.0%} ({self.low:.0%} to {self.high:.0%})"


def gains(setting: Mapping[str, Any], rule: str, over: str = "plain") -> np.ndarray:
    """Points of test accuracy that a rule gains over another, by seed."""
    of = setting["rules"]
    return np.array(of[rule]["accuracies"]) - np.array(of[over]["accuracies"])


def where_the_grid_gains(settings: Settings) -> Settings:
    """Those whose 95% interval of the grid's gain is above 0."""
    return [s for s in settings if statistics.interval(gains(s, "grid")).above]


def share(settings: Settings, rule: str) -> Share:
    """Of the settings where the grid gains."""
    own = {s["setting"]: gains(s, rule) for s in settings}
    grid = {s["setting"]: gains(s, "grid") for s in settings}
    return Share(rules.share(own, grid), *rules.share_interval(own, grid))


def cost(settings: Settings, rule: str) -> float:
    return float(np.mean([s["rules"][rule]["cost"] for s in settings]))


def shares(payload: Mapping[str, Any]) -> dict[str, dict[str, Share]]:
    """By rule and group; a group without a setting where the grid gains has none."""
    gaining = where_the_grid_gains(payload["settings"])
    found: dict[str, dict[str, Share]] = {rule: {} for rule in RULES}
    for group, (_, holds) in GROUPS.items():
        if chosen := [s for s in gaining if holds(s)]:
            for rule in RULES:
                found[rule][group] = share(chosen, rule)
    return found


def setting_title(setting: Mapping[str, Any]) -> str:
    known = {"two_gaussians": "two Gaussians", "breast_cancer": "breast cancer"}
    known |= pixels.TITLES
    name = known.get(setting["data"], setting["data"])
    pair = ", pairs" if setting["pair"] else ""
    batch = "full" if setting["batch"] is None else setting["batch"]
    optimizer = {"adam": "Adam", "sgd": "SGD"}[setting["optimizer"]]
    return f"{name}, {setting['flips']:.0%}{pair}, {optimizer}, {batch}"


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Rules by share and cost, and settings by accuracy."""
    return {
        "choosing": rule_table(payload),
        "choosing-settings": setting_table(payload),
    }


def rule_table(payload: Mapping[str, Any]) -> str:
    settings = payload["settings"]
    found = shares(payload)
    gaining = where_the_grid_gains(settings)

    def cell(group: str) -> Callable[[Mapping[str, Any]], str]:
        def write(row: Mapping[str, Any]) -> str:
            one = row["shares"].get(group)
            whole = group in ("all", "fixed", "new")
            return "-" if one is None else str(one) if whole else f"{one.share:.0%}"

        return write

    def mean(rule: str, column: str) -> float:
        return float(np.mean([np.mean(s["rules"][rule][column]) for s in settings]))

    lines = [
        {
            "title": title,
            "cost": cost(settings, rule),
            "shares": found[rule],
            "loss": mean(rule, "losses"),
            "ece": 100 * mean(rule, "ece"),
        }
        for rule, title in RULES.items()
    ]
    body = report.table(
        lines,
        {
            "rule": "{title}",
            "cost, plain runs": "{cost:.2f}",
            **{title: cell(group) for group, (title, _) in GROUPS.items()},
            "test loss": "{loss:.3f}",
            "calibration error": "{ece:.1f} %",
        },
    )
    seeds = payload["protocol"]["seeds"]
    groups = (
        f"{sum(map(holds, gaining))} of {sum(map(holds, settings))} ({title})"
        for title, holds in GROUPS.values()
    )
    text = (
        "Gain over plain training in test accuracy at the end, as a share of the "
        f"grid's ({len(payload['protocol']['grid'])} levels and plain training), with "
        f"95% bootstrap intervals over settings and their {seeds} seeds. A share is "
        "the quotient of the mean gains over the settings where the interval of the "
        f"grid's gain is above 0: {', '.join(groups)}. Cost, test loss and calibration "
        f"error are means over all {len(settings)} settings."
    )
    return "\n\n".join((body, text, report.provenance(payload)))


def setting_table(payload: Mapping[str, Any]) -> str:
    def gain(rule: str) -> report.Cell:
        return lambda s: f"{statistics.interval(gains(s, rule)):+.1f}"

    def plain(setting: Mapping[str, Any]) -> str:
        return f"{np.mean(setting['rules']['plain']['accuracies']):.1f}"

    body = report.table(
        payload["settings"],
        {
            "data, flips, optimizer, batch": setting_title,
            "constants": lambda s: "fixed on" if s["development"] else "new",
            "plain, %": plain,
            "grid": gain("grid"),
            "stop and flood": gain("best_loss_forked"),
            "`noise_floor`": gain("floor"),
            "estimated": gain("floor_estimated"),
            "early stopping": gain("early_loss"),
            "weight decay": gain("decay"),
        },
    )
    text = (
        "Test accuracy of plain training at the end, and what is gained over it, in "
        "points with 95% intervals, paired by seed: stop and flood and early stopping "
        "by validation loss, `noise_floor` with the rate known and estimated."
    )
    return f"{body}\n\n{text}"


def ahead(settings: Settings, rule: str, over: str) -> tuple[list[str], list[str]]:
    """The settings where a rule is ahead of another with its interval, and behind."""
    both = [(s["setting"], statistics.interval(gains(s, rule, over))) for s in settings]
    return (
        [name for name, one in both if one.above],
        [name for name, one in both if one.below],
    )


def numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Shares, costs, how often a rule is ahead, and how far each misses the targets."""
    settings = payload["settings"]
    gaining = where_the_grid_gains(settings)
    found: dict[str, Any] = {
        "settings": len(settings),
        "seeds": payload["protocol"]["seeds"],
        "gaining": len(gaining),
        "levels": len(payload["protocol"]["grid"]),
    }
    for rule, by_group in shares(payload).items():
        found[f"{rule}/cost"] = cost(settings, rule)
        for group, one in by_group.items():
            found |= {f"{rule}/{group}/{k}": v for k, v in one._asdict().items()}
        found |= gain_numbers(settings, rule)
        for over in ("plain", "early_loss", "decay", "best_loss_forked", "grid"):
            names = ahead(settings, rule, over)
            found[f"{rule}/ahead-of/{over}"], found[f"{rule}/behind/{over}"] = map(
                len, names
            )
    for group, (_, holds) in GROUPS.items():
        found[f"{group}/settings"] = sum(holds(s) for s in settings)
        found[f"{group}/gaining"] = sum(holds(s) for s in gaining)
    return found


def gain_numbers(settings: Settings, rule: str) -> dict[str, float]:
    """Mean gains over all settings, over those without flips and of each setting."""
    found: dict[str, float] = {}
    for name, holds in {
        "clean": lambda s: s["flips"] == 0,
        "some": lambda s: 0 < s["flips"] <= 0.1,
        "many": lambda s: s["flips"] > 0.1,
    }.items():
        if chosen := [s for s in settings if holds(s)]:
            means = [gains(s, rule).mean() for s in chosen]
            found[f"{rule}/{name}/gain"] = float(np.mean(means))
    for setting in settings:
        one = statistics.interval(gains(setting, rule))
        found |= report.named_interval(f"{setting['setting']}/{rule}", "gain", one)
    return found


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Cost against the share of the grid's gain, of the settings that are new."""
    found = shares(payload)
    groups = [g for g in ("fixed", "new") if g in found["plain"]]
    if not groups:
        return {}
    fig, axes = panels(1, len(groups), size=(6 * len(groups), 5), sharey=True)
    short = {
        "early_loss": "early stopping",
        "label_wave": "Label Wave",
        "grid": "grid",
        "halving": "halving",
        "floor": "noise_floor",
        "floor_estimated": "noise_floor, estimated",
        "best_loss_forked": "stop and flood",
        "wave_forked": "wave and flood",
        "accordance_again": "accordance",
        "plateau": "plateau",
        "adaflood": "AdaFlood",
        "decay": "weight decay",
        "smoothing": "label smoothing",
        "average": "averaged weights",
    }
    for axis, group in zip(axes, groups, strict=True):
        for rule, name in short.items():
            one, x = found[rule][group], cost(payload["settings"], rule)
            color = "C1" if rule in RIVALS else "C0"
            half = [[max(one.share - one.low, 0)], [max(one.high - one.share, 0)]]
            axis.errorbar(x, one.share, yerr=half, fmt="o", ms=4, lw=0.7, color=color)
            axis.annotate(
                name, (x, one.share), (5, 3), textcoords="offset points", fontsize=7
            )
        axis.axhline(1, color="gray", lw=0.6, ls=":")
        for least, most in TARGETS:
            axis.plot((0.15, most), (least, least), color="C2", lw=1, ls="--")
        axis.set(
            xscale="log",
            xlabel="cost, plain runs",
            title=f"settings: {GROUPS[group][0]}",
            ylim=(-0.5, 1.5),
        )
    axes[0].set_ylabel("share of the grid's gain in test accuracy")
    return {"choosing": fig}
