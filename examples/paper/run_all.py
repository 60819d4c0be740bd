"""All of the paper's claims, tried in miniature.

    python examples/paper/run_all.py --model DIR --prior known.txt --new new.txt --other another.txt --output runs/paper

Writes ``results.md`` and each script's picture and CSV file. Every run is kept in the output folder, so a command that
was stopped continues where it stopped. Takes nearly two hours on two cores for a model of 650,000 parameters;
``--quick`` shows in a minute that it works.
"""

from capacity import capacity
from coefficients import coefficients
from drift import drift
from experiments import main
from learning_rate import learning_rate
from methods import methods
from other_text import other_text
from task_sequence import task_sequence

if __name__ == "__main__":
    main(
        {
            "methods": methods,
            "other_text": other_text,
            "learning_rate": learning_rate,
            "capacity": capacity,
            "task_sequence": task_sequence,
            "drift": drift,
            "coefficients": coefficients,
        },
        __doc__,
    )
