// pack_bits
