"""What the studies of images share: names, and flips at an exact rate."""

import jax

from benchmarks import data

CLASSES = 10
TITLES = {
    "mnist-5k": "MNIST-5k",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
}


def flip(key: jax.Array, labels: jax.Array, rate: float) -> jax.Array:
    """Gives an exact share of the labels another of the ten classes."""

    def chosen(size: int, count: int) -> tuple[jax.Array, jax.Array]:
        chosen_key, shift_key = jax.random.split(key)
        order = jax.random.permutation(chosen_key, size)
        return order[:count], jax.random.randint(shift_key, (count,), 1, CLASSES)

    return data.flip(labels, rate, CLASSES, chosen)
