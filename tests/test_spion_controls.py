"""The controls of the SPION comparison: in every task as many blocks, and each another pattern."""

import itertools

import numpy as np
import pytest
import spion_image_gpu
import spion_listops_gpu
import spion_lm_gpu
import spion_text_gpu
from spion_methods import CONTROLS, Setting, control

from sparsax.patterns import mass

CLASSIFIED = {"image": spion_image_gpu, "listops": spion_listops_gpu, "text": spion_text_gpu}
SIZES = {
    **{name: script.FULL for name, script in CLASSIFIED.items()},
    **{f"{name} quick": script.QUICK for name, script in CLASSIFIED.items()},
    **{f"lm{length}": spion_lm_gpu.full(length) for length in spion_lm_gpu.DENSITY},
    "lm quick": spion_lm_gpu.QUICK,
}


@pytest.mark.parametrize("name", SIZES)
def test_controls_list_as_many_blocks_and_differ(name):
    causal = name.startswith("lm")
    setting = Setting.of(SIZES[name], causal=causal, equal_rows=True, seed=0)
    masks = {kind: control(setting, kind).to_block_mask()[:, 0] for kind in CONTROLS}
    for kind, mask in masks.items():
        band, listable = mass.bands(setting.blocks, 0 if kind == "diagonal" else 1, causal)
        count = setting.blocks if kind == "diagonal" else setting.count
        np.testing.assert_array_equal(mask.sum((1, 2)), [count] * setting.layers)
        assert (mask >= band).all()
        assert (mask <= listable).all()
    for one, other in itertools.combinations(CONTROLS, 2):
        assert (masks[one] != masks[other]).any((1, 2)).all(), (one, other)
