"""Compares flooding with the gradient penalty: drift by rule, cost, and paths."""

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import flood_optax
from benchmarks import networks, report, steps, study, timing
from benchmarks.pictures import panels
from benchmarks.small_net import BATCHES, SEED, Loss, gradient_of, net, norm
from flood_optax import Shape, penalty, shapes

DURATION, RATES = 0.1, (0.02, 0.01, 0.005)
RUNS = 200  # of the mini-batch rule
# Paths: a leaning bowl, whose level set is flattest at one point, its left end.
LEAN, LEVEL = 0.4, 0.45
START, RATE, DURATION_OF_PATH = (0.9, 0.6), 0.05, 20.0
STRENGTH = 0.01  # of the penalties whose cost is measured; it does not change the cost


def leaning_bowl(w: jax.Array) -> jax.Array:
    """Steeper on the right: |g|^2 = 2b (1 + 2kx) + (kb / (1 + kx))^2 on {L = b}."""
    return 0.5 * (1 + LEAN * w[0]) * (w @ w)


def to_level_set(loss_fn: Loss, w: jax.Array, level: float) -> jax.Array:
    """Newton's method along the gradient."""

    def step(_: int, w: jax.Array) -> jax.Array:
        loss, g = loss_fn(w), gradient_of(loss_fn)(w)
        return w - (loss - level) * g / (g @ g)

    return cast(jax.Array, jax.lax.fori_loop(0, 20, step, w))


def penalty_flow(loss_fn: Loss, w: jax.Array, times: jax.Array) -> jax.Array:
    """The flow dw/dtau = 2 level_set_drift from w, at the given times."""

    def field(_: Any, w: jax.Array, __: Any) -> jax.Array:
        return 2 * cast(jax.Array, penalty.level_set_drift(loss_fn, w))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=0.0,
        t1=times[-1],
        dt0=None,
        y0=w,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-11),
    )
    return cast(jax.Array, solution.ys)


