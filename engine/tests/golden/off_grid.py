"""A Llama GGUF file -> the same function in float32 weights that lie on no quantisation grid.

    python3 off_grid.py SmolLM2-135M-Instruct.Q4_1.gguf off-grid.gguf

The only real weights at hand come quantised, and whatever rounds to the same grid would lose nothing. Here
every input column of a linear layer is multiplied by a number between 0.71 and 1.41, a different one each, and
what makes that input is divided by it: the norm in front, the rows of v or the rows of up. That changes the
function by rounding in float32 only, and neighbours in a group no longer share 16 levels.

Needs numpy and gguf 0.19.0.
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize


def floats(tensor):
    shape = [int(n) for n in reversed(tensor.shape)]
    if tensor.tensor_type == GGMLQuantizationType.F32:
        data = np.array(tensor.data)
    else:
        data = dequantize(tensor.data, tensor.tensor_type)
    return data.astype(np.float32).reshape(shape)


def main(source, target):
    reader = GGUFReader(source)
    field = lambda name: reader.fields[name].contents()
    weights = {t.name: floats(t) for t in reader.tensors}
    heads = field("llama.attention.head_count")
    queries = heads // field("llama.attention.head_count_kv")
    random = np.random.default_rng(1)
    factors = lambda n: np.exp2(random.uniform(-0.5, 0.5, n)).astype(np.float32)

    for layer in range(field("llama.block_count")):
        of = lambda part: weights[f"blk.{layer}.{part}.weight"]
        for norm, readers in [
            ("attn_norm", ["attn_q", "attn_k", "attn_v"]),
            ("ffn_norm", ["ffn_gate", "ffn_up"]),
        ]:
            scale = factors(len(of(norm)))
            of(norm)[:] /= scale
            for part in readers:
                of(part)[:] *= scale
        value, output = of("attn_v"), of("attn_output")
        scale = factors(len(value))
        value /= scale[:, None]
        # A value head feeds `queries` heads of the output's input, one after the other.
        head = output.shape[1] // heads
        output *= np.repeat(scale.reshape(-1, head), queries, axis=0).reshape(-1)
        scale = factors(len(of("ffn_up")))
        of("ffn_up")[:] /= scale[:, None]
        of("ffn_down")[:] *= scale

    writer = GGUFWriter(target, field("general.architecture"))
    for entry in reader.fields.values():
        if entry.name.startswith("GGUF.") or entry.name in (
            "general.architecture",
            "general.quantization_version",
        ):
            continue
        kind = entry.types[0]
        part = entry.types[-1] if kind == GGUFValueType.ARRAY else None
        value = 0 if entry.name == "general.file_type" else entry.contents()
        writer.add_key_value(entry.name, value, kind, sub_type=part)
    for name, data in weights.items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
