import pytest
import torch

from veneer.errors import UserError
from veneer.numerics import quantize as qz

TINY = torch.tensor([0.5, -1.0, 0.25, 0.1, 0.9, -0.3, 0.0, 0.7])


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nf4_error(W, block, nested=False):
    codes, absmax = qz.quantise_blocks(W, qz.nfmap(4), block)
    if nested:
        absmax = qz.double_dequantise(*qz.double_quantise(absmax))
    back = qz.dequantise_blocks(codes, absmax, qz.nfmap(4), W.shape, block)
    return float((back - W).norm() / W.norm())


def test_a_tiny_block_gives_the_codes_bytes_and_values_of_the_sheet():
    # sheet 048b, oracle 1
    codes, absmax = qz.quantise_blocks(TINY, qz.nfmap(4), 8)
    assert codes.tolist() == [12, 0, 10, 8, 15, 4, 7, 14] and absmax.tolist() == [1.0]
    assert qz.pack(codes, 4).tolist() == [0xC0, 0xA8, 0xF4, 0x7E]
    values = torch.tensor([0.44070983, -1, 0.2461123, 0.0795803, 1, -0.28444138, 0, 0.72295684])
    torch.testing.assert_close(qz.dequantise_blocks(codes, absmax, qz.nfmap(4), (8,), 8), values)


def test_the_levels_equal_bitsandbytes_bit_for_bit_and_the_formula_to_rounding():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(qz.nfmap(4), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(qz.dynamic_map(), functional.create_dynamic_map())
    torch.testing.assert_close(qz.normal_quantiles(4), qz.nfmap(4), atol=2e-7, rtol=0)
    nf3 = torch.tensor([-1, -0.478629, -0.217142, 0, 0.160930, 0.337915, 0.562617, 1])
    torch.testing.assert_close(qz.nfmap(3), nf3, atol=1e-6, rtol=0)
    torch.testing.assert_close(qz.nfmap(2), torch.tensor([-1, 0, 0.337915, 1]), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="2, 3 or 4"):
        qz.nfmap(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 256])
def test_nf4_codes_maxima_and_values_equal_bitsandbytes_bit_for_bit(block, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = gaussian(48, 512).to(
        dtype
    )  # rows of whole blocks: on others bitsandbytes 0.50's CPU dequantiser mixes up maxima
    packed, state = functional.quantize_4bit(W, blocksize=block, quant_type="nf4")
    codes, absmax = qz.quantise_blocks(W, qz.nfmap(4), block)
    assert torch.equal(qz.pack(codes, 4), packed.flatten())
    assert torch.equal(absmax, state.absmax)
    ours = qz.dequantise_nibbles(qz.pack(codes, 4), absmax, qz.pair_table(qz.nfmap(4)), W.shape, block, dtype)
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))


def test_double_quantisation_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = gaussian(600, 64)
    _, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, scales, offset = qz.double_quantise(qz.quantise_blocks(W, qz.nfmap(4), 64)[1])
    torch.testing.assert_close(offset, state.offset)
    torch.testing.assert_close(scales, state.state2.absmax)
    assert (codes != state.absmax).float().mean() < 0.01  # a mean that differs in its last bit moves ties
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    torch.testing.assert_close(qz.double_dequantise(codes, scales, offset), theirs, rtol=1e-3, atol=0)


@pytest.mark.parametrize("block, nested, expected", [(64, False, 0.0920), (64, True, 0.0920), (128, False, 0.0956)])
def test_the_error_on_gaussian_weights_is_that_of_the_sheet(block, nested, expected):
    # sheet 048b, oracle 2
    assert nf4_error(gaussian(1024, 1024), block, nested) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits, expected", [(3, 0.2016), (2, 0.5627)])
