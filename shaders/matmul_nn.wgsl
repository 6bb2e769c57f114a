// matmul_nn
