// gram
