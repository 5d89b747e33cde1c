"""Files and hub ids -> rows -> documents -> sequences -> batches; batches of one's own."""
