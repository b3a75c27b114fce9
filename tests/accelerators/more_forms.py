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
    plain = optax.with_extra_args_support(inner)
    key = jax.random.key(0)

    def mean(params, batch):
        return losses(params, batch).mean()

    def loss(function):
        """The gradient of a function of the losses and the batch."""
        return Form(
            jax.value_and_grad(lambda params, b: function(losses(params, b), b)), plain
        )

    def measure(function, **given):
        """A step that only measures: no gradient."""

        def value_and_grad(params, batch):
            value = function(mean, params, batch, **given)
            value = value[0] if isinstance(value, tuple) else value
            return value, jax.tree.map(jnp.zeros_like, params)

        return Form(value_and_grad, plain)

    def per_example(level_of):
        return lambda each, batch: flood_optax.flood_mean(
            each, level_of(each), over="example"
        )

    def relaxed(each, batch):
        logits = jnp.stack([jnp.zeros_like(each), each], 1)
        labels = jnp.zeros(len(each), jnp.int32)
        return objective.relax_loss(logits, labels, LEVEL, epoch=1)

    def with_info(params, batch):
        bent = flood_optax.flooded(mean, LEVEL, return_info=True)
        (_, info), grads = jax.value_and_grad(bent, has_aux=True)(params, batch)
        return info.loss, grads

    raw = jax.value_and_grad(mean)

    def chained(level=LEVEL, **more):
        return optax.chain(flood_optax.scale_by_flood(level, **more), inner)

    window = flood_optax.flood(inner, LEVEL, every_k=programs.WINDOW)
    search = flood_optax.flood(optax.lbfgs(), LEVEL)
    warm = levels.warmup(LEVEL, 10)
    by_differences = {
        f"penalty, {method}": Form(
            penalty.value_and_grad(mean, 0.01, method=method), plain
        )
        for method in ("forward", "backward")
    }
    return {
        **{f"optax form, {n}": Form(raw, chained(shape=s)) for n, s in SHAPES.items()},
        "optax form, warm-up": Form(raw, chained(warm)),
        "wrapper, warm-up": Form(raw, flood_optax.flood(inner, warm)),
        "wrapper, weights and flush": Form(raw, window, extra=by_tokens),
        "wrapper, L-BFGS": Form(raw, search, extra=by_search),
        "loss form, info": Form(with_info, plain),
        "masked mean": loss(
            lambda each, b: flood_optax.flood_mean(each, LEVEL, where=b.groups < 5)
        ),
        "WaveBound": loss(per_example(lambda each: levels.wavebound(each, 0.01))),
        "AdaFlood": loss(
            per_example(lambda each: levels.adaflood(jax.lax.stop_gradient(each), 0.5))
        ),
        "RelaxLoss": loss(relaxed),
        "penalty, objective": Form(
            jax.value_and_grad(penalty.objective(mean, 0.01)), plain
        ),
        **by_differences,
        "gradient norm": measure(sharpness.gradient_norm),
        "Hessian trace": measure(sharpness.hessian_trace, key=key, num_samples=2),
        "top eigenvalue": measure(sharpness.top_eigenvalue, key=key, num_iterations=2),
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
