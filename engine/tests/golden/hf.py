"""Tiny random-weight checkpoints as Hugging Face folders, with the logits transformers computes in float32.

    TORCHDYNAMO_DISABLE=1 python hf.py [CASE …]        writes hf/CASE/ and hf/CASE.logits beside this file

Float checkpoints are written by transformers itself, in F32, F16 or BF16, in one file or in shards. AWQ, GPTQ and
BitNet checkpoints are packed here, bit by bit from the layout's description; their logits are those of a model that
holds the numbers that the packed ones stand for, and those numbers of one matrix go to CASE.weights, to compare bit
by bit. `make` asserts that the references can tell right from wrong, as tiny.py does.
"""

import json
import os
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import save_file

from tiny import MIN_COSINE, POSITIONS, logits, worst_cosine

VOCAB = 256
LAYERS = 2
BASE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4 * POSITIONS, rms_norm_eps=1e-5, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, attn_implementation="eager")
LLAMA3 = dict(rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
PACKED = BASE | dict(hidden_size=128, intermediate_size=256)
CASES = {
    "qwen2-f32-shards": dict(arch="qwen2", dtype=torch.float32, shards="150KB", rope_theta=250_000.0),
    "llama-bf16": dict(arch="llama", dtype=torch.bfloat16, tie_word_embeddings=True, rope_theta=500.0),
    "llama3-f16": dict(arch="llama", dtype=torch.float16, head_dim=32, rope_parameters=LLAMA3),
    # Written as transformers 4 did.
    "llama3-old-config": dict(arch="llama", dtype=torch.bfloat16, head_dim=32, rope_parameters=LLAMA3, old_config=True),
    "qwen3-f32": dict(arch="qwen3", dtype=torch.float32, head_dim=32, rope_theta=1e6),
    "bitnet-dense": dict(arch="bitnet", dtype=torch.float32),
    "bitnet-online": dict(arch="bitnet", dtype=torch.bfloat16, bitnet=("autobitlinear", "online")),
    "bitnet-bitlinear": dict(arch="bitnet", dtype=torch.bfloat16, bitnet=("bitlinear", "offline"), seed=105),
    "bitnet-autobitlinear": dict(arch="bitnet", dtype=torch.bfloat16, bitnet=("autobitlinear", "offline"), seed=105),
    "qwen2-awq-128": dict(arch="qwen2", dtype=torch.float16, awq=128, config=PACKED),
    "llama-awq-32": dict(arch="llama", dtype=torch.float16, awq=32),
    "qwen2-gptq-32": dict(arch="qwen2", dtype=torch.float16, gptq=dict(group=32, sym=False, v2=False)),
    "llama-gptq-128": dict(arch="llama", dtype=torch.float16, gptq=dict(group=128, sym=True, v2=False), config=PACKED),
    "llama-gptq-v2": dict(arch="llama", dtype=torch.float16, gptq=dict(group=32, sym=False, v2=True)),
    "qwen2-window": dict(arch="qwen2", dtype=torch.float16, gptq=dict(group=32, sym=False, v2=False),
                         use_sliding_window=True, sliding_window=7, max_window_layers=1),
}
NOT_SETTINGS = ("arch", "dtype", "seed", "shards", "old_config", "bitnet", "awq", "gptq", "config", "rope_theta")


def classes(arch):
    import transformers as t

    return {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM), "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM), "bitnet": (t.BitNetConfig, t.BitNetForCausalLM),
    }[arch]


def empty_model(case, **changes):
    config_class, model_class = classes(case["arch"])
    settings = case.get("config", BASE) | {k: v for k, v in case.items() if k not in NOT_SETTINGS}
    if case["arch"] == "bitnet":
        settings["hidden_act"] = "relu2"
    settings.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": case.get("rope_theta", 10_000.0)})
    torch.manual_seed(1)
    return model_class(config_class(**(settings | changes))).float().eval()


