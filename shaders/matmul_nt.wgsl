// matmul_nt
