"""Repeats the paper's synthetic table: 36 accuracies with and without flooding."""

import dataclasses
import itertools
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
from matplotlib import figure
from scipy import stats

import flood_optax
from benchmarks import models, record, report
from flood_optax import sharpness, sweep

TITLES = {"two_gaussians": "Two Gaussians", "spiral": "Spiral", "sinusoid": "Sinusoid"}
NOISES = (0.01, 0.05, 0.10)
SPLITS, LABELS, MEASURES = (
    ("train", "validation", "test"),
    ("noisy", "clean"),
    ("loss", "accuracy"),
)
# Ishida et al. 2020, Table 2: accuracy (sd) without and with flooding, level (sd).
PAPER: dict[tuple[str, float, bool], tuple[tuple[float, float], ...]] = {
    ("two_gaussians", 0.01, False): ((90.52, 0.71), (92.13, 0.48), (0.17, 0.10)),
    ("two_gaussians", 0.05, False): ((84.79, 1.23), (88.03, 1.00), (0.22, 0.09)),
    ("two_gaussians", 0.10, False): ((78.44, 0.92), (83.59, 0.92), (0.32, 0.08)),
    ("spiral", 0.01, False): ((97.72, 0.26), (98.72, 0.20), (0.03, 0.01)),
    ("spiral", 0.05, False): ((89.94, 0.59), (93.90, 0.90), (0.12, 0.03)),
    ("spiral", 0.10, False): ((82.38, 1.80), (87.64, 1.60), (0.24, 0.05)),
    ("sinusoid", 0.01, False): ((94.62, 0.89), (94.66, 1.35), (0.05, 0.04)),
    ("sinusoid", 0.05, False): ((87.85, 1.02), (90.19, 1.41), (0.11, 0.07)),
    ("sinusoid", 0.10, False): ((78.47, 2.39), (85.78, 1.34), (0.25, 0.08)),
    ("two_gaussians", 0.01, True): ((90.41, 0.98), (92.13, 0.52), (0.16, 0.12)),
    ("two_gaussians", 0.05, True): ((85.85, 2.07), (88.15, 0.72), (0.23, 0.08)),
    ("two_gaussians", 0.10, True): ((81.09, 2.23), (83.87, 0.65), (0.32, 0.11)),
    ("spiral", 0.01, True): ((97.72, 0.68), (98.26, 0.50), (0.02, 0.01)),
    ("spiral", 0.05, True): ((91.37, 1.43), (93.51, 0.84), (0.10, 0.04)),
    ("spiral", 0.10, True): ((84.48, 1.52), (88.01, 0.82), (0.22, 0.06)),
    ("sinusoid", 0.01, True): ((94.52, 0.85), (95.42, 1.13), (0.03, 0.03)),
    ("sinusoid", 0.05, True): ((90.56, 1.46), (91.16, 1.38), (0.13, 0.07)),
    ("sinusoid", 0.10, True): ((83.88, 1.49), (85.10, 1.34), (0.22, 0.10)),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all runs share. Points are per class, for the sinusoid in total or half."""

    train_points: int = 100
    validation_points: int = 100
    test_points: int = 10_000
    widths: tuple[int, ...] = (500, 500, 500, 500)
    learning_rate: float = 1e-3
    epochs: int = 500  # of one full batch each


SMOKE = Protocol(test_points=50, widths=(8, 8), epochs=3)


class Set(NamedTuple):
    """Inputs [n, features], labels as given to the learner, and the true ones."""

    x: jax.Array
    noisy: jax.Array
    clean: jax.Array


def two_gaussians(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Ten dimensions: n points each of N(0, I) and N(1, I)."""
    labels = jnp.repeat(jnp.arange(2), n)
    return jax.random.normal(key, (2 * n, 10)) + labels[:, None], labels


def spiral(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Two arms of two turns, n points each, without noise: the same in every draw."""
    del key
    t = jnp.linspace(0, 4 * jnp.pi, n)
    arm = jnp.stack([jnp.cos(t), jnp.sin(t)], 1)
    x = jnp.concatenate([t[:, None] * arm, (t[:, None] + jnp.pi) * arm])
    return x, jnp.repeat(jnp.arange(2), n)


def sinusoid(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The disc of radius 2, n points, labelled by the side of a sine wave."""
    normal = jax.random.normal(key, (n, 4))
    x = 2 * normal[:, :2] / jnp.sqrt((normal**2).sum(1, keepdims=True))
    return x, (1.5 * x[:, 0] + jnp.sin(1.5 * x[:, 1]) > 0).astype(jnp.int32)


GENERATORS = {"two_gaussians": two_gaussians, "spiral": spiral, "sinusoid": sinusoid}


def flip(key: jax.Array, labels: jax.Array, rate: float) -> jax.Array:
    """Flips exactly floor(rate n) binary labels, drawn without replacement."""
    count = math.floor(round(rate * len(labels), 9))
    chosen = jax.random.permutation(key, len(labels))[:count]
    return labels.at[chosen].set(1 - labels[chosen])


def draw(key: jax.Array, data: str, noise: float, points: int) -> Set:
    points_key, flip_key = jax.random.split(key)
    x, clean = GENERATORS[data](points_key, points)
    return Set(x, flip(flip_key, clean, noise), clean)


def draw_splits(
    key: jax.Array, data: str, noise: float, protocol: Protocol
) -> tuple[Set, Set, Set]:
    """Training, validation and test set, all with flipped labels."""
    test = protocol.test_points * (2 if data == "sinusoid" else 1)
    sizes = (protocol.train_points, protocol.validation_points, test)
    keys = jax.random.split(key, 3)
    train, validation, test = (
        draw(k, data, noise, n) for k, n in zip(keys, sizes, strict=True)
    )
    return train, validation, test


def loss_and_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.stack([losses.mean(), jnp.mean(logits.argmax(-1) == labels)])


def trainer(
    data: str, noise: float, protocol: Protocol, *, follow_test: bool = False
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """One run: (level, key) -> curves, and what the last and best epoch reach.

    The key decides data, flips and initialisation. The best epoch is the first of
    highest validation accuracy, epoch 0 (before training) included; its parameters are
    kept on the way. With `follow_test` the test loss of every epoch is a metric too.
    """
    net = models.MLP(protocol.widths, 2, batch_norm=True)
    optimizer = optax.adam(protocol.learning_rate)
    branch = cast(Callable[..., Any], lax.cond)

    def train(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        data_key, init_key = jax.random.split(key)
        sets = draw_splits(data_key, data, noise, protocol)
        train_set, validation_set, test_set = sets
        variables: Any = net.init(init_key, train_set.x, train=True)

        def loss_fn(params: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
            seen = {"params": params, "batch_stats": batch_stats}
            out: Any = net.apply(seen, train_set.x, train=True, mutable=["batch_stats"])
            logits, new = out
            return loss_and_accuracy(logits, train_set.noisy)[0], new["batch_stats"]

        flooded_fn = flood_optax.flooded(loss_fn, level, has_aux=True, return_info=True)

        def raw_loss(params: Any, batch_stats: Any) -> jax.Array:
            return loss_fn(params, batch_stats)[0]

        def evaluate(model: Any, at: Set) -> jax.Array:
            logits: Any = net.apply(model, at.x)
            return jnp.stack([loss_and_accuracy(logits, y) for y in at[1:]])

        def curves(model: Any) -> dict[str, jax.Array]:
            seen = {"validation_accuracy": evaluate(model, validation_set)[0, 1]}
            if follow_test:
                seen["test_loss"] = evaluate(model, test_set)[0, 0]
            return seen

        def epoch(carry: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
            model, state, best = carry
            (_, info), grads = jax.value_and_grad(flooded_fn, has_aux=True)(
                model["params"], model["batch_stats"]
            )
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(model["params"], updates)
            model = {"params": params, "batch_stats": info.aux}
            seen = curves(model)
            accuracy = seen["validation_accuracy"]
            new = (model, accuracy)
            best = branch(accuracy > best[1], lambda: new, lambda: best)
            return (model, state, best), {"loss": info.loss, **seen}

        before = curves(variables)
        best = (variables, before["validation_accuracy"])
        start = (variables, optimizer.init(variables["params"]), best)
        (last, _, (best, _)), after = lax.scan(epoch, start, length=protocol.epochs)
        metrics: dict[str, jax.Array] = {
            "train_loss": after.pop("loss"),
            **{k: jnp.append(before[k], after[k]) for k in before},
        }
        for name, model in {"last": last, "best": best}.items():
            metrics[name] = jnp.stack([evaluate(model, one) for one in sets])
            metrics[f"gradient_norm_{name}"] = sharpness.gradient_norm(
                raw_loss, model["params"], model["batch_stats"]
            )
        return metrics

    return train


def summarise(data: str, noise: float, result: sweep.Result) -> list[dict[str, Any]]:
    """The four entries of the table that one sweep gives: A and B, without and with.

    The level is picked for each trial by validation accuracy, the lowest of the best.
    """
    entries: list[dict[str, Any]] = []
    for early_stopping in (False, True):
        at = "best" if early_stopping else -1
        picks = {
            False: np.zeros(len(result.metrics["train_loss"][0])),
            True: result.best("validation_accuracy", "max", at=at),
        }
        which = "best" if early_stopping else "last"
        paper = PAPER[data, noise, early_stopping]
        for flooded, levels in picks.items():
            reached = result.curves(which, levels)
            accuracy = 100 * value(reached, "test", "noisy", "accuracy")
            below = result.curves("train_loss", levels) < levels[:, None]
            entry: dict[str, Any] = {
                "data": data,
                "noise": noise,
                "early_stopping": early_stopping,
                "flooded": flooded,
                "accuracy_mean": float(accuracy.mean()),
                "accuracy_sd": sd(accuracy),
                "level_mean": float(levels.mean()),
                "level_sd": sd(levels),
                "trials": len(levels),
                "paper_mean": paper[flooded][0],
                "paper_sd": paper[flooded][1],
                "accuracies": accuracy.tolist(),
                "levels": levels.tolist(),
            }
            if flooded:
                entry |= {
                    "paper_level_mean": paper[2][0],
                    "paper_level_sd": paper[2][1],
                }
            for split, label, measure in itertools.product(SPLITS, LABELS, MEASURES):
                mean = value(reached, split, label, measure).mean()
                entry[f"{split}_{measure}_{label}"] = float(mean)
            norms = result.curves(f"gradient_norm_{which}", levels)
            entry["gradient_norm"] = float(norms.mean())
            entry["share_below"] = float(below.mean())
            entries.append(entry)
    return entries


def by_level(data: str, noise: float, result: sweep.Result) -> dict[str, Any]:
    """Means over the trials for every level, last and best epoch."""
    metrics = result.metrics
    means: dict[str, Any] = {"data": data, "noise": noise}
    means["level"] = result.levels.tolist()
    for which in ("last", "best"):
        for measure in MEASURES:
            seen = value(metrics[which], "test", "noisy", measure).mean(1)
            means[f"test_{measure}_{which}"] = np.round(seen, 5).tolist()
    below = metrics["train_loss"] < result.levels[:, None, None]
    means["share_below"] = np.round(below.mean((1, 2)), 5).tolist()
    return means


def value(reached: np.ndarray, split: str, label: str, measure: str) -> np.ndarray:
    """One number of the [..., split, label, measure] that a run reports."""
    index = (SPLITS.index(split), LABELS.index(label), MEASURES.index(measure))
    return reached[..., *index].astype(np.float64)


def sd(x: np.ndarray) -> float:
    """The sample standard deviation, 0 for one trial."""
    return float(x.std(ddof=1)) if len(x) > 1 else 0.0


class Descent(NamedTuple):
    """Epochs of the first trough, the peak after it, and the trough after that."""

    trough: int
    peak: int
    second_trough: int


def second_descent(loss: Sequence[float], window: int = 11) -> Descent | None:
    """Finds where a loss, smoothed over `window` epochs, rises and falls again.

    Rise and fall must each be a tenth of the loss at the lower end: of the first
    trough, and of the lowest loss after the peak. None if the loss does not do so.
    """
    half = window // 2
    padded = np.pad(np.asarray(loss, np.float64), half, mode="edge")
    smooth = np.convolve(padded, np.ones(window) / window, "valid")
    lowest_before = np.minimum.accumulate(smooth)
    lowest_after = np.minimum.accumulate(smooth[::-1])[::-1]
    rises = smooth > 1.1 * lowest_before
    falls = smooth > 1.1 * lowest_after
    peaks = np.flatnonzero(rises & falls)
    if len(peaks) == 0:
        return None
    peak = int(peaks[np.argmax(smooth[peaks])])
    return Descent(
        int(np.argmin(smooth[:peak])), peak, peak + int(np.argmin(smooth[peak:]))
    )


def interval(entry: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[float, float]:
    """Mean paired gain of flooding and half of its 95% confidence interval."""
    gains = np.array(entry["accuracies"]) - np.array(plain["accuracies"])
    if len(gains) < 2:
        return float(gains.mean()), math.inf
    t = float(stats.t.ppf(0.975, len(gains) - 1))
    return float(gains.mean()), t * sd(gains) / math.sqrt(len(gains))


def epoch_of(row: Mapping[str, Any]) -> str:
    """Where a row was read off: at the last epoch, or at the best one."""
    return "best" if row["early_stopping"] else "last"


def numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and gain of each cell, each level, the troughs of each curve."""
    cells = payload["cells"]

    def cell_of(row: Mapping[str, Any]) -> str:
        return f"{row['data']}/{row['noise']:.0%}"

    def entry_of(cell: Mapping[str, Any]) -> str:
        training = "flooded" if cell["flooded"] else "plain"
        return f"{cell_of(cell)}/{epoch_of(cell)}/{training}"

    found = report.named(cells, entry_of)
    for plain, flooded in zip(cells[::2], cells[1::2], strict=True):
        gain, half = interval(flooded, plain)
        base = f"{cell_of(plain)}/{epoch_of(plain)}"
        found |= {f"{base}/gain": gain, f"{base}/gain_half": half}
    for cell in payload["by_level"]:
        for i, level in enumerate(cell["level"]):
            for column in cell.keys() - {"data", "noise", "level"}:
                found[f"{cell_of(cell)}/level-{level:g}/{column}"] = cell[column][i]
    for curve in payload["curves"]:
        loss, descent = curve["test_loss"], second_descent(curve["test_loss"])
        base = f"{cell_of(curve)}/curve-{'flooded' if curve['level'] else 'plain'}"
        at = {"lowest": int(np.argmin(loss)), "last": len(loss) - 1}
        at |= {} if descent is None else descent._asdict()
        for name, epoch in at.items():
            found[f"{base}/{name}"] = loss[epoch]
            found[f"{base}/{name}_epoch"] = epoch
    return found


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The table of the paper beside ours, and a sentence on what it shows."""
    cells = payload["cells"]
    rows: list[list[str]] = []
    ahead = behind = within = 0
    pairs = list(zip(cells[::2], cells[1::2], strict=True))
    for plain, flooded in pairs:
        row = [
            TITLES[plain["data"]],
            f"{plain['noise']:.0%}",
            "yes" if plain["early_stopping"] else "no",
        ]
        for entry in (plain, flooded):
            apart = (entry["accuracy_mean"] - entry["paper_mean"]) / entry["paper_sd"]
            within += abs(apart) <= 2
            row += [
                f"{entry['accuracy_mean']:.2f} ({entry['accuracy_sd']:.2f})",
                f"{entry['paper_mean']:.2f} ({entry['paper_sd']:.2f})",
                f"{apart:+.1f}",
            ]
        gain, half = interval(flooded, plain)
        ahead += gain - half > 0
        behind += gain + half < 0
        row += [
            f"{gain:+.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else ""),
            f"{flooded['level_mean']:.2f} ({flooded['level_sd']:.2f})",
            f"{flooded['paper_level_mean']:.2f} ({flooded['paper_level_sd']:.2f})",
        ]
        rows.append(row)
    header = [
        *("data", "flips", "early stopping"),
        *("without", "paper", "off by (sd)"),
        *("with", "paper", "off by (sd)"),
        *("gain", "level", "paper"),
    ]
    summary = (
        f"{within} of {len(cells)} accuracies are within two of the paper's standard "
        f"deviations. Of {len(pairs)} pairs, flooding is ahead in {ahead} and behind "
        f"in {behind}; in the other {len(pairs) - ahead - behind} the 95% interval of "
        "the paired gain includes 0."
    )
    parts = (report.table(header, rows), summary, report.provenance(payload))
    last_epoch, *short = [
        [line[i] for i in (0, 1, 3, 4, 6, 7, 9)]
        for line in (header, *rows)
        if line[2] != "yes"
    ]
    return {
        "synthetic": "\n\n".join(parts),
        "synthetic-short": f"{report.table(last_epoch, short)}\n\n{summary}",
        "synthetic-descent": descents(payload),
    }


def descents(payload: Mapping[str, Any]) -> str:
    """Where the test loss descends a second time, and where it does not."""
    rows: list[list[str]] = []
    for curve in payload["curves"]:
        loss = curve["test_loss"]
        found = second_descent(loss)
        second = "no"
        if found is not None:
            second = f"peak {loss[found.peak]:.2f} at {found.peak}, "
            second += f"then {loss[found.second_trough]:.2f} at {found.second_trough}"
        rows.append(
            [
                TITLES[curve["data"]],
                f"{curve['noise']:.0%}",
                f"{curve['level']:.2f}",
                f"{min(loss):.2f} at {int(np.argmin(loss))}",
                f"{loss[-1]:.2f}",
                second,
            ]
        )
    header = ["data", "flips", "level", "lowest test loss", "last", "second descent"]
    return report.table(header, rows)


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Test loss over epochs, and test accuracy over levels."""
    drawn = {"synthetic-levels": levels_figure(payload)}
    if payload["curves"]:
        drawn["synthetic-curves"] = curves_figure(payload)
    return drawn


def curves_figure(payload: Mapping[str, Any]) -> Any:
    """A panel for each data set: plain and flooded, the second descent marked."""
    curves = payload["curves"]
    names = list(dict.fromkeys(curve["data"] for curve in curves))
    fig, axes = new_figure(1, len(names))
    for axis, name in zip(axes, names, strict=True):
        mine = [curve for curve in curves if curve["data"] == name]
        for colour, curve in zip(("C3", "C0"), mine, strict=False):
            loss, level = curve["test_loss"], curve["level"]
            found = second_descent(loss)
            label = f"level {level:.2f}" if level else "no flooding"
            label += ": no second descent" if found is None else ": second descent"
            axis.plot(loss, color=colour, label=label)
            if found is not None:
                ends = [found.peak, found.second_trough]
                axis.plot(ends, [loss[i] for i in ends], "o", color=colour)
        axis.set(title=f"{TITLES[name]}, {mine[0]['noise']:.0%} flips", xlabel="epoch")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("test cross-entropy")
    return fig


def levels_figure(payload: Mapping[str, Any]) -> Any:
    """A panel for each cell: test accuracy of the last and the best epoch."""
    cells = payload["by_level"]
    columns = min(3, len(cells))
    fig, axes = new_figure(-(-len(cells) // columns), columns)
    for axis, cell in zip(axes, cells, strict=False):
        for which, label in (("last", "last epoch"), ("best", "early stopping")):
            accuracy = 100 * np.array(cell[f"test_accuracy_{which}"])
            axis.plot(cell["level"], accuracy, ".-", label=label)
        axis.set(title=f"{TITLES[cell['data']]}, {cell['noise']:.0%} flips")
        axis.set(xlabel="level", ylabel="test accuracy, %")
    axes[0].legend(fontsize="small")
    return fig


def new_figure(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its axes in reading order."""
    fig: Any = figure.Figure((4 * columns, 3.2 * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False).ravel()


def one_thread_per_run(workers: int) -> None:
    """Makes each core a device: two runs side by side beat one run on two threads.

    It must come before JAX looks for devices; afterwards it changes nothing.
    """
    os.environ["XLA_FLAGS"] = " ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={workers}",
            "--xla_cpu_multi_thread_eigen=false",
        )
    ).strip()


def run_cell(
    data: str,
    noise: float,
    protocol: Protocol,
    *,
    levels: Sequence[float],
    keys: jax.Array,
    work: pathlib.Path,
) -> sweep.Result:
    """All levels and trials of a cell; runs that `work` holds are not run again."""
    return sweep.run(
        trainer(data, noise, protocol),
        levels,
        keys,
        strategy="shard",
        chunk_size=1,
        progress=True,
        path=work / f"{data}-{noise:g}.jsonl",
    )


def follow(
    entries: Sequence[Mapping[str, Any]], protocol: Protocol, keys: jax.Array
) -> list[dict[str, Any]]:
    """Test loss over the epochs at no flooding and at the mean level of the picks."""
    curves: list[dict[str, Any]] = []
    for entry in entries:
        data, noise = str(entry["data"]), float(entry["noise"])
        print(
            f"{TITLES[data]}, {noise:.0%} flips: test loss over the epochs", flush=True
        )
        small = dataclasses.replace(
            protocol, test_points=min(1_000, protocol.test_points)
        )
        levels = sorted({0.0, round(float(entry["level_mean"]), 2)})
        result = sweep.run(
            trainer(data, noise, small, follow_test=True),
            levels,
            keys,
            strategy="shard",
            chunk_size=1,
            progress=True,
        )
        for level, losses in zip(levels, result.metrics["test_loss"], strict=True):
            curve: dict[str, Any] = {"data": data, "noise": noise, "level": level}
            curve |= {"trials": len(keys)}
            curve["test_loss"] = np.round(losses.mean(0), 4).tolist()
            curves.append(curve)
    return curves


def main(argv: Sequence[str] | None = None) -> None:
    parser = record.arguments("synthetic", __doc__)
    names = [f"{data}:{noise:g}" for data in GENERATORS for noise in NOISES]
    parser.add_argument("--cells", nargs="+", choices=names, default=names)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--grid", type=float, default=0.02, help="step of the levels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("out", "synthetic"),
        help="where the finished runs are kept; a second start does what is missing",
    )
    args = parser.parse_args(argv)
    protocol, trials, cells = Protocol(), args.trials, args.cells
    levels = [round(i * args.grid, 6) for i in range(round(0.5 / args.grid) + 1)]
    work = args.work
    if args.smoke:
        protocol, trials, cells, levels = SMOKE, 2, ["sinusoid:0.1"], [0.0, 0.3]
        work = args.out / "synthetic-smoke"
    one_thread_per_run(args.workers)
    work.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(0), trials)

    entries: list[dict[str, Any]] = []
    grids: list[dict[str, Any]] = []
    for cell in cells:
        data, _, rate = cell.partition(":")
        noise = float(rate)
        print(f"{TITLES[data]}, {noise:.0%} flips", flush=True)
        result = run_cell(data, noise, protocol, levels=levels, keys=keys, work=work)
        entries += summarise(data, noise, result)
        grids.append(by_level(data, noise, result))
    noisiest = [e for e in entries if e["noise"] == 0.1]
    chosen = [e for e in noisiest if e["flooded"] and not e["early_stopping"]]
    payload = {
        "protocol": dataclasses.asdict(protocol)
        | {
            "batch": "all training points",
            "optimizer": "adam",
            "levels": levels,
            "trials": trials,
            "selection": "noisy validation accuracy, the lowest of the best levels",
            "early_stopping": "first epoch of highest noisy validation accuracy",
            "accuracy": "noisy test labels, percent",
            "spread": "sample standard deviation over trials",
        },
        "cells": entries,
        "by_level": grids,
        "curves": follow(chosen, protocol, keys[:2]),
    }
    written = record.write("synthetic", payload, args.out)
    made = tables(record.read("synthetic", args.out))
    print("\n" + "\n\n".join(made.values()), f"\n\nWrote {written}")
