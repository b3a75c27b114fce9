"""Asks what a membership attack with shadow models tells of a trained network.

Each of sixteen models of a method is trained on half of the candidates, so that each
candidate is in eight. The likelihood-ratio attack (Carlini et al. 2022) scores it by
what the other fifteen say of it. The first candidates are canaries: their labels are
wrong, so nothing but memory gives them.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import networks, pixels, pools, report, statistics, study, training
from benchmarks.training import cross_entropy, grad, scan
from flood_optax import flood_loss, flood_mean, scale_by_flood, shapes
from flood_optax.objective import relax_loss

FALSE_POSITIVES = 0.01


@dataclasses.dataclass(frozen=True)
class Constants:
    """Of data, training and methods; what methods need was fixed in a probe before."""

    candidates: int
    canaries: int
    test: int
    batch: int
    widths: tuple[int, ...] = (100, 100)
    models: int = 16
    steps: int = 360
    early: float = 1 / 3  # of the steps
    adam: float = 2e-3
    average: float = 0.98
    level: float = 0.6
    band: float = 0.2  # x the level
    decay: float = 0.01
    smoothing: float = 0.2
    pull: float = 3.0  # of early-learning regularisation, and the pace of its targets
    pace: float = 0.7


SETTINGS = {
    "mnist-5k": Constants(candidates=1000, canaries=100, test=1500, batch=100),
    "digits": Constants(candidates=600, canaries=100, test=1000, batch=50),
}
SMOKE = {
    "digits": Constants(
        candidates=40, canaries=8, test=50, batch=10, widths=(8,), models=4, steps=12
    )
}
DRAWS = 5


class Data(NamedTuple):
    """Candidates [n, ...], of which the first are the canaries, and a test set."""

    x: jax.Array
    y: jax.Array
    test_x: jax.Array
    test_y: jax.Array
    members: jax.Array  # of each model, indices [models, n / 2]


def draw(name: str, c: Constants, key: jax.Array) -> Data:
    """New candidates; models 2 k and 2 k + 1 share them out between them."""
    pool_x, pool_y = (jnp.asarray(part) for part in pools.load(name))
    keys = jax.random.split(key, 3)
    order = jax.random.permutation(keys[0], len(pool_x))[: c.candidates + c.test]
    x, y = pool_x[order], pool_y[order]
    shift = jax.random.randint(keys[1], (c.canaries,), 1, 10)
    y = y.at[: c.canaries].set((y[: c.canaries] + shift) % 10)

    def shared_out(key: jax.Array) -> jax.Array:
        return jax.random.permutation(key, c.candidates).reshape(2, -1)

    pairs = jax.vmap(shared_out)(jax.random.split(keys[2], c.models // 2))
    own, test = slice(c.candidates), slice(c.candidates, None)
    return Data(x[own], y[own], x[test], y[test], pairs.reshape(c.models, -1))


class Batch(NamedTuple):
    """What an objective sees of a step."""

    logits: Any
    labels: jax.Array
    epoch: jax.Array
    targets: jax.Array  # of early-learning regularisation [batch, classes]


Objective = Callable[[Constants, Batch], Any]


def plain(c: Constants, batch: Batch) -> Any:
    del c
    return cross_entropy(batch.logits, batch.labels).mean()


def smoothed(c: Constants, batch: Batch) -> Any:
    evenly = -jax.nn.log_softmax(batch.logits).mean()
    return (1 - c.smoothing) * plain(c, batch) + c.smoothing * evenly


def early_learning(c: Constants, batch: Batch) -> Any:
    """Liu et al. 2020: log(1 - <p, t>) pulls towards what was predicted first."""
    agreed = (jax.nn.softmax(batch.logits) * batch.targets).sum(-1)
    return plain(c, batch) + c.pull * jnp.log(jnp.maximum(1 - agreed, 1e-4)).mean()


def per_example(c: Constants, batch: Batch) -> Any:
    return flood_mean(
        cross_entropy(batch.logits, batch.labels), c.level, over="example"
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """A loss, and what the optimizer does beside Adam."""

    title: str
    objective: Objective = plain
    flood: bool = False
    band: bool = False
    decay: bool = False
    early: bool = False


METHODS = {
    "plain": Method("plain training"),
    "early": Method("stopped after a third of the steps", early=True),
    "elr": Method("early-learning regularisation", early_learning),
    "smoothing": Method("label smoothing", smoothed),
    "decay": Method("weight decay", decay=True),
    "relax": Method(
        "RelaxLoss",
        lambda c, b: relax_loss(b.logits, b.labels, c.level, epoch=b.epoch),
    ),
    "flood": Method("flooding", flood=True),
    "band": Method("flooding in a band", flood=True, band=True),
    "example": Method("flooding each example", per_example),
    "soft": Method(
        "soft flooding (SoftAD's shape)",
        lambda c, b: flood_loss(plain(c, b), c.level, shape=shapes.soft()),
    ),
}
OURS = ("flood", "band", "example", "soft")
BESIDE = {"relax": "less RelaxLoss", "early": "less stopping early"}


class Found(NamedTuple):
    """Of each model: confidences in the candidates' labels, and test accuracy."""

    confidence: Any  # [models, candidates], log p / (1 - p)
    accuracy: Any  # [models]


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(c: Constants, method: str, data: Data, keys: jax.Array) -> Found:
    """All models of a method, in one program; their averaged weights are judged."""
    how, net = METHODS[method], networks.MLP(c.widths, 10)
    parts = [optax.adam(c.adam)]
    if how.decay:
        parts = [optax.add_decayed_weights(c.decay), *parts]
    if how.flood:
        band = c.band * c.level if how.band else 0.0
        parts = [scale_by_flood(c.level, band=band), *parts]
    optimizer: Any = optax.chain(*parts)
    size = c.candidates // 2
    steps = round(c.steps * c.early) if how.early else c.steps

    def logits(params: Any, x: jax.Array) -> Any:
        return net.apply(params, x)

    def one(given: tuple[jax.Array, jax.Array]) -> Found:
        members, key = given
        x, y = data.x[members], data.y[members]
        start, order = jax.random.split(key)
        params: Any = net.init(start, x)
        batches = training.order(order, size, c.batch, c.steps)[:steps]

        def step(carry: Any, given: Any) -> Any:
            (params, state, average, targets), (at, number) = carry, given
            probs = jax.nn.softmax(logits(params, x[at]))
            new = c.pace * targets[at] + (1 - c.pace) * probs
            targets = targets.at[at].set(new)

            def loss_fn(params: Any) -> Any:
                batch = Batch(
                    logits(params, x[at]), y[at], number // (size // c.batch), new
                )
                return how.objective(c, batch), plain(c, batch)

            grads, raw = grad(loss_fn, has_aux=True)(params)
            updates, state = optax.with_extra_args_support(optimizer).update(
                grads, state, params, value=raw
            )
            params = optax.apply_updates(params, updates)
            average = optax.incremental_update(params, average, 1 - c.average)
            return (params, state, average, targets), None

        begin = (params, optimizer.init(params), params, jnp.zeros((size, 10)))
        average = scan(step, begin, (batches, jnp.arange(steps)))[0][2]
        losses = cross_entropy(logits(average, data.x), data.y)
        _, accuracy = training.loss_and_accuracy(
            logits(average, data.test_x), data.test_y
        )
        return Found(confidence(losses), accuracy)

    return jax.lax.map(one, (data.members, keys))


