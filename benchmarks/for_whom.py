"""For whom flooding is the right tool: one row a user, from the records of all studies.

Which tool is best, and which form of flooding, is chosen on half of the seeds and
judged on the other half; the rows are judged together, by Holm's steps.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report, statistics
from benchmarks.statistics import Effect

Payload = Mapping[str, Any]
Records = Mapping[str, Payload]  # by name; those that are there
Setting = tuple[
    str, Mapping[str, np.ndarray]
]  # data, and what each tool reaches, higher
Names = Mapping[str, str]  # tools, and what the table calls them

TABLE, NEEDED = "for-whom", "choosing"  # the marker, and the record it begins with
MISSING = "not measured"

PLAIN = {"plain": "plain training"}
UNTUNED = PLAIN | {"average": "averaged weights"}
DECAY = {"decay": "weight decay, by validation"}
SMOOTHING = {"smoothing": "label smoothing, by validation"}
STOPPED = {
    "early_accuracy": "early stopping",
    "early_loss": "early stopping, by the loss",
    "label_wave": "Label Wave",
}
FLOOR = {
    "floor": "at `noise_floor`, last weights",
    "floor_average": "at `noise_floor`, averaged",
}
SWEPT = {
    "grid": "a sweep of levels, last weights",
    "grid_average": "a sweep of levels, averaged",
    "best_accuracy_forked": "stop and flood, last weights",
    "best_accuracy_average": "stop and flood, averaged",
}
EARLY = {
    "grid_best": "a sweep of levels, stopped early",
    "best_loss_better": "the better of stopping and stop and flood",
}
OTHER_RIVALS = {  # of the study of other noise
    **UNTUNED,
    "decay": "weight decay, by validation",
    "decay_average": "weight decay, averaged, by validation",
}
ESTIMATED = {
    "estimated": "share asked of the data, last weights",
    "estimated_average": "share asked of the data, averaged",
    "estimated_band": "share asked of the data, band, averaged",
}
KNOWN = {
    "known": "at `noise_floor`, last weights",
    "known_average": "at `noise_floor`, averaged",
    "known_band": "at `noise_floor`, band, averaged",
}
ATTACKED = {
    "early": "stopping at a third of the steps",
    "elr": "early-learning regularisation",
    "smoothing": "label smoothing",
    "decay": "weight decay",
    "relax": "RelaxLoss",
}
SHIELDS = {
    "flood": "flooding",
    "band": "flooding in a band",
    "example": "flooding each example",
    "soft": "soft flooding",
}


class Comparison(NamedTuple):
    """The best tool, the best form of flooding, and the second less the first.

    The effect is above 0 where flooding is ahead, also where less is better (`sign`).
    """

    tool: str
    form: str
    effect: Effect
    unit: str = "points"
    spec: str = "+.1f"
    sign: int = 1

    @property
    def shown(self) -> Effect:
        return self.effect._replace(mean=self.sign * self.effect.mean)


def compared(
    settings: Sequence[Setting], tools: Names, forms: Names
) -> Comparison | None:
    """What a user is told; None without a setting."""
    if not settings:
        return None
    ours, theirs = crossed(settings, forms), crossed(settings, tools)
    return Comparison(
        tools[best(settings, tools)],
        forms[best(settings, forms)],
        statistics.over_data(
            (data, one - other)
            for (data, _), one, other in zip(settings, ours, theirs, strict=True)
        ),
    )


def best(settings: Sequence[Setting], names: Names, seeds: slice = slice(None)) -> str:
    """The highest in the mean over the settings, by some of the seeds."""
    return max(
        names,
        key=lambda name: np.mean(
            [reached[name][seeds].mean() for _, reached in settings]
        ),
    )


def crossed(settings: Sequence[Setting], names: Names) -> list[np.ndarray]:
    """Of each setting: one tool for all, chosen by the other half of the seeds."""
    found = [np.empty(len(next(iter(reached.values())))) for _, reached in settings]
    for start in (0, 1):
        name = best(settings, names, slice(1 - start, None, 2))
        for values, (_, reached) in zip(found, settings, strict=True):
            values[start::2] = reached[name][start::2]
    return found


def choosing(
    records: Records, holds: Callable[[Payload], bool], column: str = "accuracies"
) -> list[Setting]:
    """Settings of the rules for the level; a loss is turned round."""
    sign = 1 if column == "accuracies" else -1
    return [
        (s["data"], {n: sign * np.array(r[column]) for n, r in s["rules"].items()})
        for s in records.get("choosing", {}).get("settings", ())
        if holds(s)
    ]


def other_noise(
    records: Records, kinds: str, *, mini: bool | None = None
) -> list[Setting]:
    """Settings of the study of other noise, all those with wrong labels."""
    return [
        (row["data"], {n: np.array(r) for n, r in row["rules"].items()})
        for row in records.get("choosing-noise", {}).get("noise", ())
        if row["noise"]["kind"] in kinds.split()
        and (row["noise"]["rate"] or row["noise"]["taught"])
        and mini in (None, row["batch"] is not None)
    ]


def unlearning(records: Records) -> Comparison | None:
    """The gap to models that never saw the forget set, at the middle of the cells."""
    payload = records.get("unlearning")
    if payload is None:
        return None
    protocol, titles = payload["protocol"], payload["titles"]
    rate = protocol["rates"][len(protocol["rates"]) // 2]
    horizon = str(protocol["horizons"][len(protocol["horizons"]) // 2])
    settings: list[Setting] = []
    for setting in payload["settings"]:
        reached = {
            row["method"]: -np.array(row["at"][horizon]["gap"], float)
            for row in setting["rows"]
            if horizon in row["at"] and (row["rate"], row["factor"]) == (rate, 1.0)
        }
        data = "text" if setting["setting"] == "text" else "images"
        settings.append(
            (data, {n: v for n, v in reached.items() if np.isfinite(v).all()})
        )
    common = [n for n in titles if all(n in reached for _, reached in settings)]
    forms = {n: titles[n] for n in common if n.startswith(("reflect", "soft"))}
    tools = {n: titles[n] for n in common if n not in forms}
    found = compared(settings, tools, forms) if tools and forms else None
    return found and found._replace(unit="points further from retraining", sign=-1)


def membership(records: Records) -> Comparison | None:
    """Canaries found at 1% false positives: the fewer, the better."""
    rows = records.get("membership", {}).get("rows", ())
    by_data: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        by_data.setdefault(row["data"], {})[row["method"]] = -100 * np.array(
            row["canaries"]
        )
    found = compared(list(by_data.items()), PLAIN | ATTACKED, SHIELDS)
    return found and found._replace(unit="% of the canaries found", sign=-1)


STANDING = {  # groups of the rivals' study, by what the table calls them
    "all": "the best of each setting",
    "recipe": "the recommended recipe, share asked of the data",
}


Standings = Mapping[str, Mapping[str, statistics.Effect]]


def standings(records: Records) -> Standings:
    """Those of the rivals' study; none of the record of an earlier protocol."""
    payload = records.get("rivals", {})
    if "pieces" not in payload:
        return {}
    study = importlib.import_module("benchmarks.rivals.compared")
    return study.Findings(payload).standings()