def at_level(
    loss_fn: Loss,
    optimizer: optax.GradientTransformation,
    w: jax.Array,
    *,
    level: float,
    num_steps: int,
    shape: Shape | None = None,
    batches: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Parameters and whether the loss was below the level, step by step."""
    flood = flood_optax.scale_by_flood(level, shape=shape or shapes.reflect())
    transform = optax.chain(flood, optimizer)

    def step(carry: Any, batch: jax.Array | None) -> Any:
        w, state = carry
        loss, g = jax.value_and_grad(loss_fn)(w, *(() if batch is None else (batch,)))
        updates, state = transform.update(g, state, w, value=loss)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, loss < level)

    start = (w, transform.init(w))
    _, seen = jax.lax.scan(step, start, batches, length=num_steps)
    return cast(tuple[jax.Array, jax.Array], seen)


def rules(
    rate: float, gradient: jax.Array
) -> dict[str, tuple[optax.GradientTransformation, Shape]]:
    """Optimizers and shapes; Adam's rate makes its step as long as that of SGD."""
    sgd, reflect = optax.sgd(rate), shapes.reflect()
    matched = rate * norm(gradient) / gradient.size**0.5
    return {
        "SGD": (sgd, reflect),
        "heavy ball 0.5": (optax.sgd(rate, momentum=0.5), reflect),
        "heavy ball 0.9": (optax.sgd(rate, momentum=0.9), reflect),
        "Nesterov 0.9": (optax.sgd(rate, momentum=0.9, nesterov=True), reflect),
        "Adam": (optax.adam(matched), reflect),
        "asymmetric, ascent 0.5": (sgd, shapes.asymmetric(ascent=0.5)),
        "soft (SoftAD), scale 1": (sgd, shapes.soft()),
        "soft (SoftAD), scale 0.01": (sgd, shapes.soft(0.01)),
        "pause": (sgd, shapes.pause()),
    }


def drift_by_rule(
    rates: Sequence[float] = RATES, num_runs: int = RUNS
) -> list[dict[str, Any]]:
    """Measures how each rule moves along the level set, in units of the penalty's flow.

    All start at one point of the level set, offset by 0.3 gradient steps, run for 2
    DURATION / rate^2 steps and are projected onto the level set. `ratio` is the
    component of the displacement along that of the flow, over its length; `cosine`
    the angle between the two (None where nothing moved); `alternating` the share of
    steps after which the sign changed. The mini-batch row is the mean of `num_runs`
    runs, with its standard error. Needs 64-bit types.
    """
    loss_fn, w = net()
    level, g = float(loss_fn(w)), gradient_of(loss_fn)(w)
    flow = penalty_flow(loss_fn, w, jnp.array([DURATION]))[-1] - w

    compiled = cast(Loss, jax.jit(to_level_set, static_argnums=0))
    project = functools.partial(compiled, loss_fn, level=level)

    def row(rule: str, rate: float, moved: jax.Array, below: jax.Array) -> Any:
        mean, ratios = moved.mean(0), moved @ flow / (flow @ flow)
        change = below[:, 1:] != below[:, :-1]
        still = norm(mean) < 1e-3 * norm(flow)
        cosine = None if still else float(mean @ flow) / norm(mean) / norm(flow)
        return {
            "rule": rule,
            "learning_rate": rate,
            "ratio": float(ratios.mean()),
            "standard_error": float(ratios.std(ddof=1) / len(ratios) ** 0.5)
            if len(ratios) > 1
            else None,
            "cosine": cosine,
            "alternating": float(change.mean()),
        }

    rows: list[dict[str, Any]] = []
    for rate in rates:
        num_steps = round(2 * DURATION / rate**2)
        start = w + 0.3 * rate * g
        run = functools.partial(at_level, loss_fn, level=level, num_steps=num_steps)
        for name, (optimizer, shape) in rules(rate, g).items():
            path, below = run(optimizer, start, shape=shape)
            rows.append(row(name, rate, (project(path[-1]) - w)[None], below[None]))

        def one_run(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            batches = jax.random.randint(key, (num_steps,), 0, BATCHES)  # noqa: B023
            path, below = run(optax.sgd(rate), start, batches=batches)  # noqa: B023
            return project(path[-1]) - w, below

        keys = jax.random.split(jax.random.key(SEED), num_runs)
        moved, below = cast(Any, jax.jit(jax.vmap(one_run)))(keys)
        rows.append(row("SGD, mini-batches", rate, moved, below))
    return rows


def pairs_of_batches(rate: float) -> dict[str, float]:
    """Compares pairs of steps on mini-batches with -rate^2 H g of the full loss.

    The signs are given, down then up, so this leaves out which sign a batch would get.
    All pairs (i, j) are enumerated: the mean is exact, and so is the noise, the root
    mean square deviation over the length of the mean.
    """
    loss_fn, w = net()
    everywhere, gradient = jnp.arange(BATCHES), gradient_of(loss_fn)
    penalised = cast(jax.Array, penalty.value_and_grad(loss_fn, 1.0)(w)[1])
    expected = -(rate**2) * (penalised - gradient(w))

    def pair(first: jax.Array, second: jax.Array) -> jax.Array:
        below = w - rate * gradient(w, first)
        return below + rate * gradient(below, second) - w

    over_second = jax.vmap(pair, (None, 0))
    over_both = cast(Loss, jax.jit(jax.vmap(over_second, (0, None))))
    moved = over_both(everywhere, everywhere).reshape(-1, w.size)
    same = jax.vmap(pair)(everywhere, everywhere).mean(0)
    mean = moved.mean(0)
    noise = jnp.sqrt(jnp.mean(jnp.sum((moved - mean) ** 2, -1)))
    return {
        "learning_rate": rate,
        "independent_ratio": float(mean @ expected / (expected @ expected)),
        "independent_error": norm(mean - expected) / norm(expected),
        "independent_noise": float(noise) / norm(mean),
        "same_batch_ratio": float(same @ expected / (expected @ expected)),
    }


def cost(model: str, rounds: int) -> list[dict[str, Any]]:
    """One SGD step of each rival, interleaved."""
    at = steps.problem(model)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return at.losses(params, x, y).mean()

    raw = jax.value_and_grad(loss_fn)
    flooded = jax.value_and_grad(flood_optax.flooded(loss_fn, steps.LEVEL))
    sgd = optax.with_extra_args_support(optax.sgd(0.1))
    forward = penalty.value_and_grad(loss_fn, STRENGTH, method="forward")
    compiled = steps.compiled(
        {
            "plain": (raw, sgd),
            "plain, again": (raw, sgd),
            "flooding, loss form": (flooded, sgd),
            "flooding, optax form": (
                raw,
                optax.chain(flood_optax.scale_by_flood(steps.LEVEL), sgd),
            ),
            "exact penalty": (penalty.value_and_grad(loss_fn, STRENGTH), sgd),
            "forward difference": (forward, sgd),
            "SAM (optax.contrib)": (raw, steps.sam(optax.sgd(0.1))),
        },
        at,
    )
    calls = {name: one.call for name, one in compiled.items()}
    costs = {name: one.cost for name, one in compiled.items()}
    timings = timing.compare(calls, rounds=rounds, calls=3)
    plain = costs["plain"]
    return [
        {
            "model": model,
            "variant": name,
            "seconds_median": seen["seconds_median"],
            "time_ratio_median": seen["time_ratio_median"],
            "time_ratio_iqr": seen["time_ratio_iqr"],
            "flops_ratio": costs[name]["flops"] / plain["flops"],
            "temp_bytes": costs[name]["temp_bytes"],
            "temp_memory_ratio": costs[name]["temp_bytes"] / plain["temp_bytes"],
        }
        for name, seen in timings.items()
    ]


def paths(duration: float = DURATION_OF_PATH) -> dict[str, Any]:
    """The flooded iterates, the plain ones and the flow on the leaning bowl."""
    w, num_steps = jnp.array(START), round(2 * duration / RATE**2)
    sgd = optax.sgd(RATE)
    iterates, below = at_level(leaning_bowl, sgd, w, level=LEVEL, num_steps=num_steps)
    plain, _ = at_level(leaning_bowl, sgd, w, level=-jnp.inf, num_steps=200)
    entry = to_level_set(leaning_bowl, iterates[int(jnp.argmax(below)) - 1], LEVEL)
    flow = penalty_flow(leaning_bowl, entry, jnp.linspace(0.0, duration, 200))
    last = to_level_set(leaning_bowl, iterates[-1], LEVEL)
    norms = [norm(gradient_of(leaning_bowl)(p)) for p in (entry, last)]
    return {
        "level": LEVEL,
        "learning_rate": RATE,
        "num_steps": num_steps,
        "start": list(START),
        "flooded": np.asarray(iterates[:: max(1, num_steps // 800)]).tolist(),
        "flooded_first": [list(START), *np.asarray(iterates[:60]).tolist()],
        "plain": [list(START), *np.asarray(plain).tolist()],
        "flow": np.asarray(flow).tolist(),
        "gradient_norm_on_entry": norms[0],
        "gradient_norm_at_end": norms[1],
        "distance_of_ends": norm(last - flow[-1]),
    }


def numbers(payload: dict[str, Any]) -> dict[str, Any]:
    """The drift by rule and rate, the pairs, the cost by model, and the path's ends."""
    pairs = {f"pairs/{k}": v for k, v in payload["pairs_of_batches"].items()}
    path = {k: v for k, v in payload["paths"].items() if isinstance(v, int | float)}
    return {
        **report.named(
            payload["drift"],
            lambda row: f"{report.slug(row['rule'])}/{row['learning_rate']:g}",
        ),
        **report.named(payload["cost"]),
        **pairs,
        **{f"path/{name}": value for name, value in path.items()},
    }


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The drift by rule and the cost."""
    drift, rates = payload["drift"], payload["protocol"]["learning_rates"]

    def ratio_at(rate: float) -> report.Cell:
        def cell(line: Mapping[str, Any]) -> str:
            seen = line["at"][rate]
            error = seen["standard_error"]
            return f"{seen['ratio']:.3f}" + ("" if error is None else f" ± {error:.3f}")

        return cell

    def angle(line: Mapping[str, Any]) -> str:
        cosine = line["last"]["cosine"]
        return "no motion" if cosine is None else f"{cosine:.3f}"

    def holds(line: Mapping[str, Any]) -> str:
        ratio, cosine = line["last"]["ratio"], line["last"]["cosine"]
        agrees = cosine is not None and abs(ratio - 1) < 0.02 and cosine > 0.999
        return "yes" if agrees else "no"

    lines: list[dict[str, Any]] = []
    for rule in dict.fromkeys(row["rule"] for row in drift):
        seen = {row["learning_rate"]: row for row in drift if row["rule"] == rule}
        lines.append({"rule": rule, "at": seen, "last": seen[rates[-1]]})
    shown = report.table(
        lines,
        {
            "rule": "{rule}",
            **{f"ratio, η = {rate:g}": ratio_at(rate) for rate in rates},
            "cosine": angle,
            "alternating": "{last[alternating]:.2f}",
            "equals the penalty's drift": holds,
        },
    )
    batch = payload["pairs_of_batches"]
    independent, same = batch["independent_ratio"], batch["same_batch_ratio"]
    pairs = report.table(
        [
            {
                "pair": "independent mini-batches",
                "ratio": independent,
                "noise": f"{batch['independent_noise']:.0f}",
            },
            {"pair": "one mini-batch twice", "ratio": same, "noise": ""},
        ],
        {
            "pair of steps on": "{pair}",
            "mean, ratio to -η² H g": "{ratio:.3f}",
            "noise / mean": "{noise}",
        },
    )
    costs = report.table(
        payload["cost"],
        {
            "model": "{model}",
            "variant": "{variant}",
            "step time (IQR)": "{time_ratio_median:.2f} "
            "({time_ratio_iqr[0]:.2f} to {time_ratio_iqr[1]:.2f})",
            "FLOPs": "{flops_ratio:.3f}",
            "peak temporary memory": "{temp_memory_ratio:.2f}",
        },
    )
    source = report.provenance(payload)
    return {
        "penalty-drift": f"{shown}\n\n{source}",
        "penalty-pairs": f"{pairs}\n\n{source}",
        "penalty-cost": f"{costs}\n\n{source}",
    }


def figures(payload: dict[str, Any]) -> dict[str, Any]:
    """Contours of the leaning bowl, its level set, the iterates and the flow."""
    seen = payload["paths"]
    span = np.linspace(-1.6, 1.3, 300)
    grid = np.stack(np.meshgrid(span, span), -1)
    loss = 0.5 * (1 + LEAN * grid[..., 0]) * (grid**2).sum(-1)
    figure, (axes,) = panels(1, 1, size=(6, 5.2))
    axes.contour(span, span, loss, levels=12, colors="0.85", linewidths=0.8)
    axes.contour(span, span, loss, levels=[seen["level"]], colors="k", linewidths=0.8)
    axes.plot([], [], "k", linewidth=0.8, label=f"level set, L = {seen['level']}")

    def draw(name: str, *style: Any, **options: Any) -> None:
        axes.plot(*np.array(seen[name]).T, *style, **options)

    draw("plain", "-", color="C7", label="SGD")
    draw("flooded", ".", color="C0", markersize=2, label="flooded SGD")
    draw("flooded_first", "-", color="C0", linewidth=0.6)
    draw("flow", "-", color="C1", linewidth=2, label="gradient-penalty flow")
    axes.plot(*seen["start"], "o", color="k", markersize=4, label="start")
    ends = np.roots([LEAN, 1.0, 0.0, -2 * seen["level"]]).real
    flattest = ends[np.argmin(abs(ends + 1.5))]
    axes.plot(flattest, 0, "*", color="C3", markersize=10, label="flattest point")
    axes.set(aspect="equal", xlabel="x", ylabel="y", xlim=(-1.6, 1.3), ylim=(-1.3, 1.3))
    axes.legend(loc="lower right", fontsize="small")
    return {"penalty": figure}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=40)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rates, rounds, models = RATES, args.rounds, tuple(networks.TIMED)
    duration, runs = DURATION_OF_PATH, RUNS
    if args.smoke:
        rates, rounds, models, duration, runs = (0.05, 0.02), 2, ("cnn",), 2.0, 8
    costs: list[dict[str, Any]] = []
    for model in tqdm(models, unit="model"):
        costs += cost(model, rounds)
    with study.double_precision():
        return {
            "protocol": {
                "learning_rates": list(rates),
                "duration": DURATION,
                "mini_batch_runs": runs,
                "rounds": rounds,
                "calls_per_round": 3,
                "level": steps.LEVEL,
                "strength": STRENGTH,
                "sam_rho": steps.RHO,
            },
            "drift": drift_by_rule(rates, runs),
            "pairs_of_batches": pairs_of_batches(1e-3),
            "cost": costs,
            "paths": paths(duration),
        }
