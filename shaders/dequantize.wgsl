// dequantize
