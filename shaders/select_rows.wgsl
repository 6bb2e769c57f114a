// select_rows
