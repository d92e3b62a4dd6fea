"""Masks for "auxkern" attention; transformers' own are the truth."""

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from auxkern.model.native.masks import step_mask

_PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1]]).bool()


def _asked(mask, **others):
    B, P = mask.shape
    asked = {"batch_size": B, "q_length": 1, "kv_length": P, "q_offset": P - 1, "kv_offset": 0}
    return {**asked, "attention_mask": mask, "allow_is_causal_skip": True, "use_vmap": False, **others}


@pytest.mark.parametrize(
    ("mask", "others"),
    [
        (_PADDED, {}),
        (_PADDED[1:2], {}),
        (_PADDED[1:2], {"allow_is_causal_skip": False}),
        (_PADDED[:, :1], {}),
        (_PADDED, {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3}),
        (_PADDED, {"mask_function": sliding_window_causal_mask_function(3)}),
        (_PADDED, {"q_offset": 3}),
        (_PADDED, {"kv_length": 9, "q_offset": 8}),
        (_PADDED, {"kv_length": 4, "kv_offset": 2, "q_offset": 3}),
        (_PADDED, {"q_length": 2, "q_offset": 4}),
        (_PADDED, {"q_length": 6, "q_offset": 0}),
        (_PADDED, {"attention_mask": None}),
    ],
)
def test_masks_are_those_of_transformers(mask, others):
    asked = _asked(mask, **{"mask_function": causal_mask_function, **others})
    found, expected = step_mask(**asked), sdpa_mask(**asked)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found.dtype == torch.bool
        assert torch.equal(found.expand(expected.shape), expected)


def test_a_padded_step_costs_no_copy_of_its_mask():
    mask = step_mask(**_asked(_PADDED, mask_function=causal_mask_function))
    assert mask.data_ptr() == _PADDED.data_ptr()
