"""effk's benchmarks: `python -m effk.perf`. One file a family; `harness` knows no family."""
