"""Floods the paper's MLP on real images: accuracy, test loss, calibration, flatness."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import flood_optax
from benchmarks import data, models, record, report
from benchmarks.synthetic import epoch_of, interval, one_thread_per_run, sd
from flood_optax import sharpness, sweep

TITLES = {
    "mnist-5k": "MNIST-5k",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
}
SIZES = {  # training, validation; test is what is left, or the official one
    "mnist-5k": (2000, 500),
    "mnist": (5000, 1250),
    "fashion-mnist": (5000, 1250),
    "digits": (200, 50),  # for --smoke
}
LEVELS = {  # by the share of flipped labels; clean ones take the paper's grid
    0.0: (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1),
    0.1: (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
}
MEASURES = ("loss", "accuracy", "ece")
Set = tuple[jax.Array, jax.Array]
FLATNESS = ("gradient_norm", "hessian_trace", "top_eigenvalue")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The paper's setting, but for the number of images and epochs (there 500)."""

    widths: tuple[int, ...] = (1000, 1000)
    learning_rate: float = 0.1
    momentum: float = 0.9
    batch: int = 200
    epochs: int = 60
    ece_bins: int = 15
    flatness_points: int = 250
    flatness_probes: int = 8
    flatness_iterations: int = 15


SMOKE = Protocol((16,), batch=50, epochs=2, flatness_points=20, flatness_probes=2)


class Images(NamedTuple):
    """Pixels as bytes; train and validation are drawn from the pool for each seed."""

    pool_x: np.ndarray
    pool_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    train_size: int


def load(
    name: str,
    directory: pathlib.Path | None,
    sizes: Mapping[str, tuple[int, int]] = SIZES,
) -> Images:
    """The images of a set; missing ones are an error that says how to get them."""
    train, validation = sizes[name]
    pool = train + validation
    if name == "digits":
        split = data.digits(train=pool)
    elif name == "mnist-5k":
        split = data.mnist_5k(train=pool)
    else:
        known = cast(Any, name)
        split = data.idx_split(known, train=pool, directory=directory)
    return Images(
        np.round(255 * split.train_x).astype(np.uint8),
        split.train_y,
        np.round(255 * split.test_x).astype(np.uint8),
        split.test_y,
        train,
    )


def flip(key: jax.Array, labels: jax.Array, rate: float) -> jax.Array:
    """Gives exactly floor(rate n) of the labels another of the ten classes."""
    chosen_key, shift_key = jax.random.split(key)
    chosen = jax.random.permutation(chosen_key, len(labels))
    chosen = chosen[: int(round(rate * len(labels), 9))]
    shift = jax.random.randint(shift_key, chosen.shape, 1, 10)
    return labels.at[chosen].set((labels[chosen] + shift) % 10)


def draw(images: Images, noise: float, key: jax.Array) -> tuple[Set, Set, Set]:
    """Training, validation and test set; the labels of the test set are clean."""
    order_key, train_key, validation_key = jax.random.split(key, 3)
    order = jax.random.permutation(order_key, len(images.pool_x))
    x = jnp.asarray(images.pool_x)[order].astype(jnp.float32) / 255
    y = jnp.asarray(images.pool_y)[order]
    n = images.train_size
    test_x = jnp.asarray(images.test_x).astype(jnp.float32) / 255
    return (
        (x[:n], flip(train_key, y[:n], noise)),
        (x[n:], flip(validation_key, y[n:], noise)),
        (test_x, jnp.asarray(images.test_y)),
    )


def expected_calibration_error(
    logits: jax.Array, labels: jax.Array, bins: int
) -> jax.Array:
    """Sum over bins of confidence of |accuracy - confidence|, weighted by their size.

    The bins are (i/m, (i+1)/m]. Guo et al., On Calibration of Modern Neural Networks,
    ICML 2017, equation 3.
    """
    confidence = jax.nn.softmax(logits).max(-1)
    index = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = (logits.argmax(-1) == labels) - confidence
    return jnp.abs(jax.ops.segment_sum(gap, index, bins)).sum() / len(labels)


