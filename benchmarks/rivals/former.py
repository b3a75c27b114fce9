"""Which method is best in each setting, and where the flooded ones stand."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report, statistics
from benchmarks.pictures import panels
from benchmarks.rivals.settings import TITLES

ENTRIES = {"last/either": "at the end", "best/either": "stopped early"}
# fixed before any setting but the two of `settings.py` was run
RECIPE = ("band", "last/averaged")
PLAIN = ("plain", "last/last")
READOUTS = {
    "last/last": "the end, last weights",
    "last/averaged": "the end, averaged weights",
    "best/last": "stopped early, last weights",
    "best/averaged": "stopped early, averaged weights",
}

PARTNERS = {  # what flooding is added to, and the two together
    "plain": "band",
    "decay": "band_decay",
    "dropout": "band_dropout",
    "sam": "band_sam",
    "msam": "band_msam",
    "forward": "forward_flooded",
}

Payload = Mapping[str, Any]
Name = tuple[str, str]  # a method and one of its entries


class Setting:
    """What all methods reach on a problem at a share of flips."""

    def __init__(self, payload: Payload, rows: Sequence[Mapping[str, Any]]):
        self.problem, self.flips = rows[0]["problem"], float(rows[0]["flips"])
        self.about: Mapping[str, Any] = payload["methods"]
        self.rows = {row["method"]: row["entries"] for row in rows}

    @property
    def name(self) -> str:
        return f"{self.problem}/{self.flips:.0%}"

    @property
    def title(self) -> str:
        return f"{TITLES.get(self.problem, self.problem)}, {self.flips:.0%}"

    def accuracies(self, name: Name) -> np.ndarray:
        method, entry = name
        return np.array(self.rows[method][entry]["accuracies"])

    def mean(self, name: Name) -> float:
        return float(self.accuracies(name).mean())

    def best(
        self, methods: Iterable[str], when: Iterable[str] = ENTRIES
    ) -> Name | None:
        """The most accurate in the mean, at the end or stopped early."""
        names = [(m, entry) for m in methods if m in self.rows for entry in when]
        return max(names, key=self.mean) if names else None

    def difference(self, name: Name, other: Name) -> statistics.Interval:
        return statistics.interval(self.accuracies(name) - self.accuracies(other))

    def words(self, name: Name) -> str:
        """As a table writes it."""
        method, entry = name
        return f"{self.about[method]['title']}, {ENTRIES.get(entry) or READOUTS[entry]}"


class Standing(NamedTuple):
    """How a group of methods stands beside the best rival of each setting.

    Attributes:
      ahead, tied, behind: in how many settings.
      mean, half: the mean difference, and half of its interval over the settings.
    """

    ahead: int
    tied: int
    behind: int
    mean: float
    half: float

    @property
    def settings(self) -> int:
        return self.ahead + self.tied + self.behind

    def __str__(self) -> str:
        if not self.settings:
            return "-"
        counts = f"{self.ahead}, {self.tied}, {self.behind}"
        return f"{counts} ({statistics.Interval(self.mean, self.half):+.1f})"


def settings_of(payload: Payload) -> list[Setting]:
    """In the order in which they were run."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in payload["rows"]:
        groups.setdefault((row["problem"], row["flips"]), []).append(row)
    return [Setting(payload, rows) for rows in groups.values()]


def rivals(payload: Payload) -> list[str]:
    """All that are not ours, and AdaFlood, which others have published."""
    about = payload["methods"]
    return [m for m, one in about.items() if not one["flooded"] or m == "adaflood"]


Holds = Callable[[str, Mapping[str, Any]], bool]
GROUPS: dict[str, tuple[str, Holds]] = {
    "all": ("every flooded recipe", lambda m, one: True),
    "cheap": (
        "those that cost a plain run and are not told the share of wrong labels",
        lambda m, one: one["cost"] == 1 and not one["knows_rate"],
    ),
    "paper": ("flooding as published", lambda m, one: m == "flooding"),
}


def ours(payload: Payload, group: str) -> list[str]:
    holds, others = GROUPS[group][1], rivals(payload)
    about = payload["methods"]
    return [m for m, one in about.items() if m not in others and holds(m, one)]


