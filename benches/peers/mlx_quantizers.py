"""Our MLX folders against those of mlx-lm's own quantizers, all judged by `aespa-gpu eval`, which reads the values that mlx reads (see
tests/conformance).

    benches/peers/mlx_quantizers.py AESPA_GPU MODEL_DIR CALIBRATION_TEXT HOME_TEXT ABROAD_TEXT [RESULTS.jsonl]

Theirs: the plain quantizer, and its GPTQ in f32 on the same number of windows of the same text (2 and 4 bits: it has no others), with the
embedding in as many bits as the rest, as ours. Ours: --methods. Groups of 64. Prints one JSON object per width and quantizer, with the bytes of the
weights and, of two texts, the perplexity and the mean divergence from the float model in thousandths of a nat, and appends it to
RESULTS.jsonl. What is there already is not run again.

On Linux mlx's products come from the reference BLAS; LD_PRELOAD=libopenblas.so.0 makes its GPTQ some fifteen times faster.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

GROUP = 64


def plain(model, bits, out, args):
    from mlx_lm.convert import convert

    convert(model, mlx_path=str(out), quantize=True, q_bits=bits, q_group_size=GROUP)


def gptq(model, bits, out, args):
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load, save

    loaded, tokenizer, config = load(model, lazy=True, return_config=True)
    # It sums its Hessians in the model's type, and f16 overflows.
    loaded.set_dtype(mx.float32)
    ids = mx.array(tokenizer.encode(pathlib.Path(args.calibration).read_text()))
    windows = ids[: ids.size // args.length * args.length].reshape(-1, args.length)
    mx.random.seed(0)
    windows = windows[mx.random.permutation(windows.shape[0])[: args.samples]]
    loaded, config["quantization"] = gptq_quantize(loaded, windows, bits, GROUP, bits, GROUP)
    config["quantization_config"] = config["quantization"]
    loaded.set_dtype(mx.float16)
    save(str(out), model, loaded, tokenizer, config)


def ours(method):
    def run(model, bits, out, args):
        options = ["--method", method, "--format", "mlx", "--bits", str(bits), "--group-size", str(GROUP)]
        options += ["--calibration", args.calibration, "--samples", str(args.samples), "--sequence-length", str(args.length)]
        subprocess.run([args.aespa_gpu, "quantize", model, "-o", str(out), *options], check=True, capture_output=True)

    return run


def judged(folder, text, args):
    command = [args.aespa_gpu, "eval", str(folder), "--text", text, "--window", "512", "--windows", str(args.windows)]
    out = subprocess.run([*command, "--reference", args.model, "--json"], check=True, capture_output=True, text=True).stdout
    found = json.loads(out)
    return [round(found["perplexity"], 4), round(1000 * found["kl_divergence"], 3)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("aespa_gpu", "model", "calibration", "home", "abroad"):
        parser.add_argument(name)
    parser.add_argument("results", nargs="?", default="/dev/null")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=["gptq", "aespa"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    results = pathlib.Path(args.results)
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    known = {(k["model"], k["bits"], k["by"]) for k in known}
    name = pathlib.Path(args.model).resolve().name
    makers = {"mlx-lm": plain, "mlx-lm gptq": gptq, **{method: ours(method) for method in args.methods}}
    for bits in args.bits:
        for by, make in makers.items():
            if (name, bits, by) in known or (make is gptq and bits == 3):
                continue
            with tempfile.TemporaryDirectory() as work:
                out = pathlib.Path(work) / "out"
                make(args.model, bits, out, args)
                size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
                row = {"model": name, "bits": bits, "by": by, "bytes": size}
                row |= {where: judged(out, text, args) for where, text in (("home", args.home), ("abroad", args.abroad))}
            line = json.dumps(row)
            print(line, flush=True)
            if args.results != "/dev/null":
                with results.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
