"""The figures of the pages: on a phone, at night, without a kind of cones."""

import importlib
import io
import itertools
import re

import numpy as np
import pytest
from matplotlib import colors, text

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import pictures, record, report

PHONE = 358  # pixels for a figure on a screen of 390
GROUNDS = "#ffffff", "#14181e"  # of the pages by day and by night
STUDIES = ("quickstart", "penalty", "strokes", "synthetic", "family", "unlearning")


def drawn(name, payload):
    return importlib.import_module(f"benchmarks.{name}").figures(payload)


@pytest.fixture(scope="module", params=[*STUDIES, "choosing", "rivals"])
def figures(request):
    if request.param == "rivals":  # the smallest pieces show all that is drawn
        names = ("wine", "iris")
        pieces = [record.read(name, record.RESULTS / "rivals") for name in names]
        return drawn("rivals", {"pieces": pieces})
    return drawn(request.param, record.read(request.param))


def test_every_study_with_figures_is_looked_at():
    studies = {
        module.__name__.rpartition(".")[2]
        for _, module, _ in report.records(record.RESULTS)
        if hasattr(module, "figures")
    }
    assert studies == {*STUDIES, "choosing", "rivals"}


def test_letters_are_nine_pixels_high_on_a_phone(figures):
    for name, figure in figures.items():
        figure.draw_without_rendering()
        pixels = PHONE / (72 * figure.get_figwidth())
        for each in figure.findobj(text.Text):
            if each.get_text() and not re.fullmatch(r"[\d.]+", each.get_text()):
                assert pixels * each.get_fontsize() >= 9, (name, each.get_text())


def linear(colour):
    """Linear red, green and blue of a colour of sRGB."""
    value = np.array(colors.to_rgb(colour))
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """As WCAG has it."""
    light = sorted(
        linear(each) @ [0.2126, 0.7152, 0.0722] + 0.05 for each in (one, other)
    )
    return light[1] / light[0]


def test_ground_is_transparent_and_letters_stand_on_white_and_on_night(figures):
    for name, figure in figures.items():
        assert figure.get_facecolor()[3] == 0, name
        assert all(axis.get_facecolor()[3] == 0 for axis in figure.axes), name
        for each in figure.findobj(text.Text):
            faint = colors.to_hex(each.get_color()).upper() == pictures.FAINT
            if each.get_text() and not faint:  # numbers of contours
                for ground in GROUNDS:
                    assert contrast(each.get_color(), ground) >= 3, each.get_text()


# Machado, Oliveira and Fernandes 2009, of linear RGB, no cone of the kind at all
SEEN = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(rgb):
    """CIE L*, a*, b* of linear RGB, white D65."""
    to_xyz = [
        [0.4124, 0.3576, 0.1805],
        [0.2126, 0.7152, 0.0722],
        [0.0193, 0.1192, 0.9505],
    ]
    xyz = np.array(to_xyz) @ rgb / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", SEEN)
def test_lines_are_told_apart_without_a_kind_of_cones(kind, figures):
    """A distance of 15 is plain to see; each line bears its name besides."""
    see = lambda colour: lab(np.clip(np.array(SEEN[kind]) @ linear(colour), 0, 1))
    for name, figure in figures.items():
        for axis in figure.axes:
            used = {colors.to_hex(line.get_color()).upper() for line in axis.lines}
            used -= {pictures.INK, pictures.FAINT}  # what stands behind
            for one, other in itertools.combinations(sorted(used), 2):
                apart = np.linalg.norm(see(one) - see(other))
                assert apart > 15, (name, one, other, apart)


def test_colours_that_some_confuse_are_found():
    see = lambda colour: lab(np.array(SEEN["deuteranopia"]) @ linear(colour))
    assert np.linalg.norm(see("#b04f4f") - see("#6e6e3c")) < 15
    assert np.linalg.norm(lab(linear("#b04f4f")) - lab(linear("#6e6e3c"))) > 25


def test_the_same_figure_is_the_same_file(tmp_path):
    for name in "ab":
        figure, (axis,) = pictures.panels(1, 1)
        axis.plot([0, 1 / 3], [0, 1])
        pictures.say(axis, "a line", (0, 0))
        figure.write(tmp_path / f"{name}.svg")
    written = (tmp_path / "a.svg").read_text()
    assert written == (tmp_path / "b.svg").read_text()
    whole = io.StringIO()
    figure.savefig(whole, format="svg")
    scales = lambda text: re.findall(r"scale\([^)]*\)", text)
    assert scales(written) == scales(whole.getvalue())  # letters keep their size
    longest = max(
        re.findall(r"\.(\d+)", " ".join(re.findall(r' d="([^"]*)"', written)))
    )
    assert len(longest) <= 2
    assert len(written) < len(whole.getvalue())
