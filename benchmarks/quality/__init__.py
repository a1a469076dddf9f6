"""What the network and the loop are worth on real data: each module is one command, such as

    python -m benchmarks.quality.equal_budget --help

run in the repository's root. Results go to benchmarks/results/quality_<name>.md, .csv and .png.
"""

import deformux  # noqa: F401  before MONAI, so that what MONAI deprecates is silent here too
