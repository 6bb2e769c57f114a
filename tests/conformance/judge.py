"""Judges a written folder with `transformers` and `compressed-tensors`.

judge.py weights DENSE QUANTIZED [DENSE QUANTIZED ...]
    Loads each QUANTIZED and lets the library decompress it; every parameter must equal, bit by bit, that of its DENSE, which holds
    the same codes dequantized by us. Then QUANTIZED is loaded as it is, and the first forward pass must give DENSE's logits.

    Asymmetric folders: `compressed-tensors` 0.20 expects unpacked zero points when it loads a folder as it is, though it writes
    them packed, and so refuses the folders that it wrote itself ("Reinit due to size mismatch"). We store them as it does; for
    these folders only decompression on loading is asked for, and `loads_compressed` tells when that has changed.
    Where inputs are rounded at run time (W8A8), they must be those of DENSE with its linears' inputs rounded so, within 5 %.
judge.py perplexity MODEL_DIR --text FILE --window N --windows N
    Tokenizes the whole file once without BOS, cuts consecutive windows, and takes exp of the mean over windows of each window's
    mean loss.

Both print one JSON object; `weights` exits with 1 on any difference.
"""

import argparse
import json
import math
import pathlib
import sys
import warnings

import torch
import transformers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedTokenizerFast


def is_quantized(folder):
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    return config.get("quantization_config") is not None


def load(folder, dequantize=True):
    kwargs = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize and is_quantized(folder) else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **kwargs)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(key):
            raise RuntimeError(f"{folder}: {key}: {sorted(map(str, info[key]))[:5]}")
    return model.eval()


def is_symmetric(folder):
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    return all(g["weights"]["symmetric"] for g in config["quantization_config"]["config_groups"].values())


def rounds_inputs(folder):
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    return any(g["input_activations"] for g in config["quantization_config"]["config_groups"].values())


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def rounded(_, inputs):
    """Inputs as a W8A8 runtime sees them: symmetric, a scale for each token."""
    (x,) = inputs
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127.5
    return ((x / scale).round().clamp(-128, 127) * scale,)


@torch.no_grad()
def logits(model, round_inputs=False):
    ids = torch.arange(1, 65)[None] % model.config.vocab_size
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    hooks = [m.register_forward_pre_hook(rounded) for m in linears if round_inputs]
    out = model(ids).logits
    for hook in hooks:
        hook.remove()
    return out


def judge(dense, quantized):
    ours, theirs = load(dense), load(quantized)
    rounds = rounds_inputs(quantized)
    expected, plain = logits(ours, rounds), logits(ours)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    different = sorted(set(ours) ^ set(theirs))
    for name in sorted(set(ours) & set(theirs)):
        a, b = ours[name], theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(bits(a), bits(b)):
            different.append(name)
    try:
        got = logits(load(quantized, dequantize=False))
        loads = True
        # What rounds differently in the last bit goes on as another code somewhere, so equal is only asked for where nothing is rounded.
        off = [((got - of).std() / of.std()).item() for of in (expected, plain)]
        if not (off[0] < 0.05 and 0 < off[1] if rounds else torch.equal(expected, got)):
            different.append("logits of the folder loaded as it is")
    except RuntimeError:
        loads, off = False, None
    good = not different and (loads or not is_symmetric(quantized))
    values = sum(t.numel() for t in ours.values())
    print(json.dumps({"folder": pathlib.Path(quantized).name, "values": values, "different": different[:10], "loads_compressed": loads, "logits_off": off, "good": good}))
    return good


def weights(args):
    results = [judge(dense, quantized) for dense, quantized in zip(args.folders[::2], args.folders[1::2], strict=True)]
    return 0 if all(results) else 1


@torch.no_grad()
def perplexity(args):
    # Decompressed in the checkpoint's own type, then computed in f32: the type of the weights is part of the format.
    model = load(args.model).float()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(pathlib.Path(args.model) / "tokenizer.json"))
    text = pathlib.Path(args.text).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    count = min(args.windows, len(ids) // args.window)
    losses = []
    for window in ids[: count * args.window].view(count, 1, args.window):
        logits = model(window).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    print(json.dumps({"perplexity": math.exp(sum(losses) / len(losses)), "windows": count, "window": args.window}))
    return 0


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("weights")
    command.add_argument("folders", nargs="+", metavar="DENSE QUANTIZED")
    command.set_defaults(run=weights)
    command = commands.add_parser("perplexity")
    command.add_argument("model")
    command.add_argument("--text", required=True)
    command.add_argument("--window", type=int, default=512)
    command.add_argument("--windows", type=int, default=40)
    command.set_defaults(run=perplexity)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    sys.exit(args.run(args))


if __name__ == "__main__":
    main()
