"""Random blocks of every packed GGUF type that is read, with the numbers that they stand for.

    python blocks.py        writes blocks/TYPE.blocks and blocks/TYPE.floats beside this file: two rows of 512

The decoders here follow the layouts that ggml's block structures state (ggml-common.h, ggml-quants.c) and
bitnet.cpp's for I2_S: levels as integers, then one scale, one minimum. Where the gguf package knows a type its
own decoder has to give the same bits.
"""

import os

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

# Bytes of each block where an f16 stands.
HALVES = {Q.Q4_0: (0,), Q.Q4_1: (0, 2), Q.Q5_0: (0,), Q.Q5_1: (0, 2), Q.Q8_0: (0,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2),
          Q.Q6_K: (208,), Q.TQ1_0: (52,), Q.TQ2_0: (64,)}
ROWS, COLS = 2, 512


def half(blocks, at):
    """`(n, 1)` floats."""
    return np.ascontiguousarray(blocks[:, at:at + 2]).view(np.float16).astype(np.float32)


def nibbles(cells):
    """The low nibbles of all bytes, then the high ones."""
    return np.concatenate([cells & 15, cells >> 4], axis=1).astype(np.int32)


def fifth_bits(blocks, at):
    """Bit `j` of 32 bits belongs to weight `j`."""
    words = np.ascontiguousarray(blocks[:, at:at + 4]).view("<u4")
    return (words >> np.arange(32, dtype=np.uint32) & 1).astype(np.int32) << 4


def k_scales(blocks):
    """`(n, 8)` scales and minima of 6 bits in 12 bytes: the upper two bits of the first and second four bytes are
    the upper bits of the last four of each."""
    low, high, last = (blocks[:, 4 + 4 * i:8 + 4 * i].astype(np.int32) for i in range(3))
    scales = np.concatenate([low & 63, last & 15 | low >> 6 << 4], axis=1)
    mins = np.concatenate([high & 63, last >> 4 | high >> 6 << 4], axis=1)
    return scales, mins


def k_levels(bytes_):
    """128 bytes: of each 32 the low nibbles, then the high ones."""
    return nibbles(bytes_.reshape(-1, 32)).reshape(len(bytes_), 8, 32)


def k_floats(blocks, levels):
    scales, mins = k_scales(blocks)
    step, least = half(blocks, 0) * scales.astype(np.float32), half(blocks, 2) * mins.astype(np.float32)
    return step[:, :, None] * levels.astype(np.float32) - least[:, :, None]


def q5_k(blocks):
    # Bit `s` of byte `l` belongs to weight `l` of sub-block `s`.
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & 1
    return k_floats(blocks, k_levels(blocks[:, 48:]) | fifth.astype(np.int32) << 4)


def q6_k(blocks):
    n = len(blocks)
    # Halves of 128 weights: 64 bytes of low bits, 32 of high ones.
    low = nibbles(blocks[:, :128].reshape(-1, 64)).reshape(n, 2, 4, 32)
    high = blocks[:, None, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[None, None, :, None] & 3
    levels = (low | high.astype(np.int32) << 4) - 32
    scales = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scales[:, :, None] * levels.reshape(n, 16, 16).astype(np.float32)


def digits(bytes_, count):
    """A byte is a fraction in base 3, rounded up: digit `i` is what multiplying by 3^(i + 1) carries out."""
    powers = np.array([3**i for i in range(count)], np.uint8)[None, :, None]
    return ((bytes_[:, None] * powers).astype(np.uint16) * 3 >> 8).astype(np.int32).reshape(len(bytes_), -1)


def tq1_0(blocks):
    parts = digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4)
    return half(blocks, 52) * (np.concatenate(parts, axis=1) - 1).astype(np.float32)


def pairs(bytes_, shifts):
    """32 bytes hold 128 weights: of each byte a bit pair, in the order of `shifts`."""
    cells = bytes_.reshape(-1, 1, 32) >> np.array(shifts, np.uint8)[None, :, None] & 3
    return cells.astype(np.int32).reshape(len(bytes_), -1) - 1


DECODERS = {
    Q.Q4_0: lambda b: half(b, 0) * (nibbles(b[:, 2:]) - 8).astype(np.float32),
    Q.Q4_1: lambda b: half(b, 0) * nibbles(b[:, 4:]).astype(np.float32) + half(b, 2),
    Q.Q5_0: lambda b: half(b, 0) * ((nibbles(b[:, 6:]) | fifth_bits(b, 2)) - 16).astype(np.float32),
    Q.Q5_1: lambda b: half(b, 0) * (nibbles(b[:, 8:]) | fifth_bits(b, 4)).astype(np.float32) + half(b, 2),
    Q.Q8_0: lambda b: half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32),
    Q.Q4_K: lambda b: k_floats(b, k_levels(b[:, 16:])),
    Q.Q5_K: q5_k,
    Q.Q6_K: q6_k,
    Q.TQ1_0: tq1_0,
    Q.TQ2_0: lambda b: half(b, 64) * pairs(b[:, :64], [0, 2, 4, 6]).astype(np.float32),
}


def i2_s(rng):
    """Two bits a weight, the first of four in the upper bits, no scale in a block: one f32 behind all of them, and
    room up to 32 bytes."""
    levels = rng.integers(0, 3, (ROWS * COLS // 128, 4, 32), dtype=np.uint8)
    cells = sum(levels[:, i] << (6 - 2 * i) for i in range(4)).astype(np.uint8)
    scale = np.float32(1 / 3)
    blocks = cells.tobytes() + scale.tobytes() + bytes(28)
    return np.frombuffer(blocks, np.uint8), scale * pairs(cells, [6, 4, 2, 0]).astype(np.float32)


def save(name, blocks, floats):
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "blocks")
    os.makedirs(folder, exist_ok=True)
    floats = floats.reshape(ROWS, COLS).astype("<f4")
    assert np.isfinite(floats).all()
    blocks.tofile(os.path.join(folder, f"{name}.blocks"))
    floats.tofile(os.path.join(folder, f"{name}.floats"))


def main():
    rng = np.random.default_rng(1)
    for kind, places in HALVES.items():
        elems, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (ROWS * COLS // elems, size), dtype=np.uint8)
        for place in places:
            halves = rng.normal(0, 0.02, (len(blocks), 1)).astype(np.float16)
            blocks[:, place:place + 2] = halves.view(np.uint8)
        floats = DECODERS[kind](blocks).reshape(ROWS, COLS)
        theirs = gguf.quants.dequantize(blocks.reshape(ROWS, -1), kind)
        assert np.array_equal(floats, theirs), kind.name
        save(kind.name, blocks, floats)
    save("I2_S", *i2_s(rng))


if __name__ == "__main__":
    main()
