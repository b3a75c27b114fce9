"""Further public forms, and steps that do what none of them may: for the compilers."""

import jax
import jax.numpy as jnp
import optax

import flood_optax
from benchmarks import programs
from benchmarks.programs import LEVEL, Form
from flood_optax import levels, objective, penalty, shapes, sharpness

SHAPES = {
    "soft": shapes.soft(0.1),
    "pause": shapes.pause(),
    "asymmetric": shapes.asymmetric(0.5, 0.1),
}


def by_search(value, *, grads, batch, value_and_grad):
    return {
        "value": value,
        "grad": grads,
        "value_fn": lambda params: value_and_grad(params, batch)[0],
    }


def by_tokens(value, *, batch, **_):
    return {"value": value, "weight": jnp.float32(len(batch.y)), "flush": value < 0}


def forms(losses, inner):
    """By name; `PLANTED` are the ones that must be found out."""

    def mean(params, batch):
        return losses(params, batch).mean()

    def grad_of(function):
        return jax.value_and_grad(function)

    def measured(function):
        """A step that only measures: no gradient."""

        def value_and_grad(params, batch):
            return function(params, batch), jax.tree.map(jnp.zeros_like, params)

        return value_and_grad

    def wavebound(params, batch):
        bound = levels.wavebound(losses(params, batch), 0.01)
        return flood_optax.flood_mean(losses(params, batch), bound, over="example")

    def adaflood(params, batch):
        bound = levels.adaflood(jax.lax.stop_gradient(losses(params, batch)), 0.5)
        return flood_optax.flood_mean(losses(params, batch), bound, over="example")

    def masked(params, batch):
        return flood_optax.flood_mean(
            losses(params, batch), LEVEL, where=batch.groups < 5
        )

    def relaxed(params, batch):
        each = losses(params, batch)
        logits = jnp.stack([jnp.zeros_like(each), each], 1)
        labels = jnp.zeros(len(each), jnp.int32)
        return objective.relax_loss(logits, labels, LEVEL, epoch=1)

    def with_info(params, batch):
        bent = flood_optax.flooded(mean, LEVEL, return_info=True)
        (_, info), grads = jax.value_and_grad(bent, has_aux=True)(params, batch)
        return info.loss, grads

    key = jax.random.key(0)
    raw = grad_of(mean)
    plain = optax.with_extra_args_support(inner)

    def chained(level=LEVEL, **more):
        return optax.chain(flood_optax.scale_by_flood(level, **more), inner)

    window = flood_optax.flood(inner, LEVEL, every_k=programs.WINDOW)
    warm = levels.warmup(LEVEL, 10)
    return {
        **{f"optax form, {n}": Form(raw, chained(shape=s)) for n, s in SHAPES.items()},
        "optax form, warm-up": Form(raw, chained(warm)),
        "wrapper, warm-up": Form(raw, flood_optax.flood(inner, warm)),
        "wrapper, weights and flush": Form(raw, window, extra=by_tokens),
        "wrapper, L-BFGS": Form(
            raw, flood_optax.flood(optax.lbfgs(), LEVEL), extra=by_search
        ),
        "loss form, info": Form(with_info, plain),
        "masked mean": Form(grad_of(masked), plain),
        "WaveBound": Form(grad_of(wavebound), plain),
        "AdaFlood": Form(grad_of(adaflood), plain),
        "RelaxLoss": Form(grad_of(relaxed), plain),
        "penalty, objective": Form(grad_of(penalty.objective(mean, 0.01)), plain),
        "penalty, forward": Form(
            penalty.value_and_grad(mean, 0.01, method="forward"), plain
        ),
        "penalty, backward": Form(
            penalty.value_and_grad(mean, 0.01, method="backward"), plain
        ),
        "gradient norm": Form(
            measured(lambda p, b: sharpness.gradient_norm(mean, p, b)), plain
        ),
        "Hessian trace": Form(
            measured(
                lambda p, b: sharpness.hessian_trace(
                    mean, p, b, key=key, num_samples=2
                )[0]
            ),
            plain,
        ),
        "top eigenvalue": Form(
            measured(
                lambda p, b: sharpness.top_eigenvalue(
                    mean, p, b, key=key, num_iterations=2
                )[0]
            ),
            plain,
        ),
        **planted(raw, plain, chained()),
    }


def planted(raw, plain, chain):
    """What the checks must see: a print, a call into Python, one collective more."""

    def printing(params, batch):
        value, grads = raw(params, batch)
        jax.debug.callback(print, value)
        return value, grads

    def asking_python(params, batch):
        value, grads = raw(params, batch)
        like = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return jax.pure_callback(abs, like, value), grads

    def reducing_twice(params, batch):
        value, grads = raw(params, batch)
        mean = jax.lax.pmean(optax.tree.norm(grads), "data")
        return value, jax.tree.map(lambda g: (g / (1 + mean)).astype(g.dtype), grads)

    return {
        "planted debug.callback": Form(printing, chain),
        "planted pure_callback": Form(asking_python, chain),
        "planted pmean": Form(
            reducing_twice, plain, "shard_map, plain", axis_name="data"
        ),
    }