def test_fewer_bits_err_as_the_sheet_says(bits, expected):
    W = gaussian(512, 512)
    codes, absmax = qz.quantise_blocks(W, qz.nfmap(bits))
    back = qz.dequantise_blocks(codes, absmax, qz.nfmap(bits), W.shape)
    assert codes.max() < 2**bits
    assert float((back - W).norm() / W.norm()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_packing_loses_nothing_and_takes_no_more_bytes_than_it_must(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = qz.pack(codes, bits)
    assert packed.numel() == -(-count * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(qz.unpack(packed, bits, count), codes)


@pytest.mark.parametrize("shape", [(7, 9), (3, 64), (5, 13), (1, 1)])
def test_short_last_blocks_and_odd_sizes_dequantise_alike_by_bytes_and_by_codes(shape):
    W = gaussian(*shape)
    codes, absmax = qz.quantise_blocks(W, qz.nfmap(4), 16)
    slow = qz.dequantise_blocks(codes, absmax, qz.nfmap(4), shape, 16)
    fast = qz.dequantise_nibbles(qz.pack(codes, 4), absmax, qz.pair_table(qz.nfmap(4)), shape, 16)
    assert torch.equal(slow, fast)
    again = qz.quantise_blocks(slow, qz.nfmap(4), 16)
    torch.testing.assert_close(qz.dequantise_blocks(*again, qz.nfmap(4), shape, 16), slow, rtol=1e-6, atol=1e-6)
    largest = W.abs().flatten().argmax()
    assert slow.flatten()[largest] == W.flatten()[largest]


def test_zero_blocks_come_back_as_zeros_and_what_is_not_finite_is_refused():
    codes, absmax = qz.quantise_blocks(torch.zeros(128), qz.nfmap(4))
    assert not qz.dequantise_blocks(codes, absmax, qz.nfmap(4), (128,)).any()
    doubled = qz.double_dequantise(*qz.double_quantise(torch.zeros(10)))
    assert not doubled.any()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="NaN or infinity"):
            qz.quantise_blocks(torch.tensor([1.0, bad]), qz.nfmap(4))


def test_moments_in_8_bits_keep_the_error_bounds():
    # sheet 032, oracle 9
    m = gaussian(30, 40)
    codes, scales = qz.quantise_signed(m)
    back = qz.dequantise_signed(codes, scales, m.shape)
    assert codes.dtype == torch.int8 and scales.shape == (5,)
    bound = (127 * scales / 254).repeat_interleave(256)[: m.numel()].view(m.shape)
    assert ((back - m).abs() <= bound * (1 + 1e-5)).all()
    v = m.square()
    codes, scales = qz.quantise_root(v)
    back = qz.dequantise_root(codes, scales, v.shape)
    assert codes.dtype == torch.uint8
    half = (scales / 2).repeat_interleave(256)[: v.numel()].view(v.shape)
    tiny = v.sqrt() < half
    assert ((back.sqrt() - v.sqrt()).abs() <= torch.where(tiny, 2 * half, half) * (1 + 1e-5)).all()
    assert (back[v > 0] > 0).all()


def test_zero_moments_stay_zero():
    assert not qz.dequantise_signed(*qz.quantise_signed(torch.zeros(300)), (300,)).any()
    assert not qz.dequantise_root(*qz.quantise_root(torch.zeros(300)), (300,)).any()


def test_random_rounding_is_unbiased_and_reproducible():
    m = gaussian(256) * 0.1
    m[0] = 1.0
    draws = torch.stack(
        [
            qz.dequantise_signed(*qz.quantise_signed(m, generator=torch.Generator().manual_seed(s)), (256,))
            for s in range(400)
        ]
    )
    step = 1 / 127
    nearest = qz.dequantise_signed(*qz.quantise_signed(m), (256,))
    assert (draws.mean(0) - m).abs().max() < 4 * step / 2 / 20  # four standard errors
    assert (nearest - m).abs().max() > 4 * step / 2 / 20
    again = qz.quantise_root(m.abs(), generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(again, qz.quantise_root(m.abs(), generator=torch.Generator().manual_seed(0))[0])
