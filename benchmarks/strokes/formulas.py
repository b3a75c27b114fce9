"""What a stroke does to the drift, by the modified equation of each rule.

Symbols: eta the learning rate, m the momentum, h = eta / (1 - m) the step of a formed
velocity, n the steps of a stroke. All drifts are in units of -eta^2 / 2 H g a step.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    """An optimizer whose step is a running sum of gradients, as far as strokes go.

    Attributes:
      momentum: of the gradients, or Adam's beta1.
      nesterov: whether the newest gradient counts once more, as in optax.
      beta2: of Adam's second moment, whose first is an average: None without one.
    """

    momentum: float = 0.0
    nesterov: bool = False
    beta2: float | None = None

    def lost(self, steps: float) -> float:
        """How many of the steps of a stroke turn the velocity around, and go nowhere.

        A stroke of n steps is as long as n - lost(n) steps of length h.
        """
        m, n = self.momentum, steps
        lost = 2 * m / (1 - m) * (1 - m**n) / (1 + m**n)
        return m * lost if self.nesterov else lost

    def ratio(self, steps: float) -> float:
        """The drift in strokes of so many steps, each as long as the other."""
        m, n = self.momentum, steps
        turning = 2 * m / (1 - m) * (1 - m**n) / (1 + m**n)
        ratio = (1 + m - 2 * turning / n) / (1 - m) ** 3
        if self.nesterov:
            return m * ratio + 1 / (1 - m)
        if self.beta2 is not None:  # its velocity is (1 - m) of the heavy ball's
            return (1 - m) ** 2 * ratio - (1 - self.beta2) * n**2 / 6
        return ratio

    @property
    def limit(self) -> float:
        """Of strokes that are long beside the memory of the velocity."""
        m = self.momentum
        if self.nesterov:
            return (1 - m + 2 * m**2) / (1 - m) ** 3
        if self.beta2 is not None:
            return (1 + m) / (1 - m)
        return (1 + m) / (1 - m) ** 3


RULES = {
    "SGD": Rule(),
    "heavy ball 0.5": Rule(0.5),
    "heavy ball 0.9": Rule(0.9),
    "Nesterov 0.9": Rule(0.9, nesterov=True),
    "Adam": Rule(0.9, beta2=0.999),
}
