"""Judges what we write for llama.cpp, for mlx and for GPTQModel by those readers themselves.

runtimes.py gguf FILE VALUES.json ORIGINAL --text FILE --window N --windows N
    Dequantizes every matrix with the numpy code of the `gguf` package; its values must hash to those of VALUES.json (`cargo run
    --example values`). llama.cpp must load the file, tokenize as ORIGINAL's tokenizer.json does, and then gives two
    perplexities: by its BLAS back end, which multiplies dequantized weights by activations as they are, and, as `rounded`, by its own
    kernels, which round activations to 8 bits beside quantized weights.
runtimes.py mlx FOLDER VALUES.json ORIGINAL --text FILE --window N --windows N
    The same by `mlx` and `mlx-lm`, on their CPU backend.
runtimes.py gptqmodel FOLDER VALUES.json ORIGINAL --text FILE --window N --windows N
    The same by GPTQModel's own kernels in PyTorch, for folders of GPTQ (both versions) and AWQ.

Windows are consecutive, without BOS; the perplexity is exp of the mean loss. Prints one JSON object; exits with 1 on any
difference.
"""

import argparse
import glob
import hashlib
import json
import os
import pathlib
import sys

import numpy as np
from tokenizers import Tokenizer

MULTILINGUAL = (
    "Hello, wörld!  Привет, мир. 你好，世界 🦙🦙 12345 3.14159 a\tb\n\n   c  नमस्ते مرحبا 안녕하세요 l'été, don't, I'VE "
    "_snake_case CamelCase http://example.org/?q=1&r=%20 <|endoftext|>\r\n½ ﬁ e\u0301"
)


def sha256(values):
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()


def windows(tokenizer, args):
    ids = tokenizer.encode(pathlib.Path(args.text).read_text(), add_special_tokens=False).ids
    return [ids[i * args.window : (i + 1) * args.window] for i in range(args.windows)]


def mean_loss(logits, ids):
    logits = np.asarray(logits, dtype=np.float64)[:-1]
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logits[np.arange(len(ids) - 1), ids[1:]].mean()


def our_rows(name, values, n_head, n_kv):
    """Undoes the order in which llama.cpp wants the rows of q and k: rotary pairs are neighbours there, half a head apart here."""
    heads = n_head if ".attn_q." in name else n_kv if ".attn_k." in name else None
    if heads is None:
        return values
    rows, width = values.shape
    return values.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def module(name):
    name = name.removesuffix(".weight")
    if name.startswith("blk."):
        _, block, part = name.split(".")
        return f"model.layers.{block}.{PARTS[part]}"
    return {"token_embd": "model.embed_tokens", "output": "lm_head"}[name]


def llama_losses(llama, all_ids, batch):
    llama.n_batch = batch
    losses = []
    for ids in all_ids:
        llama.reset()
        llama.eval(ids)
        losses.append(mean_loss(llama.scores[: len(ids)], ids))
    return losses


def gguf(args):
    from gguf import GGUFReader, quants
    from llama_cpp import Llama

    reader = GGUFReader(args.model)
    field = lambda key: reader.fields[key].contents()
    heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    found = {}
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in ("F32", "F16", "BF16"):
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            found[module(tensor.name)] = sha256(our_rows(tensor.name, values, *heads))

    tokenizer = Tokenizer.from_file(str(pathlib.Path(args.original) / "tokenizer.json"))
    llama = Llama(model_path=args.model, n_ctx=args.window, n_batch=args.window, n_threads=os.cpu_count(), logits_all=True, verbose=False)
    sample = pathlib.Path(args.text).read_text()[:100_000] + MULTILINGUAL
    own = llama.tokenize(sample.encode(), add_bos=False, special=True)
    same_tokens = own == tokenizer.encode(sample, add_special_tokens=False).ids
    # Its BLAS back end takes batches of 32 tokens and more, its own kernels what is smaller.
    losses, rounded = (llama_losses(llama, windows(tokenizer, args), batch) for batch in (args.window, 16))
    return found, same_tokens, losses, rounded


