"""EdgeLLM's CPU backend beside llama.cpp, in interleaved runs of one model file.

    python3 benches/cpu_peers.py MODEL.gguf --edgellm target/release/edgellm --threads 1 2

needs the Python package llama-cpp-python, built for this machine. Each repetition runs one program after the
other, prompt then single tokens; medians are printed. `--no-repack` keeps llama.cpp from laying weights out
anew, where that crashes (AMX in some virtual machines).
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
        args.model,
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--edgellm", default="target/release/edgellm")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--peer-run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer_run:
        print(json.dumps(llama(args, args.peer_run)))
        return
    for threads in args.threads:
        rates = {"edgellm": [], "llama.cpp": []}
        for _ in range(args.repeat):
            rates["edgellm"].append(edgellm(args, threads))
            # A process of its own, as EdgeLLM has: neither holds memory or threads while the other runs.
            command = [sys.executable, *sys.argv, "--peer-run", str(threads)]
            output = subprocess.run(command, check=True, capture_output=True).stdout
            rates["llama.cpp"].append(json.loads(output))
        for name, runs in rates.items():
            prompt, decode = (statistics.median(column) for column in zip(*runs))
            print(f"{threads} threads  {name:10} prompt {prompt:8.1f}  decode {decode:7.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
