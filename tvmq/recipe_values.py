"""What may stand in a recipe: precisions, observers, algorithms and other words, each with its meaning."""

from __future__ import annotations

import enum


class Precision(str, enum.Enum):
    """The arithmetic of an operator, or of a model's operators by default."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT16 = "int16"
    """Convolutions and linear layers: int8 weights, and int16 activations."""
    INT8_DYNAMIC = "int8-dynamic"
    """Linear layers: int8 weights, and int8 activations with a scale a row that is found while running."""
    INT8_WEIGHT = "int8-weight"
    """Convolutions and linear layers: int8 weights, multiplied as float32."""
    INT4_WEIGHT = "int4-weight"
    """Convolutions and linear layers: 4-bit weights with a scale a group, multiplied as float32."""
    AUTO = "auto"
    """The fastest of fp32, bf16 and int8 by estimate; int8 only where there is calibration data."""


# Floats of 16 bits, by their dtypes: a model has one kind of them.
HALVES = {Precision.BF16: "bfloat16", Precision.FP16: "float16"}

# Whose scales of activations are fixed beforehand: by calibration data.
CALIBRATED = (Precision.INT8, Precision.INT16)

# Of weights alone: of convolutions and linear layers.
WEIGHT_ONLY = (Precision.INT8_WEIGHT, Precision.INT4_WEIGHT)
# Of layers that read and make floats; none needs calibration. INT8_DYNAMIC is for linear ones.
FLOAT_ENDS = (Precision.INT8_DYNAMIC, *WEIGHT_ONLY)


class Sparse(str, enum.Enum):
    """Whether weights with zeros are multiplied without them."""

    AUTO = "auto"
    """Where it is estimated to be faster on the target."""
    FORCE = "force"
    """Wherever there is a kernel for it."""
    OFF = "off"


class Observer(str, enum.Enum):
    """The statistic of samples that a tensor's range is."""

    MIN_MAX = "min_max"
    MOVING_AVERAGE = "moving_average"
    """Short for min_max with the aggregate of that name."""
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    """Least Kullback-Leibler divergence between the distributions before and after."""
    MSE = "mse"
    """Least mean squared error, by search."""
    OCTAV = "octav"
    """Least mean squared error, by Newton's method."""
    ACIQ = "aciq"
    """Least mean squared error for a Laplace distribution."""
    FIXED = "fixed"
    """[-fixed_range, fixed_range] for every tensor, without data."""


class Aggregate(str, enum.Enum):
    """How the statistics of samples become one: of their elements together, or of each sample's range."""

    POOLED = "pooled"
    WIDEST = "widest"
    MEAN = "mean"
    MOVING_AVERAGE = "moving_average"


class Algorithm(str, enum.Enum):
    """What may be done so that quantization costs less accuracy."""

    AUTO = "auto"
    """Of int8: `equalize` and divide channels that are uneven, `squant` kernels, `bias_correction_analytic`."""
    EQUALIZE = "equalize"
    """Cross-layer equalization: like ranges for the channels of a tensor. No data."""
    SMOOTH = "smooth"
    """SmoothQuant: outlying channels of activations are moved into weights."""
    CLIP_WEIGHTS = "clip_weights"
    """Weight scales of least squared error."""
    SQUANT = "squant"
    """Rounding errors of a kernel and of a channel cancel. No data."""
    GPTQ = "gptq"
    """Rounding errors are made up for by the inputs that follow."""
    BIAS_CORRECTION = "bias_correction"
    """The mean error of each channel, measured, is taken off its bias."""
    BIAS_CORRECTION_ANALYTIC = "bias_correction_analytic"
    """The same, of weights alone, from the means of inputs that come with their ranges."""


# Those that look at calibration data before ranges are taken, or again afterwards.
WITH_DATA = (Algorithm.SMOOTH, Algorithm.GPTQ, Algorithm.BIAS_CORRECTION)
# Those that choose the weights and the bias of one layer, and so may be given by a rule.
OF_LAYERS = (
    Algorithm.CLIP_WEIGHTS,
    Algorithm.SQUANT,
    Algorithm.GPTQ,
    Algorithm.BIAS_CORRECTION,
    Algorithm.BIAS_CORRECTION_ANALYTIC,
)


class PowerOfTwo(str, enum.Enum):
    """Which scales are rounded up to powers of two."""

    NONE = "none"
    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    ALL = "all"


class WeightLevels(str, enum.Enum):
    """Values that weights may have: of fp32 layers 2**weight_bits a group, stored as floats, or what bits mean."""

    NONE = "none"
    UNIFORM = "uniform"
    ASYMMETRIC = "asymmetric"
    LOG2 = "log2"
    NORMAL_FLOAT = "normal_float"
    CODEBOOK = "codebook"
    VECTOR_CODEBOOK = "vector_codebook"
    """Of pairs of inputs."""
    STOCHASTIC = "stochastic"


GROUP_SIZES = (32, 64, 128)
# Products of two activations.
PRODUCTS = ("attention", "batch_matmul")
DEFAULT_KINDS = ("conv2d", "matmul", "add", "subtract", "multiply", "unary", "avg_pool2d", "max_pool2d", "concat")
KINDS = (*DEFAULT_KINDS, *PRODUCTS, "layer_norm", "group_norm", "softmax", "embedding")