def mlx(args):
    import mlx.core as mx
    from mlx_lm import load

    mx.set_default_device(mx.cpu)
    stored = {}
    for file in glob.glob(f"{args.model}/model*.safetensors"):
        stored.update(mx.load(file))
    settings = json.loads((pathlib.Path(args.model) / "config.json").read_text())["quantization"]
    found = {}
    for name in [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]:
        scales, biases = (stored[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        values = mx.dequantize(stored[f"{name}.weight"], scales, biases, settings["group_size"], settings["bits"])
        found[name] = sha256(np.array(values))
    model, tokenizer = load(args.model)
    # Products in f16, as folders of f16 models have them by themselves, are slow on CPUs and round more than there is to see.
    model.set_dtype(mx.float32)
    original = Tokenizer.from_file(str(pathlib.Path(args.original) / "tokenizer.json"))
    same_tokens = tokenizer.encode(MULTILINGUAL, add_special_tokens=False) == original.encode(MULTILINGUAL, add_special_tokens=False).ids
    losses = []
    for ids in windows(original, args):
        losses.append(mean_loss(np.array(model(mx.array([ids])).astype(mx.float32))[0], ids))
    return found, same_tokens, losses


def gptqmodel(args):
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    settings = json.loads((pathlib.Path(args.model) / "config.json").read_text())["quantization_config"]
    backend = BACKEND.TORCH_AWQ if settings["quant_method"] == "awq" else BACKEND.TORCH
    if settings.get("checkpoint_format") == "gptq" and not settings["sym"]:
        # It takes these only if it wrote them itself, since others once stored other zero points. Ours are told to be its own.
        for name, place in (("config.json", lambda c: c["quantization_config"]), ("quantize_config.json", lambda c: c)):
            path = pathlib.Path(args.model) / name
            config = json.loads(path.read_text())
            place(config)["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
            path.write_text(json.dumps(config))
    # In the type of our scales: another one would round them.
    loaded = GPTQModel.load(args.model, device="cpu", dtype=torch.float16, backend=backend)
    found = {}
    for name, part in loaded.model.named_modules():
        if hasattr(part, "dequantize_weight"):
            found[name] = sha256(part.dequantize_weight().T.float().numpy())
        elif hasattr(part, "qweight"):
            values = dequantize_gemm(part.qweight, part.qzeros, part.scales, part.bits, part.group_size)
            found[name] = sha256(values.T.float().numpy())
    original = Tokenizer.from_file(str(pathlib.Path(args.original) / "tokenizer.json"))
    own = loaded.tokenizer.encode(MULTILINGUAL, add_special_tokens=False)
    same_tokens = own == original.encode(MULTILINGUAL, add_special_tokens=False).ids
    losses = []
    with torch.no_grad():
        for ids in windows(original, args):
            losses.append(mean_loss(loaded.model(torch.tensor([ids])).logits[0].float().numpy(), ids))
    return found, same_tokens, losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=["gguf", "mlx", "gptqmodel"])
    for name in ("model", "values", "original"):
        parser.add_argument(name)
    parser.add_argument("--text", required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--windows", type=int, required=True)
    args = parser.parse_args()
    found, same_tokens, losses, *rounded = {"gguf": gguf, "mlx": mlx, "gptqmodel": gptqmodel}[args.runtime](args)
    ours = json.loads(pathlib.Path(args.values).read_text())
    different = sorted(name for name in found.keys() | ours.keys() if found.get(name) != ours.get(name))
    good = not different and (bool(ours) or pathlib.Path(args.model).stem.lower().endswith(("f16", "f32"))) and same_tokens
    result = {"matrices": len(ours), "different": different[:5], "same_tokens": same_tokens}
    perplexity, rounded = (float(np.exp(np.mean(l))) if l else None for l in (losses, rounded[0] if rounded else []))
    # Loaders log to standard output.
    print("\n" + json.dumps({**result, "perplexity": perplexity, "rounded": rounded, "good": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
