"""Trains a digit classifier on noisy labels, plain and flooded in both forms."""

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import flood_optax
from benchmarks import data, report, statistics
from benchmarks.pictures import BLUE, GREEN, INCHES, INK, RED, panels, say
from benchmarks.training import cross_entropy, loss_and_accuracy, value_and_grad

TRAIN, NOISE, WIDTH, LEARNING_RATE = 300, 0.2, 256, 1e-3
DECAY = 0.98  # of the average of the weights
LEVELS, SEEDS, EPOCHS = (0.2, 0.4, 0.6), (0, 1, 2), 300
FORMS = ("loss form", "optax form")
APART = "largest_parameter_difference_between_forms"
METRICS = ("train_loss", "test_loss", "test_accuracy")
AVERAGED = "averaged_test_loss"  # in curves alone


class MLP(nnx.Module):
    """Two hidden layers of ReLU units on the 64 pixels."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, param_dtype=jnp.float64, rngs=rngs)
        self.hidden1 = linear(64, WIDTH)
        self.hidden2 = linear(WIDTH, WIDTH)
        self.out = linear(WIDTH, 10)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.hidden2(nnx.relu(self.hidden1(x))))
        return self.out(hidden)


def optimizer(form: str, level: Any) -> optax.GradientTransformationExtraArgs:
    """Adam, behind a flood in the optax form alone, and an average of the weights."""
    average = flood_optax.average_params(DECAY)
    adam = optax.chain(optax.adam(LEARNING_RATE), average)
    if form == "optax form":
        return optax.chain(flood_optax.scale_by_flood(level), adam)
    return adam


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(form: str, graph: Any, run: Any, level: jax.Array, batch: Any) -> Any:
    """A step of any level is one program for each form; it returns the raw loss."""
    (params, state), (x, y) = run, batch

    def loss_fn(params: Any) -> jax.Array:
        return cross_entropy(nnx.merge(graph, params)(x), y).mean()

    if form == "loss form":
        flooded_fn = flood_optax.flooded(loss_fn, level, return_info=True)
        (_, info), grads = value_and_grad(flooded_fn, has_aux=True)(params)
        loss = info.loss
    else:
        loss, grads = value_and_grad(loss_fn)(params)
    updates, state = optimizer(form, level).update(grads, state, params, value=loss)
    return (optax.apply_updates(params, updates), state), loss


@functools.partial(jax.jit, static_argnums=0)
def evaluate(graph: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Evaluation is never flooded; float32 is enough for what is only looked at."""
    model = nnx.merge(graph, optax.tree.cast(params, jnp.float32))
    return loss_and_accuracy(model(x), y)


def train(
    form: str, level: float | None, seed: int, epochs: int, bar: Any, *, drawn: bool
) -> Any:
    """One run: its curves, of `METRICS` and `AVERAGED`, and its last parameters.

    What is not drawn is evaluated at its end alone, and NaN before.
    """
    split = data.digits(train=TRAIN, noise=NOISE, seed=seed)
    batch = (jnp.asarray(split.train_x), jnp.asarray(split.train_y))
    test = (jnp.asarray(split.test_x), jnp.asarray(split.test_y))
    graph, params = nnx.split(MLP(nnx.Rngs(seed)), nnx.Param)
    at = jnp.asarray(-jnp.inf if level is None else level)
    run = params, optimizer(form, at).init(params)
    losses: list[jax.Array] = []
    seen = np.full((epochs, 3), np.nan)
    for epoch in range(epochs):  # one full batch each
        run, loss = step(form, graph, run, at, batch)
        losses.append(loss)
        if drawn or epoch == epochs - 1:
            params, state = run
            last = evaluate(graph, params, *test)
            kept = evaluate(graph, flood_optax.averaged(state, params), *test)
            seen[epoch] = *last, kept[0]
        bar.update()
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(run[0])]
    return np.column_stack([np.stack(losses), seen]), leaves


