"""Well-known architectures with random weights, for benchmarks: shapes and costs are real, accuracy is not."""
