"""`ultramem preflight`: measures the ranks, links and folders of a job before it trains, and names the odd host out.

`local.py` measures one rank, `gpu_health.py` reads its GPU's counters, `network.py` times collectives and compares
clocks, `verdict.py` turns all ranks' reports into problems, `command.py` runs it and prints.
"""
