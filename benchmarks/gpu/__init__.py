"""What holds on a CUDA device, shown by one command in nine minutes: `make gpu`, or `python benchmarks/gpu`.

`runner` starts parts, each a process of its own under a time limit that leaves a JSON file as it goes; `summary` sets
the aims beside what was measured.
"""
