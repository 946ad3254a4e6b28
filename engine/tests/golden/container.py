"""What files of `edgellm quantize` hold, read by the safetensors package and the container's description alone
(models/src/file/container.rs, models/src/quant/): a sha256 of the float32 numbers of every weight.

    python container.py EDGELLM      writes container.json beside this file; EDGELLM is the program
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from safetensors import safe_open

HERE = os.path.dirname(os.path.abspath(__file__))
# Folder of hf/, --bits, --group, form, --lm-head.
CASES = {
    "heads": ("llama3-f16", "4", 32, "symmetric", "int8"),
    "heads-minima": ("llama-bf16", "4", 64, "asymmetric", "f16"),
    "table": ("qwen2-f32-shards", "4", 128, "asymmetric", "int4"),
    "rows": ("qwen3-f32", "4", 128, "symmetric", "int8"),
    "relu2": ("bitnet-dense", "4", 32, "asymmetric", "int8"),
    "int8": ("qwen3-f32", "8", 64, "symmetric", "f16"),
    "ternary": ("bitnet-dense", "ternary", 32, "symmetric", "f16"),
}


def tile_levels(words):
    """`(row tiles, column tiles, 256)` words -> `(rows, columns)` levels of 4 bits."""
    tall, wide, _ = words.shape
    levels = np.zeros((tall, 16, wide, 128), np.int32)
    words = words.reshape(tall, wide, 2, 32, 4)
    # Nibble of a word -> row above or below, column of four.
    places = {0: (0, 0), 1: (0, 2), 2: (1, 0), 3: (1, 2), 4: (0, 1), 5: (0, 3), 6: (1, 1), 7: (1, 3)}
    for lane in range(32):
        row, quarter = lane // 4, lane % 4
        for step in range(8):
            column = 32 * (step // 2) + 8 * quarter + 4 * (step % 2)
            word = words[:, :, step // 4, lane, step % 4]
            for nibble, (below, c) in places.items():
                levels[:, row + 8 * below, :, column + c] = word >> np.uint32(4 * nibble) & np.uint32(15)
    return levels.reshape(16 * tall, 128 * wide)


def tile_groups(values, group):
    """`(row tiles, column tiles, 16 * 128 / group)` -> `(rows, groups)` floats."""
    tall, wide, _ = values.shape
    # Rows r and r + 8 side by side.
    values = values.reshape(tall, wide, 8, 128 // group, 2).transpose(0, 4, 2, 1, 3)
    return values.reshape(16 * tall, -1).astype(np.float32)


def packed_rows(pack, rows):
    """For each matrix the rows in tiles that are its own."""
    starts = np.cumsum([0, *rows])
    if pack["order"] == "rows":
        return [np.arange(n) + start for n, start in zip(rows, starts)]
    if pack["order"] == "gate_up":
        return [np.arange(n) // 8 * 16 + 8 * m + np.arange(n) % 8 for m, n in enumerate(rows)]
    dim = pack["head_dim"]
    head, of_head = np.divmod(np.arange(max(rows)), dim)
    second, pair = np.divmod(of_head, dim // 2)
    place = head * dim + pair // 8 * 16 + second * 8 + pair % 8
    return [place[:n] + start for n, start in zip(rows, starts)]


def spread(values, group, cols):
    return np.repeat(values.astype(np.float32), group, axis=1)[:, :cols]


def weights(path):
    """Name and float32 numbers of every weight."""
    with safe_open(path, "np") as file:
        texts = file.metadata()
        assert texts["edgellm.version"] == "2"
        entries = {w["name"]: w for w in json.loads(texts["edgellm.weights"])}
        for pack in json.loads(texts["edgellm.packs"]):
            members = [entries.pop(name) for name in pack["members"]]
            group, cols = members[0]["group"], members[0]["cols"]
            tensor = lambda part: file.get_tensor(f"{pack['name']}.{part}")
            levels = tile_levels(tensor("quants"))[:, :cols].astype(np.float32)
            scales = spread(tile_groups(tensor("scales"), group), group, cols)
            if members[0]["form"] == "symmetric":
                floats = scales * (levels - 8)
            else:
                floats = scales * levels + spread(tile_groups(tensor("mins"), group), group, cols)
            for entry, rows in zip(members, packed_rows(pack, [m["rows"] for m in members])):
                yield entry["name"], floats[rows]
        for name, entry in entries.items():
            if entry["format"] in ("f16", "f32"):
                yield name, file.get_tensor(name).astype(np.float32)
                continue
            levels = file.get_tensor(name + ".quants")
            if entry["format"] == "ternary":
                # 8 bytes hold 32 weights: byte j those of columns j, j + 8, j + 16 and j + 24, the first in the lower
                # bits, as value + 1.
                cells = levels.reshape(entry["rows"], -1, 1, 8) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
                levels = cells.reshape(entry["rows"], -1).astype(np.int32) - 1
            yield name, spread(file.get_tensor(name + ".scales"), entry["group"], entry["cols"]) * levels.astype(np.float32)


def main():
    result = {}
    for case, (source, bits, group, form, head) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "made.edgellm")
            command = [sys.argv[1], "quantize", os.path.join(HERE, "hf", source), path, "--method", "rtn", "--bits", bits]
            subprocess.run(command + ["--group", str(group), f"--{form}", "--lm-head", head], check=True)
            # No zero has a sign.
            hashes = {name: hashlib.sha256((floats + np.float32(0)).astype("<f4").tobytes()).hexdigest()
                      for name, floats in weights(path)}
        result[case] = {"source": source, "bits": bits, "group": group, "form": form, "head": head,
                        "weights": dict(sorted(hashes.items()))}
    with open(os.path.join(HERE, "container.json"), "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