def rivals(known: Standings, name: str, column: str) -> Comparison | None:
    """A group of ours beside its rivals, by one of the study's selections."""
    effect = known.get(name, {}).get(column)
    if effect is None or not math.isfinite(effect.mean):
        return None
    return Comparison("the best rival of each setting", STANDING[name], effect)


OURS = {  # of the methods of the rivals' study
    "flooding": "flooding",
    "band": "in a band",
    "band_decay": "in a band, weight decay",
    "band_dropout": "in a band, dropout",
    "band_sam": "in a band, SAM",
    "estimated": "in a band, share asked of the data",
    "floor": "in a band at `noise_floor`",
}


def text(records: Records) -> Comparison | None:
    """The rivals' study on text, by the best of all configurations at the end.

    It is one corpus: its seeds are the unit, as it has no other, and overlap.
    """
    for piece in records.get("rivals", {}).get("pieces", ()):
        if piece["piece"] != "text":
            continue
        reached: dict[tuple[float, str], dict[int, float]] = {}
        for row in piece["rows"]:
            if row["method"] in piece["methods_tried"]:
                validation, accuracy = (
                    np.array(row[column]["last"].split(), float)
                    for column in ("validation", "accuracy")
                )
                at = reached.setdefault((row["flips"], row["method"]), {})
                at[row["seed"]] = float(accuracy[validation.argmax()])
        test = piece["protocol"]["test"]
        return of_text(reached, test / (piece["pool"] - test))
    return None


