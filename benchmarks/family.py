"""Compares the methods of the family, SAM and weight decay on the same noisy images."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy import stats

from benchmarks import models, record, report
from benchmarks.images import TITLES, Images, draw, load
from benchmarks.synthetic import epoch_of, interval, new_figure, one_thread_per_run, sd
from flood_optax import flood_loss, flood_mean, levels, shapes, sweep
from flood_optax.objective import relax_loss

SIZES = {  # training, validation; test is what is left, or the official one
    "mnist-5k": (1000, 1000),
    "mnist": (48_000, 12_000),
    "fashion-mnist": (48_000, 12_000),
    "digits": (100, 50),  # for --smoke
}
DEFAULT = "mnist-5k"
NOISES = (0.0, 0.2)
LEVELS = {  # by the share of flipped labels
    0.0: (0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    0.2: (0.05, 0.1, 0.2, 0.4, 0.6, 0.8),
}
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all methods share."""

    widths: tuple[int, ...] = (64,)
    learning_rate: float = 0.1
    momentum: float = 0.9
    batch: int = 100
    epochs: int = 100
    folds: int = 5  # of AdaFlood
    held_out_epochs: int = 20  # of its auxiliary models
    decay: float = 0.99  # of WaveBound's moving average
    warm_epochs: int = 10  # before the average lags behind
    patience: int = 3  # of the level on the plateau, in epochs


# 60 times as many images, so fewer rounds of them
FULL = Protocol(epochs=10, held_out_epochs=2, warm_epochs=1, patience=1)
SMOKE = Protocol((8,), batch=50, epochs=2, held_out_epochs=1, warm_epochs=1, patience=1)


class Seen(NamedTuple):
    """What an objective may use of a batch."""

    logits: jax.Array
    labels: jax.Array
    losses: jax.Array
    held_out: jax.Array  # losses under models that left the example out (AdaFlood)
    frequency: jax.Array  # of each class in the training set, of the largest
    target_loss: jax.Array  # of the moving average of the model (WaveBound)
    level: jax.Array  # one that is found on the way
    epoch: jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
    """An objective with one number to choose, from equally many candidates."""

    title: str
    number: str
    candidates: Sequence[float] | Mapping[float, Sequence[float]]
    objective: Callable[[Seen, jax.Array], jax.Array]


def plain(seen: Seen, _: jax.Array) -> jax.Array:
    return seen.losses.mean()


def tail_mean(losses: jax.Array, q: float = 0.5) -> jax.Array:
    """The conditional value at risk, at its minimiser t."""
    t = lax.stop_gradient(jnp.quantile(losses, q))
    return t + jnp.maximum(losses - t, 0).mean() / (1 - q)


