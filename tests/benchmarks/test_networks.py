"""The networks are the paper's, and PyTorch's where it is the rival."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import networks, torch_rivals


def test_batch_norm_is_that_of_pytorch():
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, (5, 3)).astype(np.float32)
    layer = networks.BatchNorm()
    variables = layer.init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))
    out, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, biased = x.mean(0), x.var(0)
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(biased + 1e-5), rtol=1e-5)
    stats = new["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * biased * 5 / 4, rtol=1e-5)
    later = layer.apply({**variables, **new}, x, train=False)
    expected = (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * biased * 5 / 4 + 1e-5)
    np.testing.assert_allclose(later, expected, rtol=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_mlp_has_the_layers_and_the_initialisation_of_the_paper(batch_norm):
    net = networks.MLP((500, 400), 2, batch_norm=batch_norm)
    params = net.init(jax.random.key(0), jnp.ones((3, 10)), train=True)["params"]
    fan_in = {"Dense_0": 10, "Dense_1": 500, "Dense_2": 400}
    for name, n in fan_in.items():
        has_bias = not batch_norm or name == "Dense_2"
        assert ("bias" in params[name]) == has_bias
        for leaf in params[name].values():
            bound = n**-0.5
            assert float(abs(leaf).max()) <= bound
            if leaf.size > 100:
                assert float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert ("BatchNorm_1" in params) == batch_norm


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