def fill(model, rng):
    """Random weights, scaled so that every part of the model shows in the logits."""
    scales = {"q_proj": 2.0, "k_proj": 2.0, "v_proj": 1.5, "o_proj": 1.5, "embed_tokens": 5.0, "lm_head": 2.0}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                value = rng.normal(1, 0.3, p.shape)
            elif name.endswith("bias"):
                value = rng.normal(0, 0.7, p.shape)
            else:
                scale = next((s for part, s in scales.items() if part in name), 1.2)
                value = rng.normal(0, scale / np.sqrt(p.shape[-1]), p.shape)
            p.copy_(torch.from_numpy(value))


def snap_tables(model):
    """Embedding and output tables that INT8 with a scale a row holds exactly, as the engine keeps them beside packed
    layers: levels up to 127 times a power of two."""
    for table in (model.model.embed_tokens, model.lm_head):
        w = table.weight.data
        step = 2.0 ** (w.abs().amax(-1, keepdim=True) / 127).log2().round()
        levels = (w / step).round().clamp(-127, 127)
        levels.scatter_(1, levels.abs().argmax(-1, keepdim=True), 127.0)
        table.weight.data = levels * step


def tokenizer(folder):
    """Byte-level BPE of the 256 byte symbols alone, with the files that describe it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(os.path.join(folder, "tokenizer.json"), pretty=False)
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump({"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"}, f)


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


# --- packed formats ---------------------------------------------------------------------------------------------

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(nibbles, order=range(8)):
    """int32 words of eight nibbles along the last axis; nibble `i` of a word is value `order[i]`."""
    n = nibbles.reshape(*nibbles.shape[:-1], -1, 8).astype(np.uint32)
    word = sum(n[..., v] << np.uint32(4 * i) for i, v in enumerate(order))
    return torch.from_numpy(word.astype(np.uint32).view(np.int32).copy())


def int4_levels(rng, n, k, group, symmetric):
    """Levels (n, k), zero points and f16 scales (n, groups): all levels and all zero points occur."""
    groups = -(-k // group)
    levels = rng.integers(0, 16, (n, k))
    zeros = np.full((n, groups), 8) if symmetric else rng.integers(1, 16, (n, groups))
    scales = (rng.uniform(0.5, 1.5, (n, groups)) * 1.2 / np.sqrt(k) / 4.6).astype(np.float16)
    return levels, zeros, scales


def pack_int4(name, module, rng, case):
    """Tensors of one linear layer and the float32 numbers that they stand for."""
    n, k = module.weight.shape
    settings = case.get("gptq") or dict(group=case["awq"], sym=False)
    group = settings["group"]
    levels, zeros, scales = int4_levels(rng, n, k, group, settings["sym"])
    group_of = np.arange(k) // group
    # The product of 11 and 5 bits is exact in float32.
    numbers = scales.astype(np.float32)[:, group_of] * (levels - zeros[:, group_of]).astype(np.float32)
    out = {f"{name}.scales": torch.from_numpy(scales.T.copy())}
    if "awq" in case:
        out[f"{name}.qweight"] = words(levels.T, AWQ_ORDER)
        out[f"{name}.qzeros"] = words(zeros.T, AWQ_ORDER)
    else:
        stored = zeros if settings["v2"] else zeros - 1
        out[f"{name}.qweight"] = words(levels).T.contiguous()
        out[f"{name}.qzeros"] = words(stored.T)
        out[f"{name}.g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return out, numbers


def pack_ternary(weight):
    """Two bits a weight: byte row `i` holds rows `i`, `i + n/4`, `i + n/2`, `i + 3n/4`, weight + 1."""
    quarters = (weight + 1).reshape(4, weight.shape[0] // 4, -1).astype(np.uint8)
    return torch.from_numpy(sum(quarters[i] << np.uint8(2 * i) for i in range(4)))


def save_packed(folder, model, case, rng):
    """Replaces the linear layers' weights by packed ones in the file and by their numbers in `model`."""
    state = {n: t.to(case["dtype"]) for n, t in model.state_dict().items()}
    shown = None
    for name, module in linears(model).items():
        del state[f"{name}.weight"]
        if "bitnet" in case:
            weight = module.weight.detach().numpy()
            scale = np.float32(1) / np.float32(max(np.abs(weight).mean(), 1e-5))
            ternary = np.clip(np.round(weight * scale), -1, 1)
            stored = torch.tensor([scale if case["bitnet"][0] == "bitlinear" else 1 / scale]).to(case["dtype"])
            state[f"{name}.weight"], state[f"{name}.weight_scale"] = pack_ternary(ternary), stored
            factor = stored.float().numpy()[0]
            factor = np.float32(1) / factor if case["bitnet"][0] == "bitlinear" else factor
            numbers = ternary.astype(np.float32) * factor
        else:
            tensors, numbers = pack_int4(name, module, rng, case)
            state |= tensors
        module.weight.data = torch.from_numpy(numbers)
        if name == "model.layers.1.mlp.down_proj":
            shown = numbers
    save_file({n: t.contiguous() for n, t in state.items()}, os.path.join(folder, "model.safetensors"))
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["quantization_config"] = quantization_config(case)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=1)
    return shown


