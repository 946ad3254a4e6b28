"""Tiny random-weight GGUF checkpoints of each architecture, with the logits transformers computes.

Weights are quantised once; the GGUF gets the blocks, the transformers model the same blocks
de-quantised, so both hold exactly the same numbers. Llama files store the q and k rows of each head
as llama.cpp's converter does (rotary pairs as neighbours); Qwen2 files store them as they are.

`make` asserts that the references can tell right from wrong: logits depend on the order of the
tokens, and each mistake in MISTAKES moves them beyond what the test tolerates. The Llama files are
also read by transformers' own GGUF loader, as a check on the row order written here.
"""

import json
import os

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q

POSITIONS = 64
# What engine/tests/golden_tiny.rs tolerates.
MIN_COSINE = 0.9999
BASE_VOCAB = 256

CASES = {
    "llama-q4_0": dict(arch="llama", width=64, ffn=160, heads=4, kv=2, head_dim=16, vocab=288, theta=50_000.0,
                       eps=1e-5, linear=Q.Q4_0, tied=True),
    "llama-q4_1": dict(arch="llama", width=96, ffn=160, heads=6, kv=1, head_dim=16, vocab=259, theta=700.0,
                       eps=1e-6, linear=Q.Q4_1, tied=False),
    "llama-q8_0": dict(arch="llama", width=64, ffn=224, heads=4, kv=4, head_dim=32, vocab=261, theta=10_000.0,
                       eps=1e-5, linear=Q.Q8_0, tied=False, rope_divisors=(8.0, 1.0, 4.0, 32)),
    "qwen2-q4_0": dict(arch="qwen2", width=64, ffn=160, heads=2, kv=1, head_dim=32, vocab=300, theta=1e6,
                       eps=1e-6, linear=Q.Q4_0, tied=False),
    "qwen2-q4_1": dict(arch="qwen2", width=64, ffn=160, heads=4, kv=2, head_dim=16, vocab=271, theta=250_000.0,
                       eps=1e-6, linear=Q.Q4_1, tied=True),
    "qwen2-q8_0": dict(arch="qwen2", width=128, ffn=96, heads=2, kv=2, head_dim=64, vocab=263, theta=2_000.0,
                       eps=1e-5, linear=Q.Q8_0, tied=True),
}
LAYERS = 2


def quantized(weight, kind):
    """Blocks of `weight` and the numbers they stand for."""
    blocks = gguf.quants.quantize(weight.astype(np.float32), kind)
    return blocks, gguf.quants.dequantize(blocks, kind).astype(np.float32)


def interleave_rows(rows, heads):
    """Rows `(first half, second half)` of each head to neighbours `(2i, 2i+1)`."""
    n = rows.shape[0] // heads // 2
    return np.ascontiguousarray(rows.reshape(heads, 2, n, -1).swapaxes(1, 2).reshape(rows.shape))


def rope_divisors(case):
    """Divisors of the rotary frequencies as Llama 3.1 scales them: (factor, low, high, trained context)."""
    factor, low, high, context = case["rope_divisors"]
    half = case["head_dim"] // 2
    frequency = case["theta"] ** (-np.arange(half) / half)
    wavelength = 2 * np.pi / frequency
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def weights(case, rng):
    """`{hf name: (gguf name, blocks, kind, numbers)}` in float32."""
    c, out = case, {}

    def matrix(hf, name, rows, cols, kind, scale, interleaved_heads=0):
        blocks, numbers = quantized(rng.normal(0, scale / np.sqrt(cols), (rows, cols)), kind)
        if interleaved_heads and c["arch"] == "llama":
            blocks = interleave_rows(blocks, interleaved_heads)
        out[hf] = (name, blocks, kind, numbers)

    def vector(hf, name, numbers):
        numbers = numbers.astype(np.float32)
        out[hf] = (name, numbers, Q.F32, numbers)

    width, q, kv = c["width"], c["heads"] * c["head_dim"], c["kv"] * c["head_dim"]
    matrix("model.embed_tokens.weight", "token_embd.weight", c["vocab"], width, Q.Q8_0, np.sqrt(width) * 0.6)
    for i in range(LAYERS):
        hf, name = f"model.layers.{i}.", f"blk.{i}."
        vector(hf + "input_layernorm.weight", name + "attn_norm.weight", rng.normal(1, 0.2, width))
        vector(hf + "post_attention_layernorm.weight", name + "ffn_norm.weight", rng.normal(1, 0.2, width))
        for part, rows, heads, scale in (("q", q, c["heads"], 2.0), ("k", kv, c["kv"], 2.0), ("v", kv, 0, 1.5)):
            matrix(f"{hf}self_attn.{part}_proj.weight", f"{name}attn_{part}.weight", rows, width, c["linear"], scale, heads)
            if c["arch"] == "qwen2":
                vector(f"{hf}self_attn.{part}_proj.bias", f"{name}attn_{part}.bias", rng.normal(0, 0.7, rows))
        matrix(hf + "self_attn.o_proj.weight", name + "attn_output.weight", width, q, c["linear"], 1.5)
        matrix(hf + "mlp.gate_proj.weight", name + "ffn_gate.weight", c["ffn"], width, c["linear"], 1.2)
        matrix(hf + "mlp.up_proj.weight", name + "ffn_up.weight", c["ffn"], width, c["linear"], 1.2)
        matrix(hf + "mlp.down_proj.weight", name + "ffn_down.weight", width, c["ffn"], c["linear"], 1.2)
    vector("model.norm.weight", "output_norm.weight", rng.normal(1, 0.2, width))
    if not c["tied"]:
        matrix("lm_head.weight", "output.weight", c["vocab"], width, Q.Q8_0, 2.0)
    return out


