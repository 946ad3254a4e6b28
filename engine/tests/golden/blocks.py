"""Random blocks of every GGUF type that is read, with the numbers that the gguf package says they are.

    python blocks.py        writes blocks/TYPE.blocks and blocks/TYPE.floats beside this file: two rows of 512
"""

import os

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

# Bytes of each block where an f16 stands.
HALVES = {Q.Q4_0: (0,), Q.Q4_1: (0, 2), Q.Q5_0: (0,), Q.Q5_1: (0, 2), Q.Q8_0: (0,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2),
          Q.Q6_K: (208,), Q.TQ1_0: (52,), Q.TQ2_0: (64,)}
ROWS, COLS = 2, 512


def main():
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "blocks")
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(1)
    for kind, places in HALVES.items():
        elems, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (ROWS * COLS // elems, size), dtype=np.uint8)
        for place in places:
            halves = rng.normal(0, 0.02, (len(blocks), 1)).astype(np.float16)
            blocks[:, place:place + 2] = halves.view(np.uint8)
        blocks = blocks.reshape(ROWS, -1)
        floats = gguf.quants.dequantize(blocks, kind).astype("<f4")
        assert floats.shape == (ROWS, COLS) and np.isfinite(floats).all()
        blocks.tofile(os.path.join(folder, f"{kind.name}.blocks"))
        floats.tofile(os.path.join(folder, f"{kind.name}.floats"))


if __name__ == "__main__":
    main()
