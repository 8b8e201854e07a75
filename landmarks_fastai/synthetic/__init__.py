"Drawn faces: data for a machine without any."
