"A run's folder and its checkpoint."
