// unpack_bits