def gap(
    setting: Setting, payload: Payload, group: str, when: Iterable[str] = ENTRIES
) -> tuple[Name, Name, statistics.Interval] | None:
    """The best of a group, the best rival, and the paired difference of the two."""
    one = setting.best(ours(payload, group), when)
    other = setting.best(rivals(payload), when)
    if one is None or other is None:
        return None
    return one, other, setting.difference(one, other)


def stands(differences: Iterable[statistics.Interval]) -> Standing:
    seen = list(differences)
    if not seen:
        return Standing(0, 0, 0, float("nan"), float("nan"))
    ahead, behind = statistics.verdicts(seen)
    mean = statistics.interval([one.mean for one in seen])
    return Standing(ahead, len(seen) - ahead - behind, behind, *mean)


def standing(
    payload: Payload, group: str, *, noisy: bool, when: Iterable[str] = ENTRIES
) -> Standing:
    """Of a group of methods, on the settings with wrong labels or without."""
    chosen = [s for s in settings_of(payload) if (s.flips > 0) == noisy]
    if group == "fixed":
        return recipe_standing(payload, noisy=noisy, when=when)
    gaps = [gap(s, payload, group, when) for s in chosen]
    return stands(one[2] for one in gaps if one)


def recipe_standing(
    payload: Payload, *, noisy: bool, when: Iterable[str] = ENTRIES
) -> Standing:
    """Of the recipe that was fixed before, beside the best rival of each setting."""
    found: list[statistics.Interval] = []
    for setting in settings_of(payload):
        other = setting.best(rivals(payload), when)
        if (setting.flips > 0) == noisy and other and RECIPE[0] in setting.rows:
            found.append(setting.difference(RECIPE, other))
    return stands(found)


def verdict(difference: statistics.Interval) -> str:
    return "ahead" if difference.above else "behind" if difference.below else "tied"


def summary_table(payload: Payload) -> str:
    """For each setting the best rival, the best flooded recipe, and the difference."""
    lines: list[dict[str, str]] = []
    for setting in settings_of(payload):
        found = gap(setting, payload, "all")
        if found is None:
            continue
        one, other, difference = found
        lines.append(
            {
                "setting": setting.title,
                "plain": f"{setting.mean(PLAIN):.1f}",
                "rival": f"{setting.words(other)}: {setting.mean(other):.1f}",
                "flooded": f"{setting.words(one)}: {setting.mean(one):.1f}",
                "difference": f"{difference:+.1f}",
                "verdict": verdict(difference),
                "recipe": f"{setting.mean(RECIPE):.1f}",
            }
        )
    return report.table(
        lines,
        {
            "data, wrong labels": "{setting}",
            "plain": "{plain}",
            "best rival": "{rival}",
            "best flooded recipe": "{flooded}",
            "difference": "{difference}",
            "flooding is": "{verdict}",
            "fixed recipe": "{recipe}",
        },
    )


WHEN: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "noisy": ("wrong labels", True, tuple(ENTRIES)),
    "end": ("wrong labels, all at the end", True, ("last/either",)),
    "stopped": ("wrong labels, all stopped early", True, ("best/either",)),
    "clean": ("right labels", False, tuple(ENTRIES)),
}
TITLES_OF_GROUPS = {g: title for g, (title, _) in GROUPS.items()} | {
    "fixed": "the recipe fixed beforehand"
}


def standings(payload: Payload) -> dict[str, dict[str, Standing]]:
    """By group, and by what it is compared on."""
    return {
        group: {
            name: standing(payload, group, noisy=noisy, when=when)
            for name, (_, noisy, when) in WHEN.items()
        }
        for group in TITLES_OF_GROUPS
    }


def standing_table(payload: Payload) -> str:
    """In how many settings the groups are ahead of the best rival, tied, behind."""
    rows = [
        {"group": TITLES_OF_GROUPS[group], **found}
        for group, found in standings(payload).items()
    ]
    return report.table(
        rows,
        {"ahead of the best rival, tied, behind (points)": "{group}"}
        | {title: f"{{{name}}}" for name, (title, _, _) in WHEN.items()},
    )


