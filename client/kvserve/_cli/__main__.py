"""``python -m kvserve._cli``, for where no script is installed."""

import sys

from kvserve._cli.main import main

sys.exit(main())