METHODS: dict[str, Method] = {
    "plain": Method("plain training", "-", (0.0,), plain),
    "weight_decay": Method(
        "weight decay", "decay", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), plain
    ),
    "sam": Method("SAM", "radius", (0.02, 0.05, 0.1, 0.2, 0.5, 1.0), plain),
    "flooding": Method(
        "flooding", "level", LEVELS, lambda s, b: flood_mean(s.losses, b)
    ),
    "pause": Method(
        "pause (no ascent)",
        "level",
        LEVELS,
        lambda s, b: flood_mean(s.losses, b, shape=shapes.pause()),
    ),
    "iflood": Method(
        "iFlood", "level", LEVELS, lambda s, b: flood_mean(s.losses, b, over="example")
    ),
    "softad": Method(
        "SoftAD",
        "level",
        LEVELS,
        lambda s, b: flood_mean(s.losses, b, over="example", shape=shapes.soft()),
    ),
    "class_wise": Method(
        "class-wise",
        "largest level",
        LEVELS,
        lambda s, b: flood_mean(
            s.losses,
            b * s.frequency,
            over="segment",
            segment_ids=s.labels,
            num_segments=CLASSES,
        ),
    ),
    "coce": Method(
        "COCE (tail mean)",
        "level",
        LEVELS,
        lambda s, b: flood_loss(tail_mean(s.losses), b),
    ),
    "relax_loss": Method(
        "RelaxLoss",
        "level",
        LEVELS,
        lambda s, b: relax_loss(s.logits, s.labels, b, epoch=s.epoch),
    ),
    "adaflood": Method(
        "AdaFlood",
        "gamma",
        SHARES,
        lambda s, g: flood_mean(
            s.losses, levels.adaflood(s.held_out, g), over="example"
        ),
    ),
    "adaflood_last_layer": Method(
        "AdaFlood, last layer re-fitted",
        "gamma",
        SHARES,
        lambda s, g: flood_mean(
            s.losses, levels.adaflood(s.held_out, g), over="example"
        ),
    ),
    "wavebound": Method(
        "WaveBound, whole batch",
        "epsilon",
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        lambda s, e: flood_mean(s.losses, levels.wavebound(s.target_loss, e)),
    ),
    "accordance": Method(
        "level from accordance (Flooding-X)",
        "threshold",
        (-0.05, 0.0, 0.05, 0.1, 0.2, 0.3),
        lambda s, _: flood_mean(s.losses, s.level),
    ),
    "plateau": Method(
        "level on plateau",
        "step",
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
        lambda s, _: flood_mean(s.losses, s.level),
    ),
}


def candidates(name: str, noise: float) -> tuple[float, ...]:
    """The numbers a method may choose from."""
    given = METHODS[name].candidates
    return tuple(given[noise] if isinstance(given, Mapping) else given)


class Run(NamedTuple):
    """What changes from step to step."""

    params: Any
    state: Any
    target: Any  # what is deployed: the model itself, but for WaveBound
    level: jax.Array


Objective = Callable[[Any, jax.Array], jax.Array]  # (params, batch of indices) -> loss
scan = cast(Callable[..., Any], lax.scan)
branch = cast(Callable[..., Any], lax.cond)
grad = cast(Callable[..., Any], jax.grad)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network and how it is trained."""

    net: models.MLP
    protocol: Protocol

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        return self.net.init(key, x)

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        return cast(jax.Array, self.net.apply(params, x))

    def losses(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = self.logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def evaluate(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Loss and accuracy, never flooded."""
        right = self.logits(params, x).argmax(-1) == y
        return jnp.stack([self.losses(params, x, y).mean(), right.mean()])

    def features(self, params: Any, x: jax.Array) -> jax.Array:
        """What the last layer sees."""
        _, seen = cast(Any, self.net.apply)(params, x, capture_intermediates=True)
        last_hidden = f"Dense_{len(self.protocol.widths) - 1}"
        return jax.nn.relu(seen["intermediates"][last_hidden]["__call__"][0])

    def optimizer(self) -> optax.GradientTransformation:
        return optax.sgd(self.protocol.learning_rate, self.protocol.momentum)

    def batches(self, key: jax.Array, size: int) -> jax.Array:
        """One epoch of indices, [steps, batch]."""
        order = jax.random.permutation(key, size)
        whole = size - size % self.protocol.batch
        return order[:whole].reshape(-1, self.protocol.batch)

    def fit(
        self, loss_fn: Objective, params: Any, key: jax.Array, *, size: int, epochs: int
    ) -> Any:
        """Plain training on indices below `size`."""
        optimizer = self.optimizer()

        def step(carry: Any, batch: jax.Array) -> Any:
            params, state = carry
            updates, state = optimizer.update(grad(loss_fn)(params, batch), state)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry: Any, key: jax.Array) -> Any:
            return scan(step, carry, self.batches(key, size))

        carry = (params, optimizer.init(params))
        return scan(epoch, carry, jax.random.split(key, epochs))[0][0]