def flips_of(payload: Payload) -> list[float]:
    return sorted({s.flips for s in settings_of(payload)})


def mean_gain(payload: Payload, name: Name, flips: float) -> float:
    """Over plain training to the end, a mean over the problems."""
    gains = [
        s.mean(name) - s.mean(PLAIN)
        for s in settings_of(payload)
        if s.flips == flips and name[0] in s.rows
    ]
    return float(np.mean(gains)) if gains else float("nan")


def of_entries(payload: Payload, name: Name, column: str) -> float:
    """A mean over the noisy settings of what is no accuracy."""
    method, entry = name
    values = [
        np.mean(s.rows[method][entry][column])
        for s in settings_of(payload)
        if s.flips > 0 and method in s.rows
    ]
    return float(np.mean(values)) if values else float("nan")


def ties(payload: Payload, method: str) -> int:
    """In how many noisy settings it is the best of all, or its interval holds that."""
    found = 0
    for setting in settings_of(payload):
        if setting.flips == 0 or method not in setting.rows:
            continue
        own, best = setting.best([method]), setting.best(setting.rows)
        assert own is not None
        assert best is not None
        found += own == best or not setting.difference(own, best).below
    return found


def method_table(payload: Payload) -> str:
    """Each method's gains, calibration and cost."""
    lines: list[dict[str, Any]] = []
    for method, about in payload["methods"].items():
        if not any(row["method"] == method for row in payload["rows"]):
            continue
        line: dict[str, Any] = {
            "method": about["title"] + (" (told the share)" * about["knows_rate"]),
            "cost": f"{about['cost']:g}",
            "ties": ties(payload, method),
            "loss": f"{of_entries(payload, (method, 'last/either'), 'losses'):.2f}",
            "ece": f"{of_entries(payload, (method, 'last/either'), 'ece'):.3f}",
        }
        for entry in ENTRIES:
            for flips in flips_of(payload):
                gain = mean_gain(payload, (method, entry), flips)
                line[f"{entry} {flips:.0%}"] = f"{gain:+.1f}"
        lines.append(line)
    columns: dict[str, report.Cell] = {"method": "{method}"}
    for entry, title in ENTRIES.items():
        for flips in flips_of(payload):
            columns[f"{title}, {flips:.0%}"] = f"{{{entry} {flips:.0%}}}"
    columns |= {
        "best or tied": "{ties}",
        "test loss": "{loss}",
        "calibration error": "{ece}",
        "cost": "{cost}",
    }
    return report.table(lines, columns)


def added(payload: Payload, partner: str, entry: str) -> list[statistics.Interval]:
    """What flooding adds to a method, in each of the settings with wrong labels."""
    both = PARTNERS[partner]
    return [
        s.difference((both, entry), (partner, entry))
        for s in settings_of(payload)
        if s.flips > 0 and partner in s.rows and both in s.rows
    ]


def partner_table(payload: Payload) -> str:
    """What flooding adds to each, and in how many settings surely more or less."""
    lines: list[dict[str, str]] = []
    for partner, both in PARTNERS.items():
        line: dict[str, str] = {}
        for entry in ENTRIES:
            if found := added(payload, partner, entry):
                line[entry] = str(stands(found))
        if line:
            about = payload["methods"]
            line |= {"partner": about[partner]["title"], "both": about[both]["title"]}
            lines.append(line)
    columns: dict[str, report.Cell] = {"to": "{partner}", "makes": "{both}"}
    for entry, title in ENTRIES.items():
        columns[f"{title}: ahead, equal, behind (points)"] = f"{{{entry}}}"
    return report.table(lines, columns)


def readout_table(payload: Payload) -> str:
    """What averaging and the band are worth, for plain and flooded training."""
    flips = [rate for rate in flips_of(payload) if rate > 0]
    lines: list[dict[str, str]] = []
    for method in ("plain", "flooding", "band", "flooding_decay", "band_decay"):
        if not any(row["method"] == method for row in payload["rows"]):
            continue
        line = {"method": payload["methods"][method]["title"]}
        for entry in READOUTS:
            gains = [mean_gain(payload, (method, entry), rate) for rate in flips]
            line[entry] = " / ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(line)
    return report.table(
        lines,
        {"method": "{method}"}
        | {title: f"{{{entry}}}" for entry, title in READOUTS.items()},
    )


