"""What every test needs: float32 products, host devices to shard over, flags that Grain asks for."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before jax starts: a test asks for 1 or 8 of them, everything else runs on the first
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

flags.FLAGS.mark_as_parsed()