def confidence(losses: jax.Array) -> jax.Array:
    """The log odds of a probability whose loss is given."""
    return -losses - jnp.log(-jnp.expm1(-jnp.maximum(losses, 1e-7)))


def scores(confidences: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Log-likelihood ratios [models, n]: in the training set or out of it.

    The normal distributions of a candidate are those of the other models; their
    variances are shared by all candidates, for eight models tell too little of one.

    Args:
      confidences: [models, n].
      inside: whether the model was trained on it [models, n].
    """
    found = []
    for part in (inside, ~inside):
        weights = part[None] & ~np.eye(len(inside), dtype=bool)[:, :, None]
        count = weights.sum(1)
        mean = np.einsum("tmn,mn->tn", weights, confidences) / count
        square = (weights * (confidences[None] - mean[:, None]) ** 2).sum((1, 2))
        variance = square / (count - 1).sum(1)
        off = (confidences - mean) ** 2
        found.append(-(off / variance[:, None] + np.log(variance)[:, None]) / 2)
    return found[0] - found[1]


def true_positives(score: np.ndarray, inside: np.ndarray) -> float:
    """The share of members above all but 1% of the others' scores."""
    others = np.sort(score[~inside])
    allowed = int(FALSE_POSITIVES * len(others))
    return float((score[inside] > others[-1 - allowed]).mean())


def auc(score: np.ndarray, inside: np.ndarray) -> float:
    """The probability that a member's score is above another's."""
    others = np.sort(score[~inside])
    below = np.searchsorted(others, score[inside], "left")
    upto = np.searchsorted(others, score[inside], "right")
    return float((below + upto).mean() / 2 / len(others))


def attacked(c: Constants, found: Found, members: np.ndarray) -> dict[str, float]:
    """What the attack finds, of canaries and of all; and one by the loss alone."""
    inside = np.zeros((c.models, c.candidates), bool)
    np.put_along_axis(inside, members, values=True, axis=1)
    own = np.asarray(found.confidence, np.float64)
    score, canary = scores(own, inside), slice(c.canaries)
    return {
        "accuracy": 100 * float(np.mean(found.accuracy)),
        "canaries": true_positives(score[:, canary], inside[:, canary]),
        "all": true_positives(score, inside),
        "threshold_auc": auc(own[:, canary], inside[:, canary]),
    }


def conduct(c: Constants, method: str, data: Data, keys: jax.Array) -> dict[str, float]:
    """Trains the models of a method and attacks each."""
    return attacked(c, train(c, method, data, keys), np.asarray(data.members))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=DRAWS)
    study.work_option(parser, pathlib.Path("out", "membership"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    sizes, draws, work = SETTINGS, args.draws, args.work
    if args.smoke:
        sizes, draws, work = SMOKE, 2, args.out / "membership-smoke"
    rows: list[dict[str, Any]] = []
    for name, c in sizes.items():
        found: dict[str, list[dict[str, float]]] = {}
        for number in range(draws):
            data_key, model_key = jax.random.split(jax.random.key(500 + number))
            data = draw(name, c, data_key)
            keys = jax.random.split(model_key, c.models)

            for method in METHODS:
                one = study.kept(
                    work / "membership.jsonl",
                    [dataclasses.asdict(c), name, number, method],
                    functools.partial(conduct, c, method, data, keys),
                )
                found.setdefault(method, []).append(one)
        pool = len(pools.load(name)[1])
        overlap = c.candidates / (pool - c.candidates)  # see `statistics.corrected`
        for method, seen in found.items():
            columns = {k: [round(one[k], 5) for one in seen] for k in seen[0]}
            rows.append({"data": name, "method": method, "overlap": overlap, **columns})
    protocol = {name: dataclasses.asdict(c) for name, c in sizes.items()}
    return {"protocol": {"draws": draws, "settings": protocol}, "rows": rows}


def row_of(payload: Mapping[str, Any], data: str, method: str) -> Mapping[str, Any]:
    return next(
        r for r in payload["rows"] if r["data"] == data and r["method"] == method
    )


def difference(
    payload: Mapping[str, Any], data: str, method: str, column: str, over: str = "plain"
) -> statistics.Effect:
    """Paired by draw, and widened for what the draws share."""
    one, other = (row_of(payload, data, name) for name in (method, over))
    return statistics.corrected(np.subtract(one[column], other[column]), one["overlap"])


COLUMNS = {
    "accuracy": "test accuracy, %",
    "canaries": "canaries found",
    "all": "of all found",
    "threshold_auc": "AUC of the loss alone",
}


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """By data: what the attack finds of each method, beside plain training."""
    names: list[str] = list(payload["protocol"]["settings"])
    verdicts = statistics.judged(
        {
            (d, m): difference(payload, d, m, "canaries")
            for d in names
            for m in METHODS
            if m != "plain"
        }
    )

    def cell(data: str, method: str, column: str) -> str:
        row = row_of(payload, data, method)
        one = statistics.corrected(row[column], row["overlap"])
        text = f"{one:.1f}" if column == "accuracy" else f"{one:.2f}"
        left_open = verdicts.get((data, method), statistics.OPEN) == statistics.OPEN
        return text if column != "canaries" or left_open else f"**{text}**"

    titles = {name: pixels.TITLES.get(name, name) for name in names}
    columns = {
        (name, column): f"{titles[name]}: {head}"
        for name in names
        for column, head in COLUMNS.items()
    }
    body = report.markdown(
        ["method", *columns.values()],
        [
            [how.title, *(cell(name, method, column) for name, column in columns)]
            for method, how in METHODS.items()
        ],
    )
    text = (
        "Found: true positives at 1 % false positives. Bold: not as plain training, by "
        f"intervals over {payload['protocol']['draws']} draws and Holm's steps."
    )
    return {
        "membership": "\n\n".join((body, text, report.provenance(payload))),
        "membership-less": less_table(payload, titles),
    }


def less_table(payload: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Canaries found by our forms less those found by two rivals."""
    effects = {
        (name, method, over): difference(payload, name, method, "canaries", over)
        for name in titles
        for method in OURS
        for over in BESIDE
        if {method, over} <= METHODS.keys()
    }
    cells = statistics.marked(effects, "+.2f")
    body = report.markdown(
        ["data", "canaries found", *BESIDE.values()],
        [
            [
                titles[name],
                METHODS[method].title,
                *(cells[name, method, over] for over in BESIDE),
            ]
            for name, method in dict.fromkeys(key[:2] for key in cells)
        ],
    )
    text = "Bold: told apart from 0 by Holm's steps over this table."
    return "\n\n".join((body, text, report.provenance(payload)))
