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
    "average": "averaged weights",
    "decay": "weight decay, by validation",
    "smoothing": "label smoothing, by validation",
    "oracle": "the grid, by the test set (no rule)",
    "grid": "the grid, by validation",
    "grid_shared": "the grid on a shared trunk (`forked`)",
    "grid_best": "the grid with early stopping, by validation",
    "grid_average": "the grid with averaged weights, by validation",
    "halving": "successive halving on the shared trunk",
    "floor": "`noise_floor`, rate known",
    "floor_half": "`noise_floor`, rate halved",
    "floor_more": "`noise_floor`, rate x 1.5",
    "floor_estimated": "`noise_floor`, rate estimated",
    "best_loss_forked": "stop and flood, validation loss",
    "best_accuracy_forked": "stop and flood, validation accuracy",
    "best_loss_better": "stop, or stop and flood, whichever validates better",
    "wave_forked": "stop and flood at Label Wave's loss",
    "floor_average": "`noise_floor`, rate known, averaged weights",
    "floor_half_average": "`noise_floor`, rate halved, averaged weights",
    "floor_more_average": "`noise_floor`, rate x 1.5, averaged weights",
    "floor_estimated_average": "`noise_floor`, rate estimated, averaged weights",
    "best_loss_average": "stop and flood, validation loss, averaged weights",
    "best_accuracy_average": "stop and flood, validation accuracy, averaged weights",
    "wave_average": "stop and flood at Label Wave's loss, averaged weights",
    "accordance_again": "level from accordance (Flooding-X)",
    "plateau": "level on plateau, from 0",
    "plateau_floor": "level on plateau, from `noise_floor`",
    "adaflood": "AdaFlood",
}
RIVALS = {"early_loss", "early_accuracy", "label_wave", "decay", "smoothing", "average"}
NO_RULE = {"plain", "oracle", "grid", "grid_shared", "grid_best", "grid_average"}
TARGETS = ((0.90, 1.2), (0.95, 2.0))  # a share of the grid's gain, and a cost at most


def is_full_batch(setting: Mapping[str, Any]) -> bool:
    """Whether every step is on all training examples."""
    return setting["batch"] is None


GROUPS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "all": ("all", lambda _: True),
    "fixed": ("constants fixed on", lambda s: s["development"]),
    "new": ("new", lambda s: not s["development"]),
    "full": ("full batch", is_full_batch),
    "mini": ("mini-batch", lambda s: not is_full_batch(s)),
    "adam": ("Adam", lambda s: s["optimizer"] == "adam"),
    "sgd": ("SGD with momentum", lambda s: s["optimizer"] == "sgd"),
}
FLIPS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "clean": ("none", lambda s: s["flips"] == 0),
    "some": (
        "1 to 10 %, full batch",
        lambda s: is_full_batch(s) and 0 < s["flips"] <= 0.1,
    ),
    "many": ("20 to 40 %, full batch", lambda s: is_full_batch(s) and s["flips"] > 0.1),
    "parts": (
        "10 to 40 %, mini-batches",
        lambda s: not is_full_batch(s) and s["flips"] > 0,
    ),
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


def mean_of_shares(settings: Settings, rule: str) -> float:
    """The shares of the settings, averaged; small gains of the grid weigh heavily."""
    own = [gains(s, rule).mean() / gains(s, "grid").mean() for s in settings]
    return float(np.mean(own))


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
        "choosing-help": help_table(payload),
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
            "stop and flood": gain("best_accuracy_forked"),
            "`noise_floor`": gain("floor"),
            "averaged": gain("floor_average"),
            "estimated": gain("floor_estimated_average"),
            "early stopping": gain("early_accuracy"),
            "weight decay": gain("decay"),
        },
    )
    text = (
        "Test accuracy of plain training at the end, and what is gained over it, in "
        "points with 95% intervals, paired by seed: stop and flood and early stopping "
        "by validation accuracy, `noise_floor` with the rate known, and with averaged "
        "weights and the rate known or estimated."
    )
    return f"{body}\n\n{text}"


