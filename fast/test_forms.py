"""Every fast form equals its definition: in value, in first derivative, recorded and not, and in second."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, mutually_broadcastable_shapes

import autograd as ag
import fast
from autograd import Tensor, grad
from fast import cpu, forms
from test_transgan import check, check_same, close, draw_mask, masks, normal, on_cpu, scales, seeds, shapes, tensors


@pytest.fixture(autouse=True, scope="module")
def installed():
    fast.install("tf32")  # so that there is a form of matmul, too; it lets float64 be
    yield
    fast.uninstall()


def softmax_inputs(draw):
    shape = draw(array_shapes(min_dims=2, max_dims=4, max_side=5))
    return [shape], (draw_mask(draw(masks), shape[-2:], draw(seeds)),)


def reduce_sum_inputs(draw):
    """Any axes, and oftener several before the last."""
    shape = draw(shapes)
    some = st.sets(st.integers(-len(shape), -1)).map(tuple) if shape else st.just(())
    return [shape], (draw(st.one_of(st.none(), some, *[st.just(tuple(range(len(shape) - 1)))] * 3)), draw(st.booleans()))


def layer_norm_inputs(draw):
    shape = draw(array_shapes(min_dims=1, max_dims=4, max_side=6))
    return [shape, shape[-1:], shape[-1:]], ()


def attention_inputs(draw):
    batch, tokens, heads, head = (draw(st.integers(1, most)) for most in (2, 6, 3, 3))
    mask = draw_mask(draw(masks), (tokens, tokens), draw(seeds))
    if mask is not None and draw(st.booleans()):  # a band, of which a block sees but a part
        mask = mask & ag.xp.asarray(np.tri(tokens, k=1, dtype=bool) & ~np.tri(tokens, k=-2, dtype=bool))
    return [(batch, tokens, 3 * heads * head)], (heads, mask)


products = mutually_broadcastable_shapes(signature="(n,k),(k,m)->(n,m)", max_dims=3, max_side=3)
# Of each operation in the table, what it is tried with: the shapes of Tensors, and other arguments.
EXAMPLES = {
    ag.matmul: lambda draw: (
        draw(mutually_broadcastable_shapes(signature="(n,k),(k,m)->(n,m)", max_dims=3, max_side=3))[0],
        (),
    ),
    ag.reduce_sum: reduce_sum_inputs,
    ag.normal_cdf: lambda draw: ([draw(shapes)], ()),
    ag.gelu: lambda draw: ([draw(shapes)], ()),
    ag.softmax: softmax_inputs,
    ag.layer_norm: layer_norm_inputs,
    ag.attention: attention_inputs,
}


def test_every_form_has_examples():
    assert forms.FORMS.keys() == {*EXAMPLES, ag.adam_update}


@pytest.mark.parametrize("operation", EXAMPLES, ids=lambda operation: operation.__name__)
@given(draw=st.data(), seed=seeds, scale=scales, cache=st.sampled_from([1, 5, 1 << 15]),
       block=st.sampled_from([1, 8, 1 << 17]), few=st.sampled_from([0, 0, 0, 128]))  # fmt: skip
def test_a_form_equals_its_definition(operation, draw, seed, scale, cache, block, few):
    form = forms.FORMS[operation]
    if operation is ag.softmax and not hasattr(forms.arrays, "softmax"):
        pytest.skip("the definition is as fast here")
    drawn, rest = EXAMPLES[operation](draw.draw)
    arrays = normal(seed, *drawn, scale=scale)
    if operation is ag.layer_norm:  # of rows nearer to constant, the steps of differences are too wide
        assume(arrays[0].shape[-1] == 1 or arrays[0].std(axis=-1).min() > 0.02)
    with pytest.MonkeyPatch.context() as patch:  # small pieces, so that work really is done piece by piece
        for name, value in {"CACHE": cache, "SCORES": block, "FEW_TOKENS": few}.items():
            patch.setattr(cpu, name, value)
        check(lambda *x: form(*x, *rest), arrays, step=2e-6)
        check_same(lambda *x: form(*x, *rest), lambda *x: forms.definition(operation)(*x, *rest), arrays)


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
@given(seed=seeds, size=st.integers(1, 20), cache=st.integers(1, 8))
def test_adams_form_equals_its_definition(betas, decay, seed, size, cache):
    pair = []
    for update in (forms.adam_update, forms.definition(ag.adam_update)):
        adam = ag.Adam(tensors(*normal(seed, (size,), (2, 3))), betas, decay=decay)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "CACHE", cache)
            patch.setitem(ag.faster, ag.adam_update, update)
            for step in range(3):
                adam.add(tensors(*normal(seed + step, (size,), (2, 3))))
                adam.step(0.01, 0.5)
        pair.append([adam.p, adam.v, adam.gradient, *([adam.m] if betas[0] else []), *([adam.average] if decay else [])])
    for a, b in zip(*pair, strict=True):
        close(a, b, 1e-12)


def test_forms_name_what_is_wrong_as_definitions_do():
    def t(*shape):
        return Tensor(ag.xp.ones(shape))

    for call, message in (
        (lambda: ag.softmax(t(2, 3), ag.xp.ones((2, 4), bool)), r"softmax of shapes \(2, 3\), \(2, 4\)"),
        (lambda: ag.layer_norm(t(2, 3), t(2), t(3)), r"layer_norm of shapes \(2, 3\), \(2,\), \(3,\): weight"),
        (lambda: ag.attention(t(1, 2, 9), 2), r"attention of shapes \(1, 2, 9\).*2 heads"),
        (lambda: ag.attention(t(1, 2, 6), 0), "attention of shapes"),
        (lambda: ag.attention(t(1, 2, 6), 2, ag.xp.ones((3, 3), bool)), r"attention .*\(3, 3\), must be \(2, 2\)"),
        (lambda: t(2, 3) @ t(3), r"matmul of shapes \(2, 3\), \(3,\): both operands need at least two axes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_uninstalling_leaves_the_definitions(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ag, "faster", {})
        assert fast.install() == ("cpu" if ag.xp is np else "gpu")
        assert ag.faster.keys() <= forms.FORMS.keys()
        fast.uninstall()
        assert not ag.faster
    fast.install("tf32")


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_attention_of_large_logits_stays_as_small_as_its_definition(scale, monkeypatch):
    """Logits up to 10^9, whose rounding alone is more than 1: probabilities must stay probabilities on the way back too."""
    monkeypatch.setattr(cpu, "FEW_TOKENS", 0)
    (qkv,) = normal(0, (2, 65, 3 * 64), scale=scale)
    (x,) = tensors(qkv.astype(np.float32))
    sizes = []
    for function in (ag.attention, forms.definition(ag.attention)):
        out = function(x, 2)
        (g,) = grad((out * out).sum(), [x])
        sizes.append([float(abs(ag.to_numpy(y)).max()) for y in (out, Tensor(g.data[..., 128:]))])
    assert np.isfinite(sizes).all()
    assert sizes[0][0] <= 1.01 * sizes[1][0]
    assert sizes[0][1] <= 3 * sizes[1][1]


@given(seed=seeds, scale=st.sampled_from([1e-30, 1.0, 1e30]), precision=st.sampled_from(["tf32", "bfloat16"]))
def test_precision_rounds_to_its_bits(seed, scale, precision):
    """To the nearest number with so many bits of fraction, at most half a unit of the last away; float64 is let be."""
    x = normal(seed, 50, scale=scale)[0].astype(np.float32)
    special = np.array([0, np.inf, -np.inf, np.nan], np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_precision", precision)
        rounded, bits, exact = cpu._rounded(x), cpu.PRECISIONS[precision], x.astype(np.float64)
        assert cpu._rounded(exact) is exact
        np.testing.assert_array_equal(cpu._rounded(special), special)
    fraction, _ = np.frexp(rounded.astype(np.float64))
    np.testing.assert_array_equal(fraction * 2 ** (bits + 1), np.round(fraction * 2 ** (bits + 1)))
    unit = np.exp2(np.floor(np.log2(np.abs(exact))) - bits)
    assert (np.abs(rounded - exact) <= unit / 2).all()


@on_cpu
@pytest.mark.parametrize("precision, error", [("float32", 1e-6), ("tf32", 3e-3), ("bfloat16", 3e-2)])
def test_matrix_products_are_as_exact_as_asked(precision, error):
    x, w = tensors(*(a.astype(np.float32) for a in normal(0, (4, 50, 60), (60, 70))))
    for product in (lambda: x @ w, lambda: ag.linear(x, w), lambda: grad((x @ w).sum(), [w])[0]):
        fast.install("float32")
        exact = product().data
        fast.install(precision)
        found = np.abs(product().data - exact).max() / np.abs(exact).max()
        assert error / 100 * (precision != "float32") <= found < error
    with pytest.raises(ValueError, match="float32, tf32, bfloat16, not 'half'"):
        fast.install("half")
    fast.install("tf32")


@on_cpu
def test_a_small_window_costs_less_than_all(monkeypatch):
    """Scores computed for 32x32 tokens, forward and back: all without a window, well under half with one of 4."""
    row, column = np.divmod(np.arange(1024), 32)

    def near(width):
        return (abs(row[:, None] - row) <= width) & (abs(column[:, None] - column) <= width)

    (qkv,) = tensors(normal(0, (1, 1024, 12))[0].astype(np.float32))
    blocks, counts = cpu._blocks, []

    def counting(heads, tokens, mask):
        for heads_, rows, keys in blocks(heads, tokens, mask):
            counts[-1] += (rows.stop - rows.start) * len(range(*keys.indices(tokens)))
            yield heads_, rows, keys

    monkeypatch.setattr(cpu, "_blocks", counting)
    for mask in (None, near(4), near(10)):
        counts.append(0)
        grad(ag.attention(qkv, 1, mask).sum(), [qkv])
    assert counts[0] == 2 * 1024**2
    assert counts[1] < 0.4 * counts[0]
    assert counts[2] < 0.75 * counts[0]
