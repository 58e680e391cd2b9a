"""Grids of runs and what is made of them: `sweep.py` trains, `record.py` measures, `report.py` tells."""
