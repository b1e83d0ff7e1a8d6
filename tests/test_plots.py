import numpy as np
import pytest
from matplotlib import pyplot as plt

from sparsax import patterns
from sparsax.plots import curve_figure, pattern_figure, slice_figure, spion_figure

T, BLOCK = 64, 16


def maps(layers=2, heads=1):
    drawn = np.random.default_rng(0).random((layers, heads, T, T)).astype(np.float32)
    return drawn / drawn.sum(-1, keepdims=True)


def find(found):
    return patterns.spion.search(found, block=BLOCK, quantile=0.4, filter_length=3)


def test_a_row_for_every_layer_and_a_column_for_every_step_and_pattern(tmp_path):
    found = find(maps())
    full = found.stack([patterns.full(T, block=BLOCK)] * 2)
    figure = spion_figure(maps(), {"CF": found, "full": full}, block=BLOCK)
    titles = ["score map", "diagonal convolution", "average pool", "CF", "full"]
    assert [axis.get_title() for axis in figure.axes] == titles + [""] * 5
    shapes = [axis.images[0].get_array().shape for axis in figure.axes]
    assert shapes == [(T, T), (T, T), *[(T // BLOCK, T // BLOCK)] * 3] * 2

    figure.savefig(tmp_path / "figure.png", dpi=40)
    picture = plt.imread(tmp_path / "figure.png")
    assert picture.shape[1] > picture.shape[0] > 100
    assert np.ptp(picture[..., :3]) > 0.5


def test_the_pictures_are_the_maps_and_the_block_masks():
    found = find(maps())
    figure = spion_figure(maps(), {"CF": found}, block=BLOCK)
    masks = np.asarray(found.to_block_mask())[:, 0]
    for layer, row in enumerate(np.reshape(figure.axes, (2, 4))):
        shown = [np.asarray(axis.images[0].get_array()) for axis in row]
        np.testing.assert_array_equal(shown[0], maps()[layer, 0])
        pooled = shown[1].reshape(4, BLOCK, 4, BLOCK).mean((1, 3))
        np.testing.assert_allclose(shown[2], pooled, rtol=1e-5)
        np.testing.assert_array_equal(shown[3].astype(bool), masks[layer])
        assert row[3].get_xlabel() == f"density {masks[layer].mean():.3f}"


@pytest.mark.parametrize("head", [0, 2])
def test_one_head_is_shown_and_a_shared_pattern_serves_them_all(head):
    each = maps(heads=3)
    shared = find(each.mean(1, keepdims=True))
    figure = spion_figure(each, {"each": find(each), "shared": shared}, block=BLOCK, head=head)
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes[:5]]
    np.testing.assert_array_equal(shown[0], each[0, head])
    np.testing.assert_array_equal(shown[3].astype(bool), find(each).to_block_mask()[0, head])
    np.testing.assert_array_equal(shown[4].astype(bool), shared.to_block_mask()[0, 0])


def test_every_pair_of_a_compound_pattern_has_the_colour_of_its_part(tmp_path):
    pattern = patterns.compound.longformer(T, window=3, positions=np.array([[5], [40]]))
    figure = slice_figure(pattern, sample=1)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shown > 0, pattern.to_mask()[1, 0])
    names = [text.get_text().split()[0] for text in figure.legends[0].get_texts()]
    assert names == ["rows", "bands", "columns"]
    assert [shown[40, 60], shown[41, 43], shown[41, 40], shown[9, 40]] == [1, 2, 2, 3]
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert np.ptp(plt.imread(tmp_path / "figure.png")[..., :3]) > 0.5


def test_a_row_for_every_layer_and_a_column_for_every_map_and_mask():
    pooled = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    masks = {"CF": pooled > 0.5, "all": np.ones((2, 4, 4), bool)}
    figure = pattern_figure({"pooled": pooled}, masks)
    rows = np.reshape(figure.axes, (2, 3))
    assert [axis.get_title() for axis in rows[0]] == ["pooled", "CF", "all"]
    for layer, row in enumerate(rows):
        shown = [np.asarray(axis.images[0].get_array()) for axis in row]
        np.testing.assert_array_equal(shown[0], pooled[layer])
        np.testing.assert_array_equal(shown[1].astype(bool), masks["CF"][layer])
        assert row[2].get_xlabel() == "density 1.000"


def test_a_panel_for_every_name_and_a_line_for_every_method():
    lines = {x: ([1, 2, 3], [3.0, 2.0, float(i)]) for i, x in enumerate("abcdefghijkl")}
    figure = curve_figure({"loss": lines, "score": {"a": ([1], [0.5])}})
    loss, score = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["loss", "score"]
    assert [line.get_label() for line in loss.lines] == list("abcdefghijkl")
    assert [float(line.get_ydata()[-1]) for line in loss.lines] == list(range(12))
    looks = {(line.get_color(), line.get_linestyle()) for line in loss.lines}
    assert len(looks) == 12
    assert len(score.lines) == 1
