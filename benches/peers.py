"""Times what torch has for a product of a matrix and some tokens: cuBLAS in fp16, and for one token its
INT4 kernel.

Reads a JSON array of {"n", "k", "group", "tokens"} from standard input, prints a JSON object a line:
kernel, n, k, group, tokens, us_median, us_p5, us_p95, version; or kernel, n, k, group, tokens, error.

As edgellm-bench times its own kernels: a CUDA graph of at least 128 launches over copies of the
weights of at least 400 MB, and three times the L2, in all; 41 runs of it, by CUDA events.
"""

import json
import sys

import torch

ROTATE_BYTES = 400_000_000
MIN_LAUNCHES = 128
WARM_UP = 3
SAMPLES = 41


def timed(weights, launch):
    """Microseconds a launch, in order, of `launch` over the rotating `weights`."""
    launches = len(weights) * -(-MIN_LAUNCHES // len(weights))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Libraries choose and load their kernels at the first call, which cannot be captured.
        for weight in weights[:2]:
            launch(weight)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                launch(weights[i % len(weights)])
        for _ in range(WARM_UP):
            graph.replay()
        stream.synchronize()
        times = []
        for _ in range(SAMPLES):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / launches)
    return sorted(times)


def copies(weight_bytes):
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    rotate = max(ROTATE_BYTES, 3 * l2)
    return max(2, -(-rotate // weight_bytes))


def int4(n, k, group, _tokens):
    """torch's own kernel: groups of a scale and a zero point in bf16."""
    quants = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(quants, 8)
    scales = torch.full((k // group, n, 2), 0.01, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, k, dtype=torch.bfloat16, device="cuda")
    count = copies(packed.nbytes + scales.nbytes)
    weights = [(packed.clone(), scales.clone()) for _ in range(count)]
    return timed(
        weights, lambda w: torch.ops.aten._weight_int4pack_mm(x, w[0], group, w[1])
    )


def fp16(n, k, _group, tokens):
    """cuBLAS: a matrix-matrix product, for one token the faster of it and a matrix-vector product."""
    weight = torch.randn(n, k, dtype=torch.float16, device="cuda")
    x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
    weights = [weight.clone() for _ in range(copies(weight.nbytes))]
    forms = [lambda w: torch.matmul(x, w.t())]
    if tokens == 1:
        forms.append(lambda w: torch.mv(w, x[0]))
    return min((timed(weights, form) for form in forms), key=lambda t: t[len(t) // 2])


def main():
    for shape in json.load(sys.stdin):
        for kernel, time in (("torch int4", int4), ("cublas fp16", fp16)):
            if time is int4 and shape["tokens"] > 1:
                continue
            result = {"kernel": kernel, "version": torch.__version__, **shape}
            try:
                times = time(shape["n"], shape["k"], shape["group"], shape["tokens"])
                at = lambda percent: times[(len(times) - 1) * percent // 100]
                result |= {"us_median": at(50), "us_p5": at(5), "us_p95": at(95)}
            except Exception as error:  # a shape that it does not take, no memory
                result["error"] = str(error).splitlines()[0]
            torch.cuda.empty_cache()
            print(json.dumps(result), flush=True)


main()
