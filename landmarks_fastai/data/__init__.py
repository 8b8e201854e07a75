"Labels and images: from landmarks.csv to batches."
