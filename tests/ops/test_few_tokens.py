"""The path for a few tokens, which reads active neurons alone, against the dense formula."""

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import ACTS, DTYPES, NEEDS_KERNELS, OPS, close, dense_formula, random, sparse_inputs

from infmoe.ops.masked_ffn import few_tokens

pytestmark = NEEDS_KERNELS


@DTYPES
@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (16, 4), (37, 5), (100, 1025), (768, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_few_rows_are_multiplied_as_torch_does(dtype, width, outputs, bias):
    weight, b = random(outputs, width, dtype=dtype), random(outputs, dtype=dtype, seed=1) if bias else None
    for N in (1, 2, 8):
        x = random(N, width, dtype=dtype, seed=2)
        expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
        close(OPS.few_rows_linear(x, weight, b), expected, dtype, atol=1e-4)


def test_the_linear_layer_takes_the_quick_way_only_where_it_may(monkeypatch):
    calls = []
    original = OPS.few_rows_linear
    monkeypatch.setattr(OPS, "few_rows_linear", lambda *args: calls.append(1) or original(*args))
    weight, bias, x = random(6, 16), random(6, seed=1), random(1, 2, 16, seed=2)
    cases = {
        "few rows": (x, weight, True),
        "no rows": (x[:, :0], weight, False),
        "many rows": (random(9, 9, 16), weight, False),
        "mixed strides": (x, random(16, 6).T, False),
        "double": (x.double(), weight.double(), False),
    }
    for name, (given, w, quick) in cases.items():
        calls.clear()
        with torch.no_grad():
            y = few_tokens.linear(given, w, bias.to(w.dtype))
        torch.testing.assert_close(y, F.linear(given, w, bias.to(w.dtype)), rtol=1e-5, atol=1e-5, msg=name)
        assert bool(calls) == quick, name
        calls.clear()
        few_tokens.linear(given, w, bias.to(w.dtype))
        assert not calls, name
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert few_tokens.linear(x, weight, bias).dtype == torch.bfloat16
    assert not calls


@ACTS
@DTYPES
@pytest.mark.parametrize("N", [1, 2, 3, 20])
@pytest.mark.parametrize(("D", "width", "block"), [(16, 48, 1), (37, 99, 3), (64, 257, 1)])
def test_the_sparse_path_equals_the_dense_formula(act, dtype, N, D, width, block):
    inputs = sparse_inputs(act, N, D, width, block, dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            y = few_tokens.sparse_ffn(*inputs, act)
        finally:
            torch.set_num_threads(1)
        assert y.dtype == dtype
        close(y, dense_formula(*inputs, act), dtype, atol=3e-5)


@ACTS
def test_the_sparse_path_without_biases(act):
    x, mask, w1, _, w3, _, w2, _ = sparse_inputs(act, 3, 16, 48, 1, torch.float32)
    inputs = (x, mask, w1, None, w3, None, w2, None)
    close(few_tokens.sparse_ffn(*inputs, act), dense_formula(*inputs, act))


@DTYPES
def test_masks_of_all_none_and_one(dtype):
    x, mask, *rest = sparse_inputs("gelu_new", 3, 16, 50, 1, dtype)
    single = torch.zeros_like(mask)
    single[0, 1, 49] = 2.0
    for given in (torch.zeros_like(mask), torch.ones_like(mask), single):
        y = few_tokens.sparse_ffn(x, given, *rest, "gelu_new")
        close(y, dense_formula(x, given, *rest, "gelu_new"), dtype)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 63, 64, 65])
