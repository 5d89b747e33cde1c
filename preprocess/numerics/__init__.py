"""Arrays in, arrays out, no input or output: sums over tokens, metrics, whitening, solvers."""