def columns(reached: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over the seeds of [seeds, metrics]."""
    found: dict[str, float] = {}
    for metric, values in zip(METRICS, reached.T[: len(METRICS)], strict=True):
        found |= {metric: float(values.mean()), f"{metric}_sd": statistics.sd(values)}
    return found


def summarise(form: str, level: float | None, curves: np.ndarray) -> dict[str, Any]:
    """One row of the record; curves is [seeds, epochs, metrics]."""
    below = 0.0 if level is None else float((curves[:, :, 0] < level).mean())
    ends = columns(curves[:, -1])
    return {"form": form, "level": level, "share_below": below, **ends}


def best_epoch(payload: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Where the mean test loss of plain training is least: the epoch, from 1, as a row.

    Only the test set could tell when to stop there.
    """
    curves = np.asarray(payload["curves"]["plain"])  # [seeds, epochs, metrics]
    best = int(curves.mean(0)[:, METRICS.index("test_loss")].argmin())
    title = f"plain, stopped at its best epoch, {best + 1}"
    return best + 1, summarise(title, None, curves[:, : best + 1])


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """The table of the README: one line for both forms where they print the same."""

    def line(row: Mapping[str, Any]) -> dict[str, str]:
        level = row["level"]
        return {
            "training": row["form"] if level is None else "flooded",
            "level": "-" if level is None else f"{level:.1f}",
            **{m: f"{row[m]:.3f} ± {row[f'{m}_sd']:.3f}" for m in METRICS},
            "below": f"{row['share_below']:.0%}",
        }

    plain, *flooded = payload["rows"]
    lines = [line(plain), line(best_epoch(payload)[1])]
    for row in flooded:
        if (new := line(row)) != lines[-1]:  # the other form of the same level
            lines.append(new)
    made = report.table(
        lines,
        {
            "training": "{training}",
            "level": "{level}",
            "train loss": "{train_loss}",
            "test loss": "{test_loss}",
            "test accuracy": "{test_accuracy}",
            "below": "{below}",
        },
    )
    note = (
        "Flooded in either form: the parameters of the two end within "
        f"{payload[APART]:.0e} of each other in float64. The best epoch has the "
        "lowest test loss, which no training knows."
    )
    return {"quickstart": f"{made}\n\n{note}"}


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Train and test loss over epochs, plain and flooded, with plain's best epoch.

    And, where the record has it, the test loss of the averaged weights.
    """
    level = payload["curves"]["level"]
    epoch, best = best_epoch(payload)
    lowest = best["test_loss"]
    fig, axes = panels(1, 2, size=(INCHES, 3.4), sharey=True)
    titles = {"plain": "plain", "flooded": f"flooded at {level}"}
    for axis, (run, title) in zip(axes, titles.items(), strict=True):
        curves = np.asarray(payload["curves"][run])  # [seeds, epochs, metrics]
        mean = curves.mean(0)
        last = len(mean) - 1
        for i, (name, colour) in enumerate((("train", BLUE), ("test", RED))):
            axis.plot(curves[:, :, i].T, color=colour, alpha=0.35, lw=0.6)
            axis.plot(mean[:, i], color=colour, lw=2)
            above = -10 if run == "flooded" and name == "train" else 9
            text = f"{name} loss {mean[-1, i]:.2f}"
            say(axis, text, (last, mean[-1, i]), (0, above), color=colour, ha="right")
        if mean.shape[1] > len(METRICS) and run == "flooded":
            axis.plot(mean[:, -1], color=GREEN, lw=1.5)
            text = f"averaged weights {mean[-1, -1]:.2f}"
            say(axis, text, (last, mean[-1, -1]), (0, 24), color=GREEN, ha="right")
        axis.axhline(lowest, color=INK, lw=1, ls=":")
        axis.set(title=title, xlabel="epoch", ylim=(0, 1.5))
    axes[0].plot(epoch - 1, lowest, "o", color=RED, mec=INK)
    best_text = f"best epoch, {epoch}: {lowest:.2f}"
    say(axes[0], best_text, (epoch - 1, lowest), (30, -12), ha="left")
    axes[0].set_ylabel("cross-entropy, not flooded")
    return {"quickstart": fig}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    # The two forms compile to two programs, which round apart in the last bit, and the
    # ups and downs at the level amplify that: float64 keeps the runs together.
    with jax.enable_x64(True):
        if args.smoke:
            return compared(5, SEEDS[:1], LEVELS[:1])
        return compared(EPOCHS, SEEDS, LEVELS)


def compared(
    epochs: int, seeds: Sequence[int], levels: Sequence[float]
) -> dict[str, Any]:
    """All runs, and how far apart the two forms end."""
    runs = [("plain", None), *((form, level) for level in levels for form in FORMS)]
    curves: dict[tuple[str, float | None], np.ndarray] = {}
    params: dict[tuple[str, float | None], list[Any]] = {}
    drawn = levels[len(levels) // 2]
    # progress is for a terminal: None asks whether there is one
    with tqdm(total=len(runs) * len(seeds) * epochs, unit="epoch", disable=None) as bar:
        for form, level in runs:
            bar.set_description(form if level is None else f"{form}, level {level}")
            is_drawn = (form, level) in (("plain", None), (FORMS[1], drawn))
            ends = [
                train(form, level, seed, epochs, bar, drawn=is_drawn) for seed in seeds
            ]
            curves[form, level] = np.stack([end[0] for end in ends])
            params[form, level] = [end[1] for end in ends]

    apart = max(
        float(np.abs(a - b).max())
        for level in levels
        for one, other in zip(*(params[form, level] for form in FORMS), strict=True)
        for a, b in zip(one, other, strict=True)
    )
    rows = [summarise(form, level, curves[form, level]) for form, level in runs]
    print(
        f"\nscikit-learn digits: {TRAIN} training examples, {NOISE:.0%} of the labels "
        f"flipped; MLP with 2 x {WIDTH} units, Adam, {epochs} epochs; mean ± sd over "
        f"{len(seeds)} seeds.\nLook at the test loss: where plain training ends, where "
        "it was at its best epoch, and where flooded training ends at each level."
    )
    return {
        "protocol": {
            "data": "scikit-learn digits",
            "train": TRAIN,
            "label_noise": NOISE,
            "hidden": [WIDTH, WIDTH],
            "optimizer": f"adam({LEARNING_RATE})",
            "dtype": "float64",
            "epochs": epochs,
            "seeds": list(seeds),
        },
        "rows": rows,
        APART: apart,
        "curves": {
            "level": drawn,
            "metrics": [*METRICS, AVERAGED],
            "plain": curves["plain", None].round(4).tolist(),
            "flooded": curves[FORMS[1], drawn].round(4).tolist(),
        },
    }