def quantization_config(case):
    if "awq" in case:
        return dict(quant_method="awq", bits=4, group_size=case["awq"], zero_point=True, version="gemm")
    if "gptq" in case:
        g = case["gptq"]
        return dict(quant_method="gptq", bits=4, group_size=g["group"], sym=g["sym"],
                    desc_act=False, checkpoint_format="gptq_v2" if g["v2"] else "gptq")
    linear_class, mode = case["bitnet"]
    return dict(quant_method="bitnet", linear_class=linear_class, quantization_mode=mode, modules_to_not_convert=["lm_head"])


def round_inputs(model):
    """Rounds the input of every linear layer to 8 bits by transformers' own function."""
    from transformers.integrations.bitnet import ActQuant

    for module in linears(model).values():
        module.register_forward_pre_hook(lambda _, args: (ActQuant.apply(args[0]),))


def halve_cache():
    """Keys and values of BitNet's attention go through f16, as the engine's cache holds them: in float32, other
    activations would lie on the two sides of a level's edge."""
    from transformers.models.bitnet import modeling_bitnet as module

    if hasattr(module, "whole_rotary"):
        return
    module.whole_rotary, module.whole_attention = module.apply_rotary_pos_emb, module.eager_attention_forward

    def rotary(q, k, *args, **kwargs):
        q, k = module.whole_rotary(q, k, *args, **kwargs)
        return q, k.half().float()

    def attention(self, q, k, v, *args, **kwargs):
        return module.whole_attention(self, q, k, v.half().float(), *args, **kwargs)

    module.apply_rotary_pos_emb, module.eager_attention_forward = rotary, attention


def round_weights(model):
    from transformers.integrations.bitnet import WeightQuant

    for module in linears(model).values():
        module.weight.data = WeightQuant.apply(module.weight.data)


# --- references -------------------------------------------------------------------------------------------------


