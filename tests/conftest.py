"""Before torch is imported: threads that wait do not spin, which costs a test run on a shared machine ten times its work."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
