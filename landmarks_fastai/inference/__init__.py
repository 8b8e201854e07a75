"From a checkpoint to points."
