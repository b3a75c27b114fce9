"""The language model of unequal parts, at reduced size, is that of one large batch."""

import json

import numpy as np
import pytest

pytest.importorskip("flax", reason="the benchmark needs the extra `bench`")

from benchmarks import __main__ as command, language

# compiles transformers; unequal parts of other models are tested every time
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    out = tmp_path_factory.mktemp("language")
    command.main(["language", "--smoke", "--out", str(out)])
    return json.loads((out / "language.json").read_text())


def row_of(document, form):
    (row,) = (row for row in document["rows"] if row["form"] == form)
    return row


def test_weighed_parts_follow_the_loss_curve_of_the_large_batch(document):
    curves = document["curves"]
    reference = curves["one large batch"]["loss"]
    level = document["protocol"]["level"]
    assert min(reference) < level < max(reference), "the level must act"
    np.testing.assert_allclose(
        curves["parts, weighed"]["loss"], reference, rtol=0, atol=1e-6
    )
    # what the state recorded is the loss of the window, float32
    np.testing.assert_allclose(curves["parts, weighed"]["met"], reference, rtol=1e-6)


@pytest.mark.parametrize(
    "form", ["parts, their gradients weighed", "parts, nothing weighed"]
)
def test_parts_without_weight_take_wrong_signs(document, form):
    row = row_of(document, form)
    assert row["distance"] > 1e-3
    assert row["wrong_signs"] > 0
    assert row_of(document, "parts, weighed")["wrong_signs"] == 0


def test_sequences_that_are_flooded_each_by_itself_follow_their_large_batch(document):
    curves = document["curves"]
    alone = curves["each sequence, one large batch"]["loss"]
    np.testing.assert_allclose(
        curves["each sequence, parts, weighed"]["loss"], alone, rtol=0, atol=1e-6
    )
    batch = np.array(curves["one large batch"]["loss"])
    assert np.abs(batch - alone).max() > 1e-3, "another algorithm than the batch's"


def test_sequences_are_those_of_segments_by_hand():
    size = language.SMOKE
    graph, params = language.nnx.split(
        language.Transformer(size, language.nnx.Rngs(0)), language.nnx.Param
    )
    tokens = language.paragraphs(size)[0, 0]
    losses, mask = map(np.asarray, language.losses_and_mask(graph, params, tokens))
    means = np.array([row[real].mean() for row, real in zip(losses, mask, strict=True)])
    level = float(means.mean())  # which acts on some
    total, count = language.sequences_and_count(graph, level, params, tokens)
    by_hand = (mask.sum(1) * (np.abs(means - level) + level)).sum()
    np.testing.assert_allclose(total, by_hand, rtol=1e-5)
    assert count == mask.sum()


def test_parts_are_of_unequal_size_and_cover_the_text(document):
    counts = document["tokens_of_a_part"]
    assert counts["most"] > 2 * counts["least"]
    tokens = language.paragraphs(language.SMOKE)
    words = "".join(language.CHARACTERS[i] for i in tokens[0, 0, 0] if i)
    text = " ".join(" ".join(language.topics.topics.values()).split())
    assert words in text


def test_padding_is_not_counted():
    size = language.SMOKE
    graph, params = language.nnx.split(
        language.Transformer(size, language.nnx.Rngs(0)), language.nnx.Param
    )
    row = np.arange(1, 8)
    padded = np.zeros((1, size.length + 1), np.int32)
    padded[0, :7] = row
    short, longer = (
        language.sum_and_count(graph, params, np.asarray(tokens, np.int32))
        for tokens in (row[None], padded)
    )
    assert short[1] == longer[1] == 6
    np.testing.assert_allclose(short[0], longer[0], rtol=1e-5)
