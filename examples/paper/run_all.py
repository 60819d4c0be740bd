"""All of the paper's claims, tried in miniature.

    python examples/paper/run_all.py --model DIR --prior known.txt --new new.txt --other another.txt --output runs/paper

Writes ``results.md`` and each script's picture and CSV files; with ``--redraw`` it makes all but the CSV files again,
of these alone. Every run is kept in the output folder, so a command that was stopped continues where it stopped. Takes
nearly two hours on two cores for a model of 650,000 parameters; ``--quick`` shows in a minute that it works.
"""

import capacity
import coefficients
import drift
import learning_rate
import methods
import other_text
import task_sequence
from experiments import main

SCRIPTS = [each.SCRIPT for each in (methods, other_text, learning_rate, capacity, task_sequence, drift, coefficients)]

if __name__ == "__main__":
    main(SCRIPTS, __doc__)
