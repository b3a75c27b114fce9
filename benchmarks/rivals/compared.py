"""What the methods reach by the configurations tried, and how that is compared."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import report, statistics
from benchmarks.rivals.methods import METHODS, PIECES, TRIES

Payload = Mapping[str, Any]
Group = Sequence[str]

WHEN = {"end": "last", "early": "best"}  # which stop a validation set chooses at
READOUTS = ("last", "averaged")
RECIPE = ("estimated", "constant", "averaged")  # as recommended, nothing tuned
PLAIN = ("plain", "constant", "last")
RIVALS = [m for m, one in METHODS.items() if not one.ours]
OURS = [m for m, one in METHODS.items() if one.ours]
UNTOLD = [m for m in RIVALS if not METHODS[m].told]
COMPARED: dict[str, tuple[str, Group, Group]] = {  # a group of ours, and its rivals
    "all": ("every flooded recipe, every rival", OURS, RIVALS),
    "untold": (
        "nobody is told the share of wrong labels",
        [m for m in OURS if not METHODS[m].told],
        UNTOLD,
    ),
    "told": ("both are told it: at the noise floor, forward", ["floor"], ["forward"]),
    "recipe": ("the recommended recipe, share estimated", ["estimated"], UNTOLD),
    "band": ("flooding in a band alone", ["band"], UNTOLD),
    "bare": ("flooding without band or averaging", ["flooding"], UNTOLD),
}
COLUMNS: dict[str, tuple[str, bool]] = {  # a title, and whether labels are wrong
    "none": ("wrong labels, no validation set", True),
    "end": ("wrong labels, at the end", True),
    "early": ("wrong labels, stopped early", True),
    "clean/end": ("right labels, at the end", False),
    "clean/early": ("right labels, stopped early", False),
}
PARTNERS = {  # what flooding is added to, and the two together
    "plain": "band",
    "decay": "band_decay",
    "dropout": "band_dropout",
    "sam": "band_sam",
}


class Setting:
    """A piece at a share of wrong labels: the seeds that every method has run."""

    def __init__(self, piece: Payload, flips: float):
        self.piece, self.flips = piece["piece"], flips
        self.data, self.text = piece["data"], piece["piece"] == "text"
        size = piece["protocol"]
        self.ratio = size["test"] / max(1, piece["pool"] - size["test"])
        by_method: dict[str, dict[int, Any]] = {}
        for row in piece["rows"]:
            if row["flips"] == flips:
                by_method.setdefault(row["method"], {})[row["seed"]] = row
        wanted = [
            m
            for m in piece["methods_tried"]
            if METHODS[m].fits(flips, is_text=self.text)
        ]
        seeds = [set(by_method.get(method, ())) for method in wanted]
        self.seeds = sorted(set.intersection(*seeds)) if seeds else []
        self.rows = {m: [by_method[m][seed] for seed in self.seeds] for m in wanted}

    @property
    def title(self) -> str:
        return f"{report.title(self.piece)}, {self.flips:.0%}"

    def has(self, method: str, when: str = "end") -> bool:
        """Whether it was run; a rule that stops by itself is not stopped early."""
        one = METHODS[method]
        if when == "none" and one.defaults is None:
            return False
        return (one.of or method) in self.rows and not (one.of and when == "early")

    @functools.cache  # noqa: B019 - as long as the findings
    def tried(self, method: str, k: int, when: str) -> np.ndarray | None:
        """The expected accuracy [seeds] of the best of k tries by validation."""
        if not self.has(method, when):
            return None
        one = METHODS[method]
        stop = one.stop if one.of else WHEN[when]
        validation, accuracy = (
            np.array(
                [numbers_in(row[column][stop]) for row in self.rows[one.of or method]]
            )
            for column in ("validation", "accuracy")
        )
        return statistics.expected_best(k, validation, accuracy)

    def fixed(self, method: str, schedule: str, readout: str) -> np.ndarray | None:
        """The accuracy [seeds] of the defaults, where nothing is validated."""
        if not self.has(method, "none"):
            return None
        one = METHODS[method]
        name = f"{schedule}/{one.stop}/{readout}"
        rows = self.rows[one.of or method]
        return np.array([numbers_in(row["defaults"][name])[0] for row in rows])

    def group(self, methods: Group, column: str) -> dict[str, np.ndarray]:
        """What each of a group reaches, by the selection of a column."""
        when = column.rpartition("/")[2]
        if when != "none":
            found = {m: self.tried(m, TRIES, when) for m in methods}
        else:
            ours = all(METHODS[m].ours for m in methods)
            found = {
                f"{m}/{readout}": self.fixed(m, "constant", readout)
                for m in methods
                for readout in (RECIPE[2:] if ours else READOUTS)
            }
        return {name: one for name, one in found.items() if one is not None}


def numbers_in(line: str) -> np.ndarray:
    return np.array(line.split(), float)


def settings_of(payload: Payload) -> list[Setting]:
    """Those with two seeds at least: one cannot both choose and judge."""
    pieces = sorted(pieces_of(payload), key=lambda one: PIECES.index(one["piece"]))
    found = [
        Setting(piece, flips)
        for piece in pieces
        for flips in piece["protocol"]["flips"]
    ]
    return [one for one in found if len(one.seeds) > 1]


def pieces_of(payload: Payload) -> Sequence[Payload]:
    return payload.get("pieces", [payload])


Difference = Callable[[Setting], np.ndarray | None]


def effect(settings: Iterable[Setting], difference: Difference) -> statistics.Effect:
    """The mean of a difference over the settings, data sets being the unit."""
    every = ((s.data, difference(s)) for s in settings)
    found = [(data, one) for data, one in every if one is not None]
    if not found:
        return statistics.Effect(float("nan"), float("inf"), 0)
    return statistics.over_data(found)


def mean(settings: Iterable[Setting], difference: Difference) -> float:
    seen = [one.mean() for s in settings if (one := difference(s)) is not None]
    return float(np.mean(seen)) if seen else float("nan")


def less(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """The difference, where both were run."""
    return None if one is None or other is None else one - other


class Findings:
    """All that the tables and figures are made from."""

    def __init__(self, payload: Payload):
        self.payload = payload
        self.settings = settings_of(payload)
        self.noisy = [s for s in self.settings if s.flips > 0]
        self.clean = [s for s in self.settings if s.flips == 0]
        self.methods = [m for m in METHODS if any(s.has(m) for s in self.settings)]

    def gain_of_tries(self, method: str, k: int, when: str) -> float:
        """Over plain training's defaults, with its last weights, at the end."""
        return mean(
            self.noisy, lambda s: less(s.tried(method, k, when), s.fixed(*PLAIN))
        )

    def spread_of_tries(self, method: str, when: str) -> statistics.Interval:
        """The interval of the gain by all tries."""
        return effect(
            self.noisy, lambda s: less(s.tried(method, TRIES, when), s.fixed(*PLAIN))
        ).interval

    def gain_of_fixed(
        self, method: str, schedule: str, readout: str, *, noisy: bool
    ) -> float:
        return mean(
            self.noisy if noisy else self.clean,
            lambda s: less(s.fixed(method, schedule, readout), s.fixed(*PLAIN)),
        )

    def beside(self, one: str, other: str, when: str) -> statistics.Effect:
        """Two methods, both the best of all their tries."""
        return effect(
            self.noisy,
            lambda s: less(s.tried(one, TRIES, when), s.tried(other, TRIES, when)),
        )

    def over_plain(self, when: str) -> dict[str, statistics.Effect]:
        return {
            method: self.beside(method, "plain", when)
            for method in self.methods
            if method != "plain" and any(s.has(method, when) for s in self.noisy)
        }

    def beside_recipe(self) -> dict[str, statistics.Effect]:
        """The recommended recipe less each method's better readout, none validated."""
        return {
            f"{m}/{r}": effect(
                self.noisy,
                lambda s, m=m, r=r: less(s.fixed(*RECIPE), s.fixed(m, "constant", r)),
            )
            for m in self.methods
            if METHODS[m].defaults is not None
            for r in READOUTS
            if (m, "constant", r) != RECIPE
        }

    def standings(self) -> dict[str, dict[str, statistics.Effect]]:
        """Of each group of ours beside its rivals, by the selection of a column."""

        def difference(s: Setting, name: str, column: str) -> np.ndarray | None:
            _, ours, rivals = COMPARED[name]
            groups = s.group(ours, column), s.group(rivals, column)
            if not all(groups):
                return None
            return less(*(statistics.cross_fitted(group) for group in groups))

        return {
            name: {
                column: effect(
                    self.noisy if noisy else self.clean,
                    lambda s, n=name, c=column: difference(s, n, c),
                )
                for column, (_, noisy) in COLUMNS.items()
            }
            for name in COMPARED
        }

    def added(self) -> dict[str, dict[str, statistics.Effect]]:
        """What a band adds to a method, by when the runs are read off."""
        return {
            partner: {when: self.beside(both, partner, when) for when in WHEN}
            for partner, both in PARTNERS.items()
            if both in self.methods
        }