def accuracy_table(payload: Payload, entry: str) -> str:
    """The accuracy of every method in every setting."""
    settings = settings_of(payload)
    lines: list[dict[str, str]] = []
    for method, about in payload["methods"].items():
        if not any(row["method"] == method for row in payload["rows"]):
            continue
        line = {"method": about["title"]}
        for s in settings:
            line[s.name] = f"{s.mean((method, entry)):.1f}" if method in s.rows else "-"
        lines.append(line)
    return report.table(
        lines, {"method": "{method}"} | {s.title: f"{{{s.name}}}" for s in settings}
    )


def tables(payload: Payload) -> dict[str, str]:
    """What docs/results.md and docs/rivals.md show."""
    made = {
        "rivals": summary_table(payload),
        "rivals-standing": standing_table(payload),
        "rivals-methods": method_table(payload),
        "rivals-partners": partner_table(payload),
        "rivals-readouts": readout_table(payload),
        "rivals-end": accuracy_table(payload, "last/either"),
        "rivals-stopped": accuracy_table(payload, "best/either"),
    }
    source = report.provenance(payload)
    return {name: f"{table}\n\n{source}" for name, table in made.items()}


def numbers(payload: Payload) -> dict[str, Any]:
    """The standings, and the gains of each method by the share of flips."""
    settings = settings_of(payload)
    noisy = [s for s in settings if s.flips > 0]
    found: dict[str, Any] = {
        "settings": len(settings),
        "noisy": len(noisy),
        "clean": len(settings) - len(noisy),
        "methods": len({row["method"] for row in payload["rows"]}),
        "rivals": len(rivals(payload)),
        "runs": payload["protocol"]["runs"],
    }
    for setting in settings:
        for method in setting.rows:
            for entry in ENTRIES:
                name = f"{setting.name}/{method}/{entry}/accuracy"
                found[name] = setting.mean((method, entry))
    for group, by_name in standings(payload).items():
        for name, one in by_name.items():
            found |= {f"{group}/{name}/{k}": v for k, v in one._asdict().items()}
            found[f"{group}/{name}/settings"] = one.settings
    for partner in PARTNERS:
        for entry in ENTRIES:
            if one := added(payload, partner, entry):
                stand = stands(one)._asdict()
                base = f"added/{partner}/{entry}"
                found |= {f"{base}/{k}": v for k, v in stand.items()}
    for method in payload["methods"]:
        found[f"{method}/ties"] = ties(payload, method)
        for entry in READOUTS | ENTRIES:
            for flips in flips_of(payload):
                gain = mean_gain(payload, (method, entry), flips)
                found[f"{method}/{entry}/{flips:.0%}/gain"] = gain
    return found


def figures(payload: Payload) -> dict[str, Any]:
    """The differences to the best rival, by setting."""
    settings = [s for s in settings_of(payload) if s.flips > 0]
    shown = {"all": "every flooded recipe", "cheap": "at the cost of a plain run"}
    shown["paper"] = "flooding as published"
    fig, (axis,) = panels(1, 1, size=(8, 0.45 * len(settings) + 1.5))
    for i, (group, label) in enumerate(shown.items()):
        ys: list[float] = []
        found: list[statistics.Interval] = []
        for row, setting in enumerate(settings):
            if one := gap(setting, payload, group):
                ys.append(row + 0.2 * (i - 1))
                found.append(one[2])
        means = [one.mean for one in found]
        halves = [one.half if np.isfinite(one.half) else 0.0 for one in found]
        axis.errorbar(means, ys, xerr=halves, fmt="o", ms=4, lw=1, label=label)
    axis.axvline(0, color="gray", lw=0.8)
    axis.set_yticks(range(len(settings)), [s.title for s in settings])
    axis.invert_yaxis()
    axis.set_xlabel("points of test accuracy over the best rival of the setting")
    axis.legend(fontsize=8)
    return {"rivals": fig}
