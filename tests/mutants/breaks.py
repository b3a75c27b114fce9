"""The breaks: a line of the library, what it becomes, and the tests that must fail."""

from typing import NamedTuple


class Break(NamedTuple):
    """Text that stands once in a file, what replaces it, and who must see that."""

    file: str
    before: str
    after: str
    tests: str


def applied(mutant: Break, text: str) -> str:
    """The text of the file, broken."""
    if text.count(mutant.before) != 1:
        found = text.count(mutant.before)
        raise ValueError(f"{mutant.file} holds {found} times, not once: {mutant}")
    return text.replace(mutant.before, mutant.after)


AVERAGE = "tests/modules/test_average.py tests/modules/test_averaged.py"

BREAKS: list[Break] = [
    *(
        Break("flood_optax/average.py", before, after, AVERAGE)
        for before, after in (
            (
                "count = jnp.minimum(step.astype(kept.dtype), 1 / (1 - kept))",
                "count = step.astype(kept.dtype)",
            ),
            (
                "count = jnp.minimum(step.astype(kept.dtype), 1 / (1 - kept))",
                "count = 1 / (1 - kept)",
            ),
            (
                "kept = jnp.asarray(decay, jnp.result_type(float))",
                "kept = jnp.asarray(decay, jnp.float32)",
            ),
            (
                "jnp.asarray(optax.safe_increment(before.flood_average_step))",
                "before.flood_average_step + 1",
            ),
            ("param = optax.apply_updates(param, update)", "pass"),
            ("_rounded(jnp.asarray(param)).astype", "jnp.asarray(param).astype"),
            ("jnp.where(new == average, new, average + step)", "average + step"),
            (
                "return jnp.array(param, dtype, copy=True)",
                "return jnp.asarray(param, dtype)",
            ),
            ("dtype = compare_dtype(np.dtype(dtype))", "pass"),
            (
                "count.astype(jnp.finfo(average.dtype).dtype)",
                "count.astype(jnp.float32)",
            ),
            ("if len(means) > 1:", "if len(means) > 2:"),
            (
                "return jnp.array(value, jnp.result_type(param), copy=True)",
                "return jnp.asarray(value, jnp.result_type(param))",
            ),
            (
                "return value.copy() if isinstance(value, jax.Array) else value",
                "return value",
            ),
            ("if path not in known and not _is_masked(average):", "if False:"),
            ("if means and jnp.shape(means[0]) != jnp.shape(param):", "if False:"),
            ("if all(mean is None for mean in here):", "if False:"),
            ("lambda d: 0 <= d < 1", "lambda d: 0 <= d <= 1"),
            ("dtype.itemsize < 4:", "dtype.itemsize < 2:"),
            ("range(len(path), -1, -1)", "range(len(path), len(path) - 1, -1)"),
        )
    ),
    *(
        Break("flood_optax/logs.py", before, after, "tests/modules/test_logs.py")
        for before, after in (
            ("jnp.maximum(step, 1)", "step"),
            ("if len(found) > 1:", "if len(found) > 2:"),
            ("jnp.asarray(*jax.tree.leaves(field))", "field"),
            ('"flood/loss": value,', '"flood/loss": level,'),
        )
    ),
]