def help_table(payload: Mapping[str, Any]) -> str:
    """Where flooding helps, and its rivals: by the share of wrong labels."""
    settings = payload["settings"]

    def cell(rule: str) -> report.Cell:
        def write(row: Mapping[str, Any]) -> str:
            better, worse = ahead(row["settings"], rule, "plain")
            gain = np.mean([gains(s, rule).mean() for s in row["settings"]])
            return f"{gain:+.1f} ({len(better)}, {len(worse)})"

        return write

    lines = [
        {"title": title, "settings": chosen, "number": len(chosen)}
        for title, holds in FLIPS.values()
        if (chosen := [s for s in settings if holds(s)])
    ]
    return report.table(
        lines,
        {
            "wrong labels": "{title}",
            "settings": "{number}",
            "flooding": cell("floor_average"),
            "stop and flood": cell("best_accuracy_average"),
            "early stopping": cell("early_accuracy"),
            "weight decay": cell("decay"),
        },
    )


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
        if gaining:
            found[f"{rule}/all/mean_of_shares"] = mean_of_shares(gaining, rule)
        for over in ("plain", "early_accuracy", "decay", "grid"):
            better, worse = ahead(settings, rule, over)
            found[f"{rule}/ahead-of/{over}"] = len(better)
            found[f"{rule}/behind/{over}"] = len(worse)
    for group, (_, holds) in GROUPS.items():
        found[f"{group}/settings"] = sum(holds(s) for s in settings)
        found[f"{group}/gaining"] = sum(holds(s) for s in gaining)
    return found


def gain_numbers(settings: Settings, rule: str) -> dict[str, float]:
    """Mean gains over all settings, over those without flips and of each setting."""
    found: dict[str, float] = {}
    for name, (_, holds) in FLIPS.items():
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
        "early_accuracy": "early stopping",
        "label_wave": "Label Wave",
        "grid": "grid",
        "halving": "halving",
        "floor": "noise_floor",
        "floor_average": "noise_floor, averaged",
        "floor_estimated_average": "estimated, averaged",
        "best_accuracy_forked": "stop and flood",
        "best_loss_better": "stop, or stop and flood",
        "wave_forked": "wave and flood",
        "accordance_again": "accordance",
        "plateau": "plateau",
        "adaflood": "AdaFlood",
        "decay": "weight decay",
        "smoothing": "label smoothing",
        "average": "averaged weights",
    }
    for axis, group in zip(axes, groups, strict=True):
        below: dict[int, float] = {}  # where the last text of a column ended
        for rule in sorted(short, key=lambda rule: found[rule][group].share):
            one, x = found[rule][group], cost(payload["settings"], rule)
            color = "C1" if rule in RIVALS else "C0"
            half = [[max(one.share - one.low, 0)], [max(one.high - one.share, 0)]]
            axis.errorbar(x, one.share, yerr=half, fmt="o", ms=4, lw=0.7, color=color)
            column = round(3 * np.log(x))
            text_y = max(one.share, below.get(column, -9) + 0.06)
            below[column] = text_y
            left = 0.9 < x < 1.5
            axis.annotate(
                short[rule],
                (x, one.share),
                (x / 1.08 if left else x * 1.08, text_y),
                fontsize=7,
                color=color,
                va="center",
                ha="right" if left else "left",
            )
        axis.axhline(1, color="gray", lw=0.6, ls=":")
        for least, most in TARGETS:
            axis.plot((0.15, most), (least, least), color="C2", lw=1, ls="--")
        axis.set(
            xscale="log",
            xlabel="cost, plain runs",
            title=f"settings: {GROUPS[group][0]}",
            xlim=(0.15, 20),
            ylim=(-0.5, 1.6),
        )
    axes[0].set_ylabel("share of the grid's gain in test accuracy")
    return {"choosing": fig}