def test_any_number_of_active_neurons(width):
    inputs = list(sparse_inputs("silu", 2, 16, width, 1, torch.float32))
    for active in range(0, width + 1, max(1, width // 7)):
        inputs[1] = torch.zeros(1, 2, width)
        inputs[1][..., torch.randperm(width)[:active]] = 0.7
        close(few_tokens.sparse_ffn(*inputs, "silu"), dense_formula(*inputs, "silu"))


def test_activations_weights_and_mask_may_differ_in_dtype():
    x, mask, *weights = sparse_inputs("swiglu", 2, 16, 48, 1, torch.bfloat16)
    expected = dense_formula(x, mask, *weights, "swiglu")
    y = few_tokens.sparse_ffn(x.float(), mask, *weights, "swiglu")
    assert y.dtype == torch.float32
    close(y, expected)
    half = mask.bfloat16()
    close(few_tokens.sparse_ffn(x.float(), half, *weights, "swiglu"), dense_formula(x, half, *weights, "swiglu"))


def test_nan_in_the_mask_shows_in_its_token_alone():
    x, mask, *weights = sparse_inputs("relu", 3, 16, 48, 1, torch.float32)
    clean = few_tokens.sparse_ffn(x, mask, *weights, "relu")
    mask[0, 1] = torch.nan
    y = few_tokens.sparse_ffn(x, mask, *weights, "relu")
    assert y[0, 1].isnan().all()
    close(y[0, ::2], clean[0, ::2])
    x[0, 2, 5] = torch.nan
    assert few_tokens.sparse_ffn(x, mask, *weights, "relu")[0, 2].isnan().all()


CHANGES = {
    "in place": lambda w: w.mul_(2),
    "copied into": lambda w: w.copy_(torch.ones_like(w)),
    "through .data": lambda w: w.data.mul_(2),
    "data replaced": lambda w: setattr(w, "data", w.data * 2),
    "as PEFT merges": lambda w: setattr(w, "data", w.data.add_(1.0)),
    "one entry": lambda w: w[3].fill_(9.0),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_of_w2_is_noticed(change):
    *inputs, w2, b2 = sparse_inputs("gelu", 2, 16, 48, 1, torch.float32)
    w2 = torch.nn.Parameter(w2)
    for _ in range(3):
        close(few_tokens.sparse_ffn(*inputs, w2, b2, "gelu"), dense_formula(*inputs, w2, b2, "gelu"))
        CHANGES[change](w2)


@torch.no_grad()
def test_w2_is_transposed_once_and_let_go_with_it():
    x, mask, w1, b1, w3, b3, w2, b2 = sparse_inputs("gelu", 2, 16, 48, 1, torch.float32)
    before, copies = len(few_tokens._transposed), set()
    parameter = torch.nn.Parameter(w2.clone())
    for _ in range(3):
        few_tokens.sparse_ffn(x, mask, w1, b1, w3, b3, parameter, b2, "gelu")
        assert len(few_tokens._transposed) == before + 1
        copies.add(id(few_tokens._transposed[parameter][-1]))
    assert len(copies) == 1
    del parameter
    assert len(few_tokens._transposed) == before


@torch.no_grad()
def test_neurons_cut_off_through_data_are_gone():
    x, mask, w1, b1, _, _, w2, b2 = sparse_inputs("gelu", 2, 16, 48, 1, torch.float32)
    w2 = torch.nn.Parameter(w2)
    few_tokens.sparse_ffn(x, mask, w1, b1, None, None, w2, b2, "gelu")
    w2.data = w2.data[:, :40]  # same version, address, type and strides
    fewer = (x, mask[..., :40], w1[:40], b1[:40], None, None, w2, b2)
    close(few_tokens.sparse_ffn(*fewer, "gelu"), dense_formula(*fewer, "gelu"))


@torch.no_grad()
def test_a_copy_of_w2_that_is_in_use_is_not_written_to():
    *inputs, w2, b2 = sparse_inputs("gelu", 2, 16, 48, 1, torch.float32)
    w2 = torch.nn.Parameter(w2)
    few_tokens.sparse_ffn(*inputs, w2, b2, "gelu")
    in_use = few_tokens._columns(w2)
    before = in_use.clone()
    w2.data.mul_(2)
    close(few_tokens.sparse_ffn(*inputs, w2, b2, "gelu"), dense_formula(*inputs, w2, b2, "gelu"))
    assert in_use.equal(before)
    assert few_tokens._columns(w2).equal(w2.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (7, 130), (130, 7), (96, 200)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_copy_is_known_from_a_few_entries(dtype, shape, strided):
    w2 = random(*shape).to(dtype)
    if strided:
        w2 = w2.T.contiguous().T
    copy = w2.T.contiguous().clone()
    assert OPS.like_its_transpose(w2, copy)
    w2[0, 0] = torch.nan
    assert not OPS.like_its_transpose(w2, copy)
    copy[0, 0] = torch.nan  # of the same bits, so not a change
    assert OPS.like_its_transpose(w2, copy)
    copy[0, 0] = 1.0
    assert not OPS.like_its_transpose(w2, copy)


WRONG = {
    "w3": (4, random(19, 8)),
    "b1": (3, random(19)),
    "b2": (7, random(9)),
    "w2": (6, random(19, 8)),
    "act": (8, 7),
    "dtype": (6, random(20, 8).bfloat16()),
}


@pytest.mark.parametrize("what", WRONG)
def test_operands_that_do_not_fit_are_refused(what):
    args = [
        random(2, 8),
        random(2, 20),
        random(20, 8),
        random(20),
        random(20, 8),
        random(20),
        random(20, 8),
        random(8),
        1,
    ]
    OPS.sparse_ffn(*args)
    place, value = WRONG[what]
    args[place] = value
    with pytest.raises(RuntimeError, match=r"fit|must have|unknown"):
        OPS.sparse_ffn(*args)


@torch.inference_mode()
def test_the_sparse_path_in_inference_mode():
    inputs = sparse_inputs("gelu", 2, 16, 48, 1, torch.float32)
    close(few_tokens.sparse_ffn(*inputs, "gelu"), dense_formula(*inputs, "gelu"))
    inputs[6].mul_(2)
    close(few_tokens.sparse_ffn(*inputs, "gelu"), dense_formula(*inputs, "gelu"))
