"""NumPyro: `SVI.run`, whose loss is the negative ELBO."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from benchmarks.trainers import problem, rows
from flood_optax import flood, flooded, scale_by_flood

TITLE = "NumPyro `SVI`"
SECTION = "NumPyro"
REQUIREMENTS = ("numpyro==0.22.0", "jax==0.12.0.1", "optax==0.2.8")
LEVEL = 75.0
X, Y = jnp.asarray(problem.X), jnp.asarray(problem.Y)
KEY = jax.random.key(4)


def model(x: Any, y: Any) -> None:
    weights = numpyro.sample("w", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(x @ weights, 1.0).to_event(1), obs=y)


def negative_log_density(weights: Any, x: Any, y: Any) -> float:
    """The negative ELBO of a point, by hand: unit normals, with their constants."""
    parts = np.asarray(weights, np.float64), np.asarray(y) - np.asarray(x) @ weights
    return float(sum(0.5 * np.sum(p**2 + np.log(2 * np.pi)) for p in parts))


def measure(run: rows.Run) -> rows.Row:
    svi = run.recipe(
        SVI=SVI, model=model, guide=AutoDelta(model), Trace_ELBO=Trace_ELBO
    )["svi"]
    steps = run.steps(200)

    def weights(state: Any, svi: Any = svi) -> Any:
        return np.asarray(svi.get_params(state)["w_auto_loc"])

    whole = svi.run(KEY, steps, X, Y, progress_bar=False)
    evaluation: list[float] = []
    raw: list[float] = []
    state = svi.init(KEY, X, Y)
    held_out = problem.VALID_X, problem.VALID_Y
    for _ in range(20):
        state, _ = svi.update(state, X, Y)
        evaluation.append(float(svi.evaluate(state, *held_out)))
        raw.append(negative_log_density(weights(state), *held_out))

    first = svi.run(KEY, steps // 2, X, Y, progress_bar=False)
    second = svi.run(
        KEY, steps - steps // 2, X, Y, progress_bar=False, init_state=first.state
    )

    # a window of micro-batches, each scaled to the whole, below its loss
    plain_svi = SVI(model, AutoDelta(model), optax.sgd(1e-4), Trace_ELBO())
    start = plain_svi.init(KEY, X, Y)
    level = negative_log_density(weights(start, plain_svi), X, Y) * 0.999

    def stepped(optimizer: Any, batches: list[Any]) -> Any:
        own = SVI(model, AutoDelta(model), optimizer, Trace_ELBO())
        state = own.init(KEY, X, Y)
        for batch in batches:
            state, _ = own.update(state, *batch)
        return weights(state, own)

    small = optax.sgd(1e-4)
    parts = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
    single = flood(small, level / 4, every_k=4)
    by_flood = stepped(single, parts)
    means = [plain_svi.evaluate(start, *p) for p in parts]
    sign = 1.0 if np.mean(means) >= level / 4 else -1.0
    plain = stepped(optax.MultiSteps(small, 4).gradient_transformation(), parts)
    origin = weights(start, plain_svi)
    due = origin + sign * (plain - origin)

    # the loss form: an ELBO of one's own
    class Flooded(Trace_ELBO):
        def loss(self, *args: Any, **kwargs: Any) -> Any:
            return flooded(super().loss, LEVEL)(*args, **kwargs)

    own = SVI(model, AutoDelta(model), optax.sgd(1e-3), Flooded())
    by_loss = own.run(KEY, steps, X, Y, progress_bar=False)
    bent = [float(own.evaluate(by_loss.state, *held_out))]

    per_example = SVI(
        model,
        AutoDelta(model),
        optax.chain(scale_by_flood(LEVEL / 64), optax.sgd(1e-3)),
        Trace_ELBO(),
    ).run(KEY, steps, X, Y, progress_bar=False)
    return rows.Row(
        form="optax form",
        line="`SVI(model, guide, optax.chain(scale_by_flood(b), optimizer), elbo)`",
        logs="`losses`, the raw negative ELBO",
        level=LEVEL,
        losses=np.asarray(whole.losses).tolist(),
        value="yes",
        evaluation=evaluation,
        evaluation_raw=raw,
        evaluates_flooded=bool(bent[0] >= LEVEL > min(raw)),
        accumulation=rows.distance(by_flood, due),
        resume=rows.distance(weights(whole.state), weights(second.state)),
        wrong=[
            rows.Wrong(
                "an ELBO whose `loss` is flooded",
                "`svi.evaluate` is {bent:.1f} where the raw loss is {raw:.1f}",
                {
                    "bent": bent[0],
                    "raw": negative_log_density(weights(by_loss.state, own), *held_out),
                },
            ),
            rows.Wrong(
                "a level per example, b / 64",
                "never reached by a sum: raw loss {last:.1f}",
                {"last": float(np.mean(per_example.losses[-rows.LAST :]))},
            ),
        ],
    )
