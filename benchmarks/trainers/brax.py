"""Brax: behaviour cloning of a small teacher."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from brax import envs
from brax.training.agents.bc import losses, networks as bc_networks, train as bc

from benchmarks.trainers import rows
from flood_optax import scale_by_flood

TITLE = "Brax `bc.train`"
SECTION = "Brax"
REQUIREMENTS = ("brax==0.14.2", "jax==0.12.0.1", "optax==0.2.8")

LEVEL = 0.05


def teacher(obs: Any, key: Any) -> tuple[Any, dict[str, Any]]:
    """Actions that depend on the state, so that a network has something to learn."""
    del key
    _, speed = jnp.split(obs["state"], 2, axis=-1)
    mean = 1.0 + jnp.sin(20.0 * speed)
    return jnp.tanh(mean), {"loc": mean}


def trained(epochs: int) -> np.ndarray:
    fast = envs.get_environment("fast", obs_mode="dict_state")
    _, _, metrics = bc.train(
        env=envs.training.wrap(fast, episode_length=128, action_repeat=1),
        teacher_inference_fn=teacher,
        demo_length=10,
        num_envs=40,
        eval_length=128,
        num_evals=2,
        num_eval_envs=8,
        dagger_steps=1,
        batch_size=200,
        learning_rate=3e-3,
        epochs=epochs,
        reset=False,
        network_factory=functools.partial(
            bc_networks.make_bc_networks,
            policy_hidden_layer_sizes=(32,),
            policy_obs_key="state",
            vision=False,
        ),
    )
    return np.ravel(metrics["actor_loss"])


def measure(run: rows.Run) -> rows.Row:
    epochs = run.steps(200)
    plain = losses.bc_loss
    run.recipe()
    flood = trained(epochs)
    losses.bc_loss = plain
    adam = optax.adam
    optax.adam = lambda **given: optax.chain(scale_by_flood(LEVEL), adam(**given))
    try:
        no_loss = rows.no_loss("a flood in its `optax.adam`", lambda: trained(1))
    finally:
        optax.adam = adam
    return rows.Row(
        form="loss form",
        line="`losses.bc_loss = flooded(plain, b, has_aux=True)`",
        logs="`actor_loss` of its metrics, raw",
        level=LEVEL,
        losses=rows.floats(flood),
        value="no",
        evaluates_flooded=False,
        wrong=[no_loss],
    )
