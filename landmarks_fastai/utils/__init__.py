"Files, signals, hardware."
