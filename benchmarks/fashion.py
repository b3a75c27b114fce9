"""Repeats iFlood and SoftAD on Fashion-MNIST beside the runs of SoftAD's authors."""

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

from benchmarks import models, record, report
from benchmarks.family import SIZES
from benchmarks.images import Images, draw, load
from benchmarks.synthetic import one_thread_per_run, sd
from flood_optax import flood_mean, shapes, sweep

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75)
SETS = ("train", "validation", "test")
scan = cast(Callable[..., Any], lax.scan)
grad = cast(Callable[..., Any], jax.grad)


class Published(NamedTuple):
    """Means of three trials after 500 epochs (eval_benchmarks_iFlood.ipynb)."""

    level: float
    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float
    norm: float


PUBLISHED = {
    "plain": Published(-np.inf, 6.7e-5, 0.8058, 1.0, 0.8966, 75.86),
    "iflood": Published(0.15, 0.1469, 0.4194, 1.0, 0.8937, 74.63),
    "softad": Published(0.01, 0.0024, 0.4651, 1.0, 0.8963, 54.69),
}
TITLES = {"plain": "plain", "iflood": "iFlood", "softad": "SoftAD"}
OBJECTIVES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "plain": lambda losses, _: losses.mean(),
    "iflood": lambda losses, b: flood_mean(losses, b, over="example"),
    "softad": lambda losses, b: flood_mean(
        losses, b, over="example", shape=shapes.soft()
    ),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Theirs, but for the epochs."""

    widths: tuple[int, ...] = (1000,)
    batch_norm: bool = True
    learning_rate: float = 0.1
    momentum: float = 0.9
    batch: int = 200
    epochs: int = 20
    looks: int = 5  # evaluations on the way, the last at the end


SMOKE = Protocol((8,), batch=50, epochs=4, looks=2)


def trainer(
    images: Images, name: str, protocol: Protocol
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """One run: (level, key) -> loss and accuracy of the three sets at every look.

    The key decides the split, initialisation and batches, the same for all methods.
    """
    n = images.train_size
    net = models.MLP(protocol.widths, 10, batch_norm=protocol.batch_norm)
    optimizer = optax.sgd(protocol.learning_rate, protocol.momentum)

    def evaluate(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = net.apply(model, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.stack([losses.mean(), (logits.argmax(-1) == y).mean()])

    def train(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        sets = draw(images, 0.0, keys[0])
        train_x, train_y = sets[0]
        start: Any = net.init(keys[1], train_x[:2], train=True)

        def objective(params: Any, stats: Any, batch: jax.Array) -> Any:
            model = {"params": params, "batch_stats": stats}
            out: Any = net.apply(
                model, train_x[batch], train=True, mutable=["batch_stats"]
            )
            logits, new = out
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, train_y[batch]
            )
            return OBJECTIVES[name](losses, level), new["batch_stats"]

        def step(carry: Any, batch: jax.Array) -> Any:
            model, state = carry
            grads, stats = grad(objective, has_aux=True)(
                model["params"], model["batch_stats"], batch
            )
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(model["params"], updates)
            return ({"params": params, "batch_stats": stats}, state), None

        def epoch(carry: Any, key: jax.Array) -> Any:
            order = jax.random.permutation(key, n)[: n - n % protocol.batch]
            return scan(step, carry, order.reshape(-1, protocol.batch))

        def look(carry: Any, keys: jax.Array) -> Any:
            carry, _ = scan(epoch, carry, keys)
            model = carry[0]
            reached = jnp.stack([evaluate(model, *one) for one in sets])
            return carry, {"reached": reached, "norm": optax.tree.norm(model["params"])}

        model = {part: start[part] for part in ("params", "batch_stats")}
        epoch_keys = jax.random.split(keys[2], protocol.epochs)
        looks = epoch_keys.reshape(protocol.looks, -1)
        _, metrics = scan(look, (model, optimizer.init(model["params"])), looks)
        metrics["validation_accuracy"] = metrics["reached"][:, 1, 1]
        return metrics

    return train


def summarise(
    name: str, epochs: int, selection: str, result: sweep.Result, levels: np.ndarray
) -> dict[str, Any]:
    """What the last epoch reaches at one level for each seed."""
    reached = result.curves("reached", levels)[:, -1].astype(np.float64)
    columns = {
        f"{which}_{measure}": reached[:, i, j]
        for i, which in enumerate(SETS)
        for j, measure in enumerate(("loss", "accuracy"))
    } | {"norm": result.curves("norm", levels)[:, -1].astype(np.float64)}
    row: dict[str, Any] = {"method": name, "epochs": epochs, "selection": selection}
    row["levels"] = None if name == "plain" else levels.tolist()
    row["seeds"] = len(levels)
    for measure, values in columns.items():
        row |= {f"{measure}_mean": float(values.mean()), f"{measure}_sd": sd(values)}
    return row


def by_level(name: str, result: sweep.Result) -> list[dict[str, Any]]:
    """Means over the seeds, at the last epoch."""
    reached = result.metrics["reached"][:, :, -1].astype(np.float64).mean(1)
    return [
        {
            "method": name,
            "level": float(level),
            "train_loss": float(seen[0, 0]),
            "train_accuracy": float(seen[0, 1]),
            "validation_accuracy": float(seen[1, 1]),
            "test_loss": float(seen[2, 0]),
            "test_accuracy": float(seen[2, 1]),
        }
        for level, seen in zip(result.levels, reached, strict=True)
    ]


def curve(name: str, protocol: Protocol, result: sweep.Result) -> dict[str, Any]:
    """Train and test loss on the way, means over the seeds."""
    reached = result.metrics["reached"][0].astype(np.float64).mean(0)
    pace = protocol.epochs // protocol.looks
    return {
        "method": name,
        "epochs": [pace * (i + 1) for i in range(protocol.looks)],
        "train_loss": np.round(reached[:, 0, 0], 5).tolist(),
        "test_loss": np.round(reached[:, 2, 0], 5).tolist(),
        "train_accuracy": np.round(reached[:, 0, 1], 5).tolist(),
    }


def numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of each row, theirs and ours, of each level, and each loss on the way."""

    def runs_of(row: Mapping[str, Any]) -> str:
        return f"{row['method']}/{report.slug(row['selection'])}"

    def level_of(row: Mapping[str, Any]) -> str:
        return f"{row['method']}/level-{row['level']:g}"

    found = report.named(payload["rows"], runs_of)
    found |= report.named(payload["by_level"], level_of)
    for name, theirs in PUBLISHED.items():
        found |= {f"{name}/theirs/{k}": v for k, v in theirs._asdict().items()}
    for row in payload["rows"]:
        if row["levels"] is not None:
            found[f"{runs_of(row)}/level"] = float(np.array(row["levels"]).mean())
    for curve in payload["curves"]:
        for column in ("train_loss", "test_loss", "train_accuracy"):
            for epoch, value in zip(curve["epochs"], curve[column], strict=True):
                found[f"{curve['method']}/epoch-{epoch}/{column}"] = value
    return found


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Theirs and ours, every level, and the losses on the way."""

    def spread(row: Mapping[str, Any], measure: str, digits: int) -> str:
        mean = f"{row[f'{measure}_mean']:.{digits}f}"
        return mean + (
            f" ({row[f'{measure}_sd']:.{digits}f})" if row["seeds"] > 1 else ""
        )

    def level_of(row: Mapping[str, Any]) -> str:
        if row["levels"] is None:
            return "-"
        levels = np.array(row["levels"])
        return f"{levels.mean():.3g}" + (f" ({sd(levels):.2f})" if sd(levels) else "")

    lines: list[list[str]] = []
    for name, theirs in PUBLISHED.items():
        level = "-" if name == "plain" else f"{theirs.level:g}"
        lines.append(
            [
                *(TITLES[name], "theirs", "500", level),
                *(f"{theirs.train_loss:.4f}", f"{theirs.test_loss:.4f}"),
                *(f"{theirs.train_accuracy:.4f}", f"{theirs.test_accuracy:.4f}"),
                f"{theirs.norm:.1f}",
            ]
        )
        lines += [
            [
                *(TITLES[name], f"ours, {row['selection']}", str(row["epochs"])),
                level_of(row),
                *(spread(row, "train_loss", 4), spread(row, "test_loss", 4)),
                *(spread(row, "train_accuracy", 4), spread(row, "test_accuracy", 4)),
                spread(row, "norm", 1),
            ]
            for row in payload["rows"]
            if row["method"] == name
        ]
    header = [
        *("method", "runs", "epochs", "level", "train loss", "test loss"),
        *("train accuracy", "test accuracy", "norm"),
    ]
    by_level = report.table(
        [
            *("method", "level", "train loss", "train accuracy"),
            "test loss",
            "test acc.",
        ],
        [
            [
                *(TITLES[row["method"]], f"{row['level']:g}"),
                *(f"{row['train_loss']:.4f}", f"{row['train_accuracy']:.4f}"),
                *(f"{row['test_loss']:.4f}", f"{row['test_accuracy']:.4f}"),
            ]
            for row in payload["by_level"]
        ],
    )
    looks = payload["curves"][0]["epochs"]
    on_the_way = report.table(
        ["method", "loss", *(f"epoch {epoch}" for epoch in looks)],
        [
            [TITLES[seen["method"]], part, *(f"{x:.3f}" for x in seen[f"{part}_loss"])]
            for seen in payload["curves"]
            for part in ("train", "test")
        ],
    )
    short = report.table(header, lines)
    return {
        "fashion": f"{short}\n\n{report.provenance(payload)}",
        "fashion-levels": by_level,
        "fashion-curves": on_the_way,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = record.arguments("fashion", __doc__)
    parser.add_argument("--data", type=pathlib.Path, help="directory of the IDX files")
    parser.add_argument("--seeds", type=int, default=3, help="of the picked levels")
    parser.add_argument("--epochs", type=int, default=Protocol.epochs)
    parser.add_argument(
        "--long-epochs", type=int, default=100, help="one seed, at their levels"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--work", type=pathlib.Path, help="keeps finished runs here, and resumes them"
    )
    args = parser.parse_args(argv)
    protocol = dataclasses.replace(Protocol(), epochs=args.epochs)
    name, seeds, grid = "fashion-mnist", args.seeds, LEVELS
    long = dataclasses.replace(protocol, epochs=args.long_epochs)
    if args.smoke:
        protocol = long = SMOKE
        name, seeds, grid = "digits", 2, LEVELS[::5]
    for option, value in (("--epochs", protocol), ("--long-epochs", long)):
        if value.epochs % value.looks:
            parser.error(f"{option} must be a multiple of {value.looks}.")
    images = load(name, args.data, SIZES)
    one_thread_per_run(args.workers)
    keys = jax.random.split(jax.random.key(0), seeds)

    def run(method: str, levels: Sequence[float], keys: Any, at: Protocol) -> Any:
        print(f"{TITLES[method]}, {at.epochs} epochs", flush=True)
        path = None
        if args.work is not None:
            args.work.mkdir(parents=True, exist_ok=True)
            path = args.work / f"fashion-{method}-{at.epochs}-{len(keys)}.npz"
        return sweep.run(
            trainer(images, method, at),
            levels,
            keys,
            strategy="shard",
            chunk_size=1,
            progress=not args.smoke,
            path=path,
        )

    rows: list[dict[str, Any]] = []
    every_level: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for method, theirs in PUBLISHED.items():
        levels = (-np.inf,) if method == "plain" else grid
        result = run(method, levels, keys, protocol)
        picked = result.best("validation_accuracy", "max", at=-1)
        rows.append(summarise(method, protocol.epochs, "picked", result, picked))
        if method != "plain":
            every_level += by_level(method, result)
        result = run(method, (theirs.level,), keys[:1], long)
        rows.append(
            summarise(method, long.epochs, "their level", result, result.levels)
        )
        curves.append(curve(method, long, result))
    payload: dict[str, Any] = {
        "protocol": {
            **dataclasses.asdict(protocol),
            "data": name,
            "sizes": [*SIZES[name], len(images.test_x)],
            "optimizer": "sgd",
            "levels": list(grid),
            "selection": "validation accuracy at the end, the lowest of the best",
            "seeds": seeds,
            "long_epochs": long.epochs,
            "shortened": "theirs: 500 epochs and 3 trials",
        },
        "rows": rows,
        "by_level": every_level,
        "curves": curves,
    }
    written = record.write("fashion", payload, args.out)
    made = tables(record.read("fashion", args.out))
    print("\n" + "\n\n".join(made.values()), f"\n\nWrote {written}")
