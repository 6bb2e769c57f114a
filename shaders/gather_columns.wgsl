// gather_columns
