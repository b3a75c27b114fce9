"""Training steps in several variants on one batch: compiled, counted, ready to time."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from benchmarks import networks, timing
from benchmarks.training import cross_entropy

LEVEL, RHO = 0.3, 0.05  # of flooding, of SAM
Variant = tuple[Any, Any]  # the objective's value_and_grad, and an optimizer


class Problem(NamedTuple):
    """A batch of random images and labels, a network's losses on it, parameters."""

    losses: Callable[..., jax.Array]
    params: Any
    x: jax.Array
    y: jax.Array


class Compiled(NamedTuple):
    """A step, its arguments, a call of it, and what the compiler says it costs."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    call: Callable[[], Any]
    cost: dict[str, Any]

    def traces(self) -> int:
        """How often jit traces it in a loop."""
        later = (*self.call()[:2], *self.arguments[2:])
        return timing.traces(self.step, self.arguments, later, later)


def problem(model: str, dtype: DTypeLike = jnp.float32) -> Problem:
    net, batch = networks.TIMED[model]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, 28, 28, 1), dtype)
    y = jax.random.randint(keys[1], (batch,), 0, 10)

    def losses(params: Any, x: jax.Array, y: ArrayLike) -> jax.Array:
        return cross_entropy(net.apply(params, x), jnp.asarray(y))

    return Problem(losses, optax.tree.cast(net.init(keys[2], x), dtype), x, y)


def sam(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """SAM in one call per step: the adversarial gradient comes from `grad_fn`."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(inner, adversary, opaque_mode=True)


def train_step(variant: Variant, *, is_sam: bool) -> Callable[..., Any]:
    """One step, which returns its loss, as training loops do to log it."""
    value_and_grad, optimizer = variant

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = value_and_grad(params, x, y)

        def grad_fn(params: Any, _: Any) -> Any:
            return value_and_grad(params, x, y)[1]

        extra: dict[str, Any] = {"grad_fn": grad_fn} if is_sam else {"value": value}
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    return step


def compiled(variants: Mapping[str, Variant], at: Problem) -> dict[str, Compiled]:
    """Every variant; what it costs is counted with parameters and state donated."""
    found: dict[str, Compiled] = {}
    for name, variant in variants.items():
        step = train_step(variant, is_sam=name.startswith("SAM"))
        arguments = (at.params, variant[1].init(at.params), at.x, at.y)
        cost = timing.compiled_cost(step, *arguments, donate=(0, 1))
        jitted = cast(Callable[..., Any], jax.jit(step))
        call = functools.partial(jitted, *arguments)
        found[name] = Compiled(step, arguments, call, cost)
    return found
