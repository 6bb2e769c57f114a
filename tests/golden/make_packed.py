"""Writes packed-*.safetensors: matrices that the tools of each format packed themselves, with the values that they read back.

make_packed.py llama.cpp OUT_DIR    needs llama-cpp-python and gguf
make_packed.py mlx OUT_DIR          needs mlx
make_packed.py gptq OUT_DIR         needs gptqmodel: GPTQ of both versions, and AWQ
make_packed.py compressed OUT_DIR   needs compressed-tensors

Versions are those of ../conformance. Each packs a matrix of 256 columns whose rows are of different sizes.
"""

import ctypes
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file


def matrix(rows):
    random = np.random.default_rng(4)
    return (random.standard_normal((rows, 256)) * np.geomspace(0.01, 2.0, rows)[:, None]).astype(np.float32)


def llama_cpp(out):
    import llama_cpp._ggml as ggml
    from gguf import GGMLQuantizationType as Type
    from gguf import GGML_QUANT_SIZES, quants

    pack = ggml.libggml.ggml_quantize_chunk
    pack.restype = ctypes.c_size_t
    pack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    w, tensors = matrix(2), {}
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        kind = Type[name]
        elements, size = GGML_QUANT_SIZES[kind]
        blocks = np.zeros((w.shape[0], w.shape[1] // elements * size), np.uint8)
        pack(kind.value, w.ctypes.data, blocks.ctypes.data, 0, *w.shape, None)
        tensors[f"{name}.blocks"] = blocks
        tensors[f"{name}.values"] = quants.dequantize(blocks, kind)
    save_file(tensors, out / "packed-llama.cpp.safetensors")


def mlx(out):
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    w, tensors = mx.array(matrix(8)).astype(mx.float16), {}
    for bits in (2, 3, 4, 5, 6, 8):
        weight, scales, biases = mx.quantize(w, 64, bits)
        values = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), 64, bits)
        parts = {"weight": weight, "scales": scales, "biases": biases, "values": values}
        tensors.update({f"{bits}.{part}": np.array(value) for part, value in parts.items()})
    save_file(tensors, out / "packed-mlx.safetensors")


def integer(w, bits, group, lowest=0):
    """Scales f16 and whole zero points [rows, groups] of the range of each group, as torch tensors."""
    import torch

    groups = torch.tensor(w).reshape(w.shape[0], -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(lowest, 2**bits - 1)
    return scale, zero


def gptq(out):
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    w, tensors = matrix(32), {}
    shape = dict(in_features=256, out_features=32, group_size=64, sym=False, desc_act=False, bias=False)

    def keep(name, layer, values):
        parts = {part: getattr(layer, part).numpy().copy() for part in ("qweight", "qzeros", "scales", "g_idx") if hasattr(layer, part)}
        tensors.update({f"{name}.{part}": value for part, value in {**parts, "values": values}.items()})

    for bits in (2, 3, 4, 8):
        # The first version cannot store a zero point of 0.
        scale, zero = integer(w, bits, 64, lowest=1)
        linear = torch.nn.Linear(256, 32, bias=False)
        linear.weight.data = torch.tensor(w)
        layer = TorchLinear(bits=bits, register_buffers=True, **shape)
        layer.pack_block(linear, scale, zero.half(), torch.arange(256, dtype=torch.int32) // 64)
        layer.post_init()
        values = layer.dequantize_weight().T.contiguous().half().numpy()
        keep(f"gptq-v2-{bits}", layer, values)
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=64))
        keep(f"gptq-{bits}", layer, values)
    scale, zero = integer(w, 4, 64)
    layer = AwqTorchLinear(bits=4, register_buffers=True, **shape)
    linear = torch.nn.Linear(256, 32, bias=False)
    linear.weight.data = torch.tensor(w).half()
    layer.pack(linear, scale, zero)
    values = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 64)
    keep("awq-4", layer, values.T.contiguous().half().numpy())
    save_file(tensors, out / "packed-gptq.safetensors")


def compressed(out):
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    w, tensors = matrix(8), {}
    for bits in range(2, 9):
        scale, zero = integer(w, bits, 64)
        wide = lambda x: x.float().repeat_interleave(64, -1)
        codes = (torch.tensor(w) / wide(scale) + wide(zero)).round().clamp(0, 2**bits - 1)
        centre = 2 ** (bits - 1)
        parts = {
            "weight_packed": pack_to_int32((codes - centre).to(torch.int8), bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(w.shape),
            "weight_zero_point": pack_to_int32((zero - centre).to(torch.int8), bits, packed_dim=0),
            "values": (wide(scale) * (codes - wide(zero))).half(),
        }
        tensors.update({f"{bits}.{part}": value.contiguous().numpy() for part, value in parts.items()})
    save_file(tensors, out / "packed-compressed-tensors.safetensors")


if __name__ == "__main__":
    tools = {"llama.cpp": llama_cpp, "mlx": mlx, "gptq": gptq, "compressed": compressed}
    if len(sys.argv) != 3 or sys.argv[1] not in tools:
        sys.exit(__doc__)
    tools[sys.argv[1]](pathlib.Path(sys.argv[2]))
