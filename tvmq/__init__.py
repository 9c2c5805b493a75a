"""tvmq: quantize, sparsify, tune, cross-compile, run and measure models for x86 and ARM CPUs on Apache TVM."""

from tvmq._version import __version__
from tvmq.deploy.executor import Executor, Latency, OpTime, load
from tvmq.errors import TvmqError
from tvmq.importer.load import import_model
from tvmq.measure.verify import verify
from tvmq.model import Model, Signature, TensorSpec
from tvmq.pipeline import compile_model as compile  # noqa: A004
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.target import Target, load_target

__all__ = [
    "CalibrationTable",
    "Executor",
    "Latency",
    "Model",
    "OpTime",
    "Recipe",
    "Signature",
    "Target",
    "TensorSpec",
    "TvmqError",
    "__version__",
    "compile",
    "import_model",
    "load",
    "load_target",
    "verify",
]
