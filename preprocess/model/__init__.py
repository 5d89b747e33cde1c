"""Loading and placing a model; which of its layers are calibrated, which inputs they share, experts."""
