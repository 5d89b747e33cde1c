"""Files and hub ids -> rows -> documents -> sequences -> batches; the caller's own batches."""
