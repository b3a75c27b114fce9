"""What a sweep's file is recognised by: data wherever they hide, and settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import sweep
from flood_optax.sweep import traced

KEYS = jax.random.split(jax.random.key(5), 3)


def mean_square(data):
    return lambda w: jnp.mean((w - data) ** 2)


def custom_jvp(value_data, rule_data):
    f = jax.custom_jvp(jax.jit(mean_square(value_data)))
    f.defjvp(lambda p, t: (f(*p), jnp.vdot(rule_data, t[0])))
    return f


def custom_vjp(value_data, rule_data):
    f = jax.custom_vjp(jax.jit(mean_square(value_data)))
    f.defvjp(lambda w: (f(w), w), lambda w, g: (g * rule_data * w,))
    return f


def drawn(data):
    key = jax.random.key(data[0].astype(jnp.int32))
    return jax.jit(lambda w: w.sum() + jax.random.uniform(key))


def mapped_over_devices(data):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("a",))
    spec = jax.sharding.PartitionSpec()
    inner = jax.jit(mean_square(data))
    return jax.shard_map(inner, mesh=mesh, in_specs=spec, out_specs=spec)


def grad(f):
    return lambda w: jnp.sum(jax.grad(f)(w))


CARRIERS = {
    "closure": mean_square,
    "numpy": lambda data: mean_square(np.asarray(data)),
    "jit": lambda data: jax.jit(mean_square(data)),
    "jit of jit": lambda data: jax.jit(lambda w: jax.jit(mean_square(data))(w) + 1),
    "grad of jit": lambda data: grad(jax.jit(mean_square(data))),
    "vmap of jit": lambda data: (
        lambda w: jax.vmap(jax.jit(mean_square(data)))(jnp.stack([w, 2 * w])).sum()
    ),
    "jit in scan": lambda data: (
        lambda w: jax.lax.scan(
            lambda c, _: (c - 0.1 * jax.jit(lambda c: c - data)(c), None), w, length=3
        )[0].sum()
    ),
    "jit in cond": lambda data: (
        lambda w: jax.lax.cond(
            w[0] > 0, jax.jit(mean_square(data)), jax.jit(mean_square(0.0)), w
        )
    ),
    "jit in while": lambda data: (
        lambda w: jax.lax.while_loop(
            lambda c: c.sum() < 9, jax.jit(lambda c: c + 1 + data**2), w
        ).sum()
    ),
    "jit in while's condition": lambda data: (
        lambda w: jax.lax.while_loop(
            jax.jit(lambda c: (c - data).sum() < 9), lambda c: c + 1, w
        ).sum()
    ),
    "jit in fori_loop": lambda data: (
        lambda w: jax.lax.fori_loop(
            0, 3, lambda i, c: jax.jit(lambda c: c - 0.1 * data)(c), w
        ).sum()
    ),
    "checkpoint": lambda data: grad(jax.checkpoint(jax.jit(mean_square(data)))),
    "beside a callback, which may be printed with its address": lambda data: (
        lambda w: jax.debug.callback(lambda w: None, w) or mean_square(data)(w)
    ),
    "custom_jvp": lambda data: custom_jvp(data, 1.0),
    "rule of custom_jvp": lambda data: grad(custom_jvp(0.0, data)),
    "custom_vjp": lambda data: custom_vjp(data, 1.0),
    "rule of custom_vjp": lambda data: grad(custom_vjp(0.0, data)),
    "shard_map": mapped_over_devices,
    "linear solve": lambda data: (
        lambda w: jax.scipy.sparse.linalg.cg(
            jax.jit(lambda x: x * (2 + data)), w, maxiter=2
        )[0].sum()
    ),
    "key": drawn,
    "number": lambda data: jax.jit(mean_square(float(data[0]))),
    "one number of many": lambda data: jax.jit(
        mean_square(jnp.zeros((5000, 3)).at[2500].set(data))
    ),
}


def swept_with(function, data):
    loss = function(data)
    return lambda level, key: {"x": loss(jnp.array([0.5, -1.0, 0.25])) + 0 * level}


def digest(function, data):
    given = jnp.float32(0.1), KEYS[0]
    found = traced.trace(swept_with(function, data), "sweep.run(train)", *given)
    return traced.fingerprint(found.jaxpr).digest


@pytest.mark.parametrize("carrier", CARRIERS)
def test_other_data_have_another_fingerprint_wherever_they_hide(carrier):
    make, data = CARRIERS[carrier], jnp.array([1.0, 2.0, 3.0])
    other = data + 1 if carrier == "key" else data.at[0].add(2.0**-23)  # one bit
    first = digest(make, data)
    for _ in range(2):  # another function, of the same data
        assert digest(make, data.copy()) == first
    assert digest(make, other) != first


@pytest.mark.parametrize("carrier", ["closure", "numpy", "jit in scan", "checkpoint"])
def test_other_data_have_another_fingerprint_where_constants_are_literals(carrier):
    name = "jax_use_simplified_jaxpr_constants"
    before = getattr(jax.config, name)
    jax.config.update(name, not before)
    try:
        test_other_data_have_another_fingerprint_wherever_they_hide(carrier)
    finally:
        jax.config.update(name, before)


def hidden_callback(data):
    return lambda w: jax.pure_callback(
        lambda w: np.float32((w - data).sum()), jax.ShapeDtypeStruct((), jnp.float32), w
    )


def hidden_vmap_rule(data):
    f = jax.custom_batching.custom_vmap(lambda w: w.sum())
    f.def_vmap(lambda size, batched, w: ((w - data).sum(axis=-1), True))
    return f


@pytest.mark.parametrize("hidden", [hidden_callback, hidden_vmap_rule])
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_path_with_a_function_of_python_in_the_program_is_refused(
    tmp_path, hidden, outer
):
    def make(data):
        return outer(hidden(data))

    train = swept_with(make, np.ones(3, np.float32))
    assert np.isfinite(sweep.run(train, [0.1], KEYS).metrics["x"]).all()
    with pytest.raises(ValueError, match="hides a function of Python"):
        sweep.run(train, [0.1], KEYS, path=tmp_path / "sweep.jsonl")


@pytest.mark.slow  # lowers a program for every setting of JAX
def test_no_setting_changes_a_program_unseen():
    def probe(level, key):
        x = jax.random.normal(key, (4, 4))
        y = jax.nn.softmax(x @ x) + jax.nn.sigmoid(x) / (1 + jax.random.gumbel(key))
        return y * level, jax.random.permutation(key, 9), jnp.linalg.norm(x)

    def both():
        jax.clear_caches()
        stage = jax.jit(lambda *a: probe(*a)).trace(jnp.float32(0.1), jax.random.key(0))
        return traced.fingerprint(stage.jaxpr).digest, stage.lower().as_text()

    digest, text = both()
    # That trace nothing, or talk.
    others = ["no_execution", "no_tracing", "disable_jit", "scan3"]
    others += ["log_", "debug", "pgle", "explain"]
    unseen = set()
    for name, value in jax.config.values.items():
        if type(value) is not bool or any(word in name for word in others):
            continue
        jax.config.update(name, not value)
        try:
            now, lowered = both()
        finally:
            jax.config.update(name, value)
        if (now == digest) and (lowered != text):
            unseen.add(name)
    # How constants, and what is partitioned, are written down changes no number.
    written = {"jax_use_simplified_jaxpr_constants", "jax_use_shardy_partitioner"}
    assert unseen - written <= {*traced.SETTINGS}
    assert "jax_threefry_partitionable" in unseen