def trainer(
    images: Images, noise: float, protocol: Protocol
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """One run: (level, key) -> what it reaches, and flatness before and after.

    The key decides the training images, the flips, initialisation and batches. Before
    flooding is where the loss of a batch first falls below the level: until there the
    run is plain training.
    """
    n = images.train_size
    steps = n // protocol.batch
    net = models.MLP(protocol.widths, 10)
    optimizer = optax.sgd(protocol.learning_rate, protocol.momentum)
    branch = cast(Callable[..., Any], lax.cond)
    scan = cast(Callable[..., Any], lax.scan)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = net.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def evaluate(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = net.apply(params, x)
        ece = expected_calibration_error(logits, y, protocol.ece_bins)
        accuracy = jnp.mean(logits.argmax(-1) == y)
        return jnp.stack([loss_fn(params, x, y), accuracy, ece])

    def flatness(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        batch = (x[: protocol.flatness_points], y[: protocol.flatness_points])
        trace, _ = sharpness.hessian_trace(
            loss_fn, params, *batch, key=key, num_samples=protocol.flatness_probes
        )
        top, _ = sharpness.top_eigenvalue(
            loss_fn,
            params,
            *batch,
            key=key,
            num_iterations=protocol.flatness_iterations,
        )
        return jnp.stack([sharpness.gradient_norm(loss_fn, params, *batch), trace, top])

    def train(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        (train_x, train_y), validation, test = draw(images, noise, keys[0])
        start: Any = net.init(keys[1], train_x)
        value_and_grad = jax.value_and_grad(
            flood_optax.flooded(loss_fn, level, return_info=True), has_aux=True
        )

        def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
            params, state, before, entered = carry
            (_, info), grads = value_and_grad(params, train_x[batch], train_y[batch])
            enters = ~entered & (info.loss < level)
            before = branch(enters, lambda: params, lambda: before)
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(params, updates)
            return (params, state, before, entered | enters), info.loss

        def epoch(carry: Any, key: jax.Array) -> tuple[Any, Any]:
            run, best = carry
            batches = jax.random.permutation(key, n)[: steps * protocol.batch]
            run, losses = scan(step, run, batches.reshape(steps, protocol.batch))
            accuracy = evaluate(run[0], *validation)[1]
            new = (run[0], accuracy)
            best = branch(accuracy > best[1], lambda: new, lambda: best)
            seen = {"train_loss": losses.mean(), "validation_accuracy": accuracy}
            return (run, best), seen | {"share_below": (losses < level).mean()}

        run = (start, optimizer.init(start), start, jnp.array(False))
        best = (start, evaluate(start, *validation)[1])
        epochs = jax.random.split(keys[2], protocol.epochs)
        (run, best), metrics = scan(epoch, (run, best), epochs)
        metrics["last"] = evaluate(run[0], *test)
        metrics["best"] = evaluate(best[0], *test)
        metrics["entered"] = run[3]
        batch = (train_x, train_y, keys[3])
        metrics["flatness_before"] = flatness(run[2], *batch)
        metrics["flatness_after"] = flatness(run[0], *batch)
        return metrics

    return train


def summarise(name: str, noise: float, result: sweep.Result) -> list[dict[str, Any]]:
    """Without and with flooding, at the last and the best epoch.

    The level is picked for each seed by validation accuracy, the lowest of the best.
    """
    entries: list[dict[str, Any]] = []
    for early_stopping in (False, True):
        which, at = ("best", "best") if early_stopping else ("last", -1)
        seeds = result.metrics["entered"].shape[1]
        picks = {
            False: np.zeros(seeds),
            True: result.best("validation_accuracy", "max", at=cast(Any, at)),
        }
        for flooded, levels in picks.items():
            reached = result.curves(which, levels).astype(np.float64)
            accuracies = 100 * reached[:, MEASURES.index("accuracy")]
            entry: dict[str, Any] = {
                "data": name,
                "noise": noise,
                "early_stopping": early_stopping,
                "flooded": flooded,
                "seeds": seeds,
                "accuracy_mean": float(accuracies.mean()),
                "accuracy_sd": sd(accuracies),
                "accuracies": accuracies.tolist(),
                "level_mean": float(levels.mean()),
                "level_sd": sd(levels),
                "levels": levels.tolist(),
            }
            for measure in ("loss", "ece"):
                values = reached[:, MEASURES.index(measure)]
                entry[f"test_{measure}_mean"] = float(values.mean())
                entry[f"test_{measure}_sd"] = sd(values)
            entries.append(entry)
    return entries


def by_level(name: str, noise: float, result: sweep.Result) -> list[dict[str, Any]]:
    """Means over the seeds at the last epoch, flatness before only where it floods."""
    rows: list[dict[str, Any]] = []
    for i, level in enumerate(result.levels):
        metrics = {k: v[i].astype(np.float64) for k, v in result.metrics.items()}
        row: dict[str, Any] = {"data": name, "noise": noise, "level": float(level)}
        row["train_loss"] = float(metrics["train_loss"][:, -1].mean())
        row["share_below"] = float(metrics["share_below"].mean())
        for j, measure in enumerate(MEASURES):
            row[f"test_{measure}"] = float(metrics["last"][:, j].mean())
        entered = bool(metrics["entered"].all())
        for j, measure in enumerate(FLATNESS):
            before = float(metrics["flatness_before"][:, j].mean())
            row[f"{measure}_before"] = before if entered else None
            row[f"{measure}_after"] = float(metrics["flatness_after"][:, j].mean())
        rows.append(row)
    return rows


def numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and gain of each pair, and of each level."""
    rows = payload["rows"]

    def base_of(row: Mapping[str, Any]) -> str:
        return f"{row['data']}/{row['noise']:.0%}"

    def pair_of(row: Mapping[str, Any]) -> str:
        return f"{base_of(row)}/{epoch_of(row)}"

    def entry_of(row: Mapping[str, Any]) -> str:
        return f"{pair_of(row)}/{'flooded' if row['flooded'] else 'plain'}"

    def level_of(row: Mapping[str, Any]) -> str:
        return f"{base_of(row)}/level-{row['level']:g}"

    found = report.named(rows, entry_of) | report.named(payload["by_level"], level_of)
    for plain, flooded in zip(rows[::2], rows[1::2], strict=True):
        gain, half = interval(flooded, plain)
        found |= {f"{pair_of(plain)}/gain": gain, f"{pair_of(plain)}/gain_half": half}
    return found


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """Without beside with flooding, and what each level does."""
    entries = payload["rows"]
    rows: list[list[str]] = []
    for plain, flooded in zip(entries[::2], entries[1::2], strict=True):
        gain, half = interval(flooded, plain)
        rows.append(
            [
                TITLES[plain["data"]],
                f"{plain['noise']:.0%}",
                "yes" if plain["early_stopping"] else "no",
                f"{flooded['level_mean']:.2f} ({flooded['level_sd']:.2f})",
                f"{plain['accuracy_mean']:.2f} to {flooded['accuracy_mean']:.2f}",
                f"{gain:+.2f}" + (f" ± {half:.2f}" if np.isfinite(half) else ""),
                f"{plain['test_loss_mean']:.3f} to {flooded['test_loss_mean']:.3f}",
                f"{plain['test_ece_mean']:.3f} to {flooded['test_ece_mean']:.3f}",
            ]
        )
    header = [
        *("data", "flips", "early stopping", "level (sd)", "test accuracy, %"),
        *("gain (95%)", "test loss", "calibration error"),
    ]
    source = report.provenance(payload)
    return {
        "images": f"{report.table(header, rows)}\n\n{source}",
        "images-levels": levels_table(payload),
    }


def levels_table(payload: Mapping[str, Any]) -> str:
    """Each level at the last epoch: how flat before it floods, and after."""
    header = [
        *("data", "flips", "level", "train loss", "steps below", "test accuracy, %"),
        *("test loss", "calibration error", "Hessian trace", "top eigenvalue"),
    ]

    def change(row: Mapping[str, Any], measure: str) -> str:
        before, after = row[f"{measure}_before"], row[f"{measure}_after"]
        return f"{after:.3g}" if before is None else f"{before:.3g} to {after:.3g}"

    rows = [
        [
            TITLES[row["data"]],
            f"{row['noise']:.0%}",
            f"{row['level']:.2f}",
            f"{row['train_loss']:.3f}",
            f"{row['share_below']:.0%}",
            f"{100 * row['test_accuracy']:.2f}",
            f"{row['test_loss']:.3f}",
            f"{row['test_ece']:.3f}",
            change(row, "hessian_trace"),
            change(row, "top_eigenvalue"),
        ]
        for row in payload["by_level"]
    ]
    return report.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = record.arguments("images", __doc__)
    sets = [name for name in TITLES if name != "digits"]
    parser.add_argument("--sets", nargs="+", choices=sets, default=sets[:1])
    parser.add_argument("--data", type=pathlib.Path, help="directory of the IDX files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Protocol.epochs)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    protocol = dataclasses.replace(Protocol(), epochs=args.epochs)
    sets, seeds, grid = args.sets, args.seeds, LEVELS
    if args.smoke:
        protocol, sets, seeds, grid = SMOKE, ["digits"], 2, {0.1: (0.0, 2.25)}
    loaded = {name: load(name, args.data) for name in sets}  # all of it, or an error
    one_thread_per_run(args.workers)
    keys = jax.random.split(jax.random.key(0), seeds)
    entries: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for name, images in loaded.items():
        for noise, levels in grid.items():
            print(f"{TITLES[name]}, {noise:.0%} flips", flush=True)
            result = sweep.run(
                trainer(images, noise, protocol),
                levels,
                keys,
                strategy="shard",
                chunk_size=1,
                progress=True,
            )
            entries += summarise(name, noise, result)
            rows += by_level(name, noise, result)
    protocol_of: dict[str, Any] = {
        **dataclasses.asdict(protocol),
        "optimizer": "sgd",
        "sizes": {name: [*SIZES[name], len(loaded[name].test_x)] for name in sets},
        "labels": "flipped in training and validation, clean in the test",
        "selection": "validation accuracy, the lowest of the best levels",
        "scaled_down": "images and epochs, to two processor cores; the paper trains "
        "500 epochs on all images, so these numbers do not compare with its table",
        "seeds": seeds,
    }
    payload = {"protocol": protocol_of, "rows": entries, "by_level": rows}
    written = record.write("images", payload, args.out)
    made = tables(record.read("images", args.out))
    print("\n" + "\n\n".join(made.values()), f"\n\nWrote {written}")
