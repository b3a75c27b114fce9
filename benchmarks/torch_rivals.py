"""The networks of `overhead` as PyTorch training steps, plain and flooded."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

INPUT_SHAPES = {"mlp": (784,), "cnn": (1, 28, 28), "transformer": (28, 28)}
OPTIMIZERS = {"sgd": ("SGD", 0.1), "adam": ("Adam", 1e-3)}


def network(model: str) -> Any:
    """The same layers as the Flax network of that name."""
    nn: Any = importlib.import_module("torch").nn  # the extra `rivals`

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(64), nn.LayerNorm(64)])
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            gelu = nn.GELU(approximate="tanh")
            self.mlp = nn.Sequential(nn.Linear(64, 128), gelu, nn.Linear(128, 64))

        def forward(self, x: Any) -> Any:
            seen = self.norms[0](x)
            x = x + self.attention(seen, seen, seen, need_weights=False)[0]
            return x + self.mlp(self.norms[1](x))

    class MeanOverTokens(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean(1)

    layers = {
        "mlp": lambda: [
            *(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()),
            nn.Linear(512, 10),
        ],
        "cnn": lambda: [
            *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(7 * 7 * 32, 10)),
        ],
        "transformer": lambda: [
            *(nn.Linear(28, 64), Block(), Block(), MeanOverTokens()),
            nn.Linear(64, 10),
        ],
    }
    return nn.Sequential(*layers[model]())


def steps(
    model: str, optimizer: str, x: np.ndarray, y: np.ndarray, *, level: float
) -> dict[str, Callable[[], float]]:
    """A plain and a flooded training step on one batch; each returns the raw loss."""
    torch: Any = importlib.import_module("torch")
    inputs = torch.tensor(x.reshape(len(x), *INPUT_SHAPES[model]))
    labels = torch.tensor(y).long()
    cost = torch.nn.CrossEntropyLoss()
    name, learning_rate = OPTIMIZERS[optimizer]

    def make(bend: Callable[[Any], Any]) -> Callable[[], float]:
        torch.manual_seed(0)
        net = network(model)
        update = getattr(torch.optim, name)(net.parameters(), lr=learning_rate)

        def step() -> float:
            update.zero_grad()
            loss = cost(net(inputs), labels)
            bend(loss).backward()
            update.step()
            return loss.item()

        return step

    return {
        "PyTorch": make(lambda loss: loss),
        "PyTorch, one-liner": make(lambda loss: (loss - level).abs() + level),
    }
