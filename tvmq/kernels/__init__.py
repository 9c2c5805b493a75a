"""TensorIR kernels and the rules that choose them."""
