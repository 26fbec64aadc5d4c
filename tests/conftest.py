"""Settings of all tests: eight CPU devices, fast compilation, and the absl flags that Grain reads."""

import atexit
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
from importlib import metadata

import quick_compiles

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before jax starts. Some tests ask for 8 devices, all else runs on the first
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        quick_compiles.flags(metadata.version("jaxlib")),
    ]
)
# What one test or one of its processes has compiled, the next takes from here, whichever of pytest's workers it runs in
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ivideo_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.append(os.path.join(sys.path[0], "launch"))  # tests import its scripts

import pytest
from absl import app, flags

flags.FLAGS.mark_as_parsed()
# Where a shell runs the tests in the background, or nohup does, these are ignored, and a run leaves them so
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def shared_programs():
    """Training and sampling of equal configs share their programs, as long as they are in one process."""
    import shared_programs

    with pytest.MonkeyPatch.context() as patch:
        shared_programs.install(patch)
        yield


@pytest.fixture(scope="module")
def no_garbage():
    """For tests that parse code: collects what earlier tests left.

    Orbax leaves coroutines when it fails to read. If they were collected during a parse, they would format tracebacks,
    which parses too, and Python 3.11 would raise a SystemError.
    """
    gc.collect()


@pytest.fixture
def command_line():
    """A test may parse flags and run the command line: flags and loggers are afterwards as before."""
    app.define_help_flags()
    before = dict(flags.FLAGS._flags())
    modules = {name: list(defined) for name, defined in flags.FLAGS.flags_by_module_dict().items()}
    levels = {name: logging.getLogger(name).level for name in ("ivideo", "absl", "asyncio")}
    yield
    flags.FLAGS._flags().clear()
    flags.FLAGS._flags().update(before)
    flags.FLAGS.flags_by_module_dict().clear()
    flags.FLAGS.flags_by_module_dict().update(modules)
    for name in before:
        flags.FLAGS[name].unparse()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
