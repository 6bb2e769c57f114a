// axpy
