"""The demo: both kinds of scales, learned on the bundled toy, before and after.

    python seal.py demo

Opened by seal.py. It trains SEAL-H and SEAL-C on 50 records with four questions about each,
asks 50 others a length of the base and of both, one question each, prints the table, and
leaves scales and a picture in seal-demo/.
"""

from dataclasses import replace
from pathlib import Path

import seal
from extras.plot import plot_scores


def command(flags: seal.Flags) -> None:
    folder, results = Path(flags.out or "seal-demo"), {}
    folder.mkdir(exist_ok=True)
    for mode in seal.METHOD:
        scales = str(folder / f"{mode}.safetensors")
        seal.train_command(replace(flags, mode=mode, out=scales, questions=4))
        results |= seal.measure(replace(flags, scales=scales, compare=not results))
    print(f"share of {flags.prompts} prompts answered right")
    print(seal.score_table(results))
    plot_scores(folder / "accuracy.png", results)
