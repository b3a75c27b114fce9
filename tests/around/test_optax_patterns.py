"""The patterns of optax's own examples, each with flooding added by one line.

docs/trainers.md lists them. The oracle of each: with the line the raw loss stays
at the level, some steps being below it and some not; with the level at -inf, which is
plain training, the same program ends below it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax import contrib

from flood_optax import flood, flooded, scale_by_flood

B, STEPS, LATE = 0.06, 400, 100  # the level; the late steps are the last of all
KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (32, 3))
Y = jnp.sin(2 * X[:, 0]) * X[:, 1] + 0.3 * X[:, 2] ** 2
PARAMS = {
    "hidden": {"w": jax.random.normal(KEYS[1], (3, 16)), "b": jnp.linspace(-1, 1, 16)},
    "out": {"w": jax.random.normal(KEYS[2], (16,)) / 4, "b": jnp.zeros([])},
}
LABELS = {
    "hidden": {"w": "hidden", "b": "hidden"},
    "out": {"w": "out", "b": "out"},
}


def predict(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def loss_fn(params, x=X, y=Y):
    return jnp.mean((predict(params, x) - y) ** 2)


def scanned(optimizer, step, params=PARAMS, steps=STEPS):
    """The raw losses of all steps, and the last parameters and state.

    `step(params, state)` gives the updates, the new state and the raw loss.
    """

    def body(carry, _):
        params, state = carry
        updates, state, loss = step(params, state)
        return (optax.apply_updates(params, updates), state), loss

    start = (params, optimizer.init(params))
    (params, state), losses = lax.scan(body, start, length=steps)
    return losses, params, state


def ordinary(optimizer, loss_fn=loss_fn, params=PARAMS, steps=STEPS):
    """The loop of most examples, which hands over the loss."""

    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return updates, state, value

    return scanned(optimizer, step, params, steps)[0]


# ---- the patterns: level -> raw losses ----


def gradient_accumulation(level):
    # was: optax.MultiSteps(optax.adam(0.02), every_k_schedule=4)
    optimizer = flood(optax.adam(0.02), level, every_k=4)
    parts = X.reshape(4, 8, 3), Y.reshape(4, 8)

    def epoch(params, state):
        loss = loss_fn(params)

        def micro_step(carry, part):
            params, state = carry
            value, grads = jax.value_and_grad(loss_fn)(params, *part)
            updates, state = optimizer.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        (after, state), _ = lax.scan(micro_step, (params, state), parts)
        return jax.tree.map(jnp.subtract, after, params), state, loss

    return scanned(optimizer, epoch)[0]


def microbatching(level):
    optimizer = optax.chain(scale_by_flood(level), optax.adam(0.02))
    value_and_grad = optax.microbatch(
        jax.value_and_grad(loss_fn),
        argnums=(1, 2),
        microbatch_size=8,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )

    def step(params, state):
        value, grads = value_and_grad(params, X, Y)
        updates, state = optimizer.update(grads, state, params, value=value)
        return updates, state, value

    return scanned(optimizer, step)[0]


def lookahead(level):
    inner = optax.lookahead(optax.adam(0.02), sync_period=5, slow_step_size=0.5)
    optimizer = optax.chain(scale_by_flood(level), inner)

    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params.fast)
        updates, state = optimizer.update(grads, state, params, value=value)
        return updates, state, value

    return scanned(optimizer, step, optax.LookaheadParams.init_synced(PARAMS))[0]


def partition(level):
    parts = {"hidden": optax.adam(0.02), "out": optax.sgd(0.05, momentum=0.9)}
    return ordinary(optax.chain(scale_by_flood(level), optax.partition(parts, LABELS)))


def freezing(level):
    frozen = {"hidden": {"w": True, "b": True}, "out": {"w": False, "b": False}}
    inner = optax.selective_transform(optax.adam(0.05), freeze_mask=frozen)
    return ordinary(optax.chain(scale_by_flood(level), inner))


def lbfgs(level):
    optimizer = flood(optax.lbfgs(), level)
    value_and_grad = optax.value_and_grad_from_state(loss_fn)

    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss_fn
        )
        return updates, state, value

    # from a start near the level, as docs/traps.md asks for
    near = optax.adam(0.02)

    def descend(params, state):
        value, grad = jax.value_and_grad(loss_fn)(params)
        return *near.update(grad, state, params), value

    _, params, _ = scanned(near, descend, steps=60)
    return scanned(optimizer, step, params, steps=STEPS)[0]


VALID_X = jax.random.normal(KEYS[3], (32, 3))
VALID_Y = jnp.sin(2 * VALID_X[:, 0]) * VALID_X[:, 1] + 0.3 * VALID_X[:, 2] ** 2


def reduce_on_plateau(level):
    optimizer = optax.chain(scale_by_flood(level), optax.adam(0.02))
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=5, accumulation_size=20)

    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, own = optimizer.update(grads, state[0], params, value=value)
        valid = loss_fn(params, VALID_X, VALID_Y)
        updates, watching = plateau.update(updates, state[1], value=valid)
        return updates, (own, watching), value

    both = optax.GradientTransformation(
        lambda params: (optimizer.init(params), plateau.init(params)), optimizer.update
    )
    return scanned(both, step)[0]


def dp_sgd(level, per_example_loss=loss_fn):
    private = contrib.differentially_private_aggregate(
        l2_norm_clip=1.0, noise_multiplier=0.05, key=jax.random.key(1)
    )
    optimizer = optax.chain(private, scale_by_flood(level), optax.sgd(0.1))
    per_example = jax.vmap(jax.grad(per_example_loss), (None, 0, 0))

    def step(params, state):
        value, grads = loss_fn(params), per_example(params, X, Y)
        updates, state = optimizer.update(grads, state, params, value=value)
        return updates, state, value

    return scanned(optimizer, step, steps=1500)[0]


def attacked(function, params):
    return X + 0.05 * jnp.sign(jax.grad(function, argnums=1)(params, X, Y))


def adversarial(level, attacking_loss=loss_fn):
    optimizer = optax.adam(0.02)

    def step(params, state):
        x = attacked(attacking_loss, params)
        grads = jax.grad(flooded(loss_fn, level))(params, x, Y)
        updates, state = optimizer.update(grads, state, params)
        return updates, state, loss_fn(params, attacked(loss_fn, params), Y)

    return scanned(optimizer, step)[0]


def sam(level):
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.02))
    optimizer = contrib.sam(optax.adam(0.02), adversary, opaque_mode=True)
    grad_fn = jax.grad(flooded(loss_fn, level))

    def step(params, state):
        grads = jax.grad(loss_fn)(params)
        updates, state = optimizer.update(
            grads, state, params, grad_fn=lambda params, _: grad_fn(params)
        )
        # what stays at the level is the loss that SAM minimises: the one uphill
        uphill, _ = adversary.update(grads, adversary.init(params), params)
        return updates, state, loss_fn(jax.tree.map(jnp.subtract, params, uphill))

    return scanned(optimizer, step)[0]


# ---- a language model with one block ----

TEXT = b"it floods where it would sink; what it would sink to, it floods above. "
VOCABULARY = sorted(set(TEXT))
TOKENS = jnp.array([VOCABULARY.index(byte) for byte in TEXT])
WINDOWS = jnp.stack([TOKENS[i : i + 13] for i in range(0, len(TEXT) - 13, 3)])
WIDTH = 16
BLOCK = ("query", "key", "value", "up", "down")


def transformer():
    shapes = {
        "embed": (len(VOCABULARY), WIDTH),
        "position": (12, WIDTH),
        "query": (WIDTH, WIDTH),
        "key": (WIDTH, WIDTH),
        "value": (WIDTH, WIDTH),
        "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, WIDTH),
        "head": (WIDTH, len(VOCABULARY)),
    }
    keys = jax.random.split(jax.random.key(2), len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def normalized(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def next_token_loss(p):
    given, wanted = WINDOWS[:, :-1], WINDOWS[:, 1:]
    x = p["embed"][given] * WIDTH**0.5 + p["position"]
    query, key, value = (normalized(x) @ p[name] for name in ("query", "key", "value"))
    scores = query @ key.swapaxes(-1, -2) / WIDTH**0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    x = x + jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ value
    x = x + jax.nn.relu(normalized(x) @ p["up"]) @ p["down"]
    logits = normalized(x) @ p["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


def nano_lm(level, inner=None):
    inner = inner or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
    optimizer = optax.chain(scale_by_flood(level), inner)
    return ordinary(optimizer, next_token_loss, transformer(), steps=200)


def muon(level):
    # the matrices of the block by Muon, the tables by Adam
    block = contrib.MuonDimensionNumbers()
    dimensions = dict.fromkeys(transformer()) | dict.fromkeys(BLOCK, block)
    inner = contrib.muon(0.02, muon_weight_dimension_numbers=dimensions)
    return nano_lm(level, inner)


LM = 0.5  # the level of the language model
PATTERNS = {
    "gradient_accumulation": (gradient_accumulation, B),
    "lookahead": (lookahead, B),
    "partition": (partition, B),
    "freezing": (freezing, 0.3),  # what is not frozen fits less
    "reduce_on_plateau": (reduce_on_plateau, B),
    "dp_sgd": (dp_sgd, B),
    "adversarial": (adversarial, B),
    "sam": (sam, B),
    "nano_lm": (nano_lm, LM),
    "muon": (muon, LM),
}


def late(compiled, level):
    return np.asarray(compiled(jnp.float32(level)))[-LATE:]


if hasattr(optax, "microbatch"):  # it came with optax 0.2.7
    PATTERNS["microbatching"] = microbatching, B


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_settles_at_the_level_and_ends_below_it_without_flooding(name):
    pattern, level = PATTERNS[name]
    pattern = jax.jit(pattern)
    losses, plain = late(pattern, level), late(pattern, -np.inf)
    assert losses.mean() == pytest.approx(level, rel=0.1)
    assert 0.25 < (losses < level).mean() < 0.75
    assert plain.max() < 0.8 * level


def test_lbfgs_stops_on_the_level_and_goes_to_zero_without_flooding():
    """Rounding decides which steps are below, so their share says nothing."""
    pattern = jax.jit(lbfgs)
    for level in (0.05, B, 0.15):
        np.testing.assert_allclose(late(pattern, level), level, rtol=1e-4)
    assert late(pattern, -np.inf).max() < 0.1 * B


# ---- why the line belongs where it is ----


def test_adversarial_training_whose_attack_is_flooded_too_stays_above_the_level():
    """Below the level the attack helps the loss, so training fights no attack."""

    @jax.jit
    def shared(level):
        return adversarial(level, attacking_loss=flooded(loss_fn, level))

    assert late(shared, B).min() > 1.1 * B


def test_dp_sgd_with_a_flooded_loss_per_example_stays_above_the_level():
    """Half of the examples pull upwards at any time, whatever their mean is."""

    @jax.jit
    def per_example(level):
        return dp_sgd(-jnp.inf, per_example_loss=flooded(loss_fn, level))

    assert late(per_example, B).min() > 1.1 * B
