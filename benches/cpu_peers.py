"""EdgeLLM's CPU backend beside llama.cpp, in interleaved runs of one model file.

    python3 benches/cpu_peers.py MODEL.gguf --edgellm target/release/edgellm --threads 1 2

needs the Python package llama-cpp-python, built for this machine. Each repetition runs one program after the
other, prompt then single tokens; medians and their ratio are printed. `--no-repack` keeps llama.cpp from laying
weights out anew, where that crashes (AMX in some virtual machines).

BitNet has another name in llama.cpp, whose `bitnet` has the same matrices and a gate with another function:

    edgellm synthesize bitnet-2b-4t /tmp/bitnet.gguf --linear tq2_0
    python3 benches/cpu_peers.py /tmp/bitnet.gguf --copy-for-peer /tmp/bitnet-tq1_0.gguf --copy-type TQ1_0
    python3 benches/cpu_peers.py /tmp/bitnet.gguf --peer-model /tmp/bitnet-tq1_0.gguf

(`--copy-for-peer` needs the Python package gguf.)
"""

import argparse
import json
import statistics
import subprocess
import sys
import time


def llama(args, threads):
    """Tokens a second of llama.cpp: prompt, decode."""
    import llama_cpp

    if args.no_repack:
        plain = llama_cpp.llama_model_default_params

        def defaults():
            params = plain()
            params.use_extra_bufts = False
            return params

        llama_cpp.llama_cpp.llama_model_default_params = defaults
        llama_cpp.llama_model_default_params = defaults
    model = llama_cpp.Llama(
        args.peer_model or args.model,
        n_ctx=args.prompt + args.tokens + 8,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    vocab = model.n_vocab()
    prompt = [(i * 7919 + 13) % (vocab - 10) + 5 for i in range(args.prompt)]
    rates = []
    for run in range(2):
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for i in range(args.tokens):
            model.eval([(i * 31 + 7) % (vocab - 10)])
        rates.append((args.prompt / first, args.tokens / (time.perf_counter() - start)))
    return rates[-1]


def edgellm(args, threads):
    """Tokens a second of EdgeLLM: prompt, decode."""
    command = [args.edgellm, "bench", "-m", args.model, "--backend", "cpu", "--json", "--repeat", "1"]
    command += ["--threads", str(threads), "-p", str(args.prompt), "-n", str(args.tokens)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return report["prompt_tokens_per_second"], report["decode_tokens_per_second"]


def copy_for_peer(args):
    """Writes the model as llama.cpp's `bitnet`, its ternary matrices in another type."""
    import gguf
    import numpy

    reader = gguf.GGUFReader(args.model)
    name = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(args.copy_for_peer, "bitnet")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        key = field.name.replace(name + ".", "bitnet.", 1) if field.name.startswith(name + ".") else field.name
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=of)
    wanted = gguf.GGMLQuantizationType[args.copy_type]
    data = {}
    for tensor in reader.tensors:
        data[tensor.name] = tensor.data
        kind = tensor.tensor_type
        if kind == gguf.GGMLQuantizationType.TQ2_0 and kind != wanted:
            floats = gguf.quants.dequantize(tensor.data, kind)
            data[tensor.name] = gguf.quants.quantize(floats, wanted)
            kind = wanted
        if kind == gguf.GGMLQuantizationType.F32:
            kind = None
        writer.add_tensor(tensor.name, numpy.ascontiguousarray(data[tensor.name]), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--edgellm", default="target/release/edgellm")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--peer-model", help="the file that llama.cpp reads, if another")
    parser.add_argument("--copy-for-peer", metavar="FILE", help="write MODEL for llama.cpp, and end")
    parser.add_argument("--copy-type", default="TQ2_0", choices=["TQ1_0", "TQ2_0"])
    parser.add_argument("--peer-run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer_run:
        print(json.dumps(llama(args, args.peer_run)))
        return
    if args.copy_for_peer:
        copy_for_peer(args)
        return
    for threads in args.threads:
        rates = {"edgellm": [], "llama.cpp": []}
        for _ in range(args.repeat):
            rates["edgellm"].append(edgellm(args, threads))
            # A process of its own, as EdgeLLM has: neither holds memory or threads while the other runs.
            command = [sys.executable, *sys.argv, "--peer-run", str(threads)]
            output = subprocess.run(command, check=True, capture_output=True).stdout
            rates["llama.cpp"].append(json.loads(output))
        medians = {}
        for name, runs in rates.items():
            prompt, decode = medians[name] = [statistics.median(column) for column in zip(*runs)]
            print(f"{threads} threads  {name:10} prompt {prompt:8.1f}  decode {decode:7.1f} tokens/s", flush=True)
        prompt, decode = (ours / theirs for ours, theirs in zip(*medians.values()))
        print(f"{threads} threads  {'ratio':10} prompt {prompt:8.2f}  decode {decode:7.2f}", flush=True)


if __name__ == "__main__":
    main()
