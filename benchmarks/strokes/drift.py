"""Measures the drift along the level set in strokes, on the full batch and on parts."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flood_optax
from benchmarks import training
from benchmarks.small_net import BATCHES, SEED, Loss, gradient_of, net, norm
from benchmarks.strokes.formulas import RULES, Rule

STEP = 5e-4  # h: of a formed velocity, in units of the gradient
CROSSINGS = (0, 10, 30, 100, 400)  # the band in steps of length h
# On mini-batches: a fifth of each batch's own loss, and the rest of the full one.
SHARE, RATE, STEPS, RUNS = 0.2, 0.01, 1000, 64
BANDS = (0.0, 1.0, 2.0, 3.0, 4.0)  # in standard deviations of the batch losses
# Steps that are left out, steps that are measured, and at how many of them.
WARM_UP, LENGTH, POINTS = 4000, 32_000, 400


def onto_level_set(
    loss_fn: Loss, w: jax.Array, level: float, metric: jax.Array | float = 1.0
) -> jax.Array:
    """Follows the field that strokes go back and forth along, to the level.

    The field is metric * g; Runge-Kutta of order 4 in the loss. A straight line along g
    would add an error of the second order in the distance, which the drift is itself.
    """
    change = (level - loss_fn(w)) / 8

    def field(w: jax.Array) -> jax.Array:
        g = gradient_of(loss_fn)(w)
        return metric * g / (g @ (metric * g))

    def step(_: int, w: jax.Array) -> jax.Array:
        first = field(w)
        second = field(w + change / 2 * first)
        third = field(w + change / 2 * second)
        fourth = field(w + change * third)
        return w + change / 6 * (first + 2 * second + 2 * third + fourth)

    return cast(jax.Array, jax.lax.fori_loop(0, 8, step, w))


def second_order(loss_fn: Loss, w: jax.Array, metric: jax.Array) -> jax.Array:
    """The drift of a ratio of 1, over eta^2 / 2: -D H D g without its part in D g.

    With D = 1 it is twice `penalty.level_set_drift`.
    """
    g = gradient_of(loss_fn)(w)
    field = metric * g
    moved = metric * jax.jvp(gradient_of(loss_fn), (w,), (field,))[1]
    return field * (g @ moved) / (g @ field) - moved


class Path(NamedTuple):
    """A run step by step: parameters, loss, whether it rose, Adam's second moment."""

    w: jax.Array
    loss: jax.Array
    rises: jax.Array
    second_moment: jax.Array


def optimizer_of(rule: Rule, step: float) -> optax.GradientTransformation:
    """The rule of optax whose formed velocity makes steps of this length."""
    rate = step / rule.gain
    if rule.beta2 is not None:
        return optax.adam(rate, b1=rule.momentum, b2=rule.beta2)
    return optax.sgd(rate, momentum=rule.momentum or None, nesterov=rule.nesterov)


def strokes(rule: Rule, step: float, band: jax.Array | float, num_steps: int) -> Path:
    """A run on the full batch from the level, as if it had been there for long."""
    loss_fn, w = net()
    flood = flood_optax.scale_by_flood(loss_fn(w), band=band)
    transform = optax.chain(flood, optimizer_of(rule, step))
    state: Any = transform.init(w)
    if rule.beta2 is not None:
        g = gradient_of(loss_fn)(w)
        long_ago = jnp.asarray(10**6, jnp.int32)
        state = optax.tree.set(state, nu=g * g, count=long_ago)

    def one(carry: Any, _: None) -> tuple[Any, Path]:
        w, state = carry
        loss, g = training.value_and_grad(loss_fn)(w)
        updates, state = cast(Any, transform.update(g, state, w, value=loss))
        flood = state[0]
        moment = optax.tree.get(state, "nu", jnp.ones_like(w))
        seen = Path(w, loss, flood.flood_value < flood.flood_level, moment)
        return (optax.apply_updates(w, updates), state), seen

    return training.scan(one, (w, state), length=num_steps)[1]


def steps_of_stroke(rises: jax.Array) -> float:
    """The mean number of steps from one turn to the next."""
    return 1 / float(jnp.mean(rises[1:] != rises[:-1]))


