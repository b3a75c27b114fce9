"""The share of wrong labels that leave-one-out scores find, against the one put in."""

import argparse
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks import data, points, pools, report
from flood_optax import levels

RECORD = "choosing-wrong-labels"
SIZES = {  # examples whose labels are asked
    "digits": 300,
    "wine": 60,
    "breast_cancer": 150,
    "two_gaussians": 200,
    "spiral": 200,
}
TITLES = {"breast_cancer": "breast cancer", "two_gaussians": "two Gaussians"}
FLIPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
DRAWS, SMOKE_DRAWS = 12, 2
WHOLE = 1200  # of digits, where a subset is asked in its place
TAUGHT = 40  # examples that the weak annotator has learned from


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(name: str, flips: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New points, or a new draw of a data set, with an exact share of flips."""
    size, classes = SIZES[name], pools.CLASSES.get(name, 10)
    if name in points.GENERATORS:
        keys = jax.random.split(key, 5)
        x, y = points.GENERATORS[name](keys[0], size // 2)
        return x, data.flip(keys[3], y, flips, classes)
    keys = jax.random.split(key, 3)
    pool_x, pool_y = (jnp.asarray(part) for part in pools.load(name))
    order = jax.random.permutation(keys[0], len(pool_x))[:size]
    return pool_x[order], data.flip(keys[1], pool_y[order], flips, classes)


def estimate(x: Any, y: Any, classes: int) -> dict[str, float]:
    """Of the more confident half, and of all."""
    scores = levels.leave_one_out(np.asarray(x), np.asarray(y), classes)
    shares = {"half": 0.5, "all": 1.0}
    return {
        name: float(levels.noise_rate(scores, y, confident=share))
        for name, share in shares.items()
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    draws = SMOKE_DRAWS if args.smoke else DRAWS
    names, flips = (("wine",), (0.2,)) if args.smoke else (tuple(SIZES), FLIPS)
    keys = jax.random.split(jax.random.key(0), draws)
    rows = []
    for name in names:
        for rate in flips:
            classes = pools.CLASSES.get(name, 10)
            found = [estimate(*drawn(name, rate, key), classes=classes) for key in keys]
            rows.append({"data": name, "flips": rate, **columns(found)})
            print(f"{name}, {rate:.0%}", flush=True)
    return {
        "protocol": {
            "draws": draws,
            "sizes": {name: SIZES[name] for name in names},
            "whole": WHOLE,
            "taught": TAUGHT,
        },
        "wrong_labels": rows,
        "subset": columns(map(subset, range(draws))),
        "annotator": columns(map(annotated, range(draws))),
    }


def subset(seed: int) -> dict[str, float]:
    """A fifth of the labels wrong, estimated from all of them and from a quarter."""
    x, y, rng = shuffled_digits(seed)
    x, y = x[:WHOLE], y[:WHOLE].copy()
    wrong = rng.permutation(WHOLE)[: WHOLE // 5]
    y[wrong] = (y[wrong] + rng.integers(1, 10, len(wrong))) % 10
    some = rng.permutation(WHOLE)[: WHOLE // 4]
    whole, part = estimate(x, y, 10)["half"], estimate(x[some], y[some], 10)["half"]
    return {"whole": whole, "part": part, "difference": part - whole}


def annotated(seed: int) -> dict[str, float]:
    """Labels by a weak linear annotator: what is wrong can be told from the input."""
    x, true, _ = shuffled_digits(seed)
    annotator = LogisticRegression(max_iter=1000).fit(x[:TAUGHT], true[:TAUGHT])
    x, true = x[TAUGHT:][:300], true[TAUGHT:][:300]
    given = annotator.predict(x)
    return {"wrong": float((given != true).mean()), **estimate(x, given, 10)}


def shuffled_digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    x, y = (np.asarray(array) for array in pools.load("digits"))
    order = rng.permutation(len(x))
    return x[order], y[order], rng


def columns(draws: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """The draws, one after another, by what they found."""
    rows = list(draws)
    return {name: [round(row[name], 5) for row in rows] for name in rows[0]}


def spread(found: list[float], form: str = ".1f") -> str:
    """Mean and standard deviation over the draws, in per cent."""
    mean, sd = 100 * np.mean(found), 100 * np.std(found, ddof=1)
    return f"{mean:{form}} ({sd:.1f})"


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    rows, sizes = payload["wrong_labels"], payload["protocol"]["sizes"]
    shares = dict.fromkeys(row["flips"] for row in rows)
    found = {(row["data"], row["flips"]): spread(row["half"]) for row in rows}
    body = report.markdown(
        ["data (examples)", *(f"{share:.0%}" for share in shares)],
        [
            [f"{TITLES.get(d, d)} ({size})", *(found[d, share] for share in shares)]
            for d, size in sizes.items()
        ],
    )
    text = (
        "Share of wrong labels put in (head) and found, in per cent: mean and, in "
        f"brackets, standard deviation over {payload['protocol']['draws']} draws. "
        f"A quarter of {payload['protocol']['whole']} digits gives "
        f"{spread(payload['subset']['difference'], '+.1f')} points more than all. Of a "
        f"weak annotator's labels {spread(payload['annotator']['wrong'])} are wrong, "
        f"and {spread(payload['annotator']['half'])} are found."
    )
    return {RECORD: "\n\n".join((body, text, report.provenance(payload)))}