def of_text(
    reached: Mapping[tuple[float, str], Mapping[int, float]], ratio: float
) -> Comparison | None:
    """All shares of flips together; a method counts that was run at each of them."""
    flips = sorted({share for share, _ in reached})
    tried = dict.fromkeys(n for _, n in reached)
    names = [n for n in tried if all((f, n) in reached for f in flips)]
    if not names or len(reached[flips[0], names[0]]) < 2:
        return None
    seeds = sorted(
        set.intersection(*(set(reached[f, n]) for f in flips for n in names))
    )
    settings: list[Setting] = [
        ("text", {n: np.array([reached[f, n][seed] for seed in seeds]) for n in names})
        for f in flips
    ]
    forms = {n: OURS[n] for n in names if n in OURS}
    titles = importlib.import_module("benchmarks.rivals.methods").METHODS
    tools = {n: titles[n].title for n in names if n not in OURS}
    found = compared(settings, tools, forms)
    if found is None:
        return None
    ours, theirs = crossed(settings, forms), crossed(settings, tools)
    by_seed = np.mean(np.subtract(ours, theirs), axis=0)
    return found._replace(effect=statistics.corrected(by_seed, ratio))


def is_full(setting: Payload) -> bool:
    return setting["batch"] is None


def rows(records: Records) -> list[tuple[str, Comparison | None]]:
    """Every user, and what was found for them."""
    validated, known = DECAY | SMOOTHING, standings(records)

    def noisy(full: bool) -> list[Setting]:
        return choosing(records, lambda s: s["flips"] > 0 and is_full(s) == full)

    losses = choosing(records, lambda s: s["flips"] > 0, "losses")
    sure = compared(losses, UNTUNED | validated | STOPPED, FLOOR | SWEPT | EARLY)
    right = choosing(records, lambda s: s["flips"] == 0)
    wrong = choosing(records, lambda s: s["flips"] > 0)
    tools, untold = UNTUNED | validated, "even class"
    by_kind = functools.partial(other_noise, records)
    made = {
        "have right labels": compared(right, tools | STOPPED, SWEPT | EARLY),
        "have wrong labels and may stop early": compared(
            wrong, tools | STOPPED, FLOOR | SWEPT | EARLY
        ),
        "have wrong labels, train to the end on full batches, know their share": (
            compared(noisy(full=True), tools, FLOOR)
        ),
        "have wrong labels, train to the end on mini-batches, know their share": (
            compared(noisy(full=False), tools, FLOOR)
        ),
        "do not know the share, on full batches": compared(
            by_kind(untold, mini=False), OTHER_RIVALS, ESTIMATED
        ),
        "do not know the share, on mini-batches": compared(
            by_kind(untold, mini=True), OTHER_RIVALS, ESTIMATED
        ),
        "have labels of a weak annotator, train to the end": compared(
            by_kind("teacher"), OTHER_RIVALS, KNOWN | ESTIMATED
        ),
        "may try 20 configurations of every method, wrong labels, to the end": (
            rivals(known, "all", "end")
        ),
        "may try 20 configurations of every method, wrong labels, and stop early": (
            rivals(known, "all", "early")
        ),
        "tune nothing, have no validation set and do not know the share": (
            rivals(known, "recipe", "none")
        ),
        "want a model to forget examples": unlearning(records),
        "must hide who was trained on": membership(records),
        "use the probabilities": (
            sure and sure._replace(unit="test loss", spec="+.3f", sign=-1)
        ),
        "train on text": text(records),
        "train a large model": None,
    }
    return list(made.items())


def table(records: Records) -> str:
    """The rows that were measured with their intervals, and those that were not.

    The verdict comes first: on a phone the other columns are right of the screen.
    """
    made = rows(records)
    said = iter(statistics.verdicts_of(c.effect for _, c in made if c is not None))
    lines = [
        [user, MISSING, "", "", ""]
        if found is None
        else [
            user,
            next(said),
            f"{found.shown:{found.spec}} {found.unit}",
            found.tool,
            found.form,
        ]
        for user, found in made
    ]
    return report.markdown(
        [
            "you",
            "flooding is",
            "difference",
            "the best tool",
            "flooding's best form",
        ],
        lines,
    )
