"""The network and the learning loop on real data: each module is one command, such as

    python -m benchmarks.quality.equal_budget --help

run in the repository's root.
"""

import deformux  # noqa: F401  before MONAI, to silence its deprecation warnings here too