def vocabulary(size):
    """The 256 byte symbols, merges of common pairs, and one control token, `size` in all."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    pairs = [(a, b) for a in "\u0120etaoin" for b in "etaoinshrdl"][:size - BASE_VOCAB - 1]
    tokens += [a + b for a, b in pairs]
    kinds = [1] * len(tokens) + [3]
    tokens.append("<|endoftext|>")
    assert pairs and len(tokens) == size
    return tokens, kinds, [f"{a} {b}" for a, b in pairs]


def write_gguf(path, name, case, made):
    c, arch = case, case["arch"]
    w = gguf.GGUFWriter(path, arch)
    w.add_name(name)
    w.add_context_length(4 * POSITIONS)
    w.add_embedding_length(c["width"])
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(c["ffn"])
    w.add_head_count(c["heads"])
    w.add_head_count_kv(c["kv"])
    w.add_rope_freq_base(c["theta"])
    w.add_layer_norm_rms_eps(c["eps"])
    w.add_vocab_size(c["vocab"])
    if c["head_dim"] * c["heads"] != c["width"]:
        w.add_key_length(c["head_dim"])
        w.add_value_length(c["head_dim"])
    w.add_rope_dimension_count(c["head_dim"])
    tokens, kinds, merges = vocabulary(c["vocab"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges(merges)
    w.add_eos_token_id(c["vocab"] - 1)
    if "rope_divisors" in c:
        w.add_tensor("rope_freqs.weight", rope_divisors(c))
    for tensor, blocks, kind, _ in made.values():
        w.add_tensor(tensor, blocks, raw_dtype=None if kind == Q.F32 else kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def reference_model(case, made):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    c = case
    rope = {"rope_type": "default", "rope_theta": c["theta"]}
    if "rope_divisors" in c:
        factor, low, high, context = c["rope_divisors"]
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                 "original_max_position_embeddings": context}
    config, model = (LlamaConfig, LlamaForCausalLM) if c["arch"] == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    config = config(
        vocab_size=c["vocab"], hidden_size=c["width"], intermediate_size=c["ffn"], num_hidden_layers=LAYERS,
        num_attention_heads=c["heads"], num_key_value_heads=c["kv"], head_dim=c["head_dim"], rms_norm_eps=c["eps"],
        rope_parameters=rope, tie_word_embeddings=c["tied"], max_position_embeddings=4 * POSITIONS,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )
    model = model(config).float().eval()
    state = {hf: torch.from_numpy(numbers) for hf, (_, _, _, numbers) in made.items()}
    if c["tied"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def worst_cosine(a, b):
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


def interleaved_rope(case, made):
    """The same numbers with q and k rows in the file's order: what half-split code sees without un-permuting."""
    out = dict(made)
    for hf, (name, blocks, kind, numbers) in made.items():
        heads = c_heads(case, hf)
        if heads:
            shape = numbers.shape
            out[hf] = (name, blocks, kind, interleave_rows(numbers.reshape(shape[0], -1), heads).reshape(shape))
    return out


def c_heads(case, hf):
    return case["heads"] if ".q_proj." in hf else case["kv"] if ".k_proj." in hf else 0


def without(made, part):
    return {hf: (n, b, k, np.zeros_like(v) if part in hf else v) for hf, (n, b, k, v) in made.items()}


MISTAKES = {
    "interleaved rope": lambda case, made: reference_model(case, interleaved_rope(case, made)),
    "theta 10% off": lambda case, made: reference_model(case | {"theta": case["theta"] * 1.1}, made),
    "eps 1e-2": lambda case, made: reference_model(case | {"eps": 1e-2}, made),
    "no q bias": lambda case, made: reference_model(case, without(made, "q_proj.bias")),
    "no rope divisors": lambda case, made: reference_model({k: v for k, v in case.items() if k != "rope_divisors"}, made),
}


def make(folder):
    os.makedirs(folder, exist_ok=True)
    index = []
    for seed, (name, case) in enumerate(CASES.items(), start=1):
        rng = np.random.default_rng(seed)
        made = weights(case, rng)
        path = os.path.join(folder, name + ".gguf")
        write_gguf(path, name, case, made)
        model = reference_model(case, made)
        ids = rng.integers(0, case["vocab"], POSITIONS).tolist()
        right = logits(model, ids)

        swapped = [ids[1], ids[0], *ids[2:]]
        order = worst_cosine(logits(model, swapped)[2:], right[2:])
        assert order < MIN_COSINE, (name, "order of tokens", order)
        report = [f"two tokens swapped {order:.4f}"]
        for mistake, wrong_model in MISTAKES.items():
            if ("bias" in mistake and case["arch"] != "qwen2") or ("divisors" in mistake and "rope_divisors" not in case):
                continue
            cosine = worst_cosine(logits(wrong_model(case, made), ids), right)
            report.append(f"{mistake} {cosine:.4f}")
            assert cosine < MIN_COSINE, (name, mistake, cosine)
        if case["arch"] == "llama" and "rope_divisors" not in case:
            from transformers import AutoModelForCausalLM

            loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name + ".gguf", dtype=torch.float32).eval()
            cosine = worst_cosine(logits(loaded, ids), right)
            assert cosine > 1 - 1e-9, (name, "transformers' own GGUF loader", cosine)
            report.append(f"transformers' GGUF loader {cosine:.9f}")

        right.astype("<f4").tofile(os.path.join(folder, name + ".logits"))
        index.append({"name": name, "ids": ids, "vocab": case["vocab"]})
        print(f"{name}: {os.path.getsize(path)} bytes, largest logit {np.abs(right).max():.2f}; {', '.join(report)}")
    with open(os.path.join(folder, "index.json"), "w", encoding="utf-8") as f:
        json.dump(index, f, separators=(",", ":"))
        f.write("\n")
