// row_dot
