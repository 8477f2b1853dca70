"""`python -m intel_nb` is the command `intel-nb`. Written by hand: one call needs no notebook."""

from intel_nb.cli import main

if __name__ == "__main__":
    main()
