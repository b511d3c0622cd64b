"""Tables, plots and the page of searches and benchmarks."""

import logging

# Without a writable home folder matplotlib warns that it keeps its caches elsewhere: nothing to do about it.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
