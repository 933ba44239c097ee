"""What codecs cost a model, and how much calibration matters."""
