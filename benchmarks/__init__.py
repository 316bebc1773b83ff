"""One question per script, answered in ratios within one run: ``python -m benchmarks.<script>``."""

import os

# Read when OpenMP starts. Threads that wait for each other spin by default: on a machine with other work that made a
# float64 SVD 2 to 50 times slower from one round to the next, and would have flattered whatever waits less.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
