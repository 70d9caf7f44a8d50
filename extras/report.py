"""The result of an evaluation as JSON.

    python seal.py eval --json result.json ...

Opened by seal.py, which writes the file anew after each cell of the table.
"""

import time

import seal


def write_report(flags: seal.Flags, facts: seal.Facts, results: dict, start: float) -> None:
    """Flags, facts, cells and seconds; with --compare also the base's cells.

    results: {method: cells} as seal.measure returns them; a cell has its length and
    depth, the prompts asked, how many are correct, and their mean score, 0 to 1.
    start: when the evaluation began, by time.monotonic().
    """
    *_, cells = results.values()
    report = {
        "ckpt": flags.ckpt,
        "scales": flags.scales,
        "task": flags.task,
        "extend": facts.extend,
        "cells": cells,
        "seconds": round(time.monotonic() - start, 1),
    }
    if flags.compare:
        report["base"] = results["base"]
    seal.write_json(flags.json, report)
