"""Trains a digit classifier on noisy labels, plain and flooded in both forms."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import flood_optax
from benchmarks import data, record, report

mpl.use("Agg")
from matplotlib import pyplot as plt

TRAIN, NOISE, WIDTH, LEARNING_RATE = 300, 0.2, 256, 1e-3
LEVELS, SEEDS, EPOCHS = (0.2, 0.4, 0.6), (0, 1, 2), 300
METRICS = ("train_loss", "test_loss", "test_accuracy")


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


def loss_fn(model: MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
    return losses.mean()


@nnx.jit
def plain_step(model: MLP, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """What people write; with `scale_by_flood` in the chain it floods."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads, value=loss)
    return loss


@nnx.jit
def flooded_step(
    model: MLP, optimizer: Any, x: jax.Array, y: jax.Array, level: jax.Array
) -> jax.Array:
    """The loss form: the same step on the wrapped loss, whose info has the raw one."""
    flooded_fn = flood_optax.flooded(loss_fn, level, return_info=True)
    (_, info), grads = nnx.value_and_grad(flooded_fn, has_aux=True)(model, x, y)
    optimizer.update(model, grads)
    return info.loss


@nnx.jit
def evaluate(model: MLP, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Evaluation is never flooded."""
    return loss_fn(model, x, y), jnp.mean(model(x).argmax(-1) == y)


@functools.cache
def optax_form(level: float | None) -> optax.GradientTransformation:
    adam = optax.adam(LEARNING_RATE)
    if level is None:
        return optax.with_extra_args_support(adam)
    return optax.chain(flood_optax.scale_by_flood(level), adam)


def train(form: str, level: float | None, seed: int, epochs: int, bar: Any) -> Any:
    """One run: the curves of the raw losses, and the parameters it ends with."""
    split = data.digits(train=TRAIN, noise=NOISE, seed=seed)
    batch = (jnp.asarray(split.train_x), jnp.asarray(split.train_y))
    test = (jnp.asarray(split.test_x), jnp.asarray(split.test_y))
    model = MLP(nnx.Rngs(seed))
    transformation = optax_form(level if form == "optax form" else None)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    curves: list[list[jax.Array]] = []
    for _ in range(epochs):  # one full batch each
        if form == "loss form":
            train_loss = flooded_step(model, optimizer, *batch, jnp.asarray(level))
        else:
            train_loss = plain_step(model, optimizer, *batch)
        curves.append([train_loss, *evaluate(model, *test)])
        bar.update()
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    return np.asarray(curves), [np.asarray(leaf) for leaf in params]


def summarise(form: str, level: float | None, curves: np.ndarray) -> dict[str, Any]:
    """One row of the table; curves is [seeds, epochs, metrics]."""
    last = curves[:, -1]
    below = 0.0 if level is None else float((curves[:, :, 0] < level).mean())
    row: dict[str, Any] = {"form": form, "level": level, "share_below": below}
    for i, metric in enumerate(METRICS):
        row[metric] = float(last[:, i].mean())
        row[f"{metric}_sd"] = float(last[:, i].std(ddof=1)) if len(last) > 1 else 0.0
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    header = ["training", "level", "train loss", "test loss", "test accuracy", "below"]
    lines: list[list[str]] = []
    for row in rows:
        level = "-" if row["level"] is None else f"{row['level']:.1f}"
        cells = [f"{row[m]:.3f} ± {row[f'{m}_sd']:.3f}" for m in METRICS]
        lines.append([row["form"], level, *cells, f"{row['share_below']:.0%}"])
    return report.table(header, lines)


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The generated table of the README: one row for both forms, which coincide."""
    rows = [
        row | {"form": "plain" if row["level"] is None else "flooded"}
        for row in payload["rows"]
        if row["form"] != "loss form"
    ]
    return {"quickstart": table(rows)}


def numbers(payload: dict[str, Any]) -> dict[str, Any]:
    """Columns of each row, of either form, and where plain training was best."""

    def row_of(row: Mapping[str, Any]) -> str:
        return "plain" if row["level"] is None else f"flooded/{row['level']:g}"

    shown = [row for row in payload["rows"] if row["form"] != "loss form"]
    found = report.named(shown, row_of)
    name = "largest_parameter_difference_between_forms"
    found["forms_apart"] = payload[name]
    curve = np.asarray(payload["curves"]["plain"]).mean(0)  # [epochs, metrics]
    best = int(curve[:, METRICS.index("test_loss")].argmin())
    found["plain/best/epoch"] = best + 1
    at_best = zip(METRICS, curve[best].tolist(), strict=True)
    return found | {f"plain/best/{metric}": value for metric, value in at_best}


def figures(payload: dict[str, Any]) -> dict[str, Any]:
    """Train and test loss over epochs, plain and flooded, with the level drawn in."""
    level = payload["curves"]["level"]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    panels = {"plain": "plain", "flooded": f"flooded at {level}"}
    for axis, (run, title) in zip(axes, panels.items(), strict=True):
        curves = np.asarray(payload["curves"][run])  # [seeds, epochs, metrics]
        for i, (name, colour) in enumerate((("train", "C0"), ("test", "C3"))):
            lines = curves[:, :, i]
            axis.plot(lines.T, color=colour, alpha=0.3, lw=0.8)
            axis.plot(lines.mean(0), color=colour, label=f"{name} loss")
        axis.set(title=title, xlabel="epoch", ylim=(0, 1.5))
        axis.axhline(level, color="k", ls=":", lw=1, label=f"level {level}")
    axes[0].set_ylabel("raw cross-entropy")
    axes[0].legend()
    return {"quickstart": fig}


def main(argv: Sequence[str] | None = None) -> None:
    # The two forms compile to two programs, which round apart in the last bit, and the
    # ups and downs at the level amplify that: float64 keeps the runs together.
    precision = jnp.zeros([]).dtype == jnp.float64
    jax.config.update("jax_enable_x64", True)
    try:
        run(argv)
    finally:
        jax.config.update("jax_enable_x64", precision)


def run(argv: Sequence[str] | None) -> None:
    args = record.arguments("quickstart", __doc__).parse_args(argv)
    epochs, seeds, levels = EPOCHS, SEEDS, LEVELS
    if args.smoke:
        epochs, seeds, levels = 5, SEEDS[:1], LEVELS[:1]

    forms = ("loss form", "optax form")
    runs = [("plain", None), *((form, level) for level in levels for form in forms)]
    curves: dict[tuple[str, float | None], np.ndarray] = {}
    params: dict[tuple[str, float | None], list[Any]] = {}
    with tqdm(total=len(runs) * len(seeds) * epochs, unit="epoch") as bar:
        for form, level in runs:
            bar.set_description(form if level is None else f"{form}, level {level}")
            ends = [train(form, level, seed, epochs, bar) for seed in seeds]
            curves[form, level] = np.stack([end[0] for end in ends])
            params[form, level] = [end[1] for end in ends]

    apart = max(
        float(np.abs(a - b).max())
        for level in levels
        for one, other in zip(
            params["loss form", level], params["optax form", level], strict=True
        )
        for a, b in zip(one, other, strict=True)
    )
    rows = [summarise(form, level, curves[form, level]) for form, level in runs]
    print(
        f"\nscikit-learn digits: {TRAIN} training examples, {NOISE:.0%} of the labels "
        f"flipped; MLP with 2 x {WIDTH} units, Adam, {epochs} epochs; mean ± sd over "
        f"{len(seeds)} seeds.\n\n{table(rows)}\n\n"
        f"Largest difference between the parameters of the two forms: {apart:g}"
    )
    drawn = levels[len(levels) // 2]
    payload: dict[str, Any] = {
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
        "largest_parameter_difference_between_forms": apart,
        "curves": {
            "level": drawn,
            "metrics": METRICS,
            "plain": curves["plain", None].round(4).tolist(),
            "flooded": curves["optax form", drawn].round(4).tolist(),
        },
    }
    written = record.write("quickstart", payload, args.out)
    picture = args.out / "quickstart.png"
    figures(payload)["quickstart"].savefig(picture, dpi=150)
    print(f"Wrote {written} and {picture}")