def reference(folder, case, rng):
    """Writes the checkpoint; gives the model whose logits are right, and numbers to compare bit by bit."""
    model = empty_model(case)
    fill(model, rng)
    packed = "awq" in case or "gptq" in case or case.get("bitnet", ("", "online"))[1] == "offline"
    if packed:
        snap_tables(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(case["dtype"]))
    shown = None
    if packed:
        shown = save_packed(folder, model, case, rng)
    else:
        copy = empty_model(case)
        copy.load_state_dict(model.state_dict())
        copy.to(case["dtype"]).save_pretrained(folder, max_shard_size=case.get("shards", "1GB"))
        path = os.path.join(folder, "config.json")
        config = json.load(open(path, encoding="utf-8"))
        if "bitnet" in case:
            config["quantization_config"] = quantization_config(case)
            round_weights(model)
        if case.get("old_config"):
            config["rope_scaling"] = config.pop("rope_parameters")
            config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
            config["transformers_version"] = "4.50.0"
        json.dump(config, open(path, "w", encoding="utf-8"), indent=1)
    if "bitnet" in case:
        halve_cache()
        round_inputs(model)
    return model, shown


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def mistakes(case, model, ids, right):
    """How far each mistake moves the logits."""
    def wrong(**changes):
        other = empty_model(case, **changes)
        other.load_state_dict(model.state_dict())
        return worst_cosine(logits(other, ids), right)

    found = {"two tokens swapped": worst_cosine(logits(model, [ids[1], ids[0], *ids[2:]])[2:], right[2:])}
    found["theta 10% off"] = wrong(rope_parameters=model.config.rope_parameters | {
        "rope_theta": model.config.rope_parameters["rope_theta"] * 1.1})
    if "rope_parameters" in case:
        found["no rope scaling"] = wrong(rope_parameters={"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]})
    if "sliding_window" in case:
        found["window one longer"] = wrong(sliding_window=case["sliding_window"] + 1)
        found["window in the other layer"] = wrong(layer_types=model.config.layer_types[::-1])
    if case["arch"] == "bitnet":
        found["silu gate"] = wrong(hidden_act="silu")
    for part in ("q_norm", "attn_sub_norm", "ffn_sub_norm", "q_proj.bias"):
        state = {n: (t if part not in n else torch.ones_like(t)) for n, t in model.state_dict().items()}
        if any(part in n for n in state):
            other = empty_model(case)
            other.load_state_dict(state)
            found[f"{part} of ones"] = worst_cosine(logits(other, ids), right)
    return found


def make(out, names):
    index_path = os.path.join(out, "index.json")
    index = json.load(open(index_path, encoding="utf-8")) if os.path.exists(index_path) else {}
    for seed, (name, case) in enumerate(CASES.items(), start=1):
        if names and name not in names:
            continue
        folder = os.path.join(out, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        rng = np.random.default_rng(case.get("seed", seed))
        model, shown = reference(folder, case, rng)
        tokenizer(folder)
        if os.path.exists(os.path.join(folder, "generation_config.json")):
            os.remove(os.path.join(folder, "generation_config.json"))
        ids = rng.permutation(VOCAB)[:POSITIONS].tolist()
        right = logits(model, ids)
        report = mistakes(case, model, ids, right)
        for mistake, cosine in report.items():
            assert cosine < MIN_COSINE, (name, mistake, cosine)
        if "bitnet" not in case and shown is None:
            from transformers import AutoModelForCausalLM

            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
            report["as transformers loads it"] = worst_cosine(logits(loaded, ids), right)
            assert report["as transformers loads it"] > 1 - 1e-9, (name, report)
        right.astype("<f4").tofile(os.path.join(out, name + ".logits"))
        if shown is not None:
            shown.astype("<f4").tofile(os.path.join(out, name + ".weights"))
        index[name] = {"ids": ids, "weights": shown is not None}
        if "bitnet" in case:
            # Where the rounding of activations is what the case is about, its effect is the measure.
            plain = empty_model(case)
            plain.load_state_dict(model.state_dict())
            index[name]["rounding"] = float((1 - cosines(logits(plain, ids), right)).mean())
            report["mean error of activations not rounded"] = index[name]["rounding"]
        size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
        print(f"{name}: {size} bytes, largest logit {np.abs(right).max():.2f};",
              ", ".join(f"{what} {cosine:.6f}" for what, cosine in report.items()), flush=True)
    with open(index_path, "w", encoding="utf-8") as f:
        lines = [json.dumps(n) + ": " + json.dumps(c, separators=(",", ":")) for n, c in sorted(index.items())]
        f.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    make(os.path.join(os.path.dirname(os.path.abspath(__file__)), "hf"), sys.argv[1:])
