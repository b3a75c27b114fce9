"""The text is drawn and flipped as it says, and the transformer is the one meant."""

import collections
import math
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.rivals import text
from benchmarks.training import cross_entropy

SMALL = text.Transformer(width=8, heads=2, blocks=2)
DRAW = jax.jit(text.draw)  # so that the share of the flips is traced


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(3), (3, 7), 0, text.CLASSES)


@pytest.fixture(scope="module")
def params(tokens):
    return jax.jit(SMALL.init)(jax.random.key(4), tokens)


def rows(part):
    """Each sequence with the character after it, as a string."""
    x, y = map(np.asarray, part)
    whole = np.concatenate([x, y[:, -1:]], 1)
    return ["".join(text.CHARACTERS[i] for i in row) for row in whole]


def test_pieces_are_the_text_in_order_without_a_gap():
    read = " ".join("\n".join(topics.topics[n] for n in sorted(topics.topics)).split())
    wanted = "".join(c for c in read if " " <= c <= "~")
    got = "".join(text.CHARACTERS[i] for i in text.pieces().ravel())
    assert text.pieces().shape[1] == text.LENGTH + 1
    assert wanted.startswith(got)
    assert len(wanted) - len(got) <= text.LENGTH


def test_sets_are_of_their_sizes_and_no_piece_is_in_two():
    sets = DRAW(jax.random.key(0), 0.0)
    for (x, y), size in zip(sets, text.SIZE[:3], strict=True):
        assert x.shape == y.shape == (size, text.LENGTH)
        assert x.dtype == y.dtype == jnp.int32
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    drawn = collections.Counter(row for part in sets for row in rows(part))
    pieces = text.pieces()
    there = collections.Counter(rows((pieces[:, :-1], pieces[:, 1:])))
    # some pieces of the text read the same: none is drawn more often than it is there
    assert drawn <= there
    others = DRAW(jax.random.key(1), 0.0)
    assert all(rows(a) != rows(b) for a, b in zip(sets, others, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.37, 1.0])
def test_flips_replace_an_exact_share_of_what_is_predicted(share):
    clean, noisy = (DRAW(jax.random.key(5), s) for s in (0.0, share))
    for (x, y), (noisy_x, noisy_y) in zip(clean, noisy, strict=True):
        np.testing.assert_array_equal(noisy_x, x)
        wanted = 0 if y is clean.test[1] else round(share * y.size)
        assert (np.asarray(noisy_y) != np.asarray(y)).sum() == wanted
        assert noisy_y.min() >= 0
        assert noisy_y.max() < text.CLASSES


def test_flips_go_evenly_to_all_other_characters_and_everywhere():
    clean, noisy = (DRAW(jax.random.key(6), s).train[1] for s in (0.0, 0.5))
    shift = (np.asarray(noisy) - np.asarray(clean)) % text.CLASSES
    counts = np.bincount(shift[shift > 0], minlength=text.CLASSES)[1:]
    mean = counts.sum() / (text.CLASSES - 1)
    assert np.abs(counts - mean).max() < 5 * math.sqrt(mean)
    ones_of_each = (text.SIZE.train, text.LENGTH)  # place, then sequence
    for axis, size in enumerate(ones_of_each):
        of_each = (shift > 0).mean(axis)
        assert np.abs(of_each - 0.5).max() < 5 * 0.5 / math.sqrt(size)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def rms(h):
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)


def test_logits_are_those_of_explicit_loops(tokens, params):
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    got = jax.jit(SMALL.logits)(params, tokens)
    for sequence, logits in zip(np.asarray(tokens), np.asarray(got), strict=True):
        h = wide["characters"][sequence] + wide["places"]
        for block in wide["blocks"]:
            query, key, value = np.split(rms(h) @ block["attend"], 3, axis=-1)
            mixed = np.zeros_like(h)
            for t in range(len(sequence)):
                for head in (slice(0, 4), slice(4, 8)):
                    scores = key[: t + 1, head] @ query[t, head] / math.sqrt(4)
                    mixed[t, head] = softmax(scores) @ value[: t + 1, head]
            h = h + mixed @ block["mix"]
            h = h + np.maximum(rms(h) @ block["hidden"], 0) @ block["back"]
        np.testing.assert_allclose(logits, rms(h) @ wide["out"], rtol=0, atol=1e-5)


def test_logits_do_not_see_what_comes_later(tokens, params):
    logits = jax.jit(SMALL.logits)
    for t in range(tokens.shape[1]):
        changed = np.array(tokens)
        changed[:, t] = (changed[:, t] + 1) % text.CLASSES
        before, after = (np.asarray(logits(params, x)) for x in (tokens, changed))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()


def test_drop_is_laid_over_each_branch_once(tokens, params):
    places = []

    def drop(h, place):
        places.append((place, h.shape))
        return jnp.zeros_like(h)

    bare = SMALL.logits(params, tokens, drop)
    assert places == [(i, (*tokens.shape, 8)) for i in range(4)]
    h = np.asarray(params["characters"])[np.asarray(tokens)] + params["places"]
    np.testing.assert_allclose(bare, rms(h) @ params["out"], rtol=1e-4, atol=1e-5)
    whole = SMALL.logits(params, tokens)
    for i in range(4):  # each is a branch of its own, none of them without effect
        without = SMALL.logits(params, tokens, lambda h, j, i=i: h * (i != j))
        assert (np.abs(without - whole).max(-1) > 1e-3).mean() > 0.9


def test_training_reads_what_is_drawn_and_learns_it():
    x, y = (part[:16] for part in DRAW(jax.random.key(7), 0.2).train)
    net = text.Transformer(width=16, heads=2, blocks=1)
    optimizer = optax.adam(3e-3)

    def loss_of(params):
        return cross_entropy(net.logits(params, x), y).mean()

    @jax.jit
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = jax.jit(net.init)(jax.random.key(8), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
    assert losses[0] > math.log(text.CLASSES)  # as good as none, before the first step
    assert losses[-1] < 1.5  # letters alone: about 3, and a fifth of them are wrong
