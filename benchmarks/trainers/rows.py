"""What is measured in a trainer; imports nothing that a trainer might not have."""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from benchmarks.trainers import page

LAST = 20  # steps over which the raw loss is averaged


class Wrong(NamedTuple):
    """A form that one would write, and what it gives.

    Attributes:
      code: as one would write it, in Markdown.
      effect: what happens, a format string that is filled with `numbers`.
      numbers: what was measured.
    """

    code: str
    effect: str
    numbers: dict[str, float]


class Run(NamedTuple):
    """One run of a trainer's module."""

    section: str
    work: pathlib.Path
    smoke: bool

    def steps(self, number: int) -> int:
        return max(number // 5, 2 * LAST) if self.smoke else number

    def recipe(self, section: str = "", **given: Any) -> dict[str, Any]:
        """Executes the code under the trainer's heading; what it defines."""
        return page.execute(section or self.section, given)


def floats(values: Any) -> list[float]:
    return [float(value) for value in values]


@dataclass(kw_only=True)
class Row:
    """What a trainer did.

    Attributes:
      form: the form that the recipe uses, in Markdown.
      line: the line that floods, in Markdown.
      logs: what the trainer logs during the run by the recipe.
      level: the level.
      losses: raw training loss of each step, of the run by the recipe.
      value: whether `value=` reaches the optimizer, as it was seen to; in Markdown.
      evaluation: what the trainer reports as evaluation loss during that run.
      evaluation_raw: the same evaluations computed outside of the trainer. They must
        go below the level, or they could not tell a flooded evaluation.
      evaluates_flooded: whether it evaluates with the training loss: whether evaluation
        is flooded when the trainer is simply given a flooded loss. None: the user
        writes the evaluation.
      accumulates: what the trainer's own accumulation does with a flood in it: "each
        micro-batch", "the window", ...; None if it has none.
      accumulation: greatest difference of a parameter between accumulation by the
        recipe and the same steps by whole batches; None if there is no recipe.
      resume: greatest difference of a parameter between a run that was resumed from a
        checkpoint and the run that was not interrupted; None if it has none.
      wrong: what wrong forms give.
      tolerance: how far from the level the last raw losses may be on average.
    """

    form: str
    line: str
    logs: str
    level: float
    losses: Sequence[float]
    value: str
    evaluation: Sequence[float] = ()
    evaluation_raw: Sequence[float] = ()
    evaluates_flooded: bool | None = None
    accumulates: str | None = None
    accumulation: float | None = None
    resume: float | None = None
    wrong: list[Wrong] = field(default_factory=list[Wrong])
    tolerance: float = 0.2

    def checked(self) -> dict[str, Any]:
        """The row as a record.

        Raises:
          AssertionError: if the run did not flood, or flooded its evaluation.
        """
        losses, own, raw = map(
            floats, (self.losses, self.evaluation, self.evaluation_raw)
        )
        last = losses[-LAST:]
        mean = sum(last) / len(last)
        below = sum(loss < self.level for loss in last) / len(last)
        assert abs(mean - self.level) <= self.tolerance * abs(self.level), (
            f"The last raw losses are {mean} on average, the level is {self.level}."
        )
        assert 0.1 <= below <= 0.9, f"A share of {below} of them is below the level."
        off = None
        if own or raw:
            assert len(own) == len(raw), f"{len(own)} evaluations, {len(raw)} raw ones."
            off = max(abs(a - b) for a, b in zip(own, raw, strict=True))
            assert min(raw) < self.level, (
                f"The least evaluation loss, {min(raw)}, is not below the level."
            )
            assert off < 1e-3 * max(map(abs, raw)), (
                f"The evaluation differs by {off} from the raw loss."
            )
        document = asdict(self) | {
            "steps": len(losses),
            "last": mean,
            "below": below,
            "evaluation_off": off,
            "evaluation_least": min(raw, default=None),
            "wrong": [wrong._asdict() for wrong in self.wrong],
        }
        for name in ("losses", "evaluation", "evaluation_raw", "tolerance"):
            del document[name]
        return document


class Path(NamedTuple):
    """The raw losses of each step, and the evaluations after it."""

    losses: list[float]
    evaluation: list[float]
    evaluation_raw: list[float]


def follow(
    step: Callable[[Any], tuple[Any, Any]],
    carry: Any,
    steps: int,
    evaluate: Callable[[Any], Any],
    outside: Callable[[Any], float],
) -> tuple[Any, Path]:
    """Takes steps, and evaluates after each: by the trainer, and outside of it."""
    path = Path([], [], [])
    for _ in range(steps):
        carry, loss = step(carry)
        path.losses.append(float(loss))
        path.evaluation.append(float(evaluate(carry)))
        path.evaluation_raw.append(outside(carry))
    return carry, path


def distance(tree: Any, other: Any) -> float:
    """Greatest difference between two trees of arrays."""
    import jax  # noqa: PLC0415 - summaries need no jax
    import numpy as np  # noqa: PLC0415

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(
        float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))
        for a, b in pairs
    )


def off_by(moved: Any, due: Any, start: Any) -> float:
    """How far a step is from the one that is due, in lengths of that one."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    def flat(tree: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])

    base = flat(start)
    step = flat(due) - base
    return float(np.linalg.norm(flat(moved) - base - step) / np.linalg.norm(step))


def refusal(attempt: Any) -> str:
    """The first line of the error that an attempt ends with, which it must."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
    raise AssertionError("It should have been refused, and was not.")


def no_loss(code: str, attempt: Any) -> Wrong:
    """A form whose optimizer is handed no loss, and says so."""
    said = refusal(attempt)
    assert "needs the current loss" in said, said
    return Wrong(code, "refused: no loss", {})
