"""``python -m openmm_regflow``, and ``torchrun -m openmm_regflow``: the command line."""

from openmm_regflow.cli import main

if __name__ == "__main__":
    main()
