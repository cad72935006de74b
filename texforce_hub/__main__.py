"""``python -m texforce_hub`` is the command line."""

from texforce_hub.cli import main

if __name__ == "__main__":
    main()