def by_rule(
    rules: Iterable[str] = RULES, crossings: Iterable[int] = CROSSINGS
) -> list[dict[str, Any]]:
    """The drift of each rule in strokes of each length, beside its formula.

    `crossing` is the width of the band in steps of a formed velocity; the velocity
    needs more, see `Rule.steps`. `ratio` is the drift a step in units of -eta^2/2 D H D
    g (D = 1 but for Adam, D = 1 / (sqrt(v) + eps)), fitted to all points of the run
    projected onto the level set along D g; `predicted` comes from the band alone, and
    None without one; `cosine` is the angle to the prediction, `cosine_penalty` that to
    the penalty's -P H g. Needs 64-bit types.
    """
    loss_fn, w = net()
    level, g = float(loss_fn(w)), gradient_of(loss_fn)(w)
    chosen = np.unique(np.linspace(0, LENGTH - 1, POINTS).astype(int))
    times = jnp.asarray(chosen - chosen.mean())

    @jax.jit
    def project(points: jax.Array, metric: jax.Array) -> jax.Array:
        return jax.vmap(lambda w: onto_level_set(loss_fn, w, level, metric))(points)

    drift = cast(Loss, jax.jit(second_order, static_argnums=0))
    rows: list[dict[str, Any]] = []
    for name in rules:
        rule, metric = RULES[name], jnp.ones_like(w)
        adaptive = rule.beta2 is not None
        step = STEP * (norm(g) / g.size**0.5 if adaptive else 1.0)
        speed = step * float(jnp.abs(g).sum() if adaptive else g @ g)
        unit = (step / rule.gain) ** 2 / 2

        @jax.jit
        def run(band: jax.Array) -> Path:
            path = strokes(rule, step, band, WARM_UP + LENGTH)  # noqa: B023
            return Path(*(part[WARM_UP:] for part in path))

        for crossing in crossings:
            path = run(jnp.asarray(crossing * speed / 2))
            if adaptive:
                metric = 1 / (jnp.sqrt(path.second_moment.mean(0)) + 1e-8)
            points = project(path.w[chosen], metric)
            moved = times @ points / (times @ times)
            middle = project(jnp.tile(points.mean(0), (len(points), 1)), metric)[0]
            due = unit * drift(loss_fn, middle, metric)
            penalised = drift(loss_fn, middle, jnp.ones_like(w))
            steps = rule.steps(crossing) if crossing else None
            rows.append(
                {
                    "rule": name,
                    "crossing": crossing,
                    "steps": steps_of_stroke(path.rises),
                    "predicted_steps": steps,
                    "ratio": float(moved @ (due / metric) / (due @ (due / metric))),
                    "predicted": None if steps is None else rule.ratio(steps),
                    "cosine": cosine(moved, due),
                    "cosine_penalty": cosine(moved, penalised),
                }
            )
    return rows


def cosine(first: jax.Array, second: jax.Array) -> float:
    """Of the angle between two displacements."""
    return float(first @ second) / norm(first) / norm(second)


def on_batches(
    bands: Iterable[float] = BANDS,
    rules: Iterable[str] = ("SGD", "heavy ball 0.9"),
    num_runs: int = RUNS,
) -> list[dict[str, Any]]:
    """The drift on mini-batches, and the part of it that is of first order in eta.

    The batch that decides the sign is the batch of the gradient. What one step gives in
    the mean over the batches it might have drawn, tangent to the level set, is
    -eta P_T E[s g_B]: summed over the steps this is the first-order part, without
    sampling noise. The rest of the noise is the sum of the deviations from that mean,
    which has mean 0 and is taken from the displacement. Both are over the penalty's
    flow of the same time, and `cosine` is that of the mean of the runs with that flow.
    """
    loss_fn, w = net()
    level, g = float(loss_fn(w)), gradient_of(loss_fn)(w)
    every = jnp.arange(BATCHES)
    tangent = jnp.eye(w.size) - jnp.outer(g, g) / (g @ g)

    def loss_of(w: jax.Array, batch: jax.Array) -> jax.Array:
        return SHARE * loss_fn(w, batch) + (1 - SHARE) * loss_fn(w)

    each = jax.vmap(training.value_and_grad(loss_of), (None, 0))
    deviation = float(each(w, every)[0].std())
    rows: list[dict[str, Any]] = []
    for name in rules:
        rule = RULES[name]
        eta = RATE / rule.gain
        flow = second_order(loss_fn, w, jnp.ones_like(w)) * STEPS * eta**2 / 2

        def one_run(key: jax.Array, band: jax.Array) -> Any:
            flood = flood_optax.scale_by_flood(level, band=band)
            transform = optax.chain(flood, optimizer_of(rule, RATE))  # noqa: B023

            def one(carry: Any, batch: jax.Array) -> tuple[Any, Any]:
                w, state, first, noise = carry
                losses, gradients = each(w, every)
                given = gradients[batch], state, w
                updates, state = cast(
                    Any,
                    transform.update(*given, value=losses[batch]),
                )
                signs = jnp.where(losses < state[0].flood_level, -1.0, 1.0)
                signed = signs[:, None] * gradients
                mean, g = signed.mean(0), gradients.mean(0)
                first -= RATE * (mean - g * (mean @ g) / (g @ g))
                noise -= RATE * (signed[batch] - mean)
                w = optax.apply_updates(w, updates)
                return (w, state, first, noise), signs[batch]

            batches = jax.random.randint(key, (STEPS,), 0, BATCHES)
            start = (w, transform.init(w), 0 * w, 0 * w)
            (end, _, first, noise), signs = training.scan(one, start, batches)
            moved = onto_level_set(loss_fn, end, level) - w - tangent @ noise
            return moved, first, jnp.mean(signs[1:] != signs[:-1])

        keys = jax.random.split(jax.random.key(SEED), num_runs)
        runs = cast(Any, jax.jit(jax.vmap(one_run, (0, None))))
        for width in bands:
            moved, first, turns = runs(keys, jnp.asarray(width * deviation))
            mean, ratios = moved.mean(0), moved @ flow / (flow @ flow)
            rows.append(
                {
                    "rule": name,
                    "band": width,
                    "steps": 1 / float(turns.mean()),
                    "ratio": float(ratios.mean()),
                    "standard_error": float(ratios.std(ddof=1) / num_runs**0.5),
                    "first_order": float(first.mean(0) @ flow / (flow @ flow)),
                    "cosine": cosine(mean, flow),
                }
            )
    return rows
