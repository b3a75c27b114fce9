"""PyTorch's networks are those that it is the rival of."""

import jax
import numpy as np
import pytest

from benchmarks import networks, torch_rivals


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
def test_pytorch_rival_is_the_same_network_and_floods(model):
    pytest.importorskip("torch", reason="the rivals need the extra `rivals`")
    net, _ = networks.TIMED[model]
    keys = jax.random.split(jax.random.key(0), 2)
    x = np.asarray(jax.random.normal(keys[0], (16, 28, 28, 1)))
    params = net.init(keys[1], x)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(p.numel() for p in torch_rivals.network(model).parameters()) == count
    y = np.arange(16) % 10
    reached = {
        name: [step() for _ in range(150)]
        for name, step in torch_rivals.steps(model, "adam", x, y, level=0.3).items()
    }
    plain, flooded = reached["PyTorch"], reached["PyTorch, one-liner"]
    same = next(i for i, loss in enumerate(plain) if loss < 0.3) + 1  # then they part
    np.testing.assert_allclose(flooded[:same], plain[:same], rtol=1e-3)
    assert plain[-1] < 0.1
    assert 0.2 < np.mean(flooded[-50:]) < 0.4