def held_out(model: Classifier, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
    """AdaFlood's auxiliary losses, all folds in one program."""
    folds, epochs = model.protocol.folds, model.protocol.held_out_epochs
    size = len(x) - len(x) // folds

    def fit(indices: jax.Array, key: jax.Array) -> Any:
        init_key, batch_key = jax.random.split(key)

        def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
            return model.losses(params, x[indices[batch]], y[indices[batch]]).mean()

        start = model.init(init_key, x)
        return model.fit(loss_fn, start, batch_key, size=size, epochs=epochs)

    def evaluate(params: Any, indices: jax.Array) -> jax.Array:
        return model.losses(params, x[indices], y[indices])

    return levels.held_out_losses(
        fit, evaluate, len(x), num_folds=folds, key=key, vmap=True
    )


def held_out_by_last_layer(
    model: Classifier, x: jax.Array, y: jax.Array, key: jax.Array
) -> jax.Array:
    """The same from one network, trained on everything but its re-fitted last layer."""
    init_key, batch_key, fold_key = jax.random.split(key, 3)

    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        return model.losses(params, x[batch], y[batch]).mean()

    epochs = model.protocol.held_out_epochs
    start = model.init(init_key, x)
    whole = model.fit(loss_fn, start, batch_key, size=len(x), epochs=epochs)
    last_layer = Classifier(models.MLP((), CLASSES), model.protocol)
    return held_out(last_layer, model.features(whole, x), y, fold_key)


def level_from_accordance(
    model: Classifier,
    start: Any,
    data_set: tuple[jax.Array, jax.Array],
    threshold: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Trains plainly once, watching the two halves of every batch."""
    (x, y), optimizer = data_set, model.optimizer()

    def loss_fn(params: Any, indices: jax.Array) -> jax.Array:
        return model.losses(params, x[indices], y[indices]).mean()

    def mean(a: Any, b: Any) -> Any:
        return (a + b) / 2

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        first, second = jnp.split(batch, 2)
        loss_a, grads_a = jax.value_and_grad(loss_fn)(params, first)
        loss_b, grads_b = jax.value_and_grad(loss_fn)(params, second)
        updates, state = optimizer.update(jax.tree.map(mean, grads_a, grads_b), state)
        accordance = levels.gradient_accordance(grads_a, grads_b)
        params = optax.apply_updates(params, updates)
        return (params, state), (mean(loss_a, loss_b), accordance)

    def epoch(carry: Any, key: jax.Array) -> Any:
        carry, (losses, accordances) = scan(step, carry, model.batches(key, len(x)))
        return carry, (losses.mean(), accordances.mean())

    keys = jax.random.split(key, model.protocol.epochs)
    _, (losses, accordances) = scan(epoch, (start, optimizer.init(start)), keys)
    return levels.accordance_level(
        losses, accordances, threshold=cast(float, threshold)
    )


def prepare(
    name: str,
    model: Classifier,
    start: Any,
    data_set: tuple[jax.Array, jax.Array],
    *,
    number: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What a method finds out before it trains: held-out losses, and a level."""
    losses, level = jnp.zeros(len(data_set[1])), jnp.float32(0)
    if name == "adaflood":
        losses = held_out(model, *data_set, key)
    if name == "adaflood_last_layer":
        losses = held_out_by_last_layer(model, *data_set, key)
    if name == "accordance":
        level = level_from_accordance(model, start, data_set, number, key)
    return losses, level


def optimizer_of(
    name: str, number: jax.Array, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The rivals of flooding change the optimizer instead of the objective."""
    if name == "weight_decay":
        return optax.chain(optax.add_decayed_weights(cast(float, number)), inner)
    if name == "sam":
        adversary = optax.chain(optax.contrib.normalize(), optax.sgd(number))
        return optax.contrib.sam(inner, adversary, opaque_mode=True)
    return inner


def trainer(
    images: Images, noise: float, name: str, protocol: Protocol
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """One run of a method: (its number, key) -> what it reaches.

    The key decides images, flips, initialisation and batches, the same for all methods.
    Test labels are clean, validation labels as noisy as those trained on.
    """
    n, method = images.train_size, METHODS[name]
    model = Classifier(models.MLP(protocol.widths, CLASSES), protocol)

    def train(number: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        (train_x, train_y), validation, test = draw(images, noise, keys[0])
        counts = jnp.bincount(train_y, length=CLASSES)
        start = model.init(keys[1], train_x)
        left_out, first_level = prepare(
            name, model, start, (train_x, train_y), number=number, key=keys[3]
        )
        optimizer = optimizer_of(name, number, model.optimizer())
        plateau_init, plateau_update = levels.on_plateau(
            0.0, step=cast(float, number), patience=protocol.patience, mode="min"
        )

        def objective(
            params: Any, run: Run, epoch: jax.Array, batch: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            x, y = train_x[batch], train_y[batch]
            logits = model.logits(params, x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            target_loss = model.losses(run.target, x, y).mean()
            seen = Seen(
                logits=logits,
                labels=y,
                losses=losses,
                held_out=left_out[batch],
                frequency=counts / counts.max(),
                target_loss=jnp.where(
                    epoch < protocol.warm_epochs, -jnp.inf, target_loss
                ),
                level=run.level,
                epoch=epoch,
            )
            return method.objective(seen, number), losses.mean()

        def step(carry: tuple[Run, jax.Array], batch: jax.Array) -> Any:
            run, epoch = carry

            def gradient(params: Any, _: Any) -> Any:
                return grad(objective, has_aux=True)(params, run, epoch, batch)[0]

            grads, loss = grad(objective, has_aux=True)(run.params, run, epoch, batch)
            extra = {"grad_fn": gradient} if name == "sam" else {}
            update = cast(Callable[..., Any], optimizer.update)
            updates, state = update(grads, run.state, run.params, **extra)
            params = target = optax.apply_updates(run.params, updates)
            if name == "wavebound":
                warm = epoch < protocol.warm_epochs
                pace = jnp.where(warm, 1.0, 1 - protocol.decay)
                target = optax.incremental_update(params, run.target, pace)
            return (Run(params, state, target, run.level), epoch), loss

        def one_epoch(carry: Any, now: tuple[jax.Array, jax.Array]) -> Any:
            run, best, plateau = carry
            (run, _), losses = scan(step, (run, now[0]), model.batches(now[1], n))
            reached = model.evaluate(run.target, *validation)
            new = (run.target, reached[1])
            best = branch(reached[1] > best[1], lambda: new, lambda: best)
            if name == "plateau":
                level, plateau = plateau_update(plateau, reached[0])
                run = run._replace(level=level)
            seen = {"train_loss": losses.mean(), "validation_accuracy": reached[1]}
            return (run, best, plateau), seen | {"level": run.level}

        run = Run(start, optimizer.init(start), start, first_level)
        carry = (run, (start, jnp.float32(-1)), plateau_init())
        epochs = jnp.arange(protocol.epochs), jax.random.split(keys[2], protocol.epochs)
        (run, best, _), metrics = scan(one_epoch, carry, epochs)
        metrics["last"] = model.evaluate(run.target, *test)
        metrics["best"] = model.evaluate(best[0], *test)
        return metrics

    return train


def summarise(name: str, noise: float, result: sweep.Result) -> list[dict[str, Any]]:
    """At the last epoch and at the best one; the number is picked for each seed."""
    rows: list[dict[str, Any]] = []
    for early_stopping in (False, True):
        which, at = ("best", "best") if early_stopping else ("last", -1)
        picked = result.best("validation_accuracy", "max", at=cast(Any, at))
        reached = result.curves(which, picked).astype(np.float64)
        train_loss = result.curves("train_loss", picked)[:, -1]
        accuracies = 100 * reached[:, 1]
        rows.append(
            {
                "method": name,
                "noise": noise,
                "early_stopping": early_stopping,
                "picked": picked.astype(float).tolist(),
                "accuracies": accuracies.tolist(),
                "accuracy_mean": float(accuracies.mean()),
                "accuracy_sd": sd(accuracies),
                "test_loss_mean": float(reached[:, 0].mean()),
                "test_loss_sd": sd(reached[:, 0]),
                "train_loss_mean": float(train_loss.mean()),
            }
        )
    return rows


def record_name(data: str) -> str:
    """One record for each set of images."""
    return "family" if data in (DEFAULT, "digits") else f"family-{data}"


def half_width(row: Mapping[str, Any]) -> float:
    """Half of the 95% interval of the mean accuracy."""
    n = len(row["accuracies"])
    if n < 2:
        return math.inf
    return float(stats.t.ppf(0.975, n - 1)) * row["accuracy_sd"] / math.sqrt(n)


def with_error(mean: float, half: float, sign: str = "") -> str:
    """A mean, and its interval where there is one."""
    return f"{mean:{sign}.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")


def numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Columns, intervals and gain of each method."""

    def base_of(row: Mapping[str, Any]) -> str:
        return f"{row['noise']:.0%}/{epoch_of(row)}"

    def name_of(row: Mapping[str, Any]) -> str:
        return f"{base_of(row)}/{row['method']}"

    rows = payload["rows"]
    found = report.named(rows, name_of)
    plain = {base_of(row): row for row in rows if row["method"] == "plain"}
    for row in rows:
        gain, half = interval(row, plain[base_of(row)])
        found[f"{name_of(row)}/accuracy_half"] = half_width(row)
        found[f"{name_of(row)}/picked_median"] = float(np.median(row["picked"]))
        found |= {f"{name_of(row)}/gain": gain, f"{name_of(row)}/gain_half": half}
    return found


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """Every method at the last epoch, and with early stopping."""
    lines: list[list[str]] = []
    ahead = {False: 0, True: 0}
    behind = {False: 0, True: 0}
    for noise in payload["protocol"]["noises"]:
        found = {
            (row["method"], row["early_stopping"]): row
            for row in payload["rows"]
            if row["noise"] == noise
        }
        for name in dict.fromkeys(method for method, _ in found):
            last = found[name, False]
            number = METHODS[name].number
            picked = "-" if number == "-" else f"{number} {np.median(last['picked']):g}"
            line = [f"{noise:.0%}", METHODS[name].title, picked]
            for stopped in (False, True):
                row = found[name, stopped]
                gain, half = interval(row, found["plain", stopped])
                ahead[stopped] += gain - half > 0
                behind[stopped] += gain + half < 0
                line.append(with_error(row["accuracy_mean"], half_width(row)))
                line.append("" if name == "plain" else with_error(gain, half, "+"))
            line.insert(5, f"{last['test_loss_mean']:.3f}")
            line.insert(6, f"{last['train_loss_mean']:.3f}")
            lines.append(line)
    header = [
        *("flips", "method", "picked (median)", "test accuracy, %", "gain over plain"),
        *("test loss", "train loss", "with early stopping, %", "gain over plain"),
    ]
    compared = len(payload["rows"]) // 2 - len(payload["protocol"]["noises"])
    summary = (
        f"Means over {payload['protocol']['seeds']} seeds with 95% intervals, gains "
        f"paired by seed. At the last epoch {ahead[False]} of {compared} are ahead of "
        f"plain training and {behind[False]} behind; with early stopping {ahead[True]} "
        f"and {behind[True]}; the others' intervals include 0. With as many "
        f"comparisons a few intervals miss by chance."
    )
    body = report.table(header, lines)
    parts = (body, summary, report.provenance(payload))
    return {record_name(payload["protocol"]["data"]): "\n\n".join(parts)}


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy by method, with intervals: last epoch and early stopping."""
    noises = payload["protocol"]["noises"]
    fig, axes = new_figure(1, len(noises))
    fig.set_size_inches(5 * len(noises) + 2, 5)
    for axis, noise in zip(axes, noises, strict=True):
        rows = [row for row in payload["rows"] if row["noise"] == noise]
        names = list(dict.fromkeys(row["method"] for row in rows))
        for stopped, marker in ((False, "o"), (True, "s")):
            chosen = [row for row in rows if row["early_stopping"] == stopped]
            half = [half_width(row) for row in chosen]
            finite = all(map(math.isfinite, half))
            shift = 0.15 if stopped else -0.15
            means = [row["accuracy_mean"] for row in chosen]
            axis.errorbar(
                means,
                np.arange(len(names)) + shift,
                xerr=half if finite else None,
                fmt=marker,
                mfc="white" if stopped else None,
                color="C1" if stopped else "C0",
                label="early stopping" if stopped else "last epoch",
                capsize=2,
                ms=4,
            )
            axis.axvline(means[0], color="C1" if stopped else "C0", lw=0.6, ls=":")
        axis.set_yticks(range(len(names)), [METHODS[name].title for name in names])
        axis.invert_yaxis()
        axis.set(title=f"{noise:.0%} flips", xlabel="test accuracy, %")
        axis.label_outer()
    axes[0].legend(loc="lower left", fontsize=8)
    return {record_name(payload["protocol"]["data"]): fig}


def main(argv: Sequence[str] | None = None) -> None:
    parser = record.arguments("family", __doc__)
    sets = [name for name in SIZES if name != "digits"]
    parser.add_argument("--set", choices=sets, default=DEFAULT)
    parser.add_argument("--data", type=pathlib.Path, help="directory of the IDX files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="100, or 10 of a whole set")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--work", type=pathlib.Path, help="keeps finished runs here, and resumes them"
    )
    args = parser.parse_args(argv)
    protocol = Protocol() if args.set == DEFAULT else FULL
    protocol = dataclasses.replace(protocol, epochs=args.epochs or protocol.epochs)
    name, seeds, noises, methods = args.set, args.seeds, NOISES, list(METHODS)
    if args.smoke:
        protocol, name, seeds, noises = SMOKE, "digits", 2, NOISES[1:]
        methods = ["plain", "sam", "adaflood_last_layer"]
    images = load(name, args.data, SIZES)
    one_thread_per_run(args.workers)
    keys = jax.random.split(jax.random.key(0), seeds)
    rows: list[dict[str, Any]] = []
    by_number: list[dict[str, Any]] = []
    for noise in noises:
        for method in methods:
            print(f"{TITLES[name]}, {noise:.0%} flips: {method}", flush=True)
            numbers = candidates(method, noise)[: 2 if args.smoke else None]
            path = None
            if args.work is not None:
                args.work.mkdir(parents=True, exist_ok=True)
                path = args.work / f"family-{name}-{noise:g}-{method}.npz"
            result = sweep.run(
                trainer(images, noise, method, protocol),
                numbers,
                keys,
                strategy="shard",
                chunk_size=1,
                progress=not args.smoke,
                path=path,
            )
            rows += summarise(method, noise, result)
            by_number.append(
                {
                    "method": method,
                    "noise": noise,
                    "numbers": list(numbers),
                    "accuracy": (100 * result.metrics["last"][..., 1].mean(1)).tolist(),
                }
            )
    payload: dict[str, Any] = {
        "protocol": {
            **dataclasses.asdict(protocol),
            "data": name,
            "sizes": [*SIZES[name], len(images.test_x)],
            "noises": list(noises),
            "optimizer": "sgd",
            "labels": "flipped in training and validation, clean in the test",
            "selection": "validation accuracy, the lowest of the best numbers",
            "seeds": seeds,
        },
        "rows": rows,
        "by_number": by_number,
    }
    written = record.write(record_name(name), payload, args.out)
    document = record.read(record_name(name), args.out)
    for which, fig in figures(document).items():
        fig.savefig(args.out / f"{which}.png", dpi=150)
    print("\n" + "\n\n".join(tables(document).values()), f"\n\nWrote {written}")
